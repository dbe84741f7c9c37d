"""Masks over real images: one batch of a run, or both geometries side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, check_masks, mean_tokens, sample_masks
from ijepa_fast.visualize.figure import faded, panel, pyplot, save

__all__ = ["draw_geometries", "draw_masks", "outline"]

GEOMETRIES: tuple[Literal["published", "unbiased"], ...] = ("published", "unbiased")
COLOURS = ("#e6194b", "#ffb000", "#00d27a", "#2f7bff", "#d455ff", "#00d7e6")


class _Shown(NamedTuple):
    """Patches (n,) of the first context, and (M, T) of the target blocks, of one image."""

    context: NDArray[np.int64]
    targets: NDArray[np.int64]


def _of_image(masks: Masks, row: int, patches: int) -> _Shown:
    start, end = int(masks.context_cu[row]), int(masks.context_cu[row + 1])
    context = masks.context_index[start:end].numpy() % patches
    return _Shown(context.astype(np.int64), masks.target_index[row].numpy().astype(np.int64))


def _visible(kept: NDArray[np.int64], grid: tuple[int, int]) -> NDArray[np.bool_]:
    visible = np.zeros(grid[0] * grid[1], dtype=bool)
    visible[kept.ravel()] = True
    return visible.reshape(grid)


def draw_masks(
    path: Path, images: NDArray[np.uint8], masks: Masks, grid: tuple[int, int], *, rows: int = 4
) -> None:
    """Writes a PNG: each image whole, its first context, and every target block in its place.

    Args:
        path: the PNG file.
        images: uint8 (B, height, width, 3).
        masks: of these images.
        grid: rows and columns of patches.
        rows: images shown.
    """
    plt = pyplot()
    rows = min(rows, len(images))
    num_targets = masks.target_index.shape[1]
    patches = grid[0] * grid[1]
    figure, axes = plt.subplots(
        rows, 2 + num_targets, figsize=(1.6 * (2 + num_targets), 1.7 * rows), squeeze=False
    )
    for row in range(rows):
        context, targets = _of_image(masks, row, patches)
        shown = [(np.arange(patches), "image"), (context, f"context ({len(context)})")]
        shown += [(t, f"target {n + 1} ({len(t)})") for n, t in enumerate(targets)]
        for axis, (kept, title) in zip(axes[row], shown, strict=True):
            axis.imshow(faded(images[row], _visible(kept, grid)))
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    save(figure, path, dpi=130)


def outline(axis: Any, box: tuple[int, int, int, int], colour: str, *, inset: float = 0.0) -> None:
    """Draws the edge of a block: top, left, height, width in pixels, `inset` pixels inside it."""
    from matplotlib.patches import Rectangle

    top, left, height, width = box
    # pixel centres have whole coordinates
    corner = (left - 0.5 + inset, top - 0.5 + inset)
    size = (width - 2 * inset, height - 2 * inset)
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.6))


def _box(block: NDArray[np.int64], grid: tuple[int, int], patch: int) -> tuple[int, int, int, int]:
    rows, columns = np.divmod(block, grid[1])
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) + 1 - top, int(columns.max()) + 1 - left
    return top * patch, left * patch, height * patch, width * patch


def draw_geometries(
    path: Path,
    images: NDArray[np.uint8],
    config: MaskConfig,
    grid: tuple[int, int],
    *,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Writes a PNG: each image whole, then context and target blocks of the published and of the
    unbiased geometry, from the same random numbers. What training cuts off a context, down to the
    shortest of its group, is pale.

    Args:
        path: the PNG file.
        images: uint8 (B, height, width, 3), the images at positions 0..B-1 of a global batch.
        config: mask settings; `geometry` is replaced.
        grid: rows and columns of patches.
        seed, step: of the random numbers.

    Raises:
        ValueError: the grid is too small for the blocks of one of the two.
    """
    patches = grid[0] * grid[1]
    patch = images.shape[1] // grid[0]
    drawn, headings = [], []
    for geometry in GEOMETRIES:
        settings = replace(config, geometry=geometry)
        check_masks(settings, grid)
        positions = np.arange(len(images))
        whole, cut = (
            sample_masks(
                replace(settings, truncation_group=group),
                grid=grid,
                seed=seed,
                step=step,
                positions=positions,
            )
            for group in (1, config.truncation_group)
        )
        drawn.append((whole, cut))
        mean = mean_tokens(settings, grid, seed=seed)
        headings.append(
            f"{geometry}: on average {mean.context:.1f} of {patches} patches\n"
            f"in a context, {mean.target:.1f} in a target block"
        )
    plt = pyplot()
    side = 1.75
    figure, axes = plt.subplots(
        len(images), 5, figsize=(5 * side, (side + 0.2) * len(images) + 0.75), squeeze=False
    )
    for row, image in enumerate(images):
        panel(axes[row, 0], image, f"image {image.shape[0]}x{image.shape[1]}")
        for number, (whole, cut) in enumerate(drawn):
            before, _ = _of_image(whole, row, patches)
            context, targets = _of_image(cut, row, patches)
            left, right = axes[row, 1 + 2 * number], axes[row, 2 + 2 * number]
            seen = faded(image, _visible(context, grid), _visible(before, grid))
            of = f" of {len(before)}" if len(before) > len(context) else ""
            panel(left, seen, f"context: {len(context)}{of}")
            panel(
                right,
                faded(image, _visible(targets, grid)),
                f"targets: {len(targets)} x {targets.shape[1]}",
            )
            for index, block in enumerate(targets):
                # blocks overlap: each a little further inside
                inset = 0.012 * image.shape[0] * (0.5 + index % 3)
                outline(right, _box(block, grid, patch), COLOURS[index % len(COLOURS)], inset=inset)
            for axis in (left, right):
                outline(axis, (0, 0, *image.shape[:2]), "#c8c8c8")
    height = figure.get_figheight()
    figure.tight_layout(pad=0.4, rect=(0, 0, 1, 1 - 0.72 / height))
    for number, heading in enumerate(headings):
        boxes = [axes[0, column].get_position() for column in (1 + 2 * number, 2 + 2 * number)]
        middle = (boxes[0].x0 + boxes[1].x1) / 2
        figure.text(middle, 1 - 0.4 / height, heading, ha="center", va="center", fontsize=10)
    group = config.truncation_group
    note = (
        "contexts whole" if group == 1 else f"contexts cut to\nthe shortest of {group} (rest pale)"
    )
    where = axes[0, 0].get_position()
    figure.text(
        (where.x0 + where.x1) / 2,
        1 - 0.4 / height,
        f"grid {grid[0]}x{grid[1]}, {note}",
        ha="center",
        va="center",
        fontsize=8,
    )
    save(figure, path, dpi=110)
