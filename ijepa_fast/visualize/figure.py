"""Matplotlib without a display, and PNG files."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.errors import UsageError

__all__ = ["check_out", "faded", "panel", "patch_pixels", "pyplot", "save"]


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing into files only: no display is needed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_out(path: Path, suffix: str, *, overwrite: bool) -> None:
    """Before any work: the file can be written and nothing is lost.

    Raises:
        UsageError: another suffix, no such folder, or the file is there and may not be replaced.
    """
    if path.suffix.lower() != suffix:
        raise UsageError(f"out must end in {suffix}, got {path}")
    if not path.parent.is_dir():
        raise UsageError(f"out must be in an existing folder, got {path}")
    if path.is_dir():
        raise UsageError(f"out must be a file, got the folder {path}")
    if path.exists() and not overwrite:
        raise UsageError(f"out must not exist (or add --overwrite), got {path}")


def save(figure: Any, path: Path, *, dpi: int) -> None:
    """Writes the PNG under another name first, so that a broken-off write leaves no half file."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        figure.savefig(temporary, dpi=dpi, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot().close(figure)


def panel(axis: Any, image: NDArray[np.generic], title: str = "") -> None:
    """An image without ticks, pixels as they are."""
    axis.imshow(image, interpolation="nearest")
    axis.set_axis_off()
    if title:
        axis.set_title(title, fontsize=8)


def patch_pixels(visible: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Patches (rows, columns) to the pixels that they cover: (height, width, 1) of an image."""
    scale = (shape[0] // visible.shape[0], shape[1] // visible.shape[1])
    return np.kron(visible, np.ones(scale, dtype=bool))[..., None]


def faded(
    image: NDArray[np.uint8], visible: NDArray[np.bool_], dim: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """An image of which only some patches are seen, the rest nearly white.

    Args:
        image: (height, width, 3).
        visible: (rows, columns) of patches.
        dim: (rows, columns), patches shown in pale colours.
    """
    pixels = image.astype(np.float32)
    light = 235 + pixels.mean(axis=2, keepdims=True) * (20 / 255)
    if dim is not None:
        light = np.where(patch_pixels(dim, image.shape), 0.3 * pixels + 0.7 * 240, light)
    return np.where(patch_pixels(visible, image.shape), image, light.astype(np.uint8))
