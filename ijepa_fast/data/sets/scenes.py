"""The scenes of the embedded data set `shapes`: eight silhouettes in front of textured backgrounds.

A scene is one large object on a textured background, with small distractors and thin lines around
it, a few small occluders before it, and a slope of light over everything. The class fixes the
silhouette and nothing else: colours, textures, pose, clutter and light come from numbers that are
drawn without looking at the class, object and background textures come from one distribution, and
every silhouette has unit area before it is posed. So colour statistics say nothing about the class;
only the outline does.

A scene is a pure function of (split, number): its numbers are keyed draws (stream SHAPES, step =
split, item = number). Rendering is float64, so that the last bits, in which maths libraries differ,
do not reach the rounded pixels.

Coordinates: x to the right, y down, in units of the image side, 0 at the centre of the image.
Silhouettes are written in units in which their area is 1, with their centroid at 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.keyed_random import Stream, uniform

__all__ = ["CLASSES", "SIDE", "SIZES", "Pose", "Split", "pose", "render", "silhouette"]

Split = Literal["train", "test"]
Array = NDArray[np.float64]

CLASSES = ("circle", "crescent", "cross", "heart", "ring", "square", "star", "triangle")
"""Class names, in label order: the label of a scene is its number modulo 8."""
SIDE = 96
"""Height and width of an image, pixels."""
SIZES: dict[Split, int] = {"train": 5120, "test": 1024}
"""Images of each split."""

_STEPS: dict[Split, int] = {"train": 0, "test": 1}
# More than any scene uses: two noise textures take 1132, all the rest under 200.
_DRAWS = 1400
_MAX_ANGLE = math.radians(30)
_PIXELS: Array = (np.arange(SIDE) + 0.5) / SIDE - 0.5


class _Draws:
    """A scene's uniform numbers, handed out in order."""

    def __init__(self, split: Split, number: int) -> None:
        if split not in SIZES:
            raise ValueError(f"split must be one of {', '.join(SIZES)}, got {split!r}")
        self._array = uniform(0, Stream.SHAPES, _STEPS[split], np.array([number]), _DRAWS)[0]
        # Python floats too: most draws are single ones, and taking them from an array is slow.
        self._list: list[float] = self._array.tolist()
        self._used = 0

    def many(self, count: int, low: float = 0.0, high: float = 1.0) -> Array:
        self._used += count
        assert self._used <= _DRAWS, "_DRAWS is too small"
        values: Array = self._array[self._used - count : self._used]
        return low + (high - low) * values

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        self._used += 1
        return low + (high - low) * self._list[self._used - 1]

    def below(self, count: int) -> int:
        return int(self.one() * count)


# Silhouettes: signed distances, negative inside, for unit area and centroid 0. Outside a corner
# they may fall short of the true distance, which antialiasing over one pixel does not notice.


def _half_plane(x: Array, y: Array, degrees: float, distance: float) -> Array:
    angle = math.radians(degrees)
    return x * math.cos(angle) + y * math.sin(angle) - distance


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1 / math.sqrt(math.pi)


def _crescent(x: Array, y: Array) -> Array:
    # The unit disc without a disc of radius r, d to its right; the two circles cross at x = chord.
    r, d = 0.8, 0.5
    chord = (d * d + 1 - r * r) / (2 * d)
    half = math.sqrt(1 - chord * chord)
    cut_left = r * r * math.acos((d - chord) / r) - (d - chord) * half
    cut_right = math.acos(chord) - chord * half
    area = math.pi - cut_left - cut_right
    # The moments of the two circle segments about their own centres cancel.
    scale, centroid = math.sqrt(area), -d * cut_left / area
    x, y = x * scale + centroid, y * scale
    distance: Array = np.maximum(np.hypot(x, y) - 1, r - np.hypot(x - d, y))
    return distance / scale


def _cross(x: Array, y: Array) -> Array:
    arm = math.sqrt(5) / 10
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - arm, np.maximum(x, y) - 3 * arm)


def _heart(x: Array, y: Array) -> Array:
    # A square standing on its corner and a disc on each of its upper edges.
    half = 0.5 / math.sqrt(1 + math.pi / 4)
    edge = half / math.sqrt(2)
    # A half disc has area pi / 2 * half^2 and its centroid 4 * half / (3 pi) beyond the edge.
    lift = math.pi * half**2 * (edge + 4 * half / (3 * math.pi) / math.sqrt(2))
    x, y = np.abs(x), y - lift
    square = (x + np.abs(y)) / math.sqrt(2) - half
    return np.minimum(square, np.hypot(x - edge, y + edge) - half)


def _ring(x: Array, y: Array) -> Array:
    # Hole of half the outer radius.
    outer = 1 / math.sqrt(0.75 * math.pi)
    return np.abs(np.hypot(x, y) - 0.75 * outer) - 0.25 * outer


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.5


def _star(x: Array, y: Array) -> Array:
    # Inner radius half of the outer one. Folded into a tenth, the outline is a single line.
    outer = 1 / math.sqrt(2.5 * math.sin(math.pi / 5))
    x = np.abs(x)
    for degrees in (72, 36):
        excess = 2 * np.maximum(_half_plane(x, y, degrees, 0), 0)
        angle = math.radians(degrees)
        x, y = np.abs(x - excess * math.cos(angle)), y - excess * math.sin(angle)
    inner_x, inner_y = 0.5 * outer * math.sin(math.pi / 5), 0.5 * outer * math.cos(math.pi / 5)
    run, rise = inner_x, outer - inner_y
    return (x * rise - (y + outer) * run) / math.hypot(run, rise)


def _triangle(x: Array, y: Array) -> Array:
    inner = 1 / math.sqrt(3 * math.sqrt(3))
    return np.maximum(y - inner, _half_plane(np.abs(x), y, -30, inner))


_SILHOUETTES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "crescent": _crescent,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where the object of a scene is. All but the class; drawn alike for every class."""

    x: float
    """Centroid, image sides right of the centre, in [-0.11, 0.11)."""
    y: float
    """Centroid, image sides below the centre, in [-0.11, 0.11)."""
    size: float
    """Square root of the object's area, image sides, in [0.34, 0.48)."""
    angle: float
    """Clockwise rotation, radians, within 30 degrees."""
    stretch: float
    """Logarithm of width over height before the rotation, in [-0.2, 0.2)."""
    shear: float
    """Horizontal shift per unit of height before the rotation, in [-0.15, 0.15)."""
    mirrored: bool
    """Left and right exchanged."""


def _draw_pose(draws: _Draws) -> Pose:
    return Pose(
        x=draws.one(-0.11, 0.11),
        y=draws.one(-0.11, 0.11),
        size=draws.one(0.34, 0.48),
        angle=draws.one(-_MAX_ANGLE, _MAX_ANGLE),
        stretch=draws.one(-0.2, 0.2),
        shear=draws.one(-0.15, 0.15),
        mirrored=draws.below(2) == 1,
    )


def pose(split: Split, number: int) -> Pose:
    """The pose of the object of scene `number` of `split`.

    Raises:
        ValueError: unknown split, or a number outside 0..2**32-1.
    """
    return _draw_pose(_Draws(split, number))


def silhouette(name: str, at: Pose) -> Array:
    """Share of each pixel that a silhouette covers: (96, 96), of sum (96 * at.size)**2.

    Args:
        name: one of `CLASSES`.
        at: its pose.

    Raises:
        ValueError: unknown name.
    """
    if name not in _SILHOUETTES:
        raise ValueError(f"name must be one of {', '.join(CLASSES)}, got {name!r}")
    x, y = _turned(_PIXELS[None, :] - at.x, _PIXELS[:, None] - at.y, at.angle)
    # The inverse of stretch and shear; both keep the area.
    x = (x - at.shear * y) * math.exp(-at.stretch / 2) / at.size
    y = y * math.exp(at.stretch / 2) / at.size
    distance = _SILHOUETTES[name](-x if at.mirrored else x, y)
    return _coverage(distance * at.size)


def _turned(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates in a frame turned clockwise by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _coverage(distance: Array) -> Array:
    """Share of a pixel inside an outline at a signed distance, image sides."""
    return np.clip(0.5 - distance * SIDE, 0, 1)


# Textures: fields (96, 96) in -1..1, of mean about 0, all from one distribution.


def _wave(
    cycles: float, angle: float, phase: float, rows: Array = _PIXELS, columns: Array = _PIXELS
) -> Array:
    """A plane sine wave. Separable: sines of two lines of pixels instead of all."""
    x = 2 * math.pi * cycles * math.cos(angle) * columns + phase
    y = (2 * math.pi * cycles * math.sin(angle) * rows)[:, None]
    wave: Array = np.cos(y) * np.sin(x) + np.sin(y) * np.cos(x)
    return wave


def _value_noise(draws: _Draws, cells: float) -> Array:
    """Random values on a lattice of `cells` cells a side, smoothly interpolated."""
    nodes = int(cells) + 2
    rows: list[Array] = []
    for _ in range(2):
        at = draws.one() * (math.ceil(cells) - cells) + cells * (_PIXELS + 0.5)
        cell = np.floor(at).astype(np.intp)
        weight = at - cell
        weight = weight * weight * (3 - 2 * weight)
        row = np.zeros((SIDE, nodes))
        row[np.arange(SIDE), cell] = 1 - weight
        row[np.arange(SIDE), cell + 1] = weight
        rows.append(row)
    lattice = draws.many(nodes * nodes, -1, 1).reshape(nodes, nodes)
    return rows[0] @ lattice @ rows[1].T


def _texture(draws: _Draws) -> Array:
    kind = draws.below(5)
    angle, phase = draws.one(0, 2 * math.pi), draws.one(0, 2 * math.pi)
    if kind == 0:
        return _wave(draws.one(3, 12), angle, phase)
    if kind == 1:
        cycles = draws.one(3, 9)
        other = _wave(cycles, angle + math.pi / 2, draws.one(0, 2 * math.pi))
        return np.clip(4 * _wave(cycles, angle, phase) * other, -1, 1)
    if kind == 2:
        return np.clip(4 * _value_noise(draws, draws.one(4, 10)), -1, 1)
    if kind == 3:
        cells = draws.one(6, 10)
        return _value_noise(draws, cells) + 0.5 * _value_noise(draws, 2 * cells)
    return _turned(2 * _PIXELS[None, :], 2 * _PIXELS[:, None], angle)[0]


@dataclass(frozen=True)
class _Paint:
    """A texture in two shades of a colour."""

    base: Array
    """(3,) in 0.1..0.9."""
    shade: Array
    """(3,), of length 0.12 to 0.3: what the texture adds where it is 1 and takes away where -1."""

    def over(self, image: Array, field: Array | float, mask: Array | float = 1.0) -> None:
        """Paints the texture `field` on the share `mask` of every pixel of `image`, in place."""
        # Channel by channel: small temporaries are reused, large ones are mapped anew each time.
        for index, (base, shade) in enumerate(zip(self.base, self.shade, strict=True)):
            image[index] += mask * (base + shade * field - image[index])


def _draw_paint(draws: _Draws, base: Array | None = None) -> _Paint:
    if base is None:
        base = draws.many(3, 0.1, 0.9)
    direction = draws.many(3, -1, 1)
    return _Paint(base, direction * (draws.one(0.12, 0.3) / math.hypot(*direction)))


def _apart_from(draws: _Draws, other: Array) -> Array:
    """An object colour (3,) well away from the background's, so that the outline can be seen."""
    choices = draws.many(24, 0.1, 0.9).reshape(8, 3)
    distances = np.sqrt(((choices - other) ** 2).sum(axis=1))
    seen = np.flatnonzero(distances >= 0.5)
    best: Array = choices[seen[0] if seen.size else int(distances.argmax())]
    return best


def _within(low: float, high: float) -> slice:
    """The rows or columns of pixels whose centres lie between two coordinates."""
    return slice(*(min(max(round((c + 0.5) * SIDE), 0), SIDE) for c in (low, high)))


def _add_pieces(image: Array, draws: _Draws, count: int, sides: tuple[float, float]) -> None:
    """Paints small rounded boxes, anything from a square to a disc to a bar, at uniform places.

    Args:
        image: (3, 96, 96), changed in place.
        draws: the scene's numbers.
        count: how many.
        sides: smallest and largest half side, image sides.
    """
    for _ in range(count):
        x, y, angle = draws.one(-0.5, 0.5), draws.one(-0.5, 0.5), draws.one(0, math.pi)
        half_x, half_y = draws.one(*sides), draws.one(*sides)
        corner = draws.one() * min(half_x, half_y)
        cycles, paint = draws.one(3, 12), _draw_paint(draws)
        # Only the pixels within reach: the pieces are small.
        reach = math.hypot(half_x, half_y) + 1 / SIDE
        columns, rows = (_within(c - reach, c + reach) for c in (x, y))
        dx, dy = _turned(_PIXELS[None, columns] - x, _PIXELS[rows, None] - y, angle)
        dx, dy = np.abs(dx) - half_x + corner, np.abs(dy) - half_y + corner
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        mask = _coverage(outside + np.minimum(np.maximum(dx, dy), 0) - corner)
        field = _wave(cycles, angle, 0.0, _PIXELS[rows], _PIXELS[columns])
        paint.over(image[:, rows, columns], field, mask)


def _add_lines(image: Array, draws: _Draws, count: int) -> None:
    """Paints thin straight lines across the whole image (3, 96, 96), in place."""
    for _ in range(count):
        angle, offset = draws.one(0, 2 * math.pi), draws.one(0, 0.5)
        half_width, paint = draws.one(0.004, 0.009), _Paint(draws.many(3, 0.1, 0.9), np.zeros(3))
        across = _turned(_PIXELS[None, :], _PIXELS[:, None], angle)[0]
        paint.over(image, 0.0, _coverage(np.abs(across - offset) - half_width))


def _render(split: Split, number: int, name: str) -> NDArray[np.uint8]:
    """The scene of (split, number) with the silhouette `name`: no draw depends on the name."""
    draws = _Draws(split, number)
    at = _draw_pose(draws)
    background = _draw_paint(draws)
    paint = _draw_paint(draws, _apart_from(draws, background.base))
    image = np.zeros((3, SIDE, SIDE))
    background.over(image, _texture(draws))
    _add_pieces(image, draws, 2 + draws.below(4), (0.02, 0.06))
    _add_lines(image, draws, draws.below(3))
    paint.over(image, _texture(draws), silhouette(name, at))
    _add_pieces(image, draws, draws.below(3), (0.015, 0.045))
    _add_lines(image, draws, draws.below(2))
    slope, angle = draws.one(0, 0.6), draws.one(0, 2 * math.pi)
    light = 255 * (1 + slope * _turned(_PIXELS[None, :], _PIXELS[:, None], angle)[0])
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    for index, channel in enumerate(image):
        pixels[:, :, index] = np.rint(np.clip(light * channel, 0, 255))
    return pixels


def render(split: Split, number: int) -> NDArray[np.uint8]:
    """Scene `number` of a split before JPEG: uint8 (96, 96, 3), RGB. Its label is `number % 8`.

    Args:
        split: `train` or `test`.
        number: number of the scene; numbers beyond `SIZES` are further scenes of the same kind.

    Raises:
        ValueError: unknown split, or a number outside 0..2**32-1.
    """
    return _render(split, number, CLASSES[number % len(CLASSES)])
