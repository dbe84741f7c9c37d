"""Training and test images with labels, decoded a batch at a time; cropped centrally."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.config import DataConfig
from ijepa_fast.data import (
    DecodeError,
    ImageDecoder,
    Index,
    crop_windows,
    epoch_order,
    make_decoder,
    named_data,
    open_index,
)
from ijepa_fast.keyed_random import Stream, uniform

__all__ = [
    "BATCH",
    "Images",
    "Split",
    "central_windows",
    "labelled_data",
    "parts_of",
]

_TRAIN_SHARE = 0.8
BATCH = 256
_logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """Decoded images uint8 (n, height, width, 3), their labels int64 (n,) and their rows in the
    index.
    """

    images: Tensor
    labels: Tensor
    rows: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a labelled data set, decoded a batch at a time.

    Attributes:
        index: the images.
        rows: int64 (n,), the rows of the index in this part.
        data: crop and decoder.
        device: where the decoder puts the images.
    """

    index: Index
    rows: NDArray[np.int64]
    data: DataConfig
    device: torch.device

    def load(self) -> Images:
        """All of it at once, on the CPU: for small sets."""
        parts = list(self.batches())
        return Images(
            torch.cat([p.images.cpu() for p in parts]),
            torch.cat([p.labels for p in parts]),
            np.concatenate([p.rows for p in parts]),
        )

    @property
    def labels(self) -> NDArray[np.int64]:
        """Of the rows: int64 (n,)."""
        return self.index.label[self.rows].astype(np.int64)

    def batches(self) -> Iterator[Images]:
        """Decodes batch after batch, cropped centrally; what cannot be decoded is named in the log
        and left out.

        Raises:
            ValueError: not one image can be decoded.
        """
        return self._decoded(self.rows, BATCH, None)

    def random_batches(self, epoch: int, *, batch: int, seed: int) -> Iterator[Images]:
        """The rows of one training epoch: in keyed order, with the random crops of `data`, in whole
        batches (the rest sits out; where there are fewer, all of them).
        """
        rows = self.rows[epoch_order(len(self.rows), seed=seed, epoch=epoch)]
        whole = max(batch, len(rows) // batch * batch)
        return self._decoded(rows[:whole], batch, (seed, epoch))

    def crops(self, seed: int, view: int) -> Iterator[Images]:
        """The rows in their order, with the random crops of `data`: of another view, others."""
        return self._decoded(self.rows, BATCH, (seed, view))

    def _decoded(
        self, order: NDArray[np.int64], batch: int, crops: tuple[int, int] | None
    ) -> Iterator[Images]:
        decoder, _ = make_decoder(self.data, self.device, max_batch=batch)
        found = False
        try:
            for start in range(0, len(order), batch):
                images, rows = _decode(
                    self.index, order[start : start + batch], self.data, decoder, crops
                )
                if len(rows):
                    found = True
                    labels = torch.from_numpy(self.index.label[rows].astype(np.int64))
                    yield Images(images, labels, rows)
        finally:
            decoder.close()
        if not found:
            raise ValueError(
                f"data must hold images that can be decoded, got none in {self.index.roots[0]}"
            )


def central_windows(
    index: Index, rows: NDArray[np.int64], crop: tuple[int, int]
) -> NDArray[np.int32]:
    """The largest central window of the crop's shape in each image: int32 (n, 4) top, left,
    height, width.
    """
    height, width = index.height[rows].astype(np.int64), index.width[rows].astype(np.int64)
    inner_height = np.minimum(height, np.maximum(1, width * crop[0] // crop[1]))
    inner_width = np.minimum(width, np.maximum(1, height * crop[1] // crop[0]))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return np.stack([top, left, inner_height, inner_width], axis=1).astype(np.int32)


def _decode(
    index: Index,
    rows: NDArray[np.int64],
    data: DataConfig,
    decoder: ImageDecoder,
    crops: tuple[int, int] | None = None,
) -> tuple[Tensor, NDArray[np.int64]]:
    """The decodable images of these rows, and their rows; `crops` is the seed and the epoch of
    random ones.
    """
    while len(rows):
        try:
            encoded = [index.read(int(row)) for row in rows]
            windows = central_windows(index, rows, data.crop_size)
            if crops:
                windows = crop_windows(
                    index.width[rows],
                    index.height[rows],
                    rows,
                    seed=crops[0],
                    epoch=crops[1],
                    scale=data.scale,
                    ratio=data.ratio,
                )
            return decoder.decode(encoded, windows, index.plain[rows]), rows
        except DecodeError as error:
            for row, reason in error.failures.items():
                _logger.warning("left out %s: %s", index.name(int(rows[row])), reason)
            rows = np.delete(rows, list(error.failures))
    return torch.empty(0), rows


def parts_of(root: str, data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    """Training and test part of any data set, labelled or not.

    Args:
        root: a named data set, a folder or another source. Sub-folders `train` and `test` or
            `val` are the split (of the two the first that has the classes of `train`), else a
            keyed 80 % / 20 % split of the images.
        data: crop and decoder.
        device: the training device.

    Raises:
        ValueError: there are no images, or an empty part.
    """
    parts = _split(root, data, device)
    _check_not_empty(parts, root)
    return parts


def _split(root: str, data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    folder = named_data(root) or Path(root)
    names = [name for name in ("test", "val") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and names:
        parts = [open_index(folder / "train")[0], _held_out(folder, names)]
        chosen = [np.arange(len(part)) for part in parts]
    else:
        index = open_index(str(folder))[0]
        parts = [index, index]
        draws = uniform(0, Stream.SPLIT, 0, np.arange(len(index)), 1)[:, 0]
        chosen = [np.flatnonzero(draws < _TRAIN_SHARE), np.flatnonzero(draws >= _TRAIN_SHARE)]
    train, test = (
        Split(index=part, rows=rows, data=data, device=device)
        for part, rows in zip(parts, chosen, strict=True)
    )
    return train, test


def _held_out(folder: Path, names: Sequence[str]) -> Index:
    """The first part with the classes of `train`: ImageNet's `test` has none, its `val` has."""
    classes = _class_folders(folder / "train")
    alike = [name for name in names if _class_folders(folder / name) == classes]
    return open_index(folder / [*alike, *names][0])[0]


def _class_folders(folder: Path) -> set[str]:
    # hidden ones are no classes, as in the index
    return {path.name for path in folder.iterdir() if path.name[0] != "." and path.is_dir()}


def _check_not_empty(parts: tuple[Split, Split], root: str) -> None:
    if min(len(part.rows) for part in parts) == 0:
        raise ValueError(
            f"data must leave images for training and test, got an empty part in {root}"
        )


def labelled_data(root: str, data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    """Training and test part of a labelled data set; images beside the class folders, which carry
    no label, are left out. Arguments as of `parts_of`.

    Raises:
        ValueError: there are no images, fewer than two classes, other classes in the test part, or
            an empty part.
    """
    train, test = _split(root, data, device)
    names = train.index.classes
    if names != test.index.classes:
        raise ValueError(
            f"classes of train and test part must be the same, got {list(names)[:5]}... "
            f"and {list(test.index.classes)[:5]}... in {test.index.roots[0]}"
        )
    if len(names) < 2:
        raise ValueError(
            f"data must have at least 2 classes (sub-folders), got {len(names)} in {root}"
        )
    train, test = (replace(part, rows=part.rows[part.labels >= 0]) for part in (train, test))
    _check_not_empty((train, test), root)
    return train, test
