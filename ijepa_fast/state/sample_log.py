"""Which samples every step took, on request."""

import contextlib
import json
import logging
from pathlib import Path

import numpy as np
from torch import Tensor

__all__ = ["SampleLog"]

_logger = logging.getLogger(__name__)


class SampleLog:
    """`samples-rank<r>.jsonl`: which samples each micro-step took, one JSON object a line.

    Steps that a resume does again are written again; the later line is the one that counts.

    Args:
        path: the file.
        step: optimiser steps done before.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._failed = path, False
        # a line that a kill has torn must not swallow this one
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("a")
        self._write(("\n" if torn else "") + json.dumps({"from_step": step}) + "\n")

    def add(self, step: int, micro_step: int, positions: np.ndarray, ids: Tensor) -> None:
        """Writes one micro-step.

        Args:
            step: the optimiser step, from 1.
            micro_step: of that step, from 0.
            positions: (b,) in the global batch.
            ids: int64 (b,) rows of the index.
        """
        row = {"step": step, "micro_step": micro_step, "positions": positions.tolist()}
        self._write(json.dumps({**row, "ids": ids.tolist()}) + "\n")

    def _write(self, text: str) -> None:
        """A full disk is no reason to lose a run."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if not self._failed:
                _logger.warning("%s has gaps: %s", self._path, error)
            self._failed = True

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()
