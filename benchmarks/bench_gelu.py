"""GELU of the hidden rows of one block of the context encoder; backward also its fused pass."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.gelu import (
    _gelu_bwd_sums,
    _gelu_float8,
    _gelu_fwd,
    _launch_bwd,
    gelu,
    gelu_bytes,
    gelu_ref,
)

BF16 = torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    h = torch.randn((model.batch * model.context, 4 * model.width), generator=generator)
    return (h.to(device, BF16),)


def _bytes(model: Model, backward: bool) -> int:
    return gelu_bytes(model.batch * model.context, 4 * model.width, BF16, backward=backward)


BENCH = Bench(
    name="gelu",
    inputs=_inputs,
    providers={"reference": gelu_ref, "ours": gelu},
    bytes=_bytes,
    differentiate=(0,),
)
bench_gelu = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    h = torch.empty((model.batch * model.context, 4 * model.width), dtype=BF16, device="meta")
    return {
        "fwd": partial(_gelu_fwd, h),
        "fwd, float8": partial(_gelu_float8, h),
        "bwd": partial(_launch_bwd, h, h, False, False),
        "bwd, sums": partial(_gelu_bwd_sums, h, h, False),
        "bwd, sums, activation": partial(_gelu_bwd_sums, h, h, True),
    }
