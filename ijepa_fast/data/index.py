"""The table of a folder's images: one row an image, a byte range with its label and size.

Everything later (order, crops, decoders) works on rows of this table; no folder is listed again.
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.data.pixels import EXTENSIONS, check_mode, describe, is_plain, open_image

__all__ = ["Index", "build_index", "index_from_arrays", "index_to_arrays"]

logger = logging.getLogger(__name__)

# A file that ends in its format's end marker is whole; some writers pad or append a little.
_TAIL = 1024
_END_MARKER = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
# Files for one task of the pool: a future costs about a kilobyte, and there may be millions.
_CHUNK = 64
_COLUMNS: dict[str, type] = {
    "file": np.int32,
    "offset": np.int64,
    "length": np.int64,
    "label": np.int32,
    "width": np.int32,
    "height": np.int32,
    "plain": np.bool_,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """A data set as a table of byte ranges; a sample id is a row number.

    Attributes:
        file: int32 (N,), the row's entry in `paths`.
        offset: int64 (N,), first byte of the image in its file.
        length: int64 (N,), bytes.
        label: int32 (N,), entry in `classes`, or -1.
        width: int32 (N,), pixels, as stored (EXIF orientation ignored).
        height: int32 (N,), pixels.
        plain: bool (N,), whether DALI may decode the row; Pillow decodes the others.
        paths: files relative to `root`; undecodable bytes as surrogate escapes.
        classes: names of the labels, sorted.
        root: the folder.
        bad: (path, reason) of files that look like images and are not usable.
        ignored: number of files that do not look like images.
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    label: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    plain: NDArray[np.bool_]
    paths: tuple[str, ...]
    classes: tuple[str, ...]
    root: str
    bad: tuple[tuple[str, str], ...] = ()
    ignored: int = 0

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file)

    def name(self, row: int) -> str:
        """The row's file, relative to `root`."""
        return self.paths[int(self.file[row])]

    def read(self, row: int) -> bytes:
        """The encoded image.

        Raises:
            OSError: the file cannot be read, is no regular file any more or has become shorter.
        """
        length = int(self.length[row])
        with _opened(os.path.join(self.root, self.name(row))) as descriptor:
            data = os.pread(descriptor, length, int(self.offset[row]))
        if len(data) != length:
            raise OSError(f"the file has changed: {length} bytes expected, {len(data)} read")
        return data

    def digest(self) -> str:
        """SHA-256 (hex) of paths, byte ranges and sizes: tells a resumed run of changed data."""
        digest = hashlib.sha256(_pack(self.name(row) for row in range(len(self))).tobytes())
        for column in (self.offset, self.length, self.width, self.height):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()


class _Image(NamedTuple):
    path: str
    length: int
    width: int
    height: int
    plain: bool


class _Bad(NamedTuple):
    path: str
    reason: str


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file descriptor of a regular file. A FIFO is refused, never waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        yield descriptor
    finally:
        os.close(descriptor)


def build_index(
    root: str | os.PathLike[str], *, threads: int | None = None, min_side: int = 1
) -> Index:
    """Lists the images below a folder and reads their headers.

    Rows are sorted by the bytes of their relative path. The class of an image is the name of the
    folder that it lies in; images directly in `root` have none. Hidden files are skipped.

    Args:
        root: the folder, any nesting; symbolic links are followed.
        threads: threads that read headers; by default twice the number of cores, at most 16.
        min_side: smallest width and height of an image, pixels (the patch size).

    Returns:
        The table. Broken files are in its `bad`, with the reason.

    Raises:
        ValueError: `root` is missing, not a folder or without a usable image; an image is smaller
            than `min_side`.
    """
    folder = Path(root)
    if not folder.exists():
        raise ValueError(f"data.root must be an existing folder, got {str(folder)!r}")
    if not folder.is_dir():
        raise ValueError(f"data.root must be a folder, not a file, got {str(folder)!r}")
    listing = _Listing(str(folder))
    threads = threads or min(2 * (os.cpu_count() or 1), 16)
    # Pillow warns of metadata that is not used here, and of large images, which `_probe` refuses.
    # The filter is the process's, so it is set once around the threads, not in each.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads, "ijepa-index") as pool:
        warnings.simplefilter("ignore")
        paths = listing.images
        chunks = (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
        probed = pool.map(lambda chunk: [_probe(listing.root, path) for path in chunk], chunks)
        found = [item for chunk in probed for item in chunk]
    images = [item for item in found if isinstance(item, _Image)]
    bad = sorted(
        [*listing.bad, *(item for item in found if isinstance(item, _Bad))], key=_path_bytes
    )
    _require_images(folder, images, bad, listing.ignored)
    _require_size(images, min_side)

    parents = [os.path.basename(os.path.dirname(image.path)) for image in images]
    classes = tuple(sorted({name for name in parents if name}, key=os.fsencode))
    label_of = {name: label for label, name in enumerate(classes)}
    index = Index(
        file=np.arange(len(images), dtype=np.int32),
        offset=np.zeros(len(images), dtype=np.int64),
        length=np.array([image.length for image in images], dtype=np.int64),
        label=np.array([label_of.get(name, -1) for name in parents], dtype=np.int32),
        width=np.array([image.width for image in images], dtype=np.int32),
        height=np.array([image.height for image in images], dtype=np.int32),
        plain=np.array([image.plain for image in images], dtype=np.bool_),
        paths=tuple(image.path for image in images),
        classes=classes,
        root=listing.root,
        bad=tuple((item.path, item.reason) for item in bad),
        ignored=listing.ignored,
    )
    counts = f"{len(index)} images in {len(classes)} classes, {len(bad)} unusable image files"
    level = logging.INFO if bad or index.ignored else logging.DEBUG
    logger.log(level, "%s: %s, %d other files ignored", listing.root, counts, index.ignored)
    return index


def _require_images(folder: Path, images: list[_Image], bad: list[_Bad], ignored: int) -> None:
    if images:
        return
    if bad:
        first = f"the first: {bad[0].path!r}: {bad[0].reason}"
        found = f"{str(folder)!r} with {len(bad)} unusable files"
        raise ValueError(f"data.root must hold images, got {found}; {first}")
    kinds = " ".join(EXTENSIONS)
    raise ValueError(
        f"data.root must hold images ({kinds}), got {str(folder)!r} with {ignored} other files"
    )


def _require_size(images: list[_Image], min_side: int) -> None:
    small = [image for image in images if min(image.width, image.height) < min_side]
    if small:
        first = f"{small[0].path!r} of {small[0].width}x{small[0].height}"
        others = f" and {len(small) - 1} more" if len(small) > 1 else ""
        raise ValueError(
            f"images must be at least {min_side} pixels on each side (the patch size), "
            f"got {first}{others}"
        )


class _Listing:
    """What lies below a folder: `images` (sorted), `bad` folders, the number `ignored`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.images: list[str] = []
        self.bad: list[_Bad] = []
        self.ignored = 0
        status = os.stat(root)
        self._walk((status.st_dev, status.st_ino))
        self.images.sort(key=os.fsencode)

    def _walk(self, identity: tuple[int, int]) -> None:
        pending = [("", frozenset({identity}))]
        while pending:
            relative, ancestors = pending.pop()
            try:
                with os.scandir(os.path.join(self.root, relative)) as entries:
                    listed = [entry for entry in entries if not entry.name.startswith(".")]
            except OSError as error:
                self.bad.append(_Bad(relative + os.sep, f"the folder {describe(error)}"))
                continue
            for entry in listed:
                path = os.path.join(relative, entry.name)
                if _is_folder(entry):
                    status = entry.stat()
                    identity = (status.st_dev, status.st_ino)
                    # A link to a folder that contains it would never end.
                    if identity not in ancestors:
                        pending.append((path, ancestors | {identity}))
                elif not entry.name.lower().endswith(EXTENSIONS):
                    self.ignored += 1
                else:
                    self.images.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _path_bytes(item: _Bad) -> bytes:
    return os.fsencode(item.path)


def _probe(root: str, path: str) -> _Image | _Bad:
    """Reads the header of one file; the pixels only if the end marker is missing."""
    try:
        with _opened(os.path.join(root, path)) as descriptor:
            length = os.fstat(descriptor).st_size
            if length == 0:
                return _Bad(path, "the file is empty")
            with os.fdopen(os.dup(descriptor), "rb") as file, open_image(file) as image:
                width, height = image.size
                _check_pixels(width, height)
                check_mode(image)
                plain = is_plain(image, os.pread(descriptor, 32, 0))
                marker = _END_MARKER.get(image.format or "")
                tail = os.pread(descriptor, _TAIL, max(length - _TAIL, 0))
                if marker is not None and marker not in tail:
                    image.load()
    except MemoryError:
        raise
    # Pillow raises nearly anything on a hostile file; all of it means that the file is not usable.
    except Exception as error:  # noqa: BLE001
        return _Bad(path, _reason(root, path, error))
    return _Image(path, length, width, height, plain)


def _check_pixels(width: int, height: int) -> None:
    from PIL import Image

    # Pillow only warns above its limit and refuses twice of it; here there is one limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"an image must have at most {limit} pixels, got {width}x{height}")


def _reason(root: str, path: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and os.path.islink(os.path.join(root, path)):
        return "a broken symbolic link"
    return describe(error)


def index_to_arrays(index: Index) -> dict[str, NDArray[np.generic]]:
    """The index as plain arrays without objects, so that rank 0 can broadcast it as tensors."""
    arrays: dict[str, NDArray[np.generic]] = {name: getattr(index, name) for name in _COLUMNS}
    arrays["paths"] = _pack(index.paths)
    arrays["classes"] = _pack(index.classes)
    arrays["root"] = _pack([index.root])
    arrays["bad"] = _pack(text for entry in index.bad for text in entry)
    arrays["ignored"] = np.array([index.ignored], dtype=np.int64)
    return arrays


def index_from_arrays(arrays: dict[str, NDArray[np.generic]]) -> Index:
    """The inverse of `index_to_arrays`.

    Raises:
        ValueError: an array is missing.
    """
    missing = [
        name
        for name in (*_COLUMNS, "paths", "classes", "root", "bad", "ignored")
        if name not in arrays
    ]
    if missing:
        raise ValueError(f"arrays must hold every column of an index, got none for {missing}")
    bad = _unpack(arrays["bad"])
    return Index(
        **{name: arrays[name].astype(dtype, copy=False) for name, dtype in _COLUMNS.items()},
        paths=_unpack(arrays["paths"]),
        classes=_unpack(arrays["classes"]),
        root=_unpack(arrays["root"])[0],
        bad=tuple(zip(bad[::2], bad[1::2], strict=True)),
        ignored=int(arrays["ignored"].reshape(-1)[0].item()),
    )


def _pack(texts: Iterable[str]) -> NDArray[np.uint8]:
    """Texts as UTF-8, each ended by a NUL (which no path can hold)."""
    joined = "".join(text.replace("\0", "") + "\0" for text in texts)
    return np.frombuffer(bytearray(joined.encode("utf-8", "surrogateescape")), dtype=np.uint8)


def _unpack(packed: NDArray[np.generic]) -> tuple[str, ...]:
    return tuple(packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])
