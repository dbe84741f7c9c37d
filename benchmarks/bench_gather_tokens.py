"""Masked token gather: a batch's context rows, and rows of four overlapping target blocks."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.gather_tokens import (
    _gather_tokens_bwd,
    _gather_tokens_fwd,
    gather_tokens,
    gather_tokens_bytes,
    gather_tokens_ref,
)

try:
    index_select_cat = importlib.import_module("xformers.ops").index_select_cat
except (ImportError, AttributeError):
    index_select_cat = None

F32, BF16 = torch.float32, torch.bfloat16


def picked_rows(model: Model, generator: torch.Generator, picked: int, blocks: int = 1) -> Tensor:
    """`picked` patches of each image in raster order, drawn afresh for each block."""
    draws = torch.rand((blocks, model.batch, model.patches), generator=generator)
    patch = draws.argsort(2)[:, :, :picked].sort(2).values
    image = torch.arange(model.batch)[:, None]
    return (image * model.patches + patch).flatten().int()


def _inputs(
    model: Model, device: torch.device, generator: torch.Generator, *, repeated: bool = False
) -> tuple[Tensor, ...]:
    x = torch.randn((model.batch * model.patches, model.width), generator=generator).to(BF16)
    picked, blocks = (model.target, model.blocks) if repeated else (model.context, 1)
    return x.to(device), picked_rows(model, generator, picked, blocks).to(device)


def _bytes(model: Model, backward: bool, *, repeated: bool = False) -> int:
    rows = model.batch * model.patches
    picked = model.blocks * model.target if repeated else model.context
    return gather_tokens_bytes(rows, model.batch * picked, model.width, BF16, backward=backward)


def _xformers(x: Tensor, index: Tensor) -> Tensor:
    """One source, one index; it promises nothing for repeated indices."""
    return index_select_cat([x], [index]).view(-1, x.shape[1])


CONTEXT = Bench(
    name="gather_tokens",
    inputs=_inputs,
    providers={
        "reference": gather_tokens_ref,
        "ours": partial(gather_tokens, unique=True),
        "xformers": _xformers if index_select_cat and torch.cuda.is_available() else None,
    },
    bytes=_bytes,
    differentiate=(0,),
)
TARGETS = Bench(
    name="gather_tokens_repeated",
    inputs=partial(_inputs, repeated=True),
    providers={"reference": gather_tokens_ref, "ours": gather_tokens},
    bytes=partial(_bytes, repeated=True),
    differentiate=(0,),
)
bench_gather_tokens = measured(CONTEXT)
bench_gather_tokens_repeated = measured(TARGETS)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    rows, picked = model.batch * model.patches, model.batch * model.context

    def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    index = meta(picked, dtype=torch.int32)
    table = meta(model.patches, model.width, dtype=F32)
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype in (("fp32", F32), ("bf16", BF16)):
        x, grad = meta(rows, model.width, dtype=dtype), meta(picked, model.width, dtype=dtype)
        shape = [rows, model.width]
        cases[f"fwd {name}"] = partial(_gather_tokens_fwd, x, index, None, True)
        cases[f"fwd {name} table"] = partial(_gather_tokens_fwd, x, index, table, True)
        for kind, unique in (("unique", True), ("repeated", False)):
            backward = partial(_gather_tokens_bwd, grad, index, shape)
            cases[f"bwd {name} {kind}"] = partial(backward, 0, F32, unique, True)
            cases[f"bwd {name} {kind} table"] = partial(backward, model.patches, F32, unique, True)
    x = meta(model.batch, model.patches, model.width)
    rectangular = meta(model.batch, model.context, dtype=torch.int64)
    cases["fwd bf16 rectangular"] = partial(_gather_tokens_fwd, x, rectangular, None, True)
    return cases
