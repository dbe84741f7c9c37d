"""Training and test images with labels, decoded a batch at a time; cropped centrally."""

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
    ADVICE,
    Index,
    central_windows,
    crop_windows,
    decode_usable,
    epoch_order,
    make_decoder,
    named_data,
    open_index,
)
from ijepa_fast.errors import TooManyBadFiles, UsageError
from ijepa_fast.keyed_random import Stream, uniform
from ijepa_fast.weights import Pretrained

__all__ = [
    "BATCH",
    "Images",
    "Split",
    "data_of",
    "labelled_data",
    "parts_of",
    "precision_of",
    "shown_part",
]

_TRAIN_SHARE = 0.8
BATCH = 256


def data_of(weights: Pretrained) -> DataConfig:
    """How images are made for an encoder: as for its run, at the size of its weights."""
    data = weights.config.data if weights.config else DataConfig()
    return replace(data, crop=weights.shape.image_size, mean=weights.mean, std=weights.std)


def precision_of(weights: Pretrained, precision: str) -> str:
    """Of products: `auto` is that of the run, and float32 for weights without one."""
    if precision != "auto":
        return precision
    return weights.config.optim.precision if weights.config else "float32"


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

    def batches(self, batch: int = BATCH) -> Iterator[Images]:
        """Decodes batch after batch, cropped centrally; what cannot be used is named in the log and
        left out.

        Raises:
            ValueError: less than half of the images can be used.
            OSError: it is the storage that fails, not a file.
        """
        return self._decoded(self.rows, batch, None)

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
        """`crops`: seed and epoch of random ones."""
        decoder, _ = make_decoder(self.data, self.device, max_batch=batch)
        index, found = self.index, 0
        try:
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                sizes = index.width[rows], index.height[rows]
                windows = central_windows(*sizes, self.data.crop_size)
                if crops:
                    windows = crop_windows(
                        *sizes,
                        rows,
                        seed=crops[0],
                        epoch=crops[1],
                        scale=self.data.scale,
                        ratio=self.data.ratio,
                    )
                images, rows = decode_usable(index, rows, windows, decoder)
                found += len(rows)
                if len(rows):
                    labels = torch.from_numpy(index.label[rows].astype(np.int64))
                    yield Images(images, labels, rows)
        finally:
            decoder.close()
        if 2 * found < len(order):
            raise ValueError(
                f"at least half of the images must be usable, got {found} of {len(order)} in "
                f"{index.roots[0]}"
            )


def parts_of(
    root: str, data: DataConfig, device: torch.device, *, name: str = "data"
) -> tuple[Split, Split]:
    """Training and test part of any data set, labelled or not.

    Args:
        root: a named data set, a folder or another source. Sub-folders `train` and `test` or
            `val` are the split (of the two the first that has the classes of `train`), else a
            keyed 80 % / 20 % split of the images.
        data: crop and decoder.
        device: the training device.
        name: of the setting that `root` is, for the errors.

    Raises:
        UsageError: there are no images, or an empty part.
        TooManyBadFiles: a shard is damaged or a folder cannot be listed.
    """
    parts = _split(root, data, device, name)
    _check_not_empty(parts, root, name)
    return parts


def shown_part(root: str, data: DataConfig, device: torch.device) -> Split:
    """What pictures show of any data set: the held-out part where it has a folder of its own, else
    all images. Arguments as of `parts_of`.
    """
    _, test = _split(root, data, device, "data")
    return replace(test, rows=np.arange(len(test.index)))


def _split(root: str, data: DataConfig, device: torch.device, name: str) -> tuple[Split, Split]:
    try:
        parts, chosen = _tables(root, data.allow_missing)
    except (ValueError, TooManyBadFiles) as error:
        kind = UsageError if isinstance(error, ValueError) else TooManyBadFiles
        text = str(error).replace("data.root", name)
        # an option of training alone
        advice = "" if name == "data" else ADVICE
        raise kind(text.replace(ADVICE, advice)) from None
    train, test = (
        Split(index=part, rows=rows, data=data, device=device)
        for part, rows in zip(parts, chosen, strict=True)
    )
    return train, test


def _tables(root: str, allow_missing: bool) -> tuple[list[Index], list[NDArray[np.int64]]]:
    """The tables of training and test part, and the rows of each."""
    folder = named_data(root) or Path(root)
    names = [name for name in ("test", "val") if (folder / name).is_dir()]
    if (folder / "train").is_dir() and names:
        folders = (folder / "train", _held_out(folder, names))
        parts = [open_index(path, allow_missing=allow_missing)[0] for path in folders]
        return parts, [np.arange(len(part)) for part in parts]
    index = open_index(str(folder), allow_missing=allow_missing)[0]
    held_out = uniform(0, Stream.SPLIT, 0, np.arange(len(index)), 1)[:, 0] >= _TRAIN_SHARE
    return [index, index], [np.flatnonzero(~held_out), np.flatnonzero(held_out)]


def _held_out(folder: Path, names: Sequence[str]) -> Path:
    """The first part with the classes of `train`: ImageNet's `test` has none, its `val` has."""
    classes = _class_folders(folder / "train")
    alike = [name for name in names if _class_folders(folder / name) == classes]
    return folder / [*alike, *names][0]


def _class_folders(folder: Path) -> set[str]:
    # hidden ones are no classes, as in the index
    return {path.name for path in folder.iterdir() if path.name[0] != "." and path.is_dir()}


def _check_not_empty(parts: tuple[Split, Split], root: str, name: str) -> None:
    if min(len(part.rows) for part in parts) == 0:
        raise UsageError(
            f"{name} must leave images for training and test, got an empty part in {root}"
        )


def labelled_data(
    root: str, data: DataConfig, device: torch.device, *, name: str = "data"
) -> tuple[Split, Split]:
    """Training and test part of a labelled data set; images beside the class folders, which carry
    no label, are left out. Arguments as of `parts_of`.

    Raises:
        UsageError: there are no images, fewer than two classes, other classes in the test part, or
            an empty part.
    """
    train, test = _split(root, data, device, name)
    classes = train.index.classes
    if classes != test.index.classes:
        raise UsageError(
            f"classes of train and test part of {name} must be the same, got "
            f"{list(classes)[:5]}... and {list(test.index.classes)[:5]}... in {test.index.roots[0]}"
        )
    if len(classes) < 2:
        raise UsageError(
            f"{name} must have at least 2 classes (sub-folders), got {len(classes)} in {root}"
        )
    train, test = (replace(part, rows=part.rows[part.labels >= 0]) for part in (train, test))
    _check_not_empty((train, test), root, name)
    return train, test
