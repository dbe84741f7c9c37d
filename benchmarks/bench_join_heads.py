"""Gradients of queries, keys and values joined: one block of the context encoder."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.join_heads import _join_heads, join_heads, join_heads_bytes, join_heads_ref

BF16 = torch.bfloat16


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    shape = (3, model.batch * model.context, model.heads, model.width // model.heads)
    return tuple(torch.randn(shape, generator=generator).to(device, BF16).unbind(0))


def _bytes(model: Model, backward: bool) -> int:
    return join_heads_bytes(model.batch * model.context, model.width, 3, BF16)


BENCH = Bench(
    name="join_heads",
    inputs=_inputs,
    providers={
        "reference": lambda *parts: join_heads_ref(parts),
        "ours": lambda *parts: join_heads(parts),
    },
    bytes=_bytes,
)
bench_join_heads = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    cases: dict[str, Callable[[], object]] = {}
    for name, width in (("encoder", model.width), ("predictor", model.predictor_width)):
        shape = (model.batch * model.context, model.heads, width // model.heads)
        part = torch.empty(shape, dtype=BF16, device="meta")
        cases[f"{name}, q, k, v"] = partial(_join_heads, *[part] * 3, *[part.stride()] * 3)
        cases[f"{name}, k, v"] = partial(_join_heads, *[part] * 2, *[part.stride()] * 2)
    return cases
