"""Multi-block masks (paper, section 3): which patches are context and which are predicted.

A pure function of (config, grid, seed, step, position in the global batch): there is no generator
to save, and a rank samples what it owns without asking the others. All numbers are keyed:

- sizes, once a step: stream ``MASK_SIZE``, item 0 = target block, item 1 = context block; draw 0 is
  the scale and (``published``) the aspect too, draw 1 the aspect of ``unbiased``;
- corners: stream ``MASK_POSITION``, item = position in the global batch; block j takes draw 2j for
  its row and 2j + 1 for its column, where the blocks are the M target blocks, then the first try of
  every context block, then the second try of every context block, and so on.

All blocks of a step share one size, so a block is a row of a small table of patterns, one for each
corner, and the work on an image is a few gathers and byte-wise operations over its N patches.

Shapes: B images asked for, A images of the groups that they belong to, C context blocks of an
image, M target blocks, T patches of a target block, N grid patches, R packed context rows.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_fast.config import MaskConfig
from ijepa_fast.keyed_random import Stream, uniform

__all__ = ["Masks", "MeanTokens", "check_masks", "mean_tokens", "reachable_sizes", "sample_masks"]

# Failures in a row after which one more target block is left out of the subtraction.
_TRIES = 20

_Bools = NDArray[np.bool_]
_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Masks:
    """Masks of one device batch; image = index inside this batch.

    Attributes:
        context_index: int32 (R,), image * N + patch, in raster order inside a sequence; sequences
            are ordered [context block, image].
        context_cu: int32 (C*B + 1,), where each sequence begins, and R.
        max_context: patches of the longest sequence.
        target_index: int32 (B, M, T), patch 0..N-1 in raster order.
    """

    context_index: torch.Tensor
    context_cu: torch.Tensor
    max_context: int
    target_index: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Masks":
        """Copy to another device."""
        return Masks(
            self.context_index.to(device, non_blocking=non_blocking),
            self.context_cu.to(device, non_blocking=non_blocking),
            self.max_context,
            self.target_index.to(device, non_blocking=non_blocking),
        )

    def elements(self, images: int, width: int) -> int:
        """Elements of the predictions of a global batch of so many images, which the loss is the
        mean over: images * C * M * T * width. One step's images share these sizes.
        """
        own, blocks, length = self.target_index.shape
        contexts = (len(self.context_cu) - 1) // own
        return images * contexts * blocks * length * width

    def pin_memory(self) -> "Masks":
        """Copy to page-locked memory, from where ``to(..., non_blocking=True)`` overlaps."""
        return Masks(
            self.context_index.pin_memory(),
            self.context_cu.pin_memory(),
            self.max_context,
            self.target_index.pin_memory(),
        )


class MeanTokens(NamedTuple):
    """Mean patches of one context block of one image (after truncation) and of one target block."""

    context: float
    target: float


class _Block(NamedTuple):
    """Size of a block in patches, and how many rows and columns its top left corner may be in."""

    height: int
    width: int
    tops: int
    lefts: int

    def corner(self, draws: NDArray[np.float64]) -> _Ints:
        """Corner number, top * lefts + left: draws (..., 2) in [0, 1) -> int64 (...)."""
        top = (draws[..., 0] * self.tops).astype(np.int64)
        return top * self.lefts + (draws[..., 1] * self.lefts).astype(np.int64)

    def patterns(self, grid: tuple[int, int]) -> _Bools:
        """Patches covered from each corner: bool (tops * lefts, N)."""
        row = np.arange(grid[0]) - np.arange(self.tops)[:, None]
        column = np.arange(grid[1]) - np.arange(self.lefts)[:, None]
        in_rows = (row >= 0) & (row < self.height)
        in_columns = (column >= 0) & (column < self.width)
        covered = in_rows[:, None, :, None] & in_columns[None, :, None, :]
        return covered.reshape(self.tops * self.lefts, -1)

    def patches(self, corner: _Ints, grid: tuple[int, int]) -> NDArray[np.int32]:
        """Patch indices in raster order: corner numbers (...) -> int32 (..., height * width)."""
        top, left = np.divmod(corner, self.lefts)
        first = (top * grid[1] + left).astype(np.int32)
        inside = np.arange(self.height)[:, None] * grid[1] + np.arange(self.width)
        return first[..., None] + inside.ravel().astype(np.int32)


def _fit(patches: int, aspect: float, grid: tuple[int, int], geometry: str) -> _Block:
    """Block of about ``patches`` patches and height / width ``aspect``, made to fit the grid."""
    # Published: a block is smaller than the grid, and a corner's upper end is excluded.
    margin = 1 if geometry == "published" else 0
    height = min(round(math.sqrt(patches * aspect)), grid[0] - margin)
    width = min(round(math.sqrt(patches / aspect)), grid[1] - margin)
    return _Block(height, width, grid[0] - height + 1 - margin, grid[1] - width + 1 - margin)


def _require_size(
    config: MaskConfig, grid: tuple[int, int], name: str, height: int, width: int
) -> None:
    where = f"on a grid of {grid[0]}x{grid[1]} patches with masks.geometry {config.geometry!r}"
    if height < 1 or width < 1:
        raise ValueError(
            f"masks.{name}_scale and masks.{name}_aspect must give {name} blocks of at least 1x1 "
            f"patch, got {height}x{width} {where}"
        )
    if name == "context" and height * width <= config.min_keep:
        raise ValueError(
            f"masks.min_keep must be less than the patches of every context block, got "
            f"{config.min_keep} and a block of {height}x{width} {where}"
        )


def _draw_blocks(
    config: MaskConfig, grid: tuple[int, int], seed: int, step: int
) -> tuple[_Block, _Block]:
    """Draw the step's target and context block, the same for all images of the global batch."""
    draws = uniform(seed, Stream.MASK_SIZE, step, np.arange(2), 2).tolist()
    blocks = []
    for name, (u, v), scale, aspect in (
        ("target", draws[0], config.target_scale, config.target_aspect),
        ("context", draws[1], config.context_scale, config.context_aspect),
    ):
        patches = math.floor(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
        # The published sampler spends one number on both.
        share = u if config.geometry == "published" else v
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        block = _fit(patches, ratio, grid, config.geometry)
        _require_size(config, grid, name, block.height, block.width)
        blocks.append(block)
    return blocks[0], blocks[1]


def _union(patterns: _Bools, corners: _Ints) -> _Bools:
    """Patches covered by any of the blocks: corners (rows, M) -> bool (rows, N)."""
    covered = np.zeros((len(corners), patterns.shape[1]), dtype=np.bool_)
    for corner in corners.T:
        covered |= patterns.take(corner, axis=0)
    return covered


def _redraw(
    config: MaskConfig,
    seed: int,
    step: int,
    block: _Block,
    patterns: tuple[_Bools, _Bools],
    target_corner: _Ints,
    position: _Ints,
    context_block: _Ints,
) -> _Bools:
    """Contexts of the F sequences whose first try kept too little.

    Args:
        config: mask settings.
        seed: seed of the run.
        step: training step.
        block: the step's context block.
        patterns: patterns of the target and the context block.
        target_corner: (F, M) corners of the image's target blocks.
        position: (F,) position of the image in the global batch.
        context_block: (F,) number of the context block, 0..C-1.

    Returns:
        bool (F, N), the patches of each context.
    """
    found = np.empty((len(position), patterns[0].shape[1]), dtype=np.bool_)
    rows = np.arange(len(position))
    draws = np.empty((len(rows), 0))
    attempt = 1
    # Ends: with no target left to subtract, the first try keeps the whole block, which is enough.
    while rows.size:
        first = 2 * (config.num_targets + attempt * config.num_contexts)
        if first + 2 * config.num_contexts > draws.shape[1]:
            count = 2 * (first + 2 * config.num_contexts)
            draws = uniform(seed, Stream.MASK_POSITION, step, position[rows], count)
        own = first + 2 * context_block[rows, None] + np.arange(2)
        corner = block.corner(np.take_along_axis(draws, own, axis=1))
        remaining = config.num_targets - attempt // _TRIES
        taken = _union(patterns[0], target_corner[rows, :remaining])
        context = patterns[1].take(corner, axis=0) > taken
        kept = np.count_nonzero(context, axis=-1) > config.min_keep
        found[rows[kept]] = context[kept]
        rows, draws = rows[~kept], draws[~kept]
        attempt += 1
    return found


def sample_masks(
    config: MaskConfig, *, grid: tuple[int, int], seed: int, step: int, positions: _Ints
) -> Masks:
    """Masks of the images at some positions of the global batch (paper, section 3 and appendix A).

    An image's masks do not depend on which other positions are asked for. Every truncation group
    that ``positions`` touch is sampled whole, so the global batch must hold whole groups.

    Args:
        config: mask settings.
        grid: rows and columns of patches, N = rows * columns.
        seed: seed of the run, 0 <= seed < 2**64.
        step: training step, 0 <= step < 2**32.
        positions: int64 (B,), positions in the global batch, in the order of the device batch.

    Returns:
        Masks of the B images, on the CPU.

    Raises:
        ValueError: the grid cannot hold the step's blocks, or an argument is out of range.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if positions.ndim != 1 or positions.size == 0:
        raise ValueError(f"positions must be one-dimensional, not empty, got {positions.shape}")
    group, targets, contexts = config.truncation_group, config.num_targets, config.num_contexts
    groups = np.unique(positions // group)
    members = (groups[:, None] * group + np.arange(group)).ravel()
    asked = np.searchsorted(members, positions)

    target, block = _draw_blocks(config, grid, seed, step)
    draws = uniform(seed, Stream.MASK_POSITION, step, members, 2 * (targets + contexts))
    draws = draws.reshape(len(members), targets + contexts, 2)
    target_corner = target.corner(draws[:, :targets])
    corner = block.corner(draws[:, targets:])
    patterns = target.patterns(grid), block.patterns(grid)

    # (C, A, N): block without targets; for bools, a > b is "a and not b".
    visible = patterns[1].take(corner.T, axis=0) > _union(patterns[0], target_corner)
    counts = np.count_nonzero(visible, axis=-1)
    c, a = np.nonzero(counts <= config.min_keep)
    if c.size:
        visible[c, a] = _redraw(
            config, seed, step, block, patterns, target_corner[a], members[a], c
        )
        counts[c, a] = np.count_nonzero(visible[c, a], axis=-1)

    lengths = counts[:, asked]
    if group > 1:
        shortest = counts.reshape(contexts, len(groups), group).min(axis=(0, 2))
        lengths = np.broadcast_to(shortest[asked // group], lengths.shape)
    if not np.array_equal(asked, np.arange(len(members))):
        visible, counts = visible[:, asked], counts[:, asked]
    index = np.concatenate([np.flatnonzero(of_block) for of_block in visible])
    cu = np.concatenate([[0], np.cumsum(lengths)])
    if group > 1:
        # Row r of the result is row r + (patches cut off earlier sequences) of the uncut index.
        cut = np.cumsum(counts) - counts.ravel() - cu[:-1]
        index = index[np.arange(cu[-1]) + np.repeat(cut, lengths.ravel())]
    return Masks(
        context_index=torch.from_numpy(index.astype(np.int32)),
        context_cu=torch.from_numpy(cu.astype(np.int32)),
        max_context=int(lengths.max()),
        target_index=torch.from_numpy(target.patches(target_corner[asked], grid)),
    )


def reachable_sizes(
    config: MaskConfig, grid: tuple[int, int], block: Literal["target", "context"]
) -> set[tuple[int, int]]:
    """Every (height, width) that some step may draw for a block; exact, not sampled."""
    scale, aspect = (
        (config.target_scale, config.target_aspect)
        if block == "target"
        else (config.context_scale, config.context_aspect)
    )
    area, spread = grid[0] * grid[1], scale[1] - scale[0]
    sizes = set()
    for patches in range(math.floor(area * scale[0]), math.floor(area * scale[1]) + 1):
        low, high = aspect
        if spread > 0:
            # The draws u that give this many patches, and so the aspects that may come with it.
            ends = [(p / area - scale[0]) / spread for p in (patches, patches + 1)]
            if ends[0] >= 1.0:
                continue
            if config.geometry == "published":
                clipped = (min(max(u, 0.0), 1.0) for u in ends)
                low, high = (aspect[0] + u * (aspect[1] - aspect[0]) for u in clipped)
        # Height and width change only at these aspects: one test between two neighbours finds all.
        halves = [(side + 0.5) ** 2 for side in range(max(grid))]
        steps = {x for half in halves for x in (half / max(patches, 1), patches / half)}
        edges = sorted({low, high} | {x for x in steps if low < x < high})
        middles = [(x + y) / 2 for x, y in pairwise(edges)] or edges
        sizes |= {_fit(patches, x, grid, config.geometry)[:2] for x in middles}
    return sizes


def check_masks(config: MaskConfig, grid: tuple[int, int]) -> None:
    """Make sure, before training, that no step can draw a block that does not work on the grid.

    Raises:
        ValueError: some step's target block would be empty, or its context block would not hold
            more than ``min_keep`` patches; the message names the size.
    """
    for height, width in sorted(reachable_sizes(config, grid, "target")):
        _require_size(config, grid, "target", height, width)
    for height, width in sorted(reachable_sizes(config, grid, "context")):
        _require_size(config, grid, "context", height, width)


def mean_tokens(
    config: MaskConfig, grid: tuple[int, int], *, seed: int = 0, steps: int = 200
) -> MeanTokens:
    """Estimate, from ``steps`` steps, how long context and target sequences are on average."""
    # Whole groups, and enough images that the corners average out within a step.
    positions = np.arange(config.truncation_group * -(-128 // config.truncation_group))
    context, target = 0.0, 0.0
    for step in range(steps):
        masks = sample_masks(config, grid=grid, seed=seed, step=step, positions=positions)
        context += len(masks.context_index) / (len(masks.context_cu) - 1) / steps
        target += masks.target_index.shape[2] / steps
    return MeanTokens(context, target)
