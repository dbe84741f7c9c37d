"""Weights & Biases: one run, which a resume goes on with."""

import logging
from collections.abc import Mapping
from typing import Any

from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.scalars import scalars

__all__ = ["WeightsAndBiases"]

_logger = logging.getLogger(__name__)


class WeightsAndBiases(Callback):
    """Sends every row's numbers, over the row's step, and all settings; no checkpoints.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE (online, offline) and the others are W&B's
    own. OUT/wandb holds its files, OUT/wandb_run_id the run's id.
    """

    def on_start(self, info: RunInfo) -> None:
        """Begins a run, or goes on with the one that this folder's checkpoint belongs to."""
        import wandb

        given = wandb.setup().settings  # of the environment
        kept = info.out / "wandb_run_id"
        resumes = info.step > 0 and kept.exists()
        self._run = wandb.init(
            id=kept.read_text() if resumes else given.run_id,
            resume="allow",
            name=given.run_name or info.out.resolve().name,
            dir=info.out,
            config=info.settings,
            # the terminal is ours: nothing is printed there, and what is printed is not copied
            settings=wandb.Settings(silent=True, console="off"),
        )
        kept.write_text(self._run.id)
        # W&B counts rows by itself, and refuses one that is done again after a kill
        self._run.define_metric("*", step_metric="step")
        where = self._run.url or f"offline; wandb sync {info.out / 'wandb' / 'offline-run-*'}"
        _logger.info("Weights & Biases: %s", where)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Sends the row; W&B's own process does the rest."""
        self._run.log({"step": row["step"], **scalars(row)})

    on_evaluation = on_step

    def on_end(self, status: Status, step: int) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=0 if status == "done" else 1)
