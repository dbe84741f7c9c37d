"""The protocol: what a callback is told of a run, and when."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ijepa_fast.config import Config, as_dict

__all__ = ["Callback", "RunInfo", "Status"]

Status = Literal["done", "stopped", "failed"]
"""How a run ended: at its last step, by a signal after a checkpoint, or by an error."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a run is, once its data, networks and checkpoint are loaded.

    Attributes:
        config: every setting.
        out: the run's folder.
        step: optimiser steps done: 0, or those of the checkpoint that the run goes on from.
        last_step: step at which the run ends.
        images: number of training images.

    Example:
        >>> config, out = ijepa_fast.preset("demo"), Path("runs/demo")
        >>> info = ijepa_fast.RunInfo(config=config, out=out, step=0, last_step=1000, images=8000)
        >>> info.settings["optim"]["epochs"]
        8
    """

    config: Config
    out: Path
    step: int
    last_step: int
    images: int

    @property
    def settings(self) -> dict[str, Any]:
        """`config` as nested plain values: `settings["optim"]["lr"]`."""
        return as_dict(self.config)


class Callback:
    """Is told what a run does. Write only the methods that you need.

    All methods are called by the main thread of rank 0, one after the other, between two steps;
    objects on other ranks are never called. Nothing that a callback is handed is on the device, and
    the device works on while a callback runs: one that takes less than a step costs nothing. One
    that raises an `Exception` is named in the log, its traceback goes into `OUT/train.log`, it is
    not called again, and training goes on.

    Example:
        >>> class Steps(ijepa_fast.Callback):
        ...     def on_step(self, row):
        ...         steps.append(row["step"])
        >>> steps = []
        >>> recipe = {"data": "images", "out": "runs/watched", "epochs": 1}
        >>> run = ijepa_fast.pretrain("tiny.yaml", callbacks=[Steps()], **recipe)
        looking at the images in images
        ...
        done: runs/watched
        >>> steps
        [2, 4, 5]
    """

    def on_start(self, info: RunInfo) -> None:
        """Before the first evaluation and the first step, after a resume too."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """At every `log.interval` steps and after the last step.

        The numbers are read when the device has sent them, so that nothing waits for it: on a GPU
        some steps after `row["step"]`, at the latest one interval.

        Args:
            row: this row of `metrics.jsonl`: step, epoch (from 0), lr, weight_decay, momentum, loss
                and feature_std of this step, skipped (steps so far that were not finite), ids_hash
                (of the samples, hexadecimal), timing (images_per_second,
                images_per_second_per_device, step_ms, data_wait_ms, memory_gib, mfu or None,
                eta_seconds: means of the interval). A copy.
        """

    def on_checkpoint(self, step: int, path: Path) -> None:
        """When a checkpoint is on the disk; training went on while it was written.

        Args:
            step: optimiser steps that it holds; all rows up to it have been handed on.
            path: its folder, `OUT/checkpoints/step-<n>`; later ones replace it
                (`checkpoint.keep`).
        """

    def on_evaluation(self, row: Mapping[str, Any]) -> None:
        """After each evaluation of the features.

        Args:
            row: this row of `metrics.jsonl`: step, monitors (name -> number) and, where there are
                labels, knn (network -> accuracy, 0 to 1), data and images. A copy.
        """

    def on_end(self, status: Status, step: int) -> None:
        """Once after `on_start`, when everything is saved; callbacks end in reverse order.

        Called after a signal and after an error too, but not where the process is killed at once:
        by SIGKILL, by a second signal, or because another rank is gone.

        Args:
            status: "done", "stopped" (by a signal, after a checkpoint) or "failed".
            step: optimiser steps done.
        """
