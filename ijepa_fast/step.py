"""The contract of a training step, and the place where a run's path is chosen.

`reference.ReferenceStep` is the specification, `fast.FastStep` the same step fast; `CapturedStep`
is that one as CUDA graphs. Whoever trains knows none of them by name.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError
from ijepa_fast.fast import CapturedStep, FastStep, make_mesh
from ijepa_fast.masks import Masks
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues
from ijepa_fast.state import HasState

__all__ = ["TrainingStep", "graphs_would_pay", "make_step", "one_device"]

# seconds of host time of an eager fast step beside an H200: 0.42 of the 84 ms measured before
HOST = 0.035
# share of a device's peak that a step of small matrix products reaches
REACHED = 0.5


class TrainingStep(HasState, Protocol):
    """Networks, their optimiser, and one training step.

    Attributes:
        parameters: trained ones, in the optimiser's order.
        mean, std: (3,) of the image channels, in 0-1 units.
    """

    parameters: list[nn.Parameter]
    mean: Tensor
    std: Tensor

    def prepare(self, masks: Masks) -> Any:
        """Masks as sampled, on the CPU, to what the other methods take; does not wait."""

    def forward(self, images: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction (M, C, B, T, D), latent target (M, B, T, D), and features it is made of."""

    def accumulate(
        self, images: Tensor, batch: Any, elements: int, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-step: its share of the loss, and the features' std.

        Args:
            images: uint8 (B, height, width, 3) on the device.
            batch: from `prepare`.
            elements: of the whole global batch's predictions, see `Masks.elements`.
            last: of its optimiser step.
        """

    def update(self, values: StepValues) -> None:
        """Reduces gradients over ranks, updates weights and averages, or skips a bad step."""

    def describe(self) -> str:
        """How the step runs, in lines for a person."""


def one_device(config: Config) -> Config:
    """The same step on one device, with whatever runs there."""
    return replace(config, shard="none", attention="auto", memory="none", graphs="off")


def graphs_would_pay(flops: float, peak: float | None) -> bool:
    """Whether the device is likely to be done with a step before the host has launched it all.

    Args:
        flops: of one micro-step.
        peak: FLOP/s of the device, None where it is not known.
    """
    return peak is not None and flops / (REACHED * peak) < HOST


def make_step(
    config: Config,
    encoder: VisionTransformer,
    predictor: Predictor,
    device: torch.device,
    *,
    local_world: int = 1,
) -> TrainingStep:
    """The step of the configured path.

    Args:
        config: the whole configuration.
        encoder, predictor: with their initial weights; moved to the device.
        device: where the step runs.
        local_world: ranks of one machine.

    Raises:
        UsageError: something is asked for that cannot be had together, or here.
    """
    networks = encoder.to(device), predictor.to(device)
    channels: dict[str, Any] = {"mean": config.data.mean, "std": config.data.std}
    if config.path == "reference":
        return ReferenceStep(*networks, config.optim, **channels)
    mesh = make_mesh(config.shard, device, local_world)
    options: dict[str, Any] = {
        **channels,
        "attention": config.attention,
        "memory": config.memory,
        "target_precision": config.target_precision,
    }
    if config.graphs == "on":
        if device.type != "cuda" or mesh is not None:
            where = "on a CPU" if mesh is None else "with sharded weights (see --shard none)"
            raise UsageError(f"graphs must be auto or off {where}, got on")
        return CapturedStep(*networks, config.optim, **options)
    trunk = config.graphs == "auto"
    return FastStep(*networks, config.optim, mesh=mesh, trunk_graph=trunk, **options)
