"""Weights & Biases: one run, which a resume goes on with."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ijepa_fast.atomic import atomic_write
from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.metrics_file import read_rows
from ijepa_fast.callbacks.scalars import scalars

__all__ = ["WeightsAndBiases"]

_logger = logging.getLogger(__name__)

# W&B's own process writes every 15 s, and a kill ends it with what it holds
_SURE_SECONDS = 60.0


class WeightsAndBiases(Callback):
    """Sends every row's numbers, over the row's step, and all settings; no checkpoints.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_MODE (online, offline) and the others are W&B's
    own. OUT/wandb holds its files; OUT/wandb_run_id the run's id, and the step up to which W&B
    surely has all rows.
    """

    def on_start(self, info: RunInfo) -> None:
        """Begins a run, or goes on with the one that this folder's checkpoint belongs to."""
        import wandb

        own = wandb.setup().settings  # of the environment
        self._kept = info.out / "wandb_run_id"
        kept = self._kept.read_text().split() if info.step and self._kept.exists() else []
        self._run = wandb.init(
            id=kept[0] if kept else own.run_id,
            resume="allow",
            name=own.run_name or info.out.resolve().name,
            dir=info.out,
            config=info.settings,
            # the terminal is ours: nothing is printed there, and what is printed is not copied
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B counts rows by itself, and refuses one that is done again after a kill
        self._run.define_metric("*", step_metric="step")
        if not kept:
            self._note(-1)
        sure = int(kept[1]) if kept else -1
        for row in read_rows(info.out / "metrics.jsonl"):
            if row["step"] > sure:
                self.on_step(row)
        self._step, self._since = info.step, time.monotonic()
        offline = f"offline; wandb sync {info.out / 'wandb' / 'offline-run-*'}"
        _logger.info("Weights & Biases: %s", offline if self._run.offline else self._run.url)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Hands the row to W&B's process."""
        self._run.log({"step": row["step"], **scalars(row)})

    on_evaluation = on_step

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Notes an earlier step from which on a resume sends the rows again."""
        if time.monotonic() - self._since > _SURE_SECONDS:
            self._note(self._step)
            self._step, self._since = step, time.monotonic()

    def on_end(self, status: Status, step: int) -> None:
        """Waits until all is sent."""
        self._run.finish(exit_code=0 if status == "done" else 1)
        self._note(step)

    def _note(self, step: int) -> None:
        with atomic_write(self._kept) as temporary:
            temporary.write_text(f"{self._run.id} {step}")
