"""Learning rate, weight decay and momentum as pure functions of the step (paper, appendix A).

Steps count from 1. With ipe = steps per epoch, T = int(ipe_scale * epochs * ipe) and
W = int(warmup * ipe): warm-up below W, then cosine to T; weight decay cosine over T; momentum
linear. Past T all three keep their value at T.
"""

import math
from dataclasses import dataclass
from typing import Self

from ijepa_fast.config import OptimConfig

__all__ = ["Schedules", "StepValues"]


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What one optimiser step uses."""

    lr: float
    weight_decay: float
    momentum: float


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The three schedules of a run.

    Attributes:
        steps_per_epoch: optimiser steps of one epoch, floor(images / global batch).
        epochs: epochs of the run.
        warmup: epochs of linear warm-up.
        ipe_scale: stretches the schedules beyond the run (the run itself keeps its length).
        start_lr, lr, final_lr: learning rate at the start, peak and end.
        weight_decay, final_weight_decay: weight decay at the start and end.
        momentum, final_momentum: momentum of the target encoder at the start and end.
    """

    steps_per_epoch: int
    epochs: int
    warmup: float
    ipe_scale: float
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    momentum: float
    final_momentum: float

    def __post_init__(self) -> None:
        for name in ("steps_per_epoch", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.total_steps < 1:
            raise ValueError(
                f"ipe_scale must give schedules of at least 1 step, got {self.ipe_scale}"
            )

    @classmethod
    def of(cls, config: OptimConfig, *, global_batch: int, steps_per_epoch: int) -> Self:
        """The schedules of a configuration, learning rates scaled to the global batch on
        request.
        """
        ratio = global_batch / config.lr_reference_batch
        factor = {"none": 1.0, "linear": ratio, "sqrt": ratio**0.5}[config.lr_scaling]
        return cls(
            steps_per_epoch=steps_per_epoch,
            epochs=config.epochs,
            warmup=config.warmup,
            ipe_scale=config.ipe_scale,
            start_lr=factor * config.start_lr,
            lr=factor * config.lr,
            final_lr=factor * config.final_lr,
            weight_decay=config.weight_decay,
            final_weight_decay=config.final_weight_decay,
            momentum=config.momentum,
            final_momentum=config.final_momentum,
        )

    @property
    def run_steps(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """T: the step at which the schedules end."""
        return int(self.ipe_scale * self.epochs * self.steps_per_epoch)

    @property
    def warmup_steps(self) -> int:
        """W: the first step at the peak learning rate."""
        return int(self.warmup * self.steps_per_epoch)

    def at(self, step: int) -> StepValues:
        """All three values.

        Args:
            step: schedule step, counted from 1.

        Raises:
            ValueError: step is below 1.
        """
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
        step = min(step, self.total_steps)
        return StepValues(
            lr=self._learning_rate(step),
            weight_decay=_cosine(
                self.weight_decay, self.final_weight_decay, step / max(1, self.total_steps)
            ),
            momentum=self._momentum(step),
        )

    def _learning_rate(self, step: int) -> float:
        warmup = self.warmup_steps
        if step < warmup:
            return self.start_lr + step / warmup * (self.lr - self.start_lr)
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return _cosine(self.lr, self.final_lr, progress)

    def _momentum(self, step: int) -> float:
        # not truncated, unlike T: 12.5 scheduled steps give T = 12 and a denominator of 12.5
        span = self.steps_per_epoch * self.epochs * self.ipe_scale
        return self.momentum + (step - 1) * (self.final_momentum - self.momentum) / span


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
