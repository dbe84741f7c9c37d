"""The table of a run's data on every rank."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.config import Config
from ijepa_fast.data import (
    Index,
    index_from_arrays,
    index_to_arrays,
    load_table,
    open_index,
    save_table,
    source_names,
)
from ijepa_fast.ranks import distributed

__all__ = ["load_index"]

_logger = logging.getLogger(__name__)


def load_index(config: Config, ranks: distributed.Ranks) -> Index:
    """Rank 0 makes the table or opens it; the others open the same file, or receive it."""
    sources = config.data.sources
    data, patch = config.data, config.model.patch_size
    made = distributed.on_main(
        ranks, lambda: open_index(sources, min_side=patch, allow_missing=data.allow_missing)
    )
    if ranks.local_rank == 0 and not ranks.is_main:
        # named data sets are written once on every machine, as its ranks read the files
        source_names(sources)
    distributed.barrier()
    index, path = made or (None, None)
    if ranks.world == 1:
        assert index is not None
        return index
    return _shared_index(index, path, ranks)


def _shared_index(index: Index | None, path: Path | None, ranks: distributed.Ranks) -> Index:
    """Rank 0's table on every rank: one file for all where they see it."""
    arrays: dict[str, NDArray[np.generic]] | None = None
    if index is not None:
        name = os.fsencode(path) if path else b""
        arrays = {"path": np.frombuffer(name, np.uint8), "table": _bytes(index.table)}
    told = distributed.broadcast_arrays(arrays)
    table, where = told["table"].tobytes().decode(), Path(os.fsdecode(told["path"].tobytes()))
    opened = index if path else _open_shared(where, table)
    if not distributed.anyone(opened is None):
        assert opened is not None
        return opened
    # another machine has no such file: it gets the table, and keeps it for all its ranks
    arrays = distributed.broadcast_arrays(index_to_arrays(index) if index is not None else None)
    received = index if index is not None else index_from_arrays(arrays)
    if index is None:
        # copies of the files elsewhere have times of their own: the table is never taken for up to
        # date by a start on this machine alone
        received = replace(
            received,
            stamps=np.zeros_like(received.stamps),
            watched_times=np.zeros_like(received.watched_times),
            table=table,
        )
    if opened is None and ranks.local_rank == 0 and told["path"].size:
        try:
            save_table(where, received)
        except OSError as error:
            _logger.warning("the table of the data is kept in memory: %s", error)
    distributed.barrier()
    return opened or _open_shared(where, table) or received


def _open_shared(path: Path, table: str) -> Index | None:
    try:
        index = load_table(path)
    except (OSError, ValueError):
        return None
    return index if table and index.table == table else None


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)
