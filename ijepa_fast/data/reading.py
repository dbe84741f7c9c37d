"""Files read by a pool of threads, which tells a bad file from storage that fails."""

import errno
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

from ijepa_fast.data.index import Index
from ijepa_fast.data.pixels import describe

__all__ = ["Parts", "Reader"]

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
            found.append(self._read_one(row))
            self.progress = time.monotonic()
        self._at[part] = -1
        return found

    def _read_one(self, row: int) -> bytes | str:
        """A file's bytes, or what is wrong with it.

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
        others = [(row + step) % len(self._index) for step in (1, 2, 3)]
        if self._stop.is_set() or any(self._readable(other) for other in others):
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

    def _readable(self, row: int) -> bool:
        try:
            self._index.read(row)
        except OSError:
            return False
        return True
