"""Column sums: the bias behind the second product of one block's MLP, context encoder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.column_sums import (
    _column_sums,
    column_sums,
    column_sums_bytes,
    column_sums_ref,
)

BF16 = torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    d = torch.randn((model.batch * model.context, model.width), generator=generator)
    return (d.to(device, BF16),)


def _bytes(model: Model, backward: bool) -> int:
    return column_sums_bytes(model.batch * model.context, model.width, BF16)


BENCH = Bench(
    name="column_sums",
    inputs=_inputs,
    providers={"reference": column_sums_ref, "ours": column_sums},
    bytes=_bytes,
)
bench_column_sums = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    d = torch.empty((model.batch * model.context, model.width), dtype=BF16, device="meta")
    return {"bf16": partial(_column_sums, d)}
