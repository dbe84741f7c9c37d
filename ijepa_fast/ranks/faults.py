"""Faults on request, to see that a job survives them: ``IJEPA_FAST_FAULT=rank:step:kind``.

Several are separated by commas. A fault strikes on its rank before its optimiser step (counted from
1 over the whole run), in the first life of a job only: after a restart by torchrun it does not come
again.
"""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["KINDS", "Faults", "InjectedFault"]

KINDS = {
    "kill": "SIGKILL to this process",
    "stop": "SIGSTOP: the process stays and does nothing",
    "term": "SIGTERM, as a scheduler sends it",
    "raise": "an exception",
    "nan-image": "every pixel of the step is NaN",
    "nan-gradient": "one gradient is NaN",
    "nan-weight": "one weight is NaN, from then on",
}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


class InjectedFault(RuntimeError):
    """The fault of kind `raise`."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The faults of one rank: (step, kind)."""

    planned: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, text: str, rank: int) -> "Faults":
        """Reads the variable.

        Raises:
            ValueError: it is not made of rank:step:kind.
        """
        planned = []
        for part in filter(None, text.split(",")):
            fields = part.strip().split(":")
            numbers = len(fields) == 3 and all(field.isdecimal() for field in fields[:2])
            if not numbers or fields[2] not in KINDS or int(fields[1]) < 1:
                raise ValueError(
                    f"IJEPA_FAST_FAULT must be rank:step:kind with a kind of {', '.join(KINDS)}, "
                    f"got {part!r}"
                )
            if int(fields[0]) == rank:
                planned.append((int(fields[1]), fields[2]))
        return cls(planned=tuple(planned))

    def due(self, step: int) -> Sequence[str]:
        """Kinds that strike at a step."""
        return [kind for at, kind in self.planned if at == step]

    def around(self, training: Any, done: int) -> Any:
        """A step that suffers these faults; the step itself where there are none.

        Args:
            training: a training step.
            done: optimiser steps so far.
        """
        return _Suffering(training, self, done) if self.planned else training


class _Suffering:
    """A training step with faults before its first micro-step, in its pixels and gradients."""

    def __init__(self, training: Any, faults: Faults, done: int) -> None:
        self._training, self._faults, self._done = training, faults, done
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._training, name)

    def accumulate(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """The step's own, with what is due."""
        training, due = self._training, self._faults.due(self._done + 1)
        if not self._begun:
            self._begun = True
            self._strike(due)
        mean = training.mean
        if "nan-image" in due:
            training.mean = torch.full_like(mean, math.nan)
        try:
            sums: tuple[Tensor, Tensor] = training.accumulate(*args, **options)
            return sums
        finally:
            training.mean = mean

    @torch.no_grad()
    def _strike(self, due: Sequence[str]) -> None:
        for kind in due:
            if kind in _SIGNALS:
                os.kill(os.getpid(), _SIGNALS[kind])
            elif kind == "raise":
                step = self._done + 1
                raise InjectedFault(f"a fault was asked for at step {step} by IJEPA_FAST_FAULT")
            elif kind == "nan-weight":
                _spoil(self._training.parameters[0])
                self._training.round()

    @torch.no_grad()
    def update(self, values: Any) -> None:
        """The step's own, with what is due."""
        self._done, self._begun = self._done + 1, False
        if "nan-gradient" in self._faults.due(self._done):
            _spoil(self._training.parameters[0].grad)
        self._training.update(values)


def _spoil(tensor: Tensor) -> None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel():
        local.view(-1)[0] = math.nan
