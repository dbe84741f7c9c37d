"""Checkpoints written by a thread while training goes on.

The step waits for a copy of the state, nothing else. One write at a time: a save that outlasts the
interval delays the next one, and they never stack.
"""

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Saver"]

_logger = logging.getLogger(__name__)

# waits between tries, seconds
BACKOFF = (0.5, 1.0, 2.0, 4.0)


class Saver:
    """Runs one job at a time, again and again until the disk takes it.

    Attributes:
        saved: step of the last good checkpoint, None before the first.

    Args:
        saved: step of the checkpoint that the run goes on from, if any.
    """

    def __init__(self, saved: int | None = None) -> None:
        self.saved = saved
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None
        self._fault: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raises what a job that has ended raised, if that was not the disk's fault."""
        if self._fault is not None:
            self.wait()

    def start(self, step: int, job: Callable[[], object]) -> None:
        """Runs a job in the background; waits for the one before first.

        Args:
            step: optimiser steps done, for the log.
            job: writes the checkpoint; may raise OSError, and is then tried again. Returns False
                if there was nothing worth writing.
        """
        self.wait()
        # not a daemon: the interpreter waits for a checkpoint that is being written
        self._thread = threading.Thread(target=self._run, args=(step, job), name="ijepa-save")
        self._thread.start()

    def wait(self) -> OSError | None:
        """Waits for the job; the error that made it give up, or None.

        Raises:
            BaseException: what the job raised that is not the disk's fault.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        return self._error

    def _run(self, step: int, job: Callable[[], object]) -> None:
        try:
            self._try(step, job)
        # whatever it is, the training loop must hear of it
        except BaseException as fault:  # noqa: BLE001
            self._fault = fault

    def _try(self, step: int, job: Callable[[], object]) -> None:
        started = time.perf_counter()
        for wait in (*BACKOFF, None):
            try:
                written = job()
            except OSError as error:
                self._error = error
                if wait is None:
                    break
                _logger.warning(
                    "the checkpoint at step %d cannot be written (%s): tried again in %g s",
                    *(step, error, wait),
                )
                time.sleep(wait)
            else:
                self._error = None
                if written is False:
                    return
                self.saved = step
                _logger.debug(
                    "checkpoint at step %d written in %.2f s", step, time.perf_counter() - started
                )
                return
        last = "none so far" if self.saved is None else f"the last good one is step {self.saved}"
        _logger.error(
            "the checkpoint at step %d is given up: %s; training goes on, %s",
            *(step, self._error, last),
        )
