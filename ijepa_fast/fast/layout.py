"""Where everything stands in the packed rows of one device batch, worked out on the host.

The masks come from the host, so whatever follows from them is computed there with NumPy and sent in
one copy: no part of the step waits for the device.

Shape letters: B images, N grid patches, M target blocks, T patches of a target block, C context
blocks, S = C * B context sequences, R packed context rows, U rows that some target needs. Sequences
are ordered [target block, context block, image], image fastest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.fast.attention import Pair, Sequences
from ijepa_fast.masks import Masks

__all__ = ["Layout", "grid_sequences"]

_Ints = NDArray[np.int32]
# every array begins at a multiple of so many elements: 64 bytes
_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Layout:
    """Of one device batch, on its device; all indices are int32.

    Attributes:
        masks: the masks themselves.
        context_patch: (R,) patch 0..N-1 of each context row.
        needed: (U,) rows image * N + patch that some target needs, ascending.
        loss_index: (M * C * B * T,) for each row of the prediction, the place in `needed` of its
            target.
        source: (M * (R + S * T),) for each row of the predictor's sequences, the row that its first
            block's queries, keys and values are copied from: r of the R context rows, or R + patch.
        context: attention within the contexts.
        last_target: attention of the target encoder's last block: needed rows to whole images.
        predictor: attention within the predictor's sequences.
        last_predictor: its last block's: target rows to whole sequences.
    """

    masks: Masks
    context_patch: Tensor
    needed: Tensor
    loss_index: Tensor
    source: Tensor
    context: Pair
    last_target: Pair
    predictor: Pair
    last_predictor: Pair

    @property
    def target_length(self) -> int:
        """T."""
        return self.masks.target_index.shape[2]

    @property
    def num_images(self) -> int:
        """B."""
        return self.masks.target_index.shape[0]

    @classmethod
    def of(cls, masks: Masks, num_patches: int, device: torch.device, *, padded: bool) -> "Layout":
        """Works out everything.

        Args:
            masks: on the CPU.
            num_patches: N.
            device: where the step runs.
            padded: also prepare for padded attention, where lengths differ.
        """
        cu = masks.context_cu.numpy().astype(np.int32)
        index = masks.context_index.numpy().astype(np.int32)
        targets = masks.target_index.numpy().astype(np.int32)
        images, blocks, length = targets.shape
        sequences = len(cu) - 1
        contexts = sequences // images

        first = np.arange(images, dtype=np.int32) * num_patches
        rows = targets.transpose(1, 0, 2) + first[:, None]  # (M, B, T)
        is_needed = np.zeros(images * num_patches, dtype=np.bool_)
        is_needed[rows.ravel()] = True
        needed = np.flatnonzero(is_needed).astype(np.int32)
        place = np.cumsum(is_needed, dtype=np.int32) - 1
        loss_index = np.repeat(place[rows][:, None], contexts, axis=1)
        needed_lengths = np.count_nonzero(is_needed.reshape(images, -1), axis=1)

        arrays: dict[str, _Ints] = {
            "context_index": index,
            "context_cu": cu,
            "target_index": targets,
            "context_patch": index % num_patches,
            "needed": needed,
            "loss_index": loss_index.ravel(),
            "source": _sources(cu, targets).ravel(),
        }
        lengths = {
            "context": np.diff(cu),
            "needed": needed_lengths,
            "images": np.full(images, num_patches),
            "predictor": np.tile(np.diff(cu) + length, blocks),
            "targets": np.full(blocks * sequences, length),
        }
        sides = {name: _Side(of, padded) for name, of in lengths.items()}
        for name, side in sides.items():
            arrays |= {f"{name}.{key}": value for key, value in side.arrays.items()}
        sent = _send(arrays, device)
        s = {name: side.sequences(name, sent) for name, side in sides.items()}
        return cls(
            masks=Masks(
                sent["context_index"], sent["context_cu"], masks.max_context, sent["target_index"]
            ),
            context_patch=sent["context_patch"],
            needed=sent["needed"],
            loss_index=sent["loss_index"],
            source=sent["source"],
            context=Pair(s["context"], s["context"]),
            last_target=Pair(s["needed"], s["images"]),
            predictor=Pair(s["predictor"], s["predictor"]),
            last_predictor=Pair(s["targets"], s["predictor"]),
        )


def grid_sequences(images: int, num_patches: int, device: torch.device) -> Pair:
    """Attention within whole images, all of N patches: always the same."""
    side = _Side(np.full(images, num_patches), padded=False)
    sent = {f"images.{k}": torch.from_numpy(v).to(device) for k, v in side.arrays.items()}
    sequences = side.sequences("images", sent)
    return Pair(sequences, sequences)


class _Side:
    """Sequences of given lengths: the arrays to send, and what to make of them there."""

    def __init__(self, lengths: NDArray[Any], padded: bool) -> None:
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        self.longest = int(lengths.max())
        self.equal = bool(lengths.min() == self.longest)
        self.arrays: dict[str, _Ints] = {"cu": self.starts}
        if padded and not self.equal:
            column = np.arange(self.longest)
            inside = column < lengths[:, None]
            rows = self.starts[:-1, None] + np.minimum(column, lengths[:, None] - 1)
            self.arrays["pad"] = rows.ravel().astype(np.int32)
            self.arrays["unpad"] = np.flatnonzero(inside).astype(np.int32)

    def sequences(self, name: str, sent: Mapping[str, Tensor]) -> Sequences:
        return Sequences(
            cu=sent[f"{name}.cu"],
            starts=self.starts,
            longest=self.longest,
            equal=self.equal,
            # int64, with which CPUs select rows four times as fast
            pad=sent[f"{name}.pad"].long() if f"{name}.pad" in sent else None,
            unpad=sent[f"{name}.unpad"].long() if f"{name}.unpad" in sent else None,
        )


def _sources(cu: _Ints, targets: _Ints) -> _Ints:
    """`Layout.source`, (M, R + S * T)."""
    images, blocks, length = targets.shape
    sequences, rows = len(cu) - 1, int(cu[-1])
    number = np.arange(sequences)
    source = np.empty((blocks, rows + sequences * length), dtype=np.int32)
    # before a row stand the targets of the sequences before its own
    source[:, np.arange(rows) + np.repeat(number, np.diff(cu)) * length] = np.arange(rows)
    behind = cu[1:, None] + number[:, None] * length + np.arange(length)
    source[:, behind] = rows + targets.transpose(1, 0, 2)[:, number % images]
    return source


def _send(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Copies int32 arrays to the device, all at once and without waiting."""
    if device.type == "cpu":
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    sizes = [-(-a.size // _ALIGNMENT) * _ALIGNMENT for a in arrays.values()]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    host = buffer.numpy()
    begin = 0
    for array, size in zip(arrays.values(), sizes, strict=True):
        host[begin : begin + array.size] = array.ravel()
        begin += size
    pieces = buffer.to(device, non_blocking=True).split(sizes)
    return {
        name: piece[: array.size].view(array.shape)
        for (name, array), piece in zip(arrays.items(), pieces, strict=True)
    }
