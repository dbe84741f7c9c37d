"""Packed predictor input: bfloat16 context features into a float32 residual stream, contexts of
unequal length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench
from benchmarks.shapes import Model
from ijepa_kernels.predictor_tokens import (
    _predictor_tokens_bwd,
    _predictor_tokens_fwd,
    predictor_tokens,
    predictor_tokens_bytes,
)

F32, BF16 = torch.float32, torch.bfloat16


def _lengths(model: Model) -> Tensor:
    """Cumulative; every other context a quarter longer than the mean, the others as much shorter:
    int32 (B + 1,).
    """
    sign = 1 - 2 * (torch.arange(model.batch) % 2)
    sign[model.batch // 2 * 2 :] = 0  # the last of an odd number
    each = model.context + sign * (model.context // 4)
    return torch.cat([each[:1] * 0, each.cumsum(0)]).int()


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    rows, width, patches = model.batch * model.context, model.predictor_width, model.patches
    lengths = _lengths(model)
    image = torch.repeat_interleave(torch.arange(model.batch), lengths.diff())
    patch = torch.randint(patches, (rows,), generator=generator)
    target_shape = model.batch, model.blocks, model.target
    tensors = (
        torch.randn((rows, width), generator=generator).to(BF16),
        torch.randn((1, 1, width), generator=generator),
        torch.randn((1, patches, width), generator=generator),
        (image * patches + patch).int(),
        torch.randint(patches, target_shape, generator=generator).int(),
        lengths,
    )
    return tuple(t.to(device) for t in tensors)


def _reference(
    context: Tensor,
    mask_token: Tensor,
    pos_table: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Without a loop and without reading a length back: every row is scattered to its place."""
    (rows, width), (_, blocks, length) = context.shape, target_index.shape
    sequence = torch.arange(lengths.shape[0] - 1, device=context.device)
    block_rows = rows + len(sequence) * length
    block = torch.arange(blocks, device=context.device)[:, None] * block_rows
    of_row = torch.repeat_interleave(sequence, lengths.diff(), output_size=rows)
    context_at = block + torch.arange(rows, device=context.device) + of_row * length
    first_target = block + lengths[1:] + sequence * length
    target_at = first_target[:, :, None] + torch.arange(length, device=context.device)

    table = pos_table[0]
    tokens = table.new_empty((blocks * block_rows, width))
    tokens[context_at] = context + table[context_index % len(table)]
    tokens[target_at] = mask_token + table[target_index.transpose(0, 1)]
    ends = torch.cat([lengths[:1], (first_target + length).flatten().int()])
    return tokens, ends


def _bytes(model: Model, backward: bool) -> int:
    return predictor_tokens_bytes(
        (model.batch * model.context, model.predictor_width),
        model.batch,
        (model.batch, model.blocks, model.target),
        model.patches,
        BF16,
        F32,
        backward=backward,
    )


BENCH = Bench(
    name="predictor_tokens",
    inputs=_inputs,
    providers={"reference": _reference, "ours": partial(predictor_tokens, out_dtype=F32)},
    bytes=_bytes,
    differentiate=(0, 1),
)


@pytest.mark.parametrize(("provider", "shape", "direction"), BENCH.cases())
def bench_predictor_tokens(benchmark: Any, provider: str, shape: str, direction: str) -> None:
    BENCH.run(benchmark, provider, shape, direction)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of every kernel at its production configuration, on meta tensors."""
    rows, width = model.batch * model.context, model.predictor_width
    tokens = model.blocks * (rows + model.batch * model.target)
    mask_token = torch.empty((1, 1, width), device="meta")
    table = torch.empty((1, model.patches, width), device="meta")
    target_shape = model.batch, model.blocks, model.target
    context_index, target_index, lengths = (
        torch.empty(shape, dtype=torch.int32, device="meta")
        for shape in ((rows,), target_shape, (model.batch + 1,))
    )
    indices = context_index, target_index, lengths
    cases: dict[str, Callable[[], object]] = {}
    for name, dtype, out_dtype in (
        ("bf16 to fp32", BF16, F32),
        ("bf16", BF16, BF16),
        ("fp32", F32, F32),
    ):
        context = torch.empty((rows, width), dtype=dtype, device="meta")
        grad = torch.empty((tokens, width), dtype=out_dtype, device="meta")
        cases[f"fwd {name}"] = partial(
            _predictor_tokens_fwd, context, mask_token, table, *indices, out_dtype
        )
        cases[f"bwd {name}"] = partial(_predictor_tokens_bwd, grad, *indices, model.patches, dtype)
    return cases
