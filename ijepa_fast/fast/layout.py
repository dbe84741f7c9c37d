"""Where everything stands in the packed rows of one device batch, worked out on the host.

The masks come from the host, so whatever follows from them is computed there with NumPy and sent in
one copy: no part of the step waits for the device. `pack` makes one flat array and a key, which is
everything that host code needs to know; `views` finds the parts of the array on the device again.
Batches of the same key have parts of the same sizes, at the same places: what was captured for one
of them is right for all.

A step that is captured needs few keys. `pack(..., few=True)` rounds up the rows that targets need,
by marking further patches; and where contexts differ in length, the context rows, by filler
sequences: real patches, attended to by nobody but themselves, that no target is predicted from.

Shape letters: B images, N grid patches, M target blocks, T patches of a target block, C context
blocks, S = C * B context sequences, F filler sequences, R packed context rows, fillers included, U
rows that some target needs, P rows of the predictor. Sequences are ordered [target block, context
block, image], image fastest, and fillers behind those of their target block.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.fast.attention import BUCKET, Pair, Sequences
from ijepa_fast.masks import Masks
from ijepa_kernels.gather_tokens import Gather

__all__ = ["Key", "Layout", "grid_sequences", "pack", "size_of", "views"]

_Ints = NDArray[np.int32]
# every part begins at a multiple of so many elements: 64 bytes
_ALIGNMENT = 16
# with few keys, R becomes a multiple of this, and U of B * N over this
ROWS, SHARE = 256, 32


class Key(NamedTuple):
    """All that host code depends on: shapes, and how attention pads.

    Attributes:
        images: B.
        patches: N.
        blocks: M.
        length: T.
        contexts: C.
        context_rows: R.
        needed: U.
        longest: tokens of the longest context; rounded up where it does not matter.
        equal: whether all contexts have that many.
        fillers: F.
        longest_needed: rows of an image that targets need, at most.
        equal_needed: whether all images have that many.
        padded: whether attention pads what is unequal.
    """

    images: int
    patches: int
    blocks: int
    length: int
    contexts: int
    context_rows: int
    needed: int
    longest: int
    equal: bool
    fillers: int
    longest_needed: int
    equal_needed: bool
    padded: bool


@dataclass(frozen=True, eq=False)
class Layout:
    """Of one device batch, on its device; all indices are int32 unless they say otherwise.

    Attributes:
        key: sizes.
        context_index: (R,) row image * N + patch of the images' patches.
        context_patch: (R,) its patch.
        needed: (U,) rows image * N + patch that some target needs, ascending within an image.
        counted: float32 (U,), 0 for rows that no target needs.
        loss_index: (M * (C * B * T + F),) for each row of the prediction, the place in `needed` of
            its target.
        loss_weight: float32, likewise: 0 for fillers; None without fillers.
        source: for each of the P rows of the predictor's sequences, the row that it is a copy of: r
            of the R context rows, or R + patch of the mask tokens.
        taken: rows of the predictor's sequences that become the prediction: all targets, and one
            row of each filler, so that every key is seen by a query.
        context: attention within the contexts.
        last_target: attention of the target encoder's last block: needed rows to whole images.
        predictor: attention within the predictor's sequences.
        last_predictor: its last block's: taken rows to whole sequences.
    """

    key: Key
    context_index: Tensor
    context_patch: Tensor
    needed: Tensor
    counted: Tensor
    loss_index: Tensor
    loss_weight: Tensor | None
    source: Gather
    taken: Gather
    context: Pair
    last_target: Pair
    predictor: Pair
    last_predictor: Pair


# --- sequences -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """Sequences, as far as a key tells: how many, how long, over how many rows."""

    count: int
    longest: int
    equal: bool
    rows: int
    padded: bool

    def sizes(self, name: str) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, tuple[int, ...]] = {f"{name}.cu": (self.count + 1,)}
        if self.padded and not self.equal:
            sizes[f"{name}.pad"] = (self.count * self.longest,)
            sizes[f"{name}.unpad"] = (self.rows,)
        return sizes

    def arrays(self, name: str, lengths: NDArray[Any]) -> dict[str, _Ints]:
        starts = np.zeros(self.count + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        arrays: dict[str, _Ints] = {f"{name}.cu": starts}
        if self.padded and not self.equal:
            column = np.arange(self.longest)
            rows = starts[:-1, None] + np.minimum(column, lengths[:, None] - 1)
            arrays[f"{name}.pad"] = rows.ravel().astype(np.int32)
            arrays[f"{name}.unpad"] = np.flatnonzero(column < lengths[:, None]).astype(np.int32)
        return arrays

    def sequences(self, name: str, parts: Mapping[str, Tensor]) -> Sequences:
        pads = [parts.get(f"{name}.{kind}") for kind in ("pad", "unpad")]
        return Sequences(
            parts[f"{name}.cu"],
            self.count,
            self.longest,
            self.equal,
            # int64, with which CPUs select rows four times as fast
            *[None if t is None else t.long() for t in pads],
        )


def _sides(key: Key) -> dict[str, _Side]:
    """Of the five attentions' queries and keys."""
    sequences = key.contexts * key.images
    fillers, longest = key.fillers, key.longest
    equal, padded, blocks = key.equal, key.padded, key.blocks
    rows = blocks * (key.context_rows + sequences * key.length)
    wanted = blocks * (sequences * key.length + fillers)
    return {
        "context": _Side(sequences + fillers, longest, equal, key.context_rows, padded),
        "needed": _Side(key.images, key.longest_needed, key.equal_needed, key.needed, padded),
        "images": _Side(key.images, key.patches, True, key.images * key.patches, padded),
        "predictor": _Side(
            blocks * (sequences + fillers), longest + key.length, equal, rows, padded
        ),
        "taken": _Side(blocks * (sequences + fillers), key.length, not fillers, wanted, padded),
    }


@functools.lru_cache(maxsize=256)
def _sizes(key: Key) -> tuple[dict[str, _Side], dict[str, tuple[int, ...]], dict[str, int], int]:
    """Of every part of the flat array, where each begins, and the whole's."""
    sides = _sides(key)
    sizes: dict[str, tuple[int, ...]] = {
        "context_index": (key.context_rows,),
        "context_patch": (key.context_rows,),
        "needed": (key.needed,),
        "counted": (key.needed,),
        "loss_index": (sides["taken"].rows,),
        "source": (sides["predictor"].rows,),
        "copies": (sides["predictor"].rows,),
        "copies_start": (key.context_rows + key.patches + 1,),
        "taken": (sides["taken"].rows,),
        "taken_as": (sides["predictor"].rows,),
    }
    if key.fillers:
        sizes["loss_weight"] = (sides["taken"].rows,)
    for name, side in sides.items():
        sizes |= side.sizes(name)
    begins, total = {}, 0
    for name, (size,) in sizes.items():
        begins[name] = total
        total += -(-size // _ALIGNMENT) * _ALIGNMENT
    return sides, sizes, begins, total


# --- pack and views ------------------------------------------------------------------------------


def pack(
    masks: Masks, num_patches: int, *, padded: bool, few: bool = False
) -> tuple[NDArray[np.int32], Key]:
    """Works out everything.

    Args:
        masks: on the CPU.
        num_patches: N.
        padded: also prepare for padded attention, where lengths differ.
        few: round row counts up, so that there are few keys.

    Returns:
        One flat array with all parts, and the key.
    """
    cu = masks.context_cu.numpy()
    index = masks.context_index.numpy()
    targets = masks.target_index.numpy()
    images, blocks, length = targets.shape
    sequences = len(cu) - 1
    lengths = np.diff(cu).astype(np.int64)
    longest = int(lengths.max())
    equal = bool(lengths.min() == longest)

    first = np.arange(images, dtype=np.int32) * num_patches
    rows = targets.transpose(1, 0, 2) + first[:, None]  # (M, B, T)
    counted = np.zeros(images * num_patches, dtype=np.bool_)
    counted[rows.ravel()] = True
    is_needed = _round_up(counted) if few else counted
    needed = np.flatnonzero(is_needed)
    place = np.cumsum(is_needed, dtype=np.int32) - 1
    each_needed = np.count_nonzero(is_needed.reshape(images, -1), axis=1)

    filler = np.empty(0, dtype=np.int64)
    if few and not equal:
        filler = _fillers(int(cu[-1]))
        longest = max(longest, int(filler.max()))
        index = np.concatenate([index, np.resize(index, filler.sum())])
        lengths = np.concatenate([lengths, filler])
    if not padded:
        longest = longest if equal else min(num_patches, -(-longest // BUCKET) * BUCKET)
    key = Key(
        images=images,
        patches=num_patches,
        blocks=blocks,
        length=length,
        contexts=sequences // images,
        context_rows=len(index),
        needed=len(needed),
        longest=longest,
        equal=equal,
        fillers=len(filler),
        longest_needed=int(each_needed.max()) if padded else num_patches,
        equal_needed=padded and bool(each_needed.min() == each_needed.max()),
        padded=padded,
    )
    frame = _frame if equal else _frame.__wrapped__
    fixed, behind = frame(key, lengths.tobytes())
    sides, sizes, begins, _ = _sizes(key)
    flat = fixed.copy()
    part = {name: flat[at : at + sizes[name][0]] for name, at in begins.items()}
    part["context_index"][:] = index
    np.remainder(index, num_patches, out=part["context_patch"])
    part["needed"][:] = needed
    part["counted"].view(np.float32)[:] = counted[needed]
    for name, array in sides["needed"].arrays("needed", each_needed).items():
        part[name][:] = array
    patches = targets.transpose(1, 0, 2)
    places = place[rows]
    if key.contexts > 1:
        patches, places = (np.tile(a, (1, key.contexts, 1)) for a in (patches, places))
    patches = patches.reshape(blocks, -1)
    part["loss_index"].reshape(blocks, -1)[:, : patches.shape[1]] = places.reshape(blocks, -1)
    part["source"][behind] = len(index) + patches.ravel()
    # the mask tokens' copies, patch by patch
    narrow = patches.astype(np.uint16 if num_patches <= 1 << 16 else np.int32).ravel()
    part["copies"][-len(behind) :] = behind[np.argsort(narrow, kind="stable")]
    counts = np.bincount(narrow, minlength=num_patches)
    part["copies_start"][-num_patches:] = len(index) * blocks + np.cumsum(counts)
    return flat, key


@functools.lru_cache(maxsize=64)
def _frame(key: Key, lengths_bytes: bytes) -> tuple[_Ints, _Ints]:
    """What follows from the contexts' and fillers' lengths alone.

    Returns:
        The flat array, with zeros where something depends on more than them; and the rows of all
        targets in the predictor's sequences (M * S * T,).
    """
    sides, sizes, begins, total = _sizes(key)
    lengths = np.frombuffer(lengths_bytes, dtype=np.int64)
    sequences, rows = key.contexts * key.images, key.context_rows
    blocks, length = key.blocks, key.length
    real, filler = lengths[:sequences], lengths[sequences:]
    wanted, rest, number = sequences * length, int(filler.sum()), np.arange(sequences)
    each = rows + wanted
    offset = np.arange(blocks)[:, None] * each
    # before a row stand the targets of the sequences before its own; fillers come last
    context = np.arange(rows) + np.repeat([*number * length, wanted], [*real, rest])
    behind = ((np.cumsum(real) + number * length)[:, None] + np.arange(length)).ravel()
    ends = each - rest + np.cumsum(filler)
    taken = np.concatenate([behind, ends - 1]) + offset
    source, taken_as = np.zeros((blocks, each)), np.full(blocks * each, -1)
    source[:, context] = np.arange(rows)
    taken_as[taken.ravel()] = np.arange(taken.size)
    weight = np.zeros((blocks, wanted + len(filler)), dtype=np.float32)
    weight[:, :wanted] = 1
    arrays = {
        "source": source,
        "copies": (context + offset).T,
        "copies_start": np.arange(rows + 1) * blocks,
        "taken": taken,
        "taken_as": taken_as,
        "loss_weight": weight.view(np.int32),
    }
    whole = np.tile(np.concatenate([real + length, filler]), blocks)
    queries = np.tile(np.concatenate([np.full(sequences, length), np.ones_like(filler)]), blocks)
    for name, those in (
        ("context", lengths),
        ("images", np.full(key.images, key.patches)),
        ("predictor", whole),
        ("taken", queries),
    ):
        arrays |= sides[name].arrays(name, those)
    flat = np.zeros(total, dtype=np.int32)
    for name, array in arrays.items():
        if name in sizes:
            flat[begins[name] : begins[name] + array.size] = array.reshape(-1)
    return flat, (behind + offset).astype(np.int32).ravel()


def size_of(key: Key) -> int:
    """Elements of the flat array of batches with this key."""
    return _sizes(key)[-1]


def views(flat: Tensor, key: Key) -> Layout:
    """The parts of what `pack` made: int32, on the device of the step, and its key."""
    sides, sizes, begins, _ = _sizes(key)
    parts = {name: flat[begins[name] : begins[name] + size] for name, (size,) in sizes.items()}
    s = {name: side.sequences(name, parts) for name, side in sides.items()}
    weight = parts.get("loss_weight")
    return Layout(
        key=key,
        context_index=parts["context_index"],
        context_patch=parts["context_patch"],
        needed=parts["needed"],
        counted=parts["counted"].view(torch.float32),
        loss_index=parts["loss_index"],
        loss_weight=None if weight is None else weight.view(torch.float32),
        source=Gather(parts["source"], parts["copies"], parts["copies_start"]),
        taken=Gather(parts["taken"], parts["taken_as"], None),
        context=Pair(s["context"], s["context"]),
        last_target=Pair(s["needed"], s["images"]),
        predictor=Pair(s["predictor"], s["predictor"]),
        last_predictor=Pair(s["taken"], s["predictor"]),
    )


def grid_sequences(images: int, num_patches: int, device: torch.device) -> Pair:
    """Attention within whole images, all of N patches: always the same."""
    side = _Side(images, num_patches, True, images * num_patches, False)
    cu = side.arrays("images", np.full(images, num_patches))["images.cu"]
    sequences = side.sequences("images", {"images.cu": torch.from_numpy(cu).to(device)})
    return Pair(sequences, sequences)


def _round_up(counted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Marks further rows, here and there."""
    free = np.flatnonzero(~counted)
    step = max(1, len(counted) // SHARE)
    more = min(-int(np.count_nonzero(counted)) % step, len(free))
    marked = counted.copy()
    marked[free[np.arange(more) * len(free) // max(more, 1)]] = True
    return marked


def _fillers(rows: int) -> NDArray[np.int64]:
    """Lengths of the filler sequences behind so many rows: always as many, 1 to 33 tokens each."""
    count = 8
    rest = count + (-(rows + count)) % ROWS
    lengths = np.full(count, rest // count, dtype=np.int64)
    lengths[: rest % count] += 1
    return lengths
