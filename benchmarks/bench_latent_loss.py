"""Loss and gradient of the predictor's output against the target encoder's.

Forward and backward are one measurement: the forward pass already writes the gradient, and a
backward pass repeated on a retained graph, as the harness would time it, is not what a training
step does. `latent_loss_scaled` has an upstream gradient other than 1, `latent_loss_alone` none.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.latent_loss import (
    _latent_loss_bwd,
    _latent_loss_bwd_,
    _latent_loss_fwd,
    latent_loss,
    latent_loss_bytes,
    latent_loss_ref,
)

BF16 = torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    shape = (model.batch, model.blocks, model.target)
    patches = torch.stack(
        [
            torch.randperm(model.patches, generator=generator)[: model.target]
            for _ in range(model.batch * model.blocks)
        ]
    ).view(shape)
    first = torch.arange(model.batch)[:, None, None] * model.patches
    index = (patches + first).transpose(0, 1).flatten().int()
    prediction = torch.randn((len(index), model.width), generator=generator)
    target = torch.randn((model.batch, model.patches, model.width), generator=generator)
    return prediction.to(device, BF16), target.to(device, BF16), index.to(device)


def _step(
    function: Callable[..., Tensor], grad_loss: float = 1.0
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Loss and gradient as a training step computes them."""

    def step(prediction: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = prediction.detach().requires_grad_()
            loss = function(leaf, target, index)
            (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, grad_loss))
        return loss.detach(), gradient

    return step


def _bytes(model: Model, backward: bool) -> int:
    rows = model.batch * model.blocks * model.target
    return latent_loss_bytes(rows, model.width, BF16, BF16, torch.int32)


def _bytes_alone(model: Model, backward: bool) -> int:
    rows = model.batch * model.blocks * model.target
    return latent_loss_bytes(rows, model.width, BF16, BF16, torch.int32, gradient=False)


BENCH = Bench(
    name="latent_loss",
    inputs=_inputs,
    providers={"reference": latent_loss_ref, "ours": latent_loss},
    through=_step,
    bytes=_bytes,
)
SCALED = Bench(
    name="latent_loss_scaled",
    inputs=_inputs,
    providers={"reference": latent_loss_ref, "ours": latent_loss},
    through=functools.partial(_step, grad_loss=0.25),
    bytes=_bytes,
)
ALONE = Bench(
    name="latent_loss_alone",
    inputs=_inputs,
    providers={"reference": latent_loss_ref, "ours": latent_loss},
    bytes=_bytes_alone,
)
bench_latent_loss = measured(BENCH)
bench_latent_loss_scaled = measured(SCALED)
bench_latent_loss_alone = measured(ALONE)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    rows = model.batch * model.blocks * model.target
    index = torch.empty(rows, dtype=torch.int32, device="meta")
    numbers = (None, None, 1.0 / (rows * model.width), False, 1.0, True, 1e-5)
    grad_loss = torch.empty((), device="meta")
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("bf16", BF16), ("fp32", torch.float32)):
        prediction = torch.empty((rows, model.width), dtype=dtype, device="meta")
        target = torch.empty((model.batch, model.patches, model.width), dtype=dtype, device="meta")
        inputs = (prediction, target, index, *numbers)
        cases[f"fwd {name}"] = functools.partial(_latent_loss_fwd, *inputs, False)
        cases[f"fwd with gradient {name}"] = functools.partial(_latent_loss_fwd, *inputs, True)
        cases[f"bwd {name}"] = functools.partial(_latent_loss_bwd, grad_loss, *inputs)
        cases[f"bwd in place {name}"] = functools.partial(
            _latent_loss_bwd_, grad_loss, prediction, *inputs
        )
    return cases
