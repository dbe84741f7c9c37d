"""What `bench_step` compares: cases, their data, and the training steps that run on them.

All providers start from the same weights and see the same images, masks and schedule values.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from benchmarks.released_style import ReleasedStyleStep
from ijepa_fast.config import BatchConfig, Config, ModelConfig
from ijepa_fast.config.presets import preset
from ijepa_fast.fast import CapturedStep, FastStep
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import Masks, sample_masks
from ijepa_fast.model import Predictor, VisionTransformer, build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules, StepValues

__all__ = [
    "CAPTURED",
    "COMPILE",
    "FAST",
    "MODES",
    "PROVIDERS",
    "REFERENCE",
    "RELEASED",
    "Case",
    "Contestant",
    "Mode",
    "Workload",
    "check_losses",
    "check_weights",
    "make_case",
]

RELEASED, REFERENCE, COMPILE = "released-style", "reference", "reference+compile"
FAST, CAPTURED = "fast", "fast, captured"
# largest relative difference of a step's loss
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# of a network's weights after all steps, as a share of their movement: where the optimiser differs,
# the losses of a few steps do not tell
WEIGHTS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
# different steps, as masks change while training
STEPS = 8

Mode = Literal["published", "whole"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration.

    Attributes:
        name: of the model.
        mode: `published` cuts contexts to the batch's shortest, `whole` leaves them.
        config: the recipe; its device batch is the whole batch.
        steps: different steps.
    """

    name: str
    mode: Mode
    config: Config
    steps: int = STEPS

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.config.batch.global_

    @property
    def precision(self) -> str:
        """Of matrix products."""
        return self.config.optim.precision

    def masks(self, step: int) -> Masks:
        """Of one step, as sampled."""
        positions = np.arange(self.batch)
        grid = self.config.grid
        return sample_masks(self.config.masks, grid=grid, seed=0, step=step, positions=positions)

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.precision}, {self.mode}"


def make_case(
    recipe: str,
    *,
    batch: int,
    mode: Mode = "published",
    precision: Literal["bfloat16", "float32"] = "bfloat16",
    depth: int | None = None,
    predictor_depth: int | None = None,
    steps: int = STEPS,
) -> Case:
    """A preset with the benchmark's batch.

    Args:
        recipe: the preset.
        batch: B.
        mode: see `Case`.
        precision: of matrix products.
        depth, predictor_depth: blocks, where the preset's are too many for the machine.
        steps: different steps.
    """
    base = preset(recipe)
    config = replace(
        base,
        model=replace(
            base.model,
            depth=depth or base.model.depth,
            predictor_depth=predictor_depth or base.model.predictor_depth,
        ),
        masks=replace(base.masks, truncation_group=batch if mode == "published" else 1),
        batch=BatchConfig(global_=batch, device=batch),
        optim=replace(base.optim, precision=precision),
    )
    return Case(name=_model_name(config), mode=mode, config=config, steps=steps)


def _model_name(config: Config) -> str:
    """H/14, and in brackets what differs from the named model."""
    letter = config.model.name.removeprefix("vit_")[0].upper()
    name = f"{letter}/{config.model.patch_size}"
    a, plain = config.model.architecture, ModelConfig(name=config.model.name).architecture
    if (a.depth, a.predictor_depth) != (plain.depth, plain.predictor_depth):
        name += f" ({a.depth} + {a.predictor_depth} blocks)"
    return name


class Workload:
    """A case's data: initial weights on the host, images on the device, masks as sampled."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        config = case.config
        self.weights = _initial_weights(config.model, config.data.crop_size)
        height, width = config.data.crop_size
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(
            0, 256, (case.batch, height, width, 3), dtype=torch.uint8, generator=generator
        )
        self.images = images.to(device)
        self.masks = [case.masks(step) for step in range(case.steps)]
        schedules = Schedules.of(config.optim, global_batch=case.batch, steps_per_epoch=1000)
        self.values: list[StepValues] = [schedules.at(step + 1) for step in range(case.steps)]
        width = config.model.architecture.width
        self.elements = [masks.elements(case.batch, width) for masks in self.masks]

    @property
    def longest(self) -> int:
        """The step with most context rows."""
        return max(range(len(self.masks)), key=lambda n: len(self.masks[n].context_index))

    def initial(self, name: str) -> Tensor:
        """A weight at the start, by its name among the masters."""
        network, _, key = name.partition(".")
        return self.weights[1 if network == "predictor" else 0][key]

    def networks(self) -> tuple[VisionTransformer, Predictor]:
        """With the initial weights, on the device; every provider has its own."""
        config = self.case.config
        with torch.device("meta"):
            networks = build_models(config.model, config.data.crop_size)
        for network, weights in zip(networks, self.weights, strict=True):
            network.to_empty(device=self.device)
            network.load_state_dict(weights)
        return networks


@functools.lru_cache(maxsize=1)
def _initial_weights(
    model: ModelConfig, crop: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    encoder, predictor = build_models(model, crop, torch_generator(0, Stream.INIT))
    return encoder.state_dict(), predictor.state_dict()


# --- providers -----------------------------------------------------------------------------------


class Step(Protocol):
    """One training step, as `ReferenceStep` and the others have it."""

    encoder: Any
    predictor: Any
    target_encoder: Any
    optimizer: Any

    def prepare(self, masks: Any) -> Any: ...
    def accumulate(self, images: Tensor, masks: Any, elements: int) -> tuple[Any, ...]: ...
    def update(self, values: StepValues) -> None: ...
    def masters(self) -> dict[str, Tensor]: ...


def _channels(workload: Workload) -> dict[str, Any]:
    data = workload.case.config.data
    return {"mean": data.mean, "std": data.std}


def _released(workload: Workload) -> Step:
    config = workload.case.config.optim
    return ReleasedStyleStep(*workload.networks(), config, **_channels(workload))


def _reference(workload: Workload) -> Step:
    config = workload.case.config.optim
    return ReferenceStep(*workload.networks(), config, **_channels(workload))


def _reference_compiled(workload: Workload) -> Step:
    step = _reference(workload)
    for blocks in (
        step.encoder.blocks,
        step.target_encoder.blocks,
        step.predictor.predictor_blocks,
    ):
        for block in blocks:
            block.compile()
    return step


def _fast(workload: Workload, kind: type[FastStep] = FastStep) -> Step:
    return kind(*workload.networks(), workload.case.config.optim, **_channels(workload))


PROVIDERS: dict[str, Callable[[Workload], Step]] = {
    REFERENCE: _reference,
    FAST: _fast,
    RELEASED: _released,
    COMPILE: _reference_compiled,
    CAPTURED: functools.partial(_fast, kind=CapturedStep),
}


def _patient_compiler() -> AbstractContextManager[object]:
    """A compiled block that met too many shapes would go on uncompiled, in silence."""
    config: Any = torch._dynamo.config
    return config.patch(recompile_limit=64)


class Contestant:
    """A provider with its networks on a workload's device."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.name, self.workload = name, workload
        self.step = PROVIDERS[name](workload)

    def run(self, number: int) -> Tensor:
        """One whole step, from masks as sampled to updated weights; the loss, on the device."""
        work = self.workload
        patient = _patient_compiler() if self.name == COMPILE else contextlib.nullcontext()
        with patient:
            batch = self.step.prepare(work.masks[number])
            loss = self.step.accumulate(work.images, batch, work.elements[number])[0]
            self.step.update(work.values[number])
        return loss

    def run_all(self) -> list[Tensor]:
        """All steps of the workload."""
        return [self.run(number) for number in range(len(self.workload.masks))]

    def weights(self) -> dict[str, Tensor]:
        """Trained and averaged weights. Without the biases of queries, keys and values: those of
        keys have no true gradient, and Adam makes steps of its noise.
        """
        left_out = ("pos_embed", "qkv.bias")
        masters = self.step.masters()
        return {k: v.detach() for k, v in masters.items() if not k.endswith(left_out)}

    @property
    def skipped(self) -> int:
        """Steps whose loss or gradient was not finite."""
        skipped = getattr(self.step, "skipped", None)
        return 0 if skipped is None else int(skipped[2])


def check_losses(
    name: str, losses: Sequence[float], expected: Sequence[float], precision: str
) -> float:
    """Holds a provider's losses against others, step by step, updates in between.

    Returns:
        The largest relative difference.

    Raises:
        ValueError: they differ; the provider computes something else.
    """
    limit, worst = TOLERANCE[precision], 0.0
    for number, (ours, theirs) in enumerate(zip(losses, expected, strict=True)):
        error = abs(ours - theirs) / abs(theirs)
        if not error <= limit or not math.isfinite(ours):
            raise ValueError(
                f"{name} must have the reference's losses in {precision} (relative {limit:g}), got "
                f"{ours:.8g}, not {theirs:.8g}, in step {number}: nothing is timed"
            )
        worst = max(worst, error)
    return worst


def check_weights(contestant: Contestant, expected: dict[str, Tensor]) -> float:
    """Holds a provider's weights after all steps against others, network by network.

    Args:
        contestant: after one `run_all`.
        expected: the other's `weights`, on the host.

    Returns:
        The largest relative L2 difference, as a share of the movement from the start.

    Raises:
        ValueError: they differ.
    """
    work, worst = contestant.workload, 0.0
    limit = WEIGHTS_TOLERANCE[work.case.precision]
    weights = contestant.weights()
    assert weights.keys() == expected.keys()
    for network in ("encoder", "predictor", "target_encoder"):
        apart = moved = torch.zeros((), device=work.device)
        for name, ours in weights.items():
            if name.startswith(network + "."):
                theirs = expected[name].to(work.device)
                apart = apart + (ours - theirs).square().sum()
                moved = moved + (theirs - work.initial(name).to(work.device)).square().sum()
        error = float((apart / moved).sqrt())
        if not error <= limit:
            raise ValueError(
                f"{contestant.name} must have the reference's weights in {work.case.precision} "
                f"(within {limit:g} of their movement), got {error:.1e} for the {network}: nothing "
                "is timed"
            )
        worst = max(worst, error)
    return worst
