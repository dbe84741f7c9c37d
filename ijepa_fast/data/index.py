"""The table of a data set: one row an image, a byte range of a file with its label and size.

Everything later (order, crops, decoders) works on rows of this table; no folder is listed again.
Names lie in one block of bytes and columns are plain arrays, so that a table of any length can be
a memory-mapped file that all ranks of a machine share (see `table_file`). `build` makes tables.
"""

import errno
import hashlib
import os
import re
import resource
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from stat import S_ISREG
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.data.objects import ImageSource, find_object, item_of, read_item

__all__ = [
    "COLUMNS",
    "FORMATS",
    "MARKED",
    "Index",
    "Texts",
    "index_from_arrays",
    "index_to_arrays",
    "mark",
    "open_regular",
    "stamp",
]

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
"""Formats that are read; the column `format` counts into it."""

COLUMNS: dict[str, type[np.generic]] = {
    "file": np.int32,
    "offset": np.int64,
    "length": np.uint32,
    "label": np.int32,
    "width": np.int32,
    "height": np.int32,
    "format": np.uint8,
    "plain": np.bool_,
    "verified": np.bool_,
    "mark": np.uint64,
}
# columns that do not have a row for each image
_OTHERS: dict[str, type[np.generic]] = {
    "stamps": np.uint64,
    "root_start": np.int32,
    "bad_stamps": np.uint64,
    "ignored_in": np.int64,
    "watched_times": np.int64,
}
_TEXTS = ("paths", "members", "classes", "roots", "bad", "bad_paths", "watched", "sources")
# Shards stay open while they are read, as far as the process may open files.
_OPEN_SHARDS = 256
MARKED = 1024
"""So many bytes at an image's end tell it from another of the same length."""
_MASK = (1 << 64) - 1


class Texts(Sequence[str]):
    """Texts in one block of bytes: millions of them need no Python object.

    Args:
        blob: uint8, the texts in UTF-8 (undecodable bytes of file names as they are), each ended
            by a NUL, which no path can hold.
        start: int64 (n + 1,), where each begins, and the length of the block.
    """

    def __init__(self, blob: NDArray[np.uint8], start: NDArray[np.int64]) -> None:
        self.blob, self.start = blob, start

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Packs texts; NULs in them are left out."""
        encoded = [t.encode("utf-8", "surrogateescape").replace(b"\0", b"") for t in texts]
        lengths = np.fromiter((len(text) + 1 for text in encoded), np.int64, len(encoded))
        start = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum(lengths, out=start[1:])
        joined = b"".join(text + b"\0" for text in encoded)
        return cls(np.frombuffer(joined, dtype=np.uint8), start)

    def raw(self, place: int) -> bytes:
        """The bytes of one text."""
        begin, end = self.start[place], self.start[place + 1]
        return self.blob[begin : end - 1].tobytes()

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.start) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        """One text, or several."""
        if isinstance(place, slice):
            return tuple(self[n] for n in range(*place.indices(len(self))))
        if not -len(self) <= place < len(self):
            raise IndexError(f"a text must be one of {len(self)}, got {place}")
        return self.raw(place % len(self)).decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        """All texts, by row number, decoded one at a time."""
        return (self[place] for place in range(len(self)))


def stamp(status: os.stat_result) -> int:
    """64 bits of a file's size and time of change: other ones mean that it was changed."""
    mixed = (status.st_mtime_ns * 0x9E3779B97F4A7C15 + status.st_size * 0xC2B2AE3D27D4EB4F) & _MASK
    return (mixed ^ (mixed >> 29)) or 1


def mark(encoded: bytes, length: int) -> int:
    """64 bits of an image's length and its last kilobyte.

    Args:
        encoded: the image, or its last `MARKED` bytes.
        length: of the whole image, bytes.
    """
    text = encoded[-MARKED:] + length.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """A descriptor and the status of a regular file. A FIFO is refused, never waited for.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            raise OSError("not a regular file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """A data set as a table of byte ranges; a sample id is a row number.

    Attributes:
        file: int32 (N,), the row's entry in `paths`.
        offset: int64 (N,), first byte of the image in its file.
        length: uint32 (N,), bytes.
        label: int32 (N,), entry in `classes`, or -1.
        width: int32 (N,), pixels, as stored (EXIF orientation ignored).
        height: int32 (N,), pixels.
        format: uint8 (N,), entry in `FORMATS`.
        plain: bool (N,), whether DALI may decode the row; Pillow decodes the others.
        verified: bool (N,), whether the whole image was decoded once.
        mark: uint64 (N,), see `mark`; images of one content have the same.
        paths: files (F,), relative to their root; undecodable bytes as surrogate escapes.
        members: names (N,) inside a tar shard, empty for files of their own; none at all without
            shards.
        stamps: uint64 (F,) of size and time of change, 0 where these were too young to be trusted.
        roots: absolute folders, one for each source.
        root_start: int32 (len(roots),), the first of each root's entries in `paths`.
        sources: what the table was made of, absolute names.
        classes: names of the labels, sorted (as numbers where all are).
        bad: (name, reason) of what looks like an image and is not usable.
        bad_paths: absolute files that the entries of `bad` are or lie in.
        bad_stamps: uint64 (len(bad),), their stamps, 0 where there is none.
        table: name of the kept table that this was opened from; another one once it is renewed.
        ignored: number of files (and members of shards) that do not look like images.
        ignored_in: int64 (k, 2), entry of `paths` and number, for shards that hold such members.
        watched: absolute folders and list files: as long as these stand, the listing does.
        watched_times: int64 (len(watched),), their times of change in ns, 0 where not trusted.
    """

    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    length: NDArray[np.uint32]
    label: NDArray[np.int32]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    format: NDArray[np.uint8]
    plain: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    mark: NDArray[np.uint64]
    paths: Texts
    members: Texts | None
    stamps: NDArray[np.uint64]
    roots: tuple[str, ...]
    root_start: NDArray[np.int32]
    classes: tuple[str, ...]
    sources: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    bad_paths: tuple[str, ...] = ()
    bad_stamps: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    table: str = ""
    ignored: int = 0
    ignored_in: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    watched: Texts = field(default_factory=lambda: Texts.of(()))
    watched_times: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    _shards: dict[int, "_Shard"] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.file)

    def file_name(self, file: int) -> str:
        """A file as it is named in messages: relative to the root where there is only one."""
        path = self.paths[file]
        if len(self.roots) == 1:
            return path
        return os.path.join(self.roots[self._root(file)], path)

    def name(self, row: int) -> str:
        """The row's file, with the member's name behind it if the file is a tar shard."""
        name = self.file_name(int(self.file[row]))
        member = self.members[row] if self.members is not None else ""
        return f"{name}/{member}" if member else name

    def _root(self, file: int) -> int:
        return int(np.searchsorted(self.root_start, file, side="right")) - 1

    def file_path(self, file: int) -> str:
        """Where a file lies."""
        return os.path.join(self.roots[self._root(file)], self.paths[file])

    def path(self, row: int) -> str:
        """Where the row's file lies."""
        return self.file_path(int(self.file[row]))

    def root(self, row: int) -> str:
        """The folder of the row's source."""
        return self.roots[self._root(int(self.file[row]))]

    @property
    def shard_files(self) -> NDArray[np.int64]:
        """Entries of `paths` that are tar shards."""
        if self.members is None:
            return np.zeros(0, dtype=np.int64)
        return np.unique(self.file[np.diff(self.members.start) > 1]).astype(np.int64)

    def rows_named(self, name: str) -> NDArray[np.int64]:
        """Rows of this name; none where there is no such one. Searches bytes, not row by row."""
        if self.members is None and len(self.roots) == 1:
            wanted = name.encode("utf-8", "surrogateescape")
            block = self.paths.blob.data
            found = [m.start() for m in re.finditer(re.escape(wanted) + b"\0", block)]
            files = np.searchsorted(self.paths.start, found)
            exact = self.paths.start[files] == found
            return np.flatnonzero(np.isin(self.file, files[exact]))
        return np.array([row for row in range(len(self)) if self.name(row) == name], np.int64)

    def read(self, row: int) -> bytes:
        """The encoded image.

        Raises:
            OSError: the file cannot be read, is no regular file any more or has changed.
        """
        file, length = int(self.file[row]), int(self.length[row])
        given = self._objects.get(self._root(file)) if self._objects else None
        if given is not None:
            data = read_item(given, item_of(self.paths[file]))
        elif self.members is not None and self.members.raw(row):
            shard = self._shard(file)
            data = os.pread(shard.descriptor, length, int(self.offset[row]))
        else:
            descriptor, status = open_regular(self.file_path(file))
            try:
                if status.st_size != length:
                    raise OSError(
                        f"the file has changed: {length} bytes expected, it has {status.st_size}"
                    )
                data = os.pread(descriptor, length, 0)
            finally:
                os.close(descriptor)
        if len(data) != length:
            raise OSError(f"the file has changed: {length} bytes expected, {len(data)} read")
        if mark(data, length) != int(self.mark[row]):
            raise OSError("the file has changed: another image of the same length")
        return data

    @cached_property
    def _objects(self) -> dict[int, ImageSource]:
        """The roots that are objects."""
        found = enumerate(map(find_object, self.roots))
        return {root: given.source for root, given in found if given}

    def _shard(self, file: int) -> "_Shard":
        """An open tar shard; it is closed when it is left out here and nobody reads from it."""
        with self._lock:
            opened = self._shards.get(file)
        if opened:
            return opened
        # not under the lock: a server may take its time
        try:
            opened = _Shard(self.file_path(file))
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self.close()
            opened = _Shard(self.file_path(file))
        with self._lock:
            self._shards[file] = opened
            while len(self._shards) > self._most_shards:
                del self._shards[next(iter(self._shards))]
        return opened

    @cached_property
    def _most_shards(self) -> int:
        return max(1, min(_OPEN_SHARDS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))

    def close(self) -> None:
        """Closes the shards; they are opened again when they are read."""
        with self._lock:
            self._shards.clear()

    def digest(self) -> str:
        """SHA-256 (hex) of names, byte ranges, sizes and marks: tells a resumed run of changed
        data.
        """
        return self._digest

    def matches(self, digest: str) -> bool:
        """Whether a digest is that of this data, of today or of versions without marks in it."""
        return digest == self._digest or digest == self._compute_digest(())

    @cached_property
    def _digest(self) -> str:
        return self._compute_digest((np.ascontiguousarray(self.mark, dtype="<u8"),))

    def _compute_digest(self, more: Iterable[NDArray[np.generic]]) -> str:
        digest = hashlib.sha256(self.paths.blob.data)
        if len(self.roots) > 1:
            digest.update(self.root_start.astype("<i4").tobytes())
        if self.members is not None:
            digest.update(self.members.blob.data)
            digest.update(np.ascontiguousarray(self.file, dtype="<i4").data)
        for column in (self.offset, self.length, self.width, self.height):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        for marks in more:
            digest.update(marks.data)
        return digest.hexdigest()


class _Shard:
    """An open tar shard, closed with the last reference to it: threads may be reading from it."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor, _ = open_regular(path)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def index_to_arrays(index: Index) -> dict[str, NDArray[np.generic]]:
    """The index as plain arrays without objects, to be broadcast or kept in a file.

    What follows from the rest is left out: files and offsets where each image is a file of its own.
    """
    names = (*COLUMNS, *_OTHERS)
    arrays: dict[str, NDArray[np.generic]] = {name: getattr(index, name) for name in names}
    own = index.members is None
    if own and np.array_equal(index.file, np.arange(len(index), dtype=np.int32)):
        del arrays["file"], arrays["offset"]
    texts: dict[str, Any] = {
        "paths": index.paths,
        "classes": Texts.of(index.classes),
        "roots": Texts.of(index.roots),
        "bad": Texts.of(text for entry in index.bad for text in entry),
        "bad_paths": Texts.of(index.bad_paths),
        "watched": index.watched,
        "sources": Texts.of(index.sources),
    }
    if index.members is not None:
        texts["members"] = index.members
    for name, packed in texts.items():
        arrays[name] = packed.blob
        arrays[f"{name}_start"] = packed.start
    arrays["ignored"] = np.array([index.ignored], dtype=np.int64)
    arrays["digest"] = np.frombuffer(bytes.fromhex(index.digest()), dtype=np.uint8)
    return arrays


def index_from_arrays(arrays: dict[str, NDArray[np.generic]]) -> Index:
    """The inverse of `index_to_arrays`.

    Raises:
        ValueError: an array is missing or does not fit the others.
    """
    needed = [
        *(name for name in COLUMNS if name not in ("file", "offset")),
        *(f"{name}{end}" for name in _TEXTS if name != "members" for end in ("", "_start")),
        *(*_OTHERS, "ignored", "digest"),
    ]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"arrays must hold every column of an index, got none for {missing}")
    rows = len(arrays["length"])
    columns = dict(arrays)
    columns.setdefault("file", np.arange(rows, dtype=np.int32))
    columns.setdefault("offset", np.broadcast_to(np.int64(0), (rows,)))
    texts = {name: _texts(arrays, name) for name in _TEXTS if name in arrays}
    members = texts.get("members")
    lengths = {name: len(columns[name]) for name in COLUMNS}
    lengths |= {"members": rows if members is None else len(members)}
    wrong = {name: length for name, length in lengths.items() if length != rows}
    if wrong:
        raise ValueError(f"columns of an index must be of one length ({rows}), got {wrong}")
    bad = tuple(texts["bad"])
    for name, count in (
        ("stamps", len(texts["paths"])),
        ("root_start", len(texts["roots"])),
        ("bad_stamps", len(texts["bad_paths"])),
        ("bad_stamps", len(bad) / 2),
        ("watched_times", len(texts["watched"])),
    ):
        if len(columns[name]) != count:
            raise ValueError(f"{name} of an index must have {count} entries")
    _check_places(columns["file"], columns["root_start"], len(texts["paths"]))
    columns["ignored_in"] = columns["ignored_in"].reshape(-1, 2)
    types = (COLUMNS | _OTHERS).items()
    index = Index(
        **{name: columns[name].astype(dtype, copy=False) for name, dtype in types},  # type: ignore[arg-type]
        paths=texts["paths"],
        members=members,
        roots=tuple(texts["roots"]),
        classes=tuple(texts["classes"]),
        bad=tuple(zip(bad[::2], bad[1::2], strict=True)),
        bad_paths=tuple(texts["bad_paths"]),
        ignored=int(arrays["ignored"].reshape(-1)[0].item()),
        watched=texts["watched"],
        sources=tuple(texts["sources"]),
    )
    # known already: computing it again would read the whole table
    index.__dict__["_digest"] = arrays["digest"].tobytes().hex()
    return index


def _check_places(file: NDArray[np.generic], root_start: NDArray[np.generic], count: int) -> None:
    """Raises ValueError where a number leads out of the table."""
    for name, places in (("file", file), ("root_start", root_start)):
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < max(count, 1):
            raise ValueError(f"{name} of an index must name one of {count} paths")
    starts = root_start.tolist()
    if not starts or starts[0] != 0 or starts != sorted(starts):
        raise ValueError(f"root_start of an index must ascend from 0, got {starts[:5]}")


def _texts(arrays: dict[str, NDArray[np.generic]], name: str) -> Texts:
    start = arrays[f"{name}_start"].astype(np.int64, copy=False)
    ends = len(start) and start[0] == 0 and start[-1] == len(arrays[name])
    if not ends or (len(start) > 1 and int(np.diff(start).min()) < 1):
        raise ValueError(f"{name}_start must ascend from 0 to the end of {name}")
    return Texts(arrays[name].astype(np.uint8, copy=False), start)
