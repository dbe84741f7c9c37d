"""`metrics.jsonl`: always written, as a resume, the curves and the report read it."""

import json
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ijepa_fast.atomic import atomic_write
from ijepa_fast.callbacks.callback import Callback, Status

__all__ = ["MetricsFile", "read_rows"]

_logger = logging.getLogger(__name__)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; lines that are none are left out, and named unless it is the last,
    which a kill may have torn.
    """
    return _rows(path.read_bytes() if path.exists() else b"", path)


def _rows(content: bytes, path: Path) -> list[dict[str, Any]]:
    lines, rows = content.splitlines(), []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif number < len(lines):
            _logger.warning("%s: line %d is left out, as it is no row of metrics", path, number)
    return rows


class MetricsFile(Callback):
    """`metrics.jsonl`, one JSON object a line. What it raises ends the run.

    Args:
        path: the file.
        step: rows past this step are cut away, as they belong to work that a resume does again.
        interval: a row of this very step is cut away too if it lies between two log lines: a stop
            by `max_steps` wrote it, and a run without that stop has none.
    """

    def __init__(self, path: Path, *, step: int, interval: int = 1) -> None:
        last = step - 1 if step % interval else step
        evaluations = ("knn", "monitors")
        kept = [
            json.dumps(row) + "\n"
            for row in read_rows(path)
            if row["step"] <= (step if any(key in row for key in evaluations) else last)
        ]
        self._path, self._waiting, self._failed = path, b"", False
        self._lock = threading.Lock()
        self._file = self._begin("".join(kept).encode())

    def _begin(self, content: bytes) -> int:
        with atomic_write(self._path) as temporary:
            temporary.write_bytes(content)
        return os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)

    def _content(self) -> bytes:
        """Also of a file that was moved or deleted, as it is open."""
        return os.pread(self._file, os.fstat(self._file).st_size, 0) + self._waiting

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, read from the file: a long run has more than memory should hold."""
        with self._lock:
            return _rows(self._content(), self._path)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Writes one row and hands it to the system; what a full disk refuses waits for the next
        row, or the next checkpoint.
        """
        with self._lock:
            self._waiting += json.dumps(row).encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                if not self._failed:
                    _logger.warning("metrics.jsonl cannot be written for now: %s", error)
                self._failed = True

    on_evaluation = on_step

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        if self._failed:
            self._failed = False
            _logger.info("metrics.jsonl is written again, nothing is lost")

    def sync(self) -> None:
        """Forces the rows to the disk; called before a checkpoint counts as written. Where the file
        was moved or deleted, all rows go into a new one.

        Raises:
            OSError: it cannot.
        """
        with self._lock:
            if not self._path.exists():
                file = self._begin(self._content())
                os.close(self._file)
                self._file, self._waiting = file, b""
            self._write()
            os.fsync(self._file)

    def on_end(self, status: Status, step: int) -> None:
        """Closes the file."""
        os.close(self._file)
