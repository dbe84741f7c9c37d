"""When a run saves, what, and what happens after it.

A thread writes while training goes on: the step waits for a copy of the state, nothing else. One
write at a time: a save that outlasts the interval delays the next one, and they never stack.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.config import CheckpointConfig
from ijepa_fast.errors import NonFiniteState, UsageError
from ijepa_fast.ranks import distributed
from ijepa_fast.state import checkpoint
from ijepa_fast.state.allowance import Allowance
from ijepa_fast.state.durable import require_room
from ijepa_fast.state.metrics import Journal
from ijepa_fast.state.run_folder import RunFolder

__all__ = ["Saver", "Saves"]

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
            self._write(step, job)
        # whatever it is, the training loop must hear of it
        except BaseException as fault:  # noqa: BLE001
            self._fault = fault

    def _write(self, step: int, job: Callable[[], object]) -> None:
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
                if written is not False:
                    self.saved = step
                    seconds = time.perf_counter() - started
                    _logger.debug("checkpoint at step %d written in %.2f s", step, seconds)
                return
        last = "none so far" if self.saved is None else f"the last good one is step {self.saved}"
        _logger.error(
            "the checkpoint at step %d is given up: %s; training goes on, %s",
            *(step, self._error, last),
        )


class Saves:
    """Copies a run's state now and then; rank 0 writes the copies while training goes on.

    Args:
        training: whose state it is.
        config: how often, and how many to keep.
        ranks: this rank.
        folder: the run's, on rank 0.
        journal: its metrics; what is queued is written before a checkpoint counts, and its
            callbacks hear of the checkpoint, in the thread that calls the methods here.
        allowance: counts the time.
        step: steps done at the start.
        every: steps of `keep_every` epochs, None without.
        meta: what a checkpoint tells besides its tensors.
        after: is called with the metrics' rows when a checkpoint is on the disk, by the thread that
            wrote it.

    Raises:
        UsageError: there is no room for a checkpoint (on rank 0; the others leave with it).
    """

    def __init__(
        self,
        training: checkpoint.HasState,
        config: CheckpointConfig,
        ranks: distributed.Ranks,
        folder: RunFolder | None,
        journal: Journal,
        allowance: Allowance,
        *,
        step: int,
        every: int | None,
        meta: dict[str, Any],
        after: Callable[[Sequence[dict[str, Any]]], None],
    ) -> None:
        self._training, self._config, self._ranks = training, config, ranks
        self._folder, self._journal, self._allowance = folder, journal, allowance
        self._every, self._meta, self._after = every, meta, after
        self._step, self._at = step, time.monotonic()
        self._writer = Saver(step or None)
        self._told, self._path = self._writer.saved, Path()
        self._broken: str | None = None
        self._snapshot = checkpoint.Snapshot(training, keep=ranks.is_main)
        distributed.on_main(ranks, self._require_room)

    def _require_room(self) -> None:
        assert self._folder is not None
        size = self._snapshot.nbytes
        try:
            require_room(self._folder.checkpoints, size)
        except OSError as error:
            raise UsageError(
                f"out must have room for a checkpoint of {size / 2**30:.2f} GiB and let it be "
                f"written, got {self._folder.checkpoints}: {error}"
            ) from None

    def wanted(self, step: int) -> bool:
        """Whether rank 0 wants a checkpoint at this step; raises what a write has raised that was
        not the disk's fault.

        One is due `checkpoint.minutes` after the last one and at every so many epochs; while one is
        being written the next one waits, and training goes on.
        """
        self._writer.check()
        self._tell()
        late = time.monotonic() - self._at >= 60 * self._config.minutes
        kept = self._every and step // self._every > self._step // self._every
        return self._ranks.is_main and (late or bool(kept)) and not self._writer.busy

    def due(self, step: int, delay: int) -> bool:
        """Whether a wish that was agreed on is due still: what was saved meanwhile is not."""
        return step - self._step > delay

    def save(self, step: int, *, last: bool) -> None:
        """Writes what is queued for the log and copies the state; rank 0 writes the copy to the
        disk and deletes the oldest checkpoint while training goes on.

        Args:
            step: steps done.
            last: no step follows.
        """
        with self._allowance.spend("save"):
            self._journal.flush()
            self._step, self._at = step, time.monotonic()
            # the copy before is this one's memory; only the last save finds one being written
            self._writer.wait()
            self._tell()
            state = self._snapshot.take(self._training, step=step, meta=self._meta)
        if self._folder:
            self._writer.start(step, lambda: self._write(state, last))

    def _write(self, state: checkpoint.State, last: bool) -> bool:
        assert self._folder is not None
        file, folder = self._journal.callbacks.file, self._folder.checkpoints
        self._folder.begin_anew()
        # a checkpoint counts once the rows before it are on the disk
        if file:
            file.sync()
        self._broken = checkpoint.not_finite(state)
        if self._broken:
            _logger.error(
                "the checkpoint at step %d is not written: %s is not finite",
                *(state.step, self._broken),
            )
            return False
        self._path = checkpoint.write(folder, state)
        keep, every = self._config.keep, self._every
        checkpoint.rotate(folder, newest=state.step, keep=keep, keep_every_steps=every)
        if file and not last:
            self._after(file.rows)
        return True

    def _tell(self) -> None:
        """Names a checkpoint that has come onto the disk since the last call."""
        step = self._writer.saved
        if step is not None and step != self._told:
            self._told = step
            self._journal.callbacks.checkpoint(step, self._path)

    def finish(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written (on rank 0; the others leave with it).
            NonFiniteState: its weights are not finite (likewise).
        """

        def wait() -> None:
            error, step = self._writer.wait(), self._step
            if self._broken:
                raise NonFiniteState(
                    f"weights must be finite to be saved, got {self._broken}: no checkpoint was "
                    f"written at step {step}"
                )
            if error is not None:
                last = self._writer.saved
                known = "none was written" if last is None else f"the last good one is step {last}"
                raise OSError(f"cannot write the checkpoint at step {step}: {error}; {known}")

        with self._allowance.spend("save"):
            distributed.on_main(self._ranks, wait)
        self._tell()

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.wait()
        self._tell()
