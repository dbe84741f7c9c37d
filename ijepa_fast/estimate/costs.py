"""What an image costs in a step: FLOPs, bytes kept for the backward pass, bytes at work.

A multiply-add counts as two FLOPs; only matrix products and attention are counted. The backward
pass costs twice the forward pass.

Memory is that of CUDA, where flash attention keeps queries, keys, values and its output. Shape
letters: D encoder width, F its MLPs' width, P predictor width, M target blocks, T patches of one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ijepa_fast.config import Config
from ijepa_fast.masks import Masks

__all__ = ["Costs", "Rows"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Patches of an image in one device batch.

    Attributes:
        context: of its contexts together, mean over the images.
        longest: of the batch's longest context, to which the reference path pads.
        target: T.
        needed: that some target needs, mean over the images.
    """

    context: float
    longest: int
    target: int
    needed: float

    @classmethod
    def of(cls, masks: Masks, num_patches: int, batch: int) -> list["Rows"]:
        """Of the images of these masks, on a grid of so many patches, in batches of so many
        images; what is left over does not count.
        """
        index = masks.target_index.flatten(1).numpy()
        lengths = masks.context_cu.diff().view(-1, len(index)).numpy()
        is_needed = np.zeros((len(index), num_patches), dtype=np.bool_)
        np.put_along_axis(is_needed, index, True, axis=1)
        needed = np.count_nonzero(is_needed, axis=1)
        return [
            cls(
                context=float(lengths[:, begin : begin + batch].sum()) / batch,
                longest=int(lengths[:, begin : begin + batch].max()),
                target=masks.target_index.shape[2],
                needed=float(needed[begin : begin + batch].mean()),
            )
            for begin in range(0, len(index) - batch + 1, batch)
        ]


def _linear(rows: float, inputs: int, outputs: int) -> float:
    """FLOPs of a matrix product."""
    return 2 * rows * inputs * outputs


def _attention(queries: float, keys: float, width: int) -> float:
    """FLOPs of one sequence's attention."""
    return 4 * queries * keys * width


def _behind(rows: float, width: int, hidden: int) -> float:
    """FLOPs of what stands behind a block's attention."""
    return _linear(rows, width, width) + 2 * _linear(rows, width, hidden)


def _block_flops(tokens: float, width: int, hidden: int) -> float:
    """One forward pass of one block over one sequence."""
    qkv = _linear(tokens, width, 3 * width)
    return qkv + _attention(tokens, tokens, width) + _behind(tokens, width, hidden)


# --- what one block keeps for its backward pass ---------------------------------------------------


class Kept(NamedTuple):
    """Bytes of a row of width D, where a block sees all rows.

    Attributes:
        before: by the first norm and the QKV product.
        inside: by attention, of queries, keys and values.
        after: by what stands behind attention, and by attention of its output.
    """

    before: float
    inside: float
    after: float


def reference_block(width: int, hidden: int, small: int) -> Kept:
    """`model.Block` under autocast. Both norms keep their input in float32; both norms' output,
    attention's output, and the GELU's input and output are kept in the products' dtype.

    36 D bytes in bfloat16 with F = 4 D.
    """
    norm_input = 4 * width
    after = norm_input + small * (2 * width + 2 * hidden)
    return Kept(before=norm_input + small * width, inside=3 * small * width, after=after)


def fast_block(width: int, hidden: int, small: int, residual: int, heads: int) -> Kept:
    """`fast.block.PackedBlock`. Both sums and their norms' statistics, queries, keys, values,
    attention's output and log-sum-exp, and the GELU's input; no norm's or GELU's output.

    24 D + 4 H + 16 bytes in bfloat16 with F = 4 D. The predictor's first and last block, which see
    fewer rows, are put together in `Costs._predictor`.
    """
    after = residual * width + 8 + small * (width + hidden)
    return Kept(before=residual * width + 8, inside=3 * small * width + 4 * heads, after=after)


class Costs:
    """FLOPs and bytes of one image, of the rows that it has."""

    def __init__(self, config: Config) -> None:
        a = config.model.architecture
        self.patches = config.grid[0] * config.grid[1]
        self.pixels = 3 * config.model.patch_size**2
        self.width, self.hidden, self.depth = a.width, a.mlp_hidden, a.depth
        self.heads, self.narrow = a.heads, config.model.predictor_width
        self.narrow_hidden = 4 * self.narrow
        self.narrow_depth = a.predictor_depth
        self.contexts = config.masks.num_contexts
        self.pairs = config.masks.num_contexts * config.masks.num_targets
        self.targets = config.masks.num_targets
        self.fast = config.path == "fast"
        self.small = 2 if config.optim.precision == "bfloat16" else 4
        self.residual = 2 if config.optim.residual == "bfloat16" else 4
        # no flash attention takes float32: unequal sequences are padded, and what is padded kept
        self.pads = self.fast and self.small == 4
        self.memory = config.memory

    # --- FLOPs -----------------------------------------------------------------------------------

    def recipe(self, context: float, target: float) -> tuple[float, float, float]:
        """FLOPs of target encoder, context encoder and predictor, of one image."""
        embed = _linear(self.patches, self.pixels, self.width)
        wide = _block_flops(self.patches, self.width, self.hidden)
        kept = _block_flops(context, self.width, self.hidden)
        narrow = _block_flops(context + target, self.narrow, self.narrow_hidden)
        projections = _linear(context + target, self.narrow, self.width)
        return (
            self.depth * wide + embed,
            3 * self.contexts * self.depth * kept + 2 * embed,
            3 * self.pairs * (self.narrow_depth * narrow + projections),
        )

    def executed(self, context: float, target: float, needed: float) -> float:
        """FLOPs of the fast path, of one image."""
        n, d, p = self.patches, self.width, self.narrow
        embed = _linear(1, self.pixels, d)
        encoded = (
            n * embed
            + (self.depth - 1) * _block_flops(n, d, self.hidden)
            + _linear(n, d, 2 * d)
            + _linear(needed, d, d)
            + _attention(needed, n, d)
            + _behind(needed, d, self.hidden)
        )
        kept = self.depth * _block_flops(context, d, self.hidden)
        sequence = context + target
        blocks = (self.narrow_depth - 1) * _block_flops(sequence, p, self.narrow_hidden)
        if self.narrow_depth > 1:
            blocks += _linear(sequence, p, 2 * p) + _linear(target, p, p)
            blocks -= _linear(sequence, p, 3 * p)  # the first block's
        blocks += _attention(target, sequence, p) + _behind(target, p, self.narrow_hidden)
        predicted = self.pairs * (blocks + _linear(target, p, d))
        predicted += self.contexts * (_linear(context, p, 3 * p) + _linear(context, p, d))
        # of pixels there is no gradient
        embedded = self.contexts * context * embed
        return encoded + 2 * embedded + 3 * (self.contexts * kept + predicted)

    # --- bytes -----------------------------------------------------------------------------------

    def _kept(self, width: int, hidden: int) -> Kept:
        """Of a row, by one block of the path."""
        if self.fast:
            return fast_block(width, hidden, self.small, self.residual, self.heads)
        return reference_block(width, hidden, self.small)

    def _inside(self, kept: Kept, rows: float, padded: float, width: int) -> float:
        """Kept by attention of queries, keys and values, and of its output where that is padded."""
        if self.pads and padded > rows:
            return self.small * 4 * padded * width
        return kept.inside * rows

    def _block(self, rows: float, padded: float, width: int, hidden: int) -> float:
        """Kept by a block that sees all rows."""
        if self.memory == "full":
            return rows * width * (self.residual + self.small)
        kept = self._kept(width, hidden)
        return rows * (kept.before + kept.after) + self._inside(kept, rows, padded, width)

    def _predictor(self, context: float, all_rows: float, padded: float, wanted: float) -> float:
        """Kept by the blocks of the fast path's predictor."""
        p, hidden, small = self.narrow, self.narrow_hidden, self.small
        if self.memory == "full":
            later = (self.narrow_depth - 1) * all_rows * (self.residual + small)
            return p * (later + context * self.residual)
        kept = self._kept(p, hidden)
        first, last = context * kept.before, wanted * kept.after
        unequal = self.pads and padded > all_rows
        keys = padded if unequal else all_rows
        if self.narrow_depth == 1:
            return first + small * p * (keys * (2 if unequal else 3) + wanted) + last
        last += self._last(all_rows, keys, wanted)
        middle = (self.narrow_depth - 2) * self._block(all_rows, padded, p, hidden)
        first += self._inside(kept, all_rows, padded, p) + all_rows * kept.after
        return first + middle + last

    def _last(self, all_rows: float, keys: float, wanted: float) -> float:
        """Kept by the predictor's last block besides what its wanted rows need after attention: its
        norm sees all rows; its keys and values, and the wanted rows' queries, lie apart.
        """
        before = self._kept(self.narrow, self.narrow_hidden).before
        return all_rows * before + self.small * self.narrow * (2 * keys + wanted)

    def activations(self, rows: Rows) -> float:
        """Kept for the backward pass, of one image."""
        d, p, small = self.width, self.narrow, self.small
        wanted = self.pairs * rows.target
        if self.fast:
            context, longest = rows.context, self.contexts * rows.longest
            embedded = context * (small * self.pixels + self.residual * d + small * d)
            predicted = wanted * (self.residual * p + small * (p + d)) + 4 * rows.needed * d
            every, padded = (self.targets * n + wanted for n in (context, longest))
            inner = self._predictor(context, every, padded, wanted)
        else:
            context = longest = self.contexts * rows.longest
            every = self.targets * context + wanted
            embedded = small * self.patches * self.pixels + 4 * context * d
            # the contexts are repeated, and the predictor's output stays whole behind its slice
            predicted = self.targets * context * small * d + 4 * every * p
            predicted += wanted * (small * p + 4 * d) + 4 * self.targets * rows.target * d
            inner = self.narrow_depth * self._block(every, every, p, self.narrow_hidden)
        wide = self.depth * self._block(context, longest, d, self.hidden)
        return wide + embedded + predicted + inner

    def graph(self) -> tuple[float, float]:
        """Of one image, what the target encoder's CUDA graph holds: its outputs (residual rows,
        normed rows, keys and values), and memory of its own that nothing else gets meanwhile (two
        residual streams, queries, keys, values, attention's output, and the MLP twice, less the
        outputs).
        """
        outputs = self.patches * self.width * (self.residual + 3 * self.small)
        inner = self.width * (2 * self.residual + 4 * self.small) + 2 * self.small * self.hidden
        return outputs, self.patches * inner - outputs

    def working(self, rows: Rows, copies: int, graph: bool) -> float:
        """Of one image beside that, at the height of a step.

        Args:
            rows: of the step.
            copies: device batches of pixels.
            graph: whether the target encoder runs as a CUDA graph.
        """
        d, p, small, n = self.width, self.narrow, self.small, self.patches
        wanted = self.pairs * rows.target
        size: float = copies * n * self.pixels
        if not self.fast:
            half = small == 2
            # backward: features, prediction, and its gradients
            backward = 4 * n * d + wanted * d * (8 + (2 if half else 0))
            # end of the forward pass: the encoders' rows; under autocast the float32 pixels and
            # contexts (repeated, too) beside their rounded copies; not yet a float32 prediction
            contexts = self.contexts * rows.longest
            forward = 8 * n * d + 4 * contexts * d
            if half:
                forward += 4 * (n * self.pixels + self.targets * contexts * d - wanted * d)
            return size + max(forward, backward)
        size += small * wanted * d
        every, width = self.targets * rows.context + wanted, self.narrow_hidden
        if self.memory == "full":
            # one block again, and the gradient of its GELU
            size += every * ((8 - self.residual) * p + small * (6 * p + 3 * width))
        elif self.narrow_depth > 1:
            # the last block but one going back: the GELU and its gradient, residual gradients
            last = self._last(every, every, wanted) + wanted * self._kept(p, width).after
            size += max(0.0, every * (2 * small * width + (self.residual + 2 * small) * p) - last)
        return size + (sum(self.graph()) if graph else 0)
