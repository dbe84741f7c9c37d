"""Pictures of a run: masks over real images, and curves of its metrics. Needs the extra `viz`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.masks import Masks

__all__ = ["draw_curves", "draw_masks"]


def _pyplot() -> Any:
    import matplotlib

    # draws into files only: no display is needed
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


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
    plt = _pyplot()
    rows = min(rows, len(images))
    num_targets = masks.target_index.shape[1]
    patches = grid[0] * grid[1]
    height, width = images.shape[1] // grid[0], images.shape[2] // grid[1]
    figure, axes = plt.subplots(
        rows, 2 + num_targets, figsize=(1.6 * (2 + num_targets), 1.7 * rows), squeeze=False
    )
    for row in range(rows):
        start, end = int(masks.context_cu[row]), int(masks.context_cu[row + 1])
        shown = [(np.arange(patches), "image")]
        context = masks.context_index[start:end].numpy() % patches
        shown.append((context, f"context ({len(context)})"))
        for block in range(num_targets):
            target = masks.target_index[row, block].numpy()
            shown.append((target, f"target {block + 1} ({len(target)})"))
        for axis, (kept, title) in zip(axes[row], shown, strict=True):
            visible = np.zeros(patches, dtype=bool)
            visible[kept] = True
            pixels = np.kron(visible.reshape(grid), np.ones((height, width), dtype=bool))
            faded = 235 + images[row].astype(np.float32).mean(axis=2, keepdims=True) * (20 / 255)
            axis.imshow(np.where(pixels[..., None], images[row], faded.astype(np.uint8)))
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a PNG of loss, learning rate, weight decay, momentum, feature std and images/s over
    the step.

    Args:
        path: the PNG file.
        rows: rows of `metrics.jsonl`; kNN rows are drawn too where there are any.
    """
    plt = _pyplot()
    training = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in training]
    panels = [
        ("loss", [row["loss"] for row in training]),
        ("learning rate", [row["lr"] for row in training]),
        ("weight decay", [row["weight_decay"] for row in training]),
        ("momentum of the target encoder", [row["momentum"] for row in training]),
        ("feature std of the target encoder", [row["feature_std"] for row in training]),
        ("images/s", [row["timing"]["images_per_second"] for row in training]),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        axis.plot(steps, values, color="tab:blue", linewidth=1.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
    scored = [row for row in rows if "knn" in row]
    if scored:
        text = "\n".join(
            f"step {row['step']}: {name} {100 * value:.1f} %"
            for row in scored
            for name, value in row["knn"].items()
        )
        figure.text(0.01, 0.005, "kNN: " + text.replace("\n", "   "), fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
