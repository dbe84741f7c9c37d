"""Faults on request, to see that a job survives them: ``IJEPA_FAST_FAULT=rank:step:kind``.

Several are separated by commas. A fault strikes on its rank before its optimiser step (counted from
1 over the whole run), in the first life of a job only: after a restart by torchrun it does not come
again.
"""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
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


class Training(Protocol):
    """What faults are done to: `ReferenceStep` or `FastStep`."""

    mean: Tensor
    parameters: list[nn.Parameter]

    def round(self) -> None:
        """Follows a change of the masters."""


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

    def _due(self, step: int) -> Sequence[str]:
        return [kind for at, kind in self.planned if at == step]

    @torch.no_grad()
    def strike(self, step: int, training: Training) -> None:
        """Before a step: what ends or stops the process, and damage to a weight.

        Raises:
            InjectedFault: on request.
        """
        for kind in self._due(step):
            if kind in _SIGNALS:
                os.kill(os.getpid(), _SIGNALS[kind])
            elif kind == "raise":
                raise InjectedFault(f"a fault was asked for at step {step} by IJEPA_FAST_FAULT")
            elif kind == "nan-weight":
                _spoil(training.parameters[0])
                training.round()

    @contextmanager
    def images(self, step: int, training: Training) -> Iterator[None]:
        """Around the forward and backward passes: damage to the pixels."""
        mean = training.mean
        if "nan-image" in self._due(step):
            training.mean = torch.full_like(mean, math.nan)
        try:
            yield
        finally:
            training.mean = mean

    @torch.no_grad()
    def gradients(self, step: int, training: Training) -> None:
        """After the backward pass: damage to a gradient."""
        if "nan-gradient" in self._due(step):
            gradient = training.parameters[0].grad
            assert gradient is not None
            _spoil(gradient)


def _spoil(tensor: Tensor) -> None:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel():
        local.view(-1)[0] = math.nan
