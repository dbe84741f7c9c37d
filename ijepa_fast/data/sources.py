"""What a data set is made of: folders, list files and tar shards, listed but not opened.

- A folder: every image below it, and every tar file, which is a shard. The class of an image is
  the name of the folder that it lies in; images directly in the folder have none.
- A list file (``.txt``, ``.tsv``, UTF-8): a line an image, ``path`` or ``path<TAB>class``; paths
  relative to the list file's folder; blank lines and lines that begin with ``#`` are left out.
- A tar file, or a range of them: ``shards/train-{00000..00099}.tar``.
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ijepa_fast.data.pixels import EXTENSIONS, describe

__all__ = ["LIST_FILES", "SHARDS", "Bad", "Entry", "Source", "list_source", "trusted_time"]

SHARDS = (".tar",)
LIST_FILES = (".txt", ".tsv")
_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")
_MOST_SHARDS = 1_000_000
_YOUNG_NS = 2_000_000_000


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
        watched: (absolute path, mtime in ns, see `trusted_time`) of folders and list files: as long
            as these stand, the listing does.
        listed: whether a list file names the entries.
    """

    root: str
    entries: list[Entry] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    ignored: int = 0
    watched: list[tuple[str, int]] = field(default_factory=list)
    listed: bool = False


def list_source(source: str | os.PathLike[str]) -> Source:
    """Lists one source.

    Raises:
        ValueError: it is missing, or none of the kinds above.
    """
    text = os.fspath(source)
    where = Path(text)
    if where.is_dir():
        return _folder(os.path.abspath(text))
    if match := _RANGE.match(text):
        return _shard_range(text, match)
    if not where.exists():
        raise ValueError(f"data.root must be an existing folder, list file or tar, got {text!r}")
    if text.lower().endswith(SHARDS):
        folder, name = os.path.split(os.path.abspath(text))
        return Source(folder, [Entry(name, None)])
    if text.lower().endswith(LIST_FILES):
        return _list_file(os.path.abspath(text))
    kinds = " ".join((*LIST_FILES, *SHARDS))
    raise ValueError(f"data.root must be a folder or a file of {kinds}, not a file like {text!r}")


def _shard_range(text: str, match: re.Match[str]) -> Source:
    before, first, last, after = match.groups()
    if not after.lower().endswith(SHARDS):
        raise ValueError(f"data.root with a range must name .tar files, got {text!r}")
    count = int(last) - int(first) + 1
    if not 1 <= count <= _MOST_SHARDS:
        raise ValueError(f"data.root must name a range of 1 to {_MOST_SHARDS} shards, got {text!r}")
    width = len(first)
    paths = [f"{before}{n:0{width}d}{after}" for n in range(int(first), int(last) + 1)]
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing:
        raise ValueError(f"every shard of data.root must exist, got {text!r} without {missing!r}")
    root = os.path.dirname(os.path.abspath(before + "0"))
    return Source(root, [Entry(os.path.relpath(path, root), None) for path in paths])


def trusted_time(status: os.stat_result) -> int:
    """The time of change in ns, or 0 for what was changed so shortly before that the clock may not
    tell a later change from it.
    """
    changed = status.st_mtime_ns
    return changed if changed < time.time_ns() - _YOUNG_NS else 0


def _list_file(path: str) -> Source:
    root = os.path.dirname(path)
    source = Source(root, watched=[(path, trusted_time(os.stat(path)))], listed=True)
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            text = line.rstrip("\r\n")
            if not text.strip() or text.startswith("#"):
                continue
            name, _, label = text.partition("\t")
            if "\0" in name:
                source.bad.append(Bad(name.replace("\0", "?"), "a path cannot hold a NUL"))
            elif name.lower().endswith((*EXTENSIONS, *SHARDS)):
                source.entries.append(Entry(name, label.strip() or None))
            else:
                source.ignored += 1
    return source


def _folder(root: str) -> Source:
    source = Source(root)
    status = os.stat(root)
    pending = [("", frozenset({(status.st_dev, status.st_ino)}))]
    while pending:
        relative, ancestors = pending.pop()
        folder = os.path.join(root, relative)
        # images directly in the root have no class
        label = os.path.basename(relative) or None
        try:
            # before it is listed: what is added meanwhile makes the time a later one
            source.watched.append((folder, trusted_time(os.stat(folder))))
            with os.scandir(folder) as entries:
                listed = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            source.bad.append(Bad(relative + os.sep, f"the folder {describe(error)}"))
            continue
        for entry in listed:
            path = os.path.join(relative, entry.name)
            if _is_folder(entry):
                status = entry.stat()
                identity = (status.st_dev, status.st_ino)
                # A link to a folder that contains it would never end.
                if identity not in ancestors:
                    pending.append((path, ancestors | {identity}))
            elif entry.name.lower().endswith((*EXTENSIONS, *SHARDS)):
                source.entries.append(Entry(path, label))
            else:
                source.ignored += 1
    source.entries.sort(key=lambda entry: os.fsencode(entry.path))
    return source


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
