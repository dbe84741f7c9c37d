"""Files read by a pool of threads, which tells a bad file from storage that fails."""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.data.index import FORMATS, Index
from ijepa_fast.data.pillow_decoder import DecodeError, ImageDecoder
from ijepa_fast.data.pixels import LEAST_SCAN, MOST_SCANNED, check_scans, describe
from ijepa_fast.data.sources import OUT_OF_FILES

__all__ = ["Parts", "Reader", "decode_usable", "require_decodable", "thread_pool"]

logger = logging.getLogger(__name__)

Parts = list[Future[list[bytes | str]]]

# Threads that read: they wait for a disk or a network, not for a core.
_READERS = 16
# Errors that are a file's own; others (an I/O error, a lost server) may pass.
_OF_THE_FILE = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
}
# Waits between tries to read, seconds.
_BACKOFF = (0.5, 1.0, 2.0, 4.0)


@contextlib.contextmanager
def thread_pool(
    threads: int, name: str, stop: threading.Event | None = None
) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what waits in it, and sets `stop`, if its block ends with an error or
    Ctrl-C.
    """
    with ThreadPoolExecutor(threads, name) as pool:
        try:
            yield pool
        except BaseException:
            if stop:
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def decode_usable(
    index: Index, rows: NDArray[np.int64], windows: NDArray[np.int32], decoder: ImageDecoder
) -> tuple[Tensor, NDArray[np.int64]]:
    """Reads and decodes rows of a table; what cannot be used is named in the log and left out.

    Args:
        index: the table.
        rows: (B,) rows.
        windows: int32 (B, 4), see `ImageDecoder.decode`.
        decoder: for at least B images.

    Returns:
        uint8 (b, H, W, 3), and the rows (b,) that they are of; b is 0 where none can be used.

    Raises:
        OSError: it is the storage that fails, not a file.
    """
    while len(rows):
        try:
            encoded = _read_all(index, rows)
            require_decodable(index, rows, encoded)
            return decoder.decode(encoded, windows, index.plain[rows]), rows
        except DecodeError as error:
            failures = error.failures
        for place, reason in failures.items():
            logger.warning("left out %r: %s", index.name(int(rows[place])), reason)
        rows = np.delete(rows, list(failures))
        windows = np.delete(windows, list(failures), axis=0)
    return torch.empty(0), rows


def require_decodable(index: Index, rows: NDArray[np.int64], encoded: list[bytes]) -> None:
    """Raises DecodeError for images that no decoder should be given, as none can be stopped."""
    pixels = index.width[rows].astype(np.int64) * index.height[rows]
    # the files' bytes are looked through only where so many scans would have room in them
    room = (index.length[rows] // LEAST_SCAN).astype(np.int64)
    suspects = (index.format[rows] == FORMATS.index("JPEG")) & (pixels * room > MOST_SCANNED)
    failures = {}
    for place in np.flatnonzero(suspects).tolist():
        row = rows[place]
        try:
            check_scans(encoded[place], int(index.width[row]), int(index.height[row]))
        except ValueError as error:
            failures[place] = describe(error)
    if failures:
        raise DecodeError(failures)


def _read_all(index: Index, rows: NDArray[np.int64]) -> list[bytes]:
    encoded, failures = [], {}
    for place, row in enumerate(rows.tolist()):
        try:
            encoded.append(index.read(row))
        except OSError as error:
            own = error.errno is None or error.errno in _OF_THE_FILE
            if error.errno in OUT_OF_FILES or not (own or _others_readable(index, row)):
                raise
            failures[place] = describe(error)
    if failures:
        raise DecodeError(failures)
    return encoded


def _others_readable(index: Index, row: int) -> bool:
    """Whether the storage works: one of three other rows can be read."""
    for step in (1, 2, 3):
        with contextlib.suppress(OSError):
            index.read((row + step) % len(index))
            return True
    return False


class Reader:
    """Reads rows of a table, a share of a batch in each thread.

    Attributes:
        progress: when a file was last read to its end, in seconds of the monotonic clock.

    Args:
        index: the table.
        stop: set when nobody wants the files any more.
    """

    def __init__(self, index: Index, stop: threading.Event) -> None:
        self._index, self._stop = index, stop
        self._pool = ThreadPoolExecutor(_READERS, "ijepa-read")
        # what each thread is at
        self._at: list[int] = [-1] * _READERS
        self.progress = time.monotonic()

    def begin(self, rows: list[int]) -> Parts:
        """Begins to read; the parts' results, one after the other, are the files' bytes, or what
        is wrong with them.
        """
        bounds = [len(rows) * part // _READERS for part in range(_READERS + 1)]
        return [
            self._pool.submit(self._part, part, rows[begin:end])
            for part, (begin, end) in enumerate(pairwise(bounds))
            if end > begin
        ]

    def being_read(self) -> str:
        """Names of the files that are being read just now."""
        rows = [row for row in self._at if row >= 0]
        names = ", ".join(repr(self._index.name(row)) for row in rows[:2])
        return f"{names} and {len(rows) - 2} more" if len(rows) > 2 else names or "nothing"

    def close(self, *, wait: bool) -> None:
        """Ends the threads; without waiting, one that hangs in a read is left to itself."""
        self._pool.shutdown(wait=wait, cancel_futures=True)

    def _part(self, part: int, rows: list[int]) -> list[bytes | str]:
        """The files' bytes, or what is wrong with them."""
        found: list[bytes | str] = []
        for row in rows:
            if self._stop.is_set():
                break
            self._at[part] = row
            found.append(self.read(row))
            self.progress = time.monotonic()
        self._at[part] = -1
        return found

    def read(self, row: int) -> bytes | str:
        """A file's bytes, or what is wrong with it, in the caller's thread.

        Raises:
            OSError: it is the storage that fails, not the file.
        """
        for wait in (*_BACKOFF, None):
            try:
                return self._index.read(row)
            except OSError as error:
                reason, failed = describe(error), error
                if error.errno is None or (error.errno in _OF_THE_FILE and self._reachable(row)):
                    return reason
            if wait is None or self._stop.wait(wait):
                break
        if failed.errno in OUT_OF_FILES:
            raise OSError(
                f"the limit of open files (ulimit -n) must leave room for the data: {reason}"
            ) from failed
        if self._stop.is_set() or _others_readable(self._index, row):
            return reason
        raise OSError(
            f"the storage of the data fails: {self._index.path(row)!r} and others: {reason}"
        ) from failed

    def _reachable(self, row: int) -> bool:
        """Whether the folder that the row's source lies in is there: not after an unmount."""
        try:
            with os.scandir(self._index.root(row)) as entries:
                return next(entries, None) is not None
        except OSError:
            return False
