"""When a run evaluates its features while it trains, and what it says of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.data import Index
from ijepa_fast.evaluate.monitors import collapse_warning
from ijepa_fast.evaluate.online import UNTRAINED, OnlineEvaluation, look_interval
from ijepa_fast.evaluate.scores import knn_table
from ijepa_fast.state import Allowance, Journal

__all__ = ["ScheduledEvaluation"]

_logger = logging.getLogger(__name__)


class ScheduledEvaluation:
    """Looks at the features before the first step, after the last, and at every so many.

    Args:
        config: of the run.
        index: its images.
        device: where to compute.
        weights: gathers all networks' weights on rank 0; every rank must call it.
        journal: where the numbers go.
        allowance: counts the time, and may forbid a look.
        run_steps, world: of the run.

    Attributes:
        every: steps between looks, 0 for none at all.
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
        self._looks = OnlineEvaluation(config, index, device)
        self.every = look_interval(config, run_steps, world)

    def due(self, step: int) -> bool:
        """Whether a look is planned after this step."""
        return bool(self.every) and step % self.every == 0

    def refused(self) -> bool:
        """Whether there is no time for a look now; those that `eval.every` asks for are made."""
        return self._config.eval.every is None and not self._allowance.covers("look")

    def between(self, step: int, *, refused: bool) -> None:
        """A look while training, unless there is no time for it."""
        if not refused:
            self.look(step, ends=False)
            return
        _logger.info(
            "no look at step %d: saves, pictures and looks have taken %.1f s of %.0f s",
            *(step, self._allowance.spent, self._allowance.elapsed),
        )

    def look(self, step: int, *, ends: bool) -> None:
        """Looks at the features, once for each step, if the run is to; see `online.py`.

        Args:
            step: steps done.
            ends: before the first step or after the last.
        """
        if self.every:
            with self._allowance.spend("look"):
                self._look(step, ends=ends)

    def _look(self, step: int, *, ends: bool) -> None:
        weights = self._weights()
        file, root = self._journal.file, self._config.eval.data
        whole = ends and self._config.eval.whole
        if not file or not self._journal.reporter:
            return
        self._journal.flush()
        rows = [row for row in file.rows if "monitors" in row]
        if any(
            row["step"] == step and row.get("data") == root and (not whole or "images" not in row)
            for row in rows
        ):
            return
        untrained = not step and self._config.init is None
        name = UNTRAINED if untrained else f"target encoder, step {step}"
        try:
            row = self._looks.look(weights, name, whole=whole, baselines=not step)
            before = self._before_training(rows) if step else row["monitors"]
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            # before the first step and after the last an error in the labelled data ends the run;
            # otherwise a look is no reason to lose it
            if ends and not isinstance(error, torch.OutOfMemoryError):
                raise
            _logger.warning("no look at step %d: %s", step, error)
            return
        row = {"step": step, **row}
        file.append(row)
        self._journal.reporter.show_look(row)
        warning = collapse_warning(row["monitors"], before) if step else None
        if warning:
            _logger.warning("step %d: %s", step, warning)

    def _before_training(self, looks: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """The monitors of the network that the run started from. Where it did not look then: of
        the untrained one.
        """
        first = next((row["monitors"] for row in looks if row["step"] == 0), None)
        return first or self._looks.untrained

    def summary(self, step: int) -> None:
        """Prints all kNN scores of the run.

        Args:
            step: of its end.
        """
        rows = self._journal.file.rows if self._journal.file else []
        root = self._config.eval.data
        mine = [
            row
            for row in rows
            if "knn" in row and row.get("data") == root and row["step"] in (0, step)
        ]
        images = mine[-1].get("images") if mine else None
        alike = [row["knn"] for row in mine if row.get("images") == images]
        scores = {name: value for knn in alike for name, value in knn.items()}
        if scores:
            _logger.info("%s", knn_table(scores, images))
