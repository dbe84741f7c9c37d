"""Target rows out of the predictor's float32 residual stream, contexts of unequal length."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.shapes import Model
from ijepa_kernels.take_targets import (
    _take_targets_bwd,
    _take_targets_fwd,
    take_targets,
    take_targets_bytes,
)

F32, BF16 = torch.float32, torch.bfloat16


def _rows(model: Model) -> int:
    return model.blocks * model.batch * (model.context + model.target)


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    tokens = torch.randn((_rows(model), model.predictor_width), generator=generator)
    # every other context a quarter longer than the mean, the others as much shorter
    sign = 1 - 2 * (torch.arange(model.blocks * model.batch) % 2)
    each = model.context + sign * (model.context // 4) + model.target
    lengths = torch.cat([each[:1] * 0, each.cumsum(0)]).int()
    return tokens.to(device), lengths.to(device), model.target


def _reference(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    t = torch.arange(-target_length, 0, device=tokens.device, dtype=lengths.dtype)
    return tokens.index_select(0, (lengths[1:, None] + t).flatten())


def _bytes(model: Model, backward: bool) -> int:
    sequences, width = model.blocks * model.batch, model.predictor_width
    return take_targets_bytes(_rows(model), sequences, model.target, width, F32, backward=backward)


BENCH = Bench(
    name="take_targets",
    inputs=_inputs,
    providers={"reference": _reference, "ours": take_targets},
    bytes=_bytes,
    differentiate=(0,),
)


@pytest.mark.parametrize(("provider", "shape", "direction"), BENCH.cases())
def bench_take_targets(benchmark: Any, provider: str, shape: str, direction: str) -> None:
    BENCH.run(benchmark, provider, shape, direction)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    rows, sequences, width = _rows(model), model.blocks * model.batch, model.predictor_width
    lengths = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("fp32", F32), ("bf16", BF16)):
        tokens = torch.empty((rows, width), dtype=dtype, device="meta")
        grad = torch.empty((sequences * model.target, width), dtype=dtype, device="meta")
        cases[f"fwd {name}"] = partial(_take_targets_fwd, tokens, lengths, model.target)
        cases[f"bwd {name}"] = partial(_take_targets_bwd, grad, lengths, rows, model.target)
    return cases
