"""MNIST's IDX files (Fashion-MNIST: Xiao et al., 2017) as lossless PNG files in a cache folder.

The images then go through the same path as any folder of images. An IDX file is a big-endian
header (two zero bytes, 8 for uint8, the number of dimensions, the dimensions as uint32) and the
values; it may be gzipped.
"""

import gzip
import hashlib
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.atomic import atomic_write
from ijepa_fast.errors import UsageError

__all__ = ["EMBEDDED", "FASHION_MNIST", "cache_folder", "find_idx", "write_idx"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""
EMBEDDED = Path(__file__).parent / "fashion_mnist_10k"
"""The 10,000 test images of Fashion-MNIST, which come with this package."""
EMBEDDED_TRAIN = 8000
"""So many of them, in the order of a fixed permutation, are for training; the rest is held out."""

_PARTS = {"train": "train", "test": "t10k"}
_KINDS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
_MANIFEST = "manifest.json"
_VERSION = 1
_UINT8 = 8
_MOST_BYTES = 1 << 30
_FASHION = (
    "t-shirt_top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle_boot",
)
# SHA-256 of Fashion-MNIST's 60,000 training and 10,000 test labels
_FASHION_LABELS = (
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
)
_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache.

    Raises:
        UsageError: neither is known.
    """
    # the XDG specification asks for relative values to be ignored
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        user = os.getuid()
        raise UsageError(
            f"XDG_CACHE_HOME must be a folder where there is no home, got none for user id {user}"
        ) from None


def find_idx(folder: Path) -> dict[str, Path] | None:
    """The four files of a folder, or None where it has no training images in this format.

    Returns:
        `train images`, `train labels`, `test images`, `test labels`.

    Raises:
        ValueError: some of them are there and some are missing.
    """
    found = {}
    for part, prefix in _PARTS.items():
        for kind, name in _KINDS.items():
            for ending in ("", ".gz"):
                path = folder / f"{prefix}-{name}{ending}"
                if path.is_file():
                    found[f"{part} {kind}"] = path
                    break
    if not found:
        return None
    missing = {f"{p} {k}" for p in _PARTS for k in _KINDS} - found.keys()
    if missing:
        raise ValueError(
            f"IDX files must be four (train-images-idx3-ubyte, ...), got none of "
            f"{', '.join(sorted(missing))} in {folder}"
        )
    return found


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The values of an IDX file of bytes."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} must be a readable IDX file: {error}") from None
    start = 4 + 4 * dimensions
    magic = bytes((0, 0, _UINT8, dimensions))
    if len(data) < start or data[:4] != magic:
        raise ValueError(
            f"{path} must be an IDX file of bytes with {dimensions} dimensions (begin with "
            f"{magic.hex()}), got {data[:4].hex() or 'nothing'}"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    if min(shape) < 1 or len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path} must hold {shape} bytes, got {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def write_idx(folder: Path, cache: Path | None = None) -> Path:
    """Writes the images of IDX files once, as `{train,test}/<class>/<number>.png`.

    Args:
        folder: with the four files, see `find_idx`; or `EMBEDDED`, whose two are split.
        cache: parent folder; by default $XDG_CACHE_HOME, or ~/.cache.

    Returns:
        `<cache>/ijepa-fast/idx-<digest>`, the same for the same files. Several processes may call
        this at once: each writes to a folder of its own, and the first one's is used.

    Raises:
        ValueError: the files are missing or damaged, or images and labels are not as many.
        OSError: the cache folder cannot be written.
    """
    if folder == EMBEDDED:
        files = {f"test {kind}": folder / f"t10k-{name}.gz" for kind, name in _KINDS.items()}
    else:
        files = find_idx(folder) or {}
    if not files:
        raise ValueError(f"data must be a folder with IDX files, got {folder}")
    digest = hashlib.sha256(f"version {_VERSION}".encode())
    for name in sorted(files):
        digest.update(hashlib.sha256(files[name].read_bytes()).digest())
    final = (cache or cache_folder()) / "ijepa-fast" / f"idx-{digest.hexdigest()[:16]}"
    if (final / _MANIFEST).is_file():
        _require_whole(final)
        return final
    _LOG.info("writing the images of %s to %s", folder, final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(final) as own:
            counts = _write(files, own)
            about = json.dumps({"source": str(folder), "images": counts})
            (own / _MANIFEST).write_text(about + "\n")
    except OSError as error:
        # else another process was faster
        if not (final / _MANIFEST).is_file():
            raise OSError(
                f"cannot write the images of {folder} to {final} ({error}); set XDG_CACHE_HOME to "
                "choose another cache folder"
            ) from error
    return final


def _parts(files: dict[str, Path]) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Pixels (n, height, width) and labels (n,) of `train` and `test`."""
    parts = {}
    for part in _PARTS:
        if f"{part} images" in files:
            images, labels = _read(files[f"{part} images"], 3), _read(files[f"{part} labels"], 1)
            if len(images) != len(labels):
                raise ValueError(
                    f"{part} images and labels must be as many, got {len(images)} and "
                    f"{len(labels)} in {files[f'{part} images'].parent}"
                )
            parts[part] = images, labels
    if "train" in parts:
        return parts
    images, labels = parts["test"]
    order = np.random.default_rng(0).permutation(len(labels))
    rows = {"train": order[:EMBEDDED_TRAIN], "test": order[EMBEDDED_TRAIN:]}
    return {part: (images[of], labels[of]) for part, of in rows.items()}


def _write(files: dict[str, Path], own: Path) -> dict[str, int]:
    # imported here: naming a data set must not ask for Pillow
    from PIL import Image

    known = any(
        hashlib.sha256(_read(path, 1).tobytes()).hexdigest() in _FASHION_LABELS
        for name, path in files.items()
        if "labels" in name
    )
    counts = {}
    for part, (images, labels) in _parts(files).items():
        names = [_FASHION[n] if known else str(n) for n in range(int(labels.max()) + 1)]
        for number in np.unique(labels):
            (own / part / names[number]).mkdir(parents=True)
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            path = own / part / names[label] / f"{number:05d}.png"
            Image.fromarray(pixels).save(path, compress_level=1)
        counts[part] = len(images)
    return counts


def _require_whole(folder: Path) -> None:
    """Counts the files: the manifest comes last, so only a hand can have removed one."""
    counts = json.loads((folder / _MANIFEST).read_text())["images"]
    for part, count in counts.items():
        found = sum(len(files) for _, _, files in os.walk(folder / part))
        if found != count:
            raise ValueError(
                f"{folder / part} must hold {count} images, got {found}: delete {folder}"
            )
