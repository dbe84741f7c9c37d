"""Token scatter: context rows back to their places with mask tokens and positions elsewhere, and
the sum of four overlapping target blocks.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_gather_tokens import picked_rows
from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.scatter_tokens import (
    _scatter_tokens_bwd,
    _scatter_tokens_fwd,
    scatter_tokens,
    scatter_tokens_bytes,
    scatter_tokens_ref,
)

try:
    scaled_index_add = importlib.import_module("xformers.ops").scaled_index_add
except (ImportError, AttributeError):
    scaled_index_add = None

F32, BF16 = torch.float32, torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    """x, index, rows of the output, mask token, positions."""
    index = picked_rows(model, generator, model.context)
    x = torch.randn((len(index), model.width), generator=generator).to(BF16)
    fill = torch.randn(model.width, generator=generator)
    table = torch.randn((model.patches, model.width), generator=generator)
    rows = model.batch * model.patches
    return x.to(device), index.to(device), rows, fill.to(device), table.to(device)


def _inputs_repeated(
    model: Model, device: torch.device, generator: torch.Generator
) -> tuple[Any, ...]:
    index = picked_rows(model, generator, model.target, model.blocks)
    x = torch.randn((len(index), model.width), generator=generator).to(BF16)
    return x.to(device), index.to(device), model.batch * model.patches


def _bytes(model: Model, backward: bool) -> int:
    return scatter_tokens_bytes(
        model.batch * model.patches,
        model.batch * model.context,
        model.width,
        BF16,
        fill_dtype=F32,
        table_rows=0 if backward else model.patches,  # the table is fixed
        backward=backward,
    )


def _bytes_repeated(model: Model, backward: bool) -> int:
    given = model.batch * model.blocks * model.target
    return scatter_tokens_bytes(
        model.batch * model.patches, given, model.width, BF16, backward=backward
    )


def _xformers(x: Tensor, index: Tensor, num_tokens: int, fill: Tensor, table: Tensor) -> Tensor:
    """Adds in place, so the fill has to leave room; indices must not repeat."""
    index = index.long()
    empty = fill.to(x.dtype).expand(num_tokens, -1).index_fill(0, index, 0)
    out = scaled_index_add(empty[:, None], index, x[:, None], None, 1.0)
    out = out.view(-1, *table.shape) + table
    return out.to(x.dtype).flatten(0, 1)


CONTEXT = Bench(
    name="scatter_tokens",
    inputs=_inputs,
    providers={
        "reference": scatter_tokens_ref,
        "ours": partial(scatter_tokens, unique=True),
        "xformers": _xformers if scaled_index_add and torch.cuda.is_available() else None,
    },
    bytes=_bytes,
    differentiate=(0, 3),
)
TARGETS = Bench(
    name="scatter_tokens_repeated",
    inputs=_inputs_repeated,
    providers={"reference": scatter_tokens_ref, "ours": scatter_tokens},
    bytes=_bytes_repeated,
    differentiate=(0,),
)
bench_scatter_tokens = measured(CONTEXT)
bench_scatter_tokens_repeated = measured(TARGETS)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    rows, given = model.batch * model.patches, model.batch * model.context

    def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index = meta(given, dtype=torch.int32)
    fill = meta(model.width, dtype=F32)
    table = meta(model.patches, model.width, dtype=F32)
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("fp32", F32), ("bf16", BF16)):
        x, grad = meta(given, model.width, dtype=dtype), meta(rows, model.width, dtype=dtype)
        for kind, unique in (("unique", True), ("repeated", False)):
            forward = partial(_scatter_tokens_fwd, x, index, rows)
            cases[f"fwd {name} {kind}"] = partial(forward, None, None, unique)
            cases[f"fwd {name} {kind} fill table"] = partial(forward, fill, table, unique)
        cases[f"bwd {name}"] = partial(_scatter_tokens_bwd, grad, index, True, True)
    return cases
