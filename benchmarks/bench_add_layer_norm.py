"""Residual add + LayerNorm + cast: rows of one block of the context encoder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels._layer_norm import (
    add_layer_norm_bwd,
    add_layer_norm_fwd,
    add_layer_norm_fwd_float8,
)
from ijepa_kernels.add_layer_norm import add_layer_norm, add_layer_norm_bytes, add_layer_norm_ref

F32, BF16 = torch.float32, torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, width = model.batch * model.context, model.width
    residual = torch.randn((rows, width), generator=generator)
    x = torch.randn((rows, width), generator=generator).to(BF16)
    weight, bias = torch.randn((2, width), generator=generator)
    return tuple(t.to(device) for t in (residual, x, weight.clone(), bias.clone()))


def _bytes(model: Model, backward: bool) -> int:
    rows = model.batch * model.context
    return add_layer_norm_bytes(rows, model.width, F32, BF16, BF16, backward=backward)


BENCH = Bench(
    name="add_layer_norm",
    inputs=_inputs,
    providers={"reference": add_layer_norm_ref, "ours": add_layer_norm},
    bytes=_bytes,
    differentiate=(0, 1, 2, 3),
)
bench_add_layer_norm = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    shape = (model.batch * model.context, model.width)
    x = torch.empty(shape, dtype=BF16, device="meta")
    affine = torch.empty(model.width, device="meta")
    mean = torch.empty(shape[0], device="meta")
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("fp32", F32), ("bf16", BF16)):
        r = torch.empty(shape, dtype=dtype, device="meta")
        cases[f"fwd {name} residual"] = partial(
            add_layer_norm_fwd, r, x, affine, affine, 1e-6, BF16
        )
        cases[f"fwd {name} residual, float8"] = partial(
            add_layer_norm_fwd_float8, r, x, affine, affine, 1e-6
        )
        cases[f"bwd {name} residual"] = partial(
            add_layer_norm_bwd,
            *(x, r, r, mean, mean, affine, affine, BF16, dtype != BF16, False, False),
        )
        cases[f"bwd of a block, {name} residual"] = partial(
            add_layer_norm_bwd,
            *(x, r, r, mean, mean, affine, affine, BF16, True, True, True),
        )
    cases["fwd fp32, nothing added"] = partial(
        add_layer_norm_fwd, torch.empty(shape, device="meta"), None, affine, affine, 1e-6, BF16
    )
    return cases
