"""Rows rounded to float8: attention's output in one block of the target encoder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.quantize_rows import (
    _quantize_rows,
    quantize_rows,
    quantize_rows_bytes,
    quantize_rows_ref,
)

BF16 = torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    x = torch.randn((model.batch * model.patches, model.width), generator=generator)
    return (x.to(device, BF16),)


def _bytes(model: Model, backward: bool) -> int:
    return quantize_rows_bytes(model.batch * model.patches, model.width, BF16)


BENCH = Bench(
    name="quantize_rows",
    inputs=_inputs,
    providers={"reference": quantize_rows_ref, "ours": quantize_rows},
    bytes=_bytes,
)
bench_quantize_rows = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    x = torch.empty((model.batch * model.patches, model.width), dtype=BF16, device="meta")
    weight = torch.empty((4 * model.width, model.width), device="meta")
    return {
        "bf16": partial(_quantize_rows, x, None, None),
        "fp32 weight of fc1": partial(_quantize_rows, weight, None, None),
        "fp32 weight of fc2": partial(_quantize_rows, weight.view(model.width, -1), None, None),
    }
