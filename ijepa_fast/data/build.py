"""Makes the table of a data set: lists its sources, looks into every file.

A file is looked into again only where its path, size or time of change differs from an older
table's.
"""

import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.data.headers import Image, Inspected, inspect_file, inspect_item, inspect_shard
from ijepa_fast.data.index import COLUMNS, Index, Texts, stamp
from ijepa_fast.data.objects import find_object
from ijepa_fast.data.pixels import EXTENSIONS
from ijepa_fast.data.reading import thread_pool
from ijepa_fast.data.sets.named import named_data
from ijepa_fast.data.sources import SHARDS, Bad, Entry, Source, list_source
from ijepa_fast.errors import TooManyBadFiles, UsageError

__all__ = [
    "ADVICE",
    "NoImages",
    "Sources",
    "build_index",
    "lost_parts",
    "require_size",
    "require_whole",
    "source_key",
    "source_names",
]

logger = logging.getLogger(__name__)

ADVICE = ", or add --data.allow-missing to use the rest"

Sources = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Files for one task of the pool: a future costs about a kilobyte, and there may be millions.
_CHUNK = 64
# Rows that are kept as objects before they become arrays.
_FLUSHED = 1 << 16
_SAID_EVERY = 10.0
_OF_IMAGE = ("offset", "length", "width", "height", "format", "plain", "verified", "mark")


class NoImages(UsageError):
    """Sources hold no usable image."""


def build_index(
    sources: Sources,
    *,
    threads: int | None = None,
    verify: bool = False,
    older: Index | None = None,
) -> Index:
    """Lists images and reads their headers.

    Rows come source by source; in a folder they are sorted by the bytes of their relative path, in
    a shard they keep its order. Hidden files are skipped, symbolic links to files and folders are
    followed, members of a shard that are links are not.

    Args:
        sources: a folder, list file, tar shard or range of shards, or several (see `sources`).
        threads: threads that read headers; by default twice the number of cores, at most 16.
        verify: decode every image wholly, which finds damage between header and end.
        older: a table of the same sources; what has not changed since is taken over.

    Returns:
        The table. Broken files are in its `bad`, with the reason.

    Raises:
        UsageError: a source is missing, given twice or of no known kind, or they hold no usable
            image.
    """
    given = source_names(sources)
    if not given:
        raise UsageError("data.root must name at least one source, got none")
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice:
        raise UsageError(f"data.root must name every source once, got {twice!r} twice")
    listed = [list_source(source) for source in given]
    threads = threads or min(2 * (os.cpu_count() or 1), 16)
    stop = threading.Event()
    parts = _Parts()
    total = sum(len(source.entries) for source in listed)
    said, done = time.monotonic(), 0
    # Pillow warns of metadata that is not used here, and of large images, which are refused.
    # The filter is the process's, so it is set once around the threads, not in each.
    with warnings.catch_warnings(), thread_pool(threads, "ijepa-index", stop) as pool:
        warnings.simplefilter("ignore")
        for source in listed:
            parts.begin(source)
            known = _Known(older, source, verify=verify) if older else None
            for inspected in _inspected(pool, source, verify, known, stop):
                parts.add(inspected)
                done += 1
                if time.monotonic() - said > _SAID_EVERY:
                    said = time.monotonic()
                    logger.info("looked into %d of %d files", done, total)
    index = replace(parts.finish(), sources=tuple(map(source_key, given)))
    _require_images(given, index)
    counts = f"{len(index)} images in {len(index.classes)} classes, {len(index.bad)} unusable"
    level = logging.INFO if index.bad or index.ignored else logging.DEBUG
    where = ", ".join(given)
    logger.log(level, "%s: %s image files, %d other files ignored", where, counts, index.ignored)
    return index


def source_names(sources: Sources) -> list[str]:
    """What the sources are called; for the name of a data set, its folder of training images,
    which is written where it is not there yet (see `named_data`).
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    names = [os.fspath(source) for source in sources]
    folders = [named_data(name) for name in names]
    return [
        str(folder / "train") if folder else name
        for folder, name in zip(folders, names, strict=True)
    ]


def source_key(name: str) -> str:
    """What a table knows a source by: its absolute path; of an object also the fingerprint."""
    given = find_object(name)
    if not given:
        return os.path.abspath(name)
    return f"{name} of {len(given.source)}, {given.fingerprint}"


def _inspected(
    pool: ThreadPoolExecutor,
    source: Source,
    verify: bool,
    known: "_Known | None",
    stop: threading.Event,
) -> Iterator[Inspected]:
    """Every entry of a source, in order."""

    def look(entries: Sequence[Entry]) -> list[Inspected]:
        found = []
        for path, label in entries:
            again = known.find(path, label) if known else None
            if again:
                found.append(again)
            elif source.given is not None:
                found.append(inspect_item(source.given, path, verify=verify))
            elif path.lower().endswith(SHARDS):
                found.append(inspect_shard(source.root, path, label, verify=verify, stop=stop))
            else:
                found.append(inspect_file(source.root, path, label, verify=verify))
        return found

    return chain.from_iterable(pool.map(look, _tasks(source.entries)))


def _tasks(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Pieces of a listing for the pool; a shard is work enough for one."""
    piece: list[Entry] = []
    for entry in entries:
        shard = entry.path.lower().endswith(SHARDS)
        if piece and (shard or len(piece) == _CHUNK):
            yield piece
            piece = []
        if shard:
            yield [entry]
        else:
            piece.append(entry)
    if piece:
        yield piece


class _Known:
    """What an older table says of files that have not changed since."""

    def __init__(self, older: Index, source: Source, *, verify: bool) -> None:
        root = source.root
        self._older, self._root, self._verify = older, root, verify
        # whose line may give its shards another class today
        self._listed = source.listed
        self._file_of: dict[bytes, int] = {}
        for place, known in enumerate(older.roots):
            if known == root:
                begin = int(older.root_start[place])
                last = place + 1 == len(older.roots)
                end = len(older.paths) if last else int(older.root_start[place + 1])
                self._file_of |= {older.paths.raw(file): file for file in range(begin, end)}
        # rows of a file stand together, and files in the order of their rows
        self._first = np.searchsorted(older.file, np.arange(len(older.paths) + 1))
        self._ignored = dict(older.ignored_in.tolist())
        self._bad: dict[str, list[int]] = {}
        for place, path in enumerate(older.bad_paths):
            self._bad.setdefault(path, []).append(place)

    def find(self, path: str, label: str | None) -> Inspected | None:
        """What was found in a file, if it is as it was."""
        older, where = self._older, os.path.join(self._root, path)
        if self._listed and path.lower().endswith(SHARDS):
            return None
        file = self._file_of.get(os.fsencode(path))
        # once, also where two sources overlap
        bad = list({older.bad[place]: place for place in self._bad.get(where, [])}.values())
        stamps = {int(older.bad_stamps[place]) for place in bad}
        if file is not None:
            stamps.add(int(older.stamps[file]))
        try:
            if stamps != {stamp(os.stat(where))}:
                return None
        except OSError:
            return None
        rows = range(0) if file is None else range(*self._first[file : file + 2].tolist())
        if self._verify and not older.verified[rows.start : rows.stop].all():
            return None
        return Inspected(
            path,
            [self._image(row, label) for row in rows],
            [Bad(self._name(*older.bad[place]), older.bad[place][1]) for place in bad],
            stamps.pop(),
            0 if file is None else self._ignored.get(file, 0),
        )

    def _name(self, name: str, _reason: str) -> str:
        """Names of a table of several sources have the root before them."""
        several = len(self._older.roots) > 1
        return name.removeprefix(self._root + os.sep) if several else name

    def _image(self, row: int, label: str | None) -> Image:
        older = self._older
        member = older.members[row] if older.members is not None else ""
        if member:
            code = int(older.label[row])
            label = older.classes[code] if code >= 0 else None
        values = {name: getattr(older, name)[row].item() for name in _OF_IMAGE}
        return Image(member=member, label=label, **values)


class _Parts:
    """Rows as they are found, file after file; columns in pieces of plain arrays."""

    def __init__(self) -> None:
        self._columns: dict[str, list[NDArray[np.generic]]] = {name: [] for name in COLUMNS}
        self._labels: dict[str, int] = {}
        self._paths: list[str] = []
        self._stamps: list[int] = []
        self._members: list[str] = []
        self._sharded = False
        self._roots: list[str] = []
        self._root_start: list[int] = []
        self._bad: list[tuple[int, str, int, Bad]] = []
        self._ignored = 0
        self._ignored_in: list[tuple[int, int]] = []
        self._rows: list[tuple[int, Image]] = []
        self._watched: list[tuple[str, int]] = []

    def begin(self, source: Source) -> None:
        """The files from here on belong to this source."""
        self._roots.append(source.root)
        self._root_start.append(len(self._paths))
        self._ignored += source.ignored
        self._bad += [(len(self._roots) - 1, bad.path, 0, bad) for bad in source.bad]
        self._watched += source.watched

    def add(self, inspected: Inspected) -> None:
        """Takes over one file."""
        root = len(self._roots) - 1
        self._bad += [(root, inspected.path, inspected.stamp, bad) for bad in inspected.bad]
        self._ignored += inspected.ignored
        if not inspected.images:
            return
        file = len(self._paths)
        if inspected.ignored:
            self._ignored_in.append((file, inspected.ignored))
        self._paths.append(inspected.path)
        self._stamps.append(inspected.stamp)
        self._rows += [(file, image) for image in inspected.images]
        if len(self._rows) >= _FLUSHED:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        images = [image for _, image in rows]
        codes = self._labels
        values: dict[str, list[int]] = {
            "file": [file for file, _ in rows],
            "label": [
                -1 if i.label is None else codes.setdefault(i.label, len(codes)) for i in images
            ],
            **{name: [getattr(i, name) for i in images] for name in _OF_IMAGE},
        }
        for name, column in values.items():
            self._columns[name].append(np.array(column, dtype=COLUMNS[name]))
        members = [image.member for image in images]
        self._sharded = self._sharded or any(members)
        self._members += members

    def finish(self) -> Index:
        """The table of all files that were added; none may be added after it."""
        self._flush()
        columns = {name: np.concatenate(pieces) for name, pieces in self._columns.items()}
        numbers = all(label.isdecimal() for label in self._labels)
        classes = sorted(self._labels, key=_as_number if numbers else os.fsencode)
        new = np.empty(len(classes) + 1, dtype=np.int32)
        new[[self._labels[name] for name in classes]] = np.arange(len(classes), dtype=np.int32)
        new[-1] = -1
        columns["label"] = new[columns["label"]]
        several = len(self._roots) > 1
        bad = sorted(
            (
                os.path.join(self._roots[root], entry.path) if several else entry.path,
                entry.reason,
                os.path.join(self._roots[root], path),
                known,
            )
            for root, path, known, entry in self._bad
        )
        bad.sort(key=lambda entry: os.fsencode(entry[0]))
        return Index(
            **columns,  # type: ignore[arg-type]
            paths=Texts.of(self._paths),
            members=Texts.of(self._members) if self._sharded else None,
            stamps=np.array(self._stamps, dtype=np.uint64),
            roots=tuple(self._roots),
            root_start=np.array(self._root_start, dtype=np.int32),
            classes=tuple(classes),
            bad=tuple((name, reason) for name, reason, _, _ in bad),
            bad_paths=tuple(path for _, _, path, _ in bad),
            bad_stamps=np.array([known for _, _, _, known in bad], dtype=np.uint64),
            ignored=self._ignored,
            ignored_in=np.array(self._ignored_in, dtype=np.int64).reshape(-1, 2),
            watched=Texts.of(path for path, _ in self._watched),
            watched_times=np.array([changed for _, changed in self._watched], dtype=np.int64),
        )


def _as_number(label: str) -> tuple[int, str]:
    return int(label), label


def _require_images(given: Sequence[str], index: Index) -> None:
    if len(index):
        return
    names = ", ".join(repr(source) for source in given)
    if index.bad:
        name, reason = index.bad[0]
        found = f"{names} with {len(index.bad)} unusable files"
        raise NoImages(f"data.root must hold images, got {found}; the first: {name!r}: {reason}")
    kinds = " ".join((*EXTENSIONS, *SHARDS))
    raise NoImages(
        f"data.root must hold images ({kinds}), got {names} with {index.ignored} other files"
    )


def require_size(index: Index, min_side: int) -> None:
    """Raises UsageError if an image is smaller than `min_side` pixels in width or height."""
    small = np.flatnonzero(np.minimum(index.width, index.height) < min_side)
    if small.size:
        row = int(small[0])
        first = f"{index.name(row)!r} of {index.width[row]}x{index.height[row]}"
        others = f" and {small.size - 1} more" if small.size > 1 else ""
        raise UsageError(
            f"images must be at least {min_side} pixels on each side (the patch size), "
            f"got {first}{others}"
        )


def lost_parts(index: Index) -> dict[str, int]:
    """Damaged shards, and folders that cannot be listed, among the unusable files.

    Returns:
        Name -> number of images that are missing, as the other shards let expect; 0: not known.
    """
    lost = dict.fromkeys(
        (name for name, _ in index.bad if name.lower().endswith((os.sep, *SHARDS))),
        0,
    )
    if any(not name.endswith(os.sep) for name in lost):
        counts = np.bincount(index.file, minlength=len(index.paths))
        found = {index.file_name(file): int(counts[file]) for file in index.shard_files.tolist()}
        whole = [count for name, count in found.items() if name not in lost]
        if whole:
            usual = int(np.median(whole))
            for name in lost:
                if not name.endswith(os.sep):
                    lost[name] = max(usual - found.get(name, 0), 0)
    return lost


def require_whole(index: Index) -> None:
    """Raises TooManyBadFiles if a shard is damaged or a folder cannot be listed."""
    lost = lost_parts(index)
    if lost:
        name, reason = next(entry for entry in index.bad if entry[0] in lost)
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        known = sum(lost.values())
        about = f"; about {known} images are missing" if known else ""
        raise TooManyBadFiles(
            f"shards and folders of data.root must be whole, got {name!r}: {reason}{more}{about}; "
            f"mend them{ADVICE}"
        )
