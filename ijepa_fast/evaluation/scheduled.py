"""When a run evaluates its features while it trains, and what it says of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.data import Index
from ijepa_fast.errors import TooManyBadFiles, UsageError
from ijepa_fast.evaluation.monitors import collapse_warning
from ijepa_fast.evaluation.online import UNTRAINED, OnlineEvaluation, evaluation_interval
from ijepa_fast.evaluation.scores import table
from ijepa_fast.state import Allowance, Journal

__all__ = ["ScheduledEvaluation"]

_logger = logging.getLogger(__name__)


class ScheduledEvaluation:
    """Evaluates the features before the first step, after the last, and at every so many.

    Args:
        config: of the run.
        index: its images.
        device: where to compute.
        weights: gathers all networks' weights on rank 0; every rank must call it.
        journal: where the numbers go.
        allowance: counts the time, and may forbid an evaluation.
        run_steps, world: of the run.

    Attributes:
        every: steps between evaluations, 0 for none at all.
    """

    def __init__(
        self,
        config: Config,
        index: Index,
        device: torch.device,
        weights: Callable[[], dict[str, Tensor]],
        journal: Journal,
        allowance: Allowance,
        *,
        run_steps: int,
        world: int,
    ) -> None:
        self._config, self._weights, self._journal = config, weights, journal
        self._allowance = allowance
        steps = min(run_steps, config.max_steps or run_steps)
        self._online = OnlineEvaluation(config, index, device, steps=steps, world=world)
        self._too_short = False
        self.every = evaluation_interval(config, run_steps, world)

    def due(self, step: int) -> bool:
        """Whether an evaluation is planned after this step."""
        return bool(self.every) and step % self.every == 0

    def refused(self) -> bool:
        """Whether there is no time for one now; those that `eval.every` asks for are made."""
        return self._config.eval.every is None and (
            self._too_short or not self._allowance.covers("evaluation")
        )

    def between(self, step: int, *, refused: bool) -> None:
        """An evaluation while training, unless there is no time for it."""
        if not refused:
            self.evaluate(step, ends=False)
        elif not self._too_short:
            _logger.info(
                "no evaluation at step %d: saves, pictures and evaluations have taken %.1f s of "
                "%.0f s",
                *(step, self._allowance.spent, self._allowance.elapsed),
            )

    def evaluate(self, step: int, *, ends: bool) -> None:
        """Evaluates the features, once for each step, if the run is to; see `online.py`.

        Args:
            step: steps done.
            ends: before the first step or after the last.
        """
        if self.every:
            with self._allowance.spend("evaluation"):
                self._evaluate(step, ends=ends)

    def _evaluate(self, step: int, *, ends: bool) -> None:
        weights = self._weights()
        callbacks, root = self._journal.callbacks, self._config.eval.data
        whole = ends and step > 0 and self._config.eval.whole
        if not callbacks.file or self._too_short:
            return
        self._journal.flush()
        rows = [row for row in callbacks.file.rows if "monitors" in row]
        # on as many images as in the part of the run before
        earlier = [row["images"] for row in rows if row.get("data") == root and "images" in row]
        if earlier:
            self._online.part = earlier[-1][0], earlier[-1][1]
        done = [row for row in rows if row["step"] == step and row.get("data") == root]
        if done and not (whole and root):
            return
        # a run that was made before there were tables, or on a part of the images, gets its own
        if any("table" in row for row in done):
            return
        untrained = not step and self._config.init is None
        name = UNTRAINED if untrained else f"target encoder, step {step}"
        try:
            row = self._online.row(weights, name, whole=whole, first=not step)
            if not row:
                self._too_short = True
                _logger.info(
                    "no evaluation: the steps of this run take less than eval.seconds (%g); "
                    "--eval.seconds 0 evaluates it all the same",
                    self._config.eval.seconds,
                )
                return
            before = self._before_training(rows) if step else row["monitors"]
        except (OSError, ValueError, TooManyBadFiles, torch.OutOfMemoryError) as error:
            # wrong settings end a run before its first step; otherwise an evaluation, and files
            # that cannot be read for it, are no reason to lose it
            if not step and isinstance(error, UsageError | TooManyBadFiles):
                raise
            _logger.warning("no evaluation at step %d: %s", step, error)
            return
        row = {"step": step, **row}
        callbacks.evaluation(row)
        warning = collapse_warning(row["monitors"], before) if step else None
        if warning:
            _logger.warning("step %d: %s", step, warning)

    def _before_training(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """The monitors of the network that the run started from; where there are none, of the
        untrained one.
        """
        first = next((row["monitors"] for row in rows if row["step"] == 0), None)
        return first or self._online.untrained

    def summary(self, step: int) -> None:
        """Prints what training has brought.

        Args:
            step: of its end.
        """
        file = self._journal.callbacks.file
        rows = file.rows if file else []
        root = self._config.eval.data
        mine = [
            row
            for row in rows
            if "knn" in row and row.get("data") == root and row["step"] in (0, step)
        ]
        if not mine:
            return
        if "table" in mine[-1]:
            _logger.info("accuracy on %s\n%s", root, table(mine[-1]["table"]))
            return
        images = mine[-1].get("images")
        alike = [row["knn"] for row in mine if row.get("images") == images]
        scores = {name: {"kNN": value} for knn in alike for name, value in knn.items()}
        part = f", {images[0]} training and {images[1]} test images" if images else ""
        _logger.info("accuracy on %s%s\n%s", root, part, table(scores))
