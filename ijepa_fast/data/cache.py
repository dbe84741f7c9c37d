"""Tables in the cache folder: made once, opened in no time, renewed where the files have changed.

`<cache>/ijepa-fast/tables/<hash of the sources>.safetensors`. A start compares folders, list files,
shards and (up to two million files) every image with the table by path, size and time of change;
larger sets compare an image when it is read. A table of objects is made once while they are given,
and kept as a file only where each says by its fingerprint that it is the same as before.
"""

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from ijepa_fast.data.build import (
    Sources,
    build_index,
    require_size,
    require_whole,
    source_key,
    source_names,
)
from ijepa_fast.data.index import (
    Index,
    index_from_arrays,
    index_to_arrays,
    open_regular,
    stamp,
)
from ijepa_fast.data.objects import PREFIX, Given, find_object
from ijepa_fast.data.reading import thread_pool
from ijepa_fast.data.sets.idx import cache_folder
from ijepa_fast.data.table_file import TableError, read_table, write_table

__all__ = ["load_table", "open_index", "save_table"]

logger = logging.getLogger(__name__)

_FORMAT = 2
_COMPARED = 2_000_000
_CHUNK = 1024
_THREADS = 16
# by the first object among the sources
_TABLES: WeakKeyDictionary[Given, dict[tuple[str, ...], tuple[Index, Path | None]]]
_TABLES = WeakKeyDictionary()


def open_index(
    sources: Sources,
    *,
    cache: Path | None = None,
    threads: int | None = None,
    min_side: int = 1,
    verify: bool = False,
    compare_all: bool = False,
    allow_missing: bool = False,
) -> tuple[Index, Path | None]:
    """The table of a data set, from the cache if it is up to date, see `build_index`.

    Args:
        sources: what it consists of.
        cache: parent folder; by default $XDG_CACHE_HOME, or ~/.cache.
        threads: threads that read headers.
        min_side: smallest width and height of an image, pixels.
        verify: decode every image wholly that has not been verified yet.
        compare_all: compare every image with the table, however many there are.
        allow_missing: take what is left where a shard is damaged or a folder cannot be listed.

    Returns:
        The table, and the file that it was opened from; None if it could not be written.

    Raises:
        UsageError: as `build_index`; an image is smaller than `min_side`.
        TooManyBadFiles: a shard is damaged or a folder cannot be listed.
    """
    given = source_names(sources)
    objects = [found for found in map(find_object, given) if found]
    wanted = tuple(map(source_key, given))
    made = _TABLES.setdefault(objects[0], {}) if objects else {}
    if wanted in made:
        index, path = made[wanted]
    elif len(objects) in (0, len(given)) and all(found.fingerprint for found in objects):
        index, path = _kept(given, wanted, cache, threads, verify=verify, compare_all=compare_all)
    else:
        index, path = build_index(given, threads=threads, verify=verify), None
    made[wanted] = index, path
    if not allow_missing:
        require_whole(index)
    require_size(index, min_side)
    return index, path


def _kept(
    given: list[str],
    wanted: tuple[str, ...],
    cache: Path | None,
    threads: int | None,
    *,
    verify: bool,
    compare_all: bool,
) -> tuple[Index, Path | None]:
    """The table from its file, which is written where it is not there or not up to date."""
    key = json.dumps([_FORMAT, wanted], ensure_ascii=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    path = (cache or cache_folder()) / "ijepa-fast" / "tables" / f"{name}.safetensors"
    older: Index | None = None
    try:
        older = load_table(path)
        if older.sources != wanted:
            other, older = older, None
            raise TableError(f"it is of other data: {', '.join(other.sources)}")
    except FileNotFoundError:
        pass
    except (TableError, OSError) as error:
        logger.warning("the table %s is made anew: %s", path, error)
    if older and _up_to_date(older, compare_all) and (not verify or older.verified.all()):
        index = older
    else:
        index = build_index(given, threads=threads, verify=verify, older=older)
        try:
            if _lasting(index):
                save_table(path, index)
                index = load_table(path)
        except OSError as error:
            logger.warning(
                "the table of the data is not kept, the next start makes it anew: %s", error
            )
    # what was opened has a name
    return index, path if index.table else None


def _lasting(index: Index) -> bool:
    """Not where another start may be able to read items that could not be read now."""
    return not index.roots[0].startswith(PREFIX) or bool(index.bad_stamps.all())


def save_table(path: Path, index: Index) -> None:
    """Writes a table, under a new name if it has none.

    Raises:
        OSError: it cannot be written.
    """
    meta = {"format": str(_FORMAT), "table": index.table or uuid.uuid4().hex}
    write_table(path, index_to_arrays(index), meta)


def load_table(path: Path) -> Index:
    """Opens a table without looking at the data.

    Raises:
        TableError: the file is damaged or of another version.
        OSError: it cannot be opened.
    """
    arrays, meta = read_table(path)
    if meta.get("format") != str(_FORMAT):
        raise TableError(f"{path} must have format {_FORMAT}, got {meta.get('format')!r}")
    try:
        return replace(index_from_arrays(arrays), table=meta.get("table", ""))
    except ValueError as error:
        raise TableError(f"{path} is damaged: {error}") from None


def _up_to_date(index: Index, compare_all: bool) -> bool:
    """Whether folders, lists, shards and files are as they were when the table was made."""
    if index.roots[0].startswith(PREFIX):
        # all are, and their fingerprints are the same
        return True
    try:
        # 0: too young to be trusted
        watched = zip(index.watched, index.watched_times.tolist(), strict=True)
        if any(os.stat(path).st_mtime_ns != changed for path, changed in watched):
            return False
        compared = compare_all or len(index.paths) <= _COMPARED
        if not compared:
            logger.info(
                "%d files: a changed image is noticed when it is read; `python -m ijepa_fast.data` "
                "compares all",
                len(index.paths),
            )
        files = np.arange(len(index.paths)) if compared else index.shard_files
        parts = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
        # stat waits for a server, not for a core
        with thread_pool(_THREADS, "ijepa-compare") as pool:
            for same in pool.map(lambda part: _same(index, part.tolist()), parts):
                if not same:
                    pool.shutdown(wait=False, cancel_futures=True)
                    return False
        pairs = zip(index.bad_paths, index.bad_stamps.tolist(), strict=True)
        return all(_still_bad(path, known) for path, known in pairs)
    except OSError:
        return False


def _same(index: Index, files: Sequence[int]) -> bool:
    return all(stamp(os.stat(index.file_path(f))) == int(index.stamps[f]) for f in files)


def _still_bad(path: str, known: int) -> bool:
    """Whether an unusable file is as it was. One without a stamp could not be opened, or was too
    young for its time to tell.
    """
    if known:
        return stamp(os.stat(path)) == known
    if os.path.isdir(path):
        return not os.access(path, os.R_OK | os.X_OK)
    try:
        descriptor, _ = open_regular(path)
    except OSError:
        return True
    os.close(descriptor)
    return False
