"""Calls the callbacks of a run, and takes out those that raise."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.metrics_file import MetricsFile
from ijepa_fast.callbacks.progress import Progress

__all__ = ["Callbacks"]

_logger = logging.getLogger(__name__)


class Callbacks:
    """The callbacks of a run in the order in which they are called; none on ranks but 0.

    Args:
        file: the metrics. A resume needs it: what it raises ends the run.
        progress: the bar, which hears of every step.
        others: loggers and the user's own.
    """

    def __init__(
        self,
        file: MetricsFile | None = None,
        progress: Progress | None = None,
        others: Sequence[Callback] = (),
    ) -> None:
        self.file, self._progress = file, progress
        self._active = [one for one in (file, progress, *others) if one is not None]

    def start(self, info: RunInfo) -> None:
        """The run begins."""
        self._tell("on_start", info)

    def step(self, row: Mapping[str, Any]) -> None:
        """A row of training metrics has arrived."""
        self._tell("on_step", row)

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is on the disk."""
        self._tell("on_checkpoint", step, path)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The features were evaluated."""
        self._tell("on_evaluation", row)

    def end(self, status: Status, step: int) -> None:
        """The run is over."""
        self._active.reverse()
        self._tell("on_end", status, step)

    def advance(self, step: int) -> None:
        """So many steps are done: for the bar."""
        self._call(self._progress, "advance", step)

    def doing(self, what: str) -> None:
        """What is done instead of training: for the bar."""
        self._call(self._progress, "doing", what)

    def _tell(self, method: str, *values: Any) -> None:
        for callback in tuple(self._active):
            self._call(callback, method, *values)

    def _call(self, callback: Callback | None, method: str, *values: Any) -> None:
        if not any(callback is one for one in self._active):
            return
        try:
            # copies: what a callback does to a row changes nothing for the others
            getattr(callback, method)(*copy.deepcopy(values))
        except Exception as error:  # anybody's code
            if callback is self.file:
                raise
            self._active = [one for one in self._active if one is not callback]
            _logger.warning(
                "callback %s raised %s in %s and is taken out, training goes on: %s",
                *(type(callback).__name__, type(error).__name__, method, error),
            )
            # into train.log only
            _logger.debug("of callback %s", type(callback).__name__, exc_info=error)
