"""What a data set is made of: folders, list files and tar shards, listed but not opened.

- A folder: every image below it, and every tar file, which is a shard. The class of an image is
  the name of the folder that it lies in; images directly in the folder have none. A folder that
  links lead to more than once is listed once; the folder of a run is no data.
- A list file (``.txt``, ``.tsv``, UTF-8): a line an image, ``path`` or ``path<TAB>class``; paths
  relative to the list file's folder; blank lines and lines that begin with ``#`` are left out.
- A tar file, or a range of them: ``shards/train-{00000..00099}.tar``.
- An object that Python gives, see `objects`.
"""

import errno
import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ijepa_fast.data.index import open_regular
from ijepa_fast.data.objects import ImageSource, find_object, item_name
from ijepa_fast.data.pixels import EXTENSIONS, describe
from ijepa_fast.errors import UsageError

__all__ = ["OUT_OF_FILES", "SHARDS", "Bad", "Entry", "Source", "list_source", "settled"]

logger = logging.getLogger(__name__)

SHARDS = (".tar",)
LIST_FILES = (".txt", ".tsv")
_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")
_MOST_SHARDS = 1_000_000
_YOUNG_NS = 2_000_000_000
# a server's clock may be ahead of ours by so much
_AHEAD_NS = 3600 * 10**9
_LONGEST_CLASS = 255
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
"""Errors of a process that has too many files open: they say nothing of the file."""


class Entry(NamedTuple):
    """A file to look into: its path relative to the root, and its class where one is known."""

    path: str
    label: str | None


class Bad(NamedTuple):
    """What cannot be used, and why."""

    path: str
    reason: str


@dataclass
class Source:
    """What one source consists of.

    Attributes:
        root: absolute folder that all paths are relative to.
        entries: images and shards, sorted by the bytes of their paths; a list file keeps its order.
        bad: folders that cannot be listed.
        ignored: number of files that do not look like images.
        watched: (absolute path, mtime in ns, 0 if it is not `settled`) of folders and list files:
            as long as these stand, the listing does.
        listed: whether a list file names the entries.
        given: the object that the entries are items of.
    """

    root: str
    entries: list[Entry] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    ignored: int = 0
    watched: list[tuple[str, int]] = field(default_factory=list)
    listed: bool = False
    given: ImageSource | None = None


def list_source(source: str | os.PathLike[str]) -> Source:
    """Lists one source.

    Raises:
        UsageError: it is missing, or none of the kinds above.
    """
    text = os.fspath(source)
    if found := find_object(text):
        entries = [Entry(item_name(text, item), None) for item in range(len(found.source))]
        return Source(text, entries, given=found.source)
    where = Path(text)
    if where.is_dir():
        return _folder(os.path.abspath(text))
    if match := _RANGE.match(text):
        return _shard_range(text, match)
    if not where.exists():
        raise UsageError(f"data.root must be an existing folder, list file or tar, got {text!r}")
    if not where.is_file():
        raise UsageError(f"data.root must be a folder or a regular file, got {text!r}")
    if text.lower().endswith(SHARDS):
        folder, name = os.path.split(os.path.abspath(text))
        return Source(folder, [Entry(name, None)])
    if text.lower().endswith(LIST_FILES):
        return _list_file(os.path.abspath(text))
    kinds = " ".join((*LIST_FILES, *SHARDS))
    raise UsageError(f"data.root must be a folder or a file of {kinds}, not a file like {text!r}")


def _shard_range(text: str, match: re.Match[str]) -> Source:
    before, first, last, after = match.groups()
    if not after.lower().endswith(SHARDS):
        raise UsageError(f"data.root with a range must name .tar files, got {text!r}")
    count = int(last) - int(first) + 1
    if not 1 <= count <= _MOST_SHARDS:
        raise UsageError(f"data.root must name a range of 1 to {_MOST_SHARDS} shards, got {text!r}")
    width = len(first)
    paths = [f"{before}{n:0{width}d}{after}" for n in range(int(first), int(last) + 1)]
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing:
        raise UsageError(f"every shard of data.root must exist, got {text!r} without {missing!r}")
    root = os.path.dirname(os.path.abspath(before + "0"))
    return Source(root, [Entry(os.path.relpath(path, root), None) for path in paths])


def settled(status: os.stat_result) -> bool:
    """Whether a later change of a file will show in its time of change.

    Not where it was changed just now: the clock may not tell another change from that one.
    """
    return not -_AHEAD_NS < time.time_ns() - status.st_mtime_ns < _YOUNG_NS


def _watched(path: str, status: os.stat_result) -> tuple[str, int]:
    return path, status.st_mtime_ns if settled(status) else 0


def _list_file(path: str) -> Source:
    root = os.path.dirname(path)
    descriptor, status = open_regular(path)
    source = Source(root, watched=[_watched(path, status)], listed=True)
    # a byte order mark is no part of the first path
    with os.fdopen(descriptor, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            text = line.rstrip("\r\n")
            if not text.strip() or text.startswith("#"):
                continue
            name, _, label = text.partition("\t")
            if "\0" in label or len(label) > _LONGEST_CLASS:
                raise UsageError(
                    f"a class in data.root must have at most {_LONGEST_CLASS} characters and no "
                    f"NUL, got {label[:20]!r}... of {len(label)} in line {number} of {path}"
                )
            if "\0" in name:
                source.bad.append(Bad(name.replace("\0", "?"), "a path cannot hold a NUL"))
            elif name.lower().endswith((*EXTENSIONS, *SHARDS)):
                source.entries.append(Entry(name, label.strip() or None))
            else:
                source.ignored += 1
    return source


def _folder(root: str) -> Source:
    source = Source(root)
    # Links to folders wait until every folder is listed under its own name; then each adds what is
    # not listed yet. So the order does not depend on the disk, and no circle of links is followed.
    pending, links = [("", False)], list[str]()
    seen: set[tuple[int, int]] = set()
    again: list[str] = []
    runs: list[str] = []
    while pending or links:
        if not pending:
            links.sort(key=os.fsencode, reverse=True)
            pending.append((links.pop(), True))
        relative, linked = pending.pop()
        folder = os.path.join(root, relative)
        # images directly in the root have no class
        label = os.path.basename(relative) or None
        try:
            # before it is listed: what is added meanwhile makes the time a later one
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if linked and identity in seen:
                again.append(relative)
                continue
            seen.add(identity)
            with os.scandir(folder) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if error.errno in OUT_OF_FILES:
                raise
            name = os.path.join(relative or ".", "")
            source.bad.append(Bad(name, f"the folder {describe(error)}"))
            continue
        if _is_run({entry.name for entry in listed}):
            runs.append(relative)
            continue
        source.watched.append(_watched(folder, status))
        for entry in listed:
            path = os.path.join(relative, entry.name)
            if _is_folder(entry):
                if entry.is_symlink():
                    links.append(path)
                else:
                    pending.append((path, linked))
            elif entry.name.lower().endswith((*EXTENSIONS, *SHARDS)):
                source.entries.append(Entry(path, label))
            else:
                source.ignored += 1
    if "" in runs:
        raise UsageError(
            f"data.root must not be the folder of a run (config.yaml and train.log or checkpoints "
            f"are in it), got {root!r}"
        )
    for names, what in (
        (runs, "the folder of a run, which is no data"),
        (again, "a link to a folder that is listed already"),
    ):
        if names:
            more = f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""
            logger.warning("left out of %s: %r, %s%s", root, min(names), what, more)
    source.entries.sort(key=lambda entry: os.fsencode(entry.path))
    return source


def _is_run(names: set[str]) -> bool:
    """Whether a folder of these entries is one that training writes."""
    return "config.yaml" in names and not names.isdisjoint(("checkpoints", "train.log"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
