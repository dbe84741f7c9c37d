"""Masks over real images: one batch of a run, or both geometries side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, check_masks, mean_tokens, sample_masks
from ijepa_fast.visualize.figure import Frame, Panel, draw_sheet, faded

__all__ = ["draw_geometries", "draw_masks"]

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
    patches = grid[0] * grid[1]
    sheet = []
    for row, image in enumerate(images[:rows]):
        context, targets = _of_image(masks, row, patches)
        shown = [(context, f"context ({len(context)})")]
        shown += [(t, f"target {n + 1} ({len(t)})") for n, t in enumerate(targets)]
        parts = [Panel(faded(image, _visible(kept, grid)), words) for kept, words in shown]
        sheet.append([Panel(image, "image"), *parts])
    draw_sheet(path, sheet, "", side=1.5)


def _frame(
    block: NDArray[np.int64], grid: tuple[int, int], patch: int, colour: str, inset: float
) -> Frame:
    rows, columns = np.divmod(block, grid[1])
    top, left = patch * int(rows.min()), patch * int(columns.min())
    height, width = patch * int(np.ptp(rows) + 1), patch * int(np.ptp(columns) + 1)
    return Frame((top + inset, left + inset, height - 2 * inset, width - 2 * inset), colour)


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
    group, title = config.truncation_group, f"grid {grid[0]}x{grid[1]}, "
    cut_to = f"contexts cut to the shortest of {group} (rest pale)"
    title += "contexts whole" if group == 1 else cut_to
    sheet = [[Panel(image, "image")] for image in images]
    for geometry in GEOMETRIES:
        settings = replace(config, geometry=geometry)
        check_masks(settings, grid)
        positions = np.arange(len(images))
        whole, cut = (
            sample_masks(
                replace(settings, truncation_group=size),
                grid=grid,
                seed=seed,
                step=step,
                positions=positions,
            )
            for size in (1, group)
        )
        mean = mean_tokens(settings, grid, seed=seed)
        title += (
            f"; {geometry}: on average {mean.context:.1f} of {patches} patches in a context, "
            f"{mean.target:.1f} in a target block"
        )
        for row, image in enumerate(images):
            edge = Frame((0, 0, *image.shape[:2]), "#c8c8c8")
            before, _ = _of_image(whole, row, patches)
            context, targets = _of_image(cut, row, patches)
            seen = faded(image, _visible(context, grid), _visible(before, grid))
            of = f" of {len(before)}" if len(before) > len(context) else ""
            sheet[row].append(Panel(seen, f"{geometry}\ncontext: {len(context)}{of}", [edge]))
            # blocks overlap: each a little further inside
            insets = (0.012 * image.shape[0] * (0.5 + n % 3) for n in range(len(targets)))
            frames = [
                _frame(block, grid, patch, COLOURS[n % len(COLOURS)], inset)
                for n, (block, inset) in enumerate(zip(targets, insets, strict=True))
            ]
            words = f"{geometry}\ntargets: {len(targets)} x {targets.shape[1]}"
            hidden = faded(image, _visible(targets, grid))
            sheet[row].append(Panel(hidden, words, [*frames, edge]))
    draw_sheet(path, sheet, title, side=1.75)
