"""Matplotlib without a display, and PNG files: sheets of panels."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.atomic import atomic_write
from ijepa_fast.errors import UsageError

__all__ = [
    "Frame",
    "Panel",
    "check_out",
    "draw_sheet",
    "faded",
    "patch_pixels",
    "pyplot",
    "save",
]

# inches: between panels, of an empty column, and of a line of text
SPACE, GAP, LINE = 0.08, 0.14, 0.15


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
    """Writes the PNG and forgets the figure."""
    try:
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=dpi, format="png")
    finally:
        pyplot().close(figure)


class Frame(NamedTuple):
    """A rectangle over a panel: top, left, height and width in pixels of its image."""

    box: Sequence[float]
    colour: str


class Panel(NamedTuple):
    """An image (height, width, 3), uint8 or 0..1, what stands above it, and frames on it."""

    image: NDArray[np.generic]
    words: str = ""
    frames: Sequence[Frame] = ()


def draw_sheet(
    path: Path, rows: Sequence[Sequence[Panel | None]], title: str, *, side: float
) -> None:
    """Writes a PNG of panels in rows; their pixels stay squares of one colour.

    Args:
        path: the PNG file.
        rows: None is an empty panel, and makes a narrow column where it stands in the first row.
        title: above everything; it is broken into lines.
        side: width of a panel, inches.
    """
    from matplotlib.patches import Rectangle

    plt = pyplot()
    widths = [side if panel else GAP for panel in rows[0]]
    width = sum(widths) + SPACE * (len(widths) + 1)
    lines = textwrap.wrap(title, int(14 * width))
    panels = [panel for row in rows for panel in row if panel]
    words = max(len(panel.words.splitlines()) for panel in panels)
    shape = panels[0].image.shape
    height = side * shape[0] / shape[1]
    top = SPACE + LINE * len(lines)
    step = LINE * words + height + SPACE
    figure = plt.figure(figsize=(width, top + step * len(rows)))
    # one for all: each costs more than an image
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    for number, row in enumerate(rows):
        y = top + step * number + LINE * words
        x = SPACE
        for panel, column in zip(row, widths, strict=False):
            if panel:
                extent = (x, x + side, y + height, y)
                axis.imshow(panel.image, interpolation="nearest", extent=extent, aspect="auto")
                style: dict[str, Any] = {"ha": "center", "va": "baseline", "linespacing": 1.1}
                short = [textwrap.shorten(line, int(18 * side)) for line in panel.words.split("\n")]
                axis.text(x + side / 2, y - 0.05, "\n".join(short), fontsize=8, **style)
                scale = side / panel.image.shape[1]
                for frame in panel.frames:
                    down, right, tall, wide = (scale * length for length in frame.box)
                    style = {"fill": False, "ec": frame.colour, "lw": 1.6}
                    axis.add_patch(Rectangle((x + right, y + down), wide, tall, **style))
            x += column + SPACE
    axis.set(xlim=(0, width), ylim=(top + step * len(rows), 0))
    style = {"ha": "center", "va": "top", "linespacing": 1.1}
    axis.text(width / 2, SPACE / 2, "\n".join(lines), fontsize=9, **style)
    save(figure, path, dpi=120)


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
