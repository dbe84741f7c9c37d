"""The packed input of the predictor: context rows and mask tokens, each with its position.

For target block m, context block c and image b (in this order, image fastest) one sequence:

    context[r] + pos_table[context_index[r] % N]     for the rows r of sequence s = c * B + b
    mask_token + pos_table[target_index[b, m, t]]    for t = 0 .. T - 1

Fused: both position gathers, both sums (float32, rounded once), the M copies of the context and the
packing. The context is read once, every token is written once, nothing else is stored; the table
stays in the L2 cache. Work is handed out by sequence and part of it, so that a program finds its
rows by two loads from `lengths`: no search, and no length is read back to the host.

Bytes: R * P read, M * (R + S * T) * P written. Unfused, with scatters in place of a concatenation:
the positions of R + M * S * T rows gathered (2 passes over them), added (3) and scattered (2).
Backward: the gradient of the tokens read once, that of the context (the sum over its M copies)
written; the mask token's goes through one partial row a program and a second pass in fixed order:
no atomics.

Shape letters: R context rows, S = C * B context sequences of C context blocks and B images, N grid
patches, M target blocks, T patches of a target block, P predictor width.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, check_range, check_shape, debugging
from ijepa_kernels._launch import run
from ijepa_kernels._op import define

__all__ = ["predictor_tokens", "predictor_tokens_bytes", "predictor_tokens_ref"]


def predictor_tokens_ref(
    context: Tensor,
    mask_token: Tensor,
    pos_table: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain torch."""
    dtype = torch.promote_types(context.dtype, torch.float32)
    table = pos_table.to(dtype).flatten(0, -2)
    rows = context.to(dtype) + table[context_index.long() % len(table)]
    targets = mask_token.to(dtype).flatten() + table[target_index.long()]
    sequences = [
        torch.cat([rows[begin:end], targets[s % len(targets), m]])
        for m in range(target_index.shape[1])
        for s, (begin, end) in enumerate(pairwise(lengths.tolist()))
    ]
    ends = torch.tensor([0, *map(len, sequences)], device=lengths.device).cumsum(0)
    return torch.cat([rows[:0], *sequences]).to(out_dtype or context.dtype), ends.int()


def predictor_tokens_bytes(
    context_shape: tuple[int, int],
    sequences: int,
    target_shape: tuple[int, int, int],
    patches: int,
    context_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    backward: bool = False,
) -> int:
    """Bytes that have to move at least: every input read once, every output written once."""
    (context_rows, width), (images, blocks, length) = context_shape, target_shape
    tokens = blocks * (context_rows + sequences * length) * width
    floats = tokens * out_dtype.itemsize + context_rows * width * context_dtype.itemsize
    # int32 indices and lengths, float32 table and mask token
    moved = floats + 4 * (context_rows + images * blocks * length + sequences + 1) + 4 * width
    return moved if backward else moved + 4 * patches * width + 4 * (blocks * sequences + 1)


# --- launch table --------------------------------------------------------------------------------

MAX_PARTS = 64  # programs that share a sequence
BACKWARD_PROGRAMS = 1024  # or fewer: each keeps one partial sum of the mask token's gradient


@functools.cache
def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a tile, and warps, for rows of this width."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(8, 2048 // columns))
    warps = min(16, max(4, rows * columns // 512))
    return {"P": width, "BLOCK_R": rows, "BLOCK_P": columns, "num_warps": warps}


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _context_rows(lengths_ptr, sequence, R):
    """First and end row of a context sequence; lengths that make no sense stay inside 0 .. R."""
    begin = tl.load(lengths_ptr + sequence).to(tl.int64)
    end = tl.load(lengths_ptr + sequence + 1).to(tl.int64)
    return tl.maximum(begin, 0), tl.minimum(tl.maximum(end, 0), R)


@triton.jit(do_not_specialize=["R", "B", "T"])
def _predictor_tokens_fwd_kernel(
    context_ptr,
    mask_token_ptr,
    pos_table_ptr,
    context_index_ptr,
    target_index_ptr,
    lengths_ptr,
    tokens_ptr,
    ends_ptr,
    R,
    B,
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    sequences = tl.num_programs(0).to(tl.int64)
    image = (sequence.to(tl.int32) % B).to(tl.int64)
    begin, end = _context_rows(lengths_ptr, sequence, R)
    # tokens of one target block, and target tokens of it before this sequence
    block = R + sequences * T
    before = sequence * T
    column = tl.arange(0, BLOCK_P)[None, :]
    in_column = column < P

    for start in range(begin + part * BLOCK_R, end, parts * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        index = tl.load(context_index_ptr + row, mask=row < end, other=0)
        known = (index >= 0) & (index < B * N)
        patch = tl.where(known, index % N, 0).to(tl.int64)
        mask = (row < end)[:, None] & in_column
        offset = row[:, None] * P + column
        x = tl.load(context_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        position = tl.load(pos_table_ptr + patch[:, None] * P + column, mask=mask, other=0.0)
        token = tl.where(known[:, None], x + position.to(tl.float32), float("nan"))
        token = token.to(tokens_ptr.dtype.element_ty)
        for m in tl.static_range(M):
            tl.store(tokens_ptr + (m * block + before) * P + offset, token, mask=mask)

    mask_token = tl.load(mask_token_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    tiles = tl.cdiv(T, BLOCK_R)
    for tile in range(part.to(tl.int32), M * tiles, parts):
        m = tile // tiles
        t = (tile - m * tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        index = tl.load(target_index_ptr + (image * M + m) * T + t, mask=t < T, other=0)
        known = (index >= 0) & (index < N)
        patch = tl.where(known, index, 0).to(tl.int64)
        mask = (t < T)[:, None] & in_column
        position = tl.load(pos_table_ptr + patch[:, None] * P + column, mask=mask, other=0.0)
        token = tl.where(known[:, None], mask_token + position.to(tl.float32), float("nan"))
        token = token.to(tokens_ptr.dtype.element_ty)
        row = m * block + before + end + t
        tl.store(tokens_ptr + row[:, None] * P + column, token, mask=mask)

    if part == 0:
        if sequence == 0:
            tl.store(ends_ptr, 0)
        for m in tl.static_range(M):
            after = m * block + before + end + T
            tl.store(ends_ptr + m * sequences + sequence + 1, after.to(tl.int32))


@triton.jit(do_not_specialize=["R", "B", "T"])
def _predictor_tokens_bwd_kernel(
    grad_ptr,
    context_index_ptr,
    target_index_ptr,
    lengths_ptr,
    grad_context_ptr,
    partial_ptr,
    R,
    B,
    T,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(1)
    image = (sequence.to(tl.int32) % B).to(tl.int64)
    begin, end = _context_rows(lengths_ptr, sequence, R)
    block = R + tl.num_programs(0).to(tl.int64) * T
    before = sequence * T
    column = tl.arange(0, BLOCK_P)[None, :]
    in_column = column < P

    for start in range(begin + part * BLOCK_R, end, parts * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        index = tl.load(context_index_ptr + row, mask=row < end, other=-1)
        known = (index >= 0) & (index < B * N)
        offset = row[:, None] * P + column
        mask = (row < end)[:, None] & in_column
        total = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        for m in tl.static_range(M):
            at = grad_ptr + (m * block + before) * P + offset
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        total = tl.where(known[:, None], total, 0.0).to(grad_context_ptr.dtype.element_ty)
        tl.store(grad_context_ptr + offset, total, mask=mask)

    grad_mask = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
    tiles = tl.cdiv(T, BLOCK_R)
    for tile in range(part.to(tl.int32), M * tiles, parts):
        m = tile // tiles
        t = (tile - m * tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        index = tl.load(target_index_ptr + (image * M + m) * T + t, mask=t < T, other=-1)
        known = (index >= 0) & (index < N)
        at = grad_ptr + (m * block + before + end + t)[:, None] * P + column
        grad = tl.load(at, mask=(t < T)[:, None] & in_column, other=0.0).to(tl.float32)
        grad_mask += tl.where(known[:, None], grad, 0.0)
    partial = partial_ptr + (sequence * parts + part) * P + column
    tl.store(partial, tl.sum(grad_mask, axis=0)[None, :], mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def _check_values(
    num_patches: int, context_index: Tensor, target_index: Tensor, lengths: Tensor
) -> None:
    """Raises ValueError unless the indices are in range and the lengths rise from 0 to R."""
    check_range("context_index", context_index, target_index.shape[0] * num_patches)
    check_range("target_index", target_index, num_patches)
    offsets, rows = lengths.tolist(), context_index.shape[0]
    if offsets[0] != 0 or offsets[-1] != rows or offsets != sorted(offsets):
        raise ValueError(f"lengths must rise from 0 to the {rows} rows of context, got {lengths}")


def _empty(
    context: Tensor, target_index: Tensor, lengths: Tensor, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens, and int32 (M*S + 1,), where each of their sequences begins."""
    _, blocks, length = target_index.shape
    sequences = lengths.shape[0] - 1
    rows = blocks * (context.shape[0] + sequences * length)
    tokens = context.new_empty((rows, context.shape[1]), dtype=out_dtype)
    return tokens, lengths.new_empty(blocks * sequences + 1, dtype=torch.int32)


def _predictor_tokens_fwd(
    context: Tensor,
    mask_token: Tensor,
    pos_table: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    num_patches, width = pos_table.shape[-2:]
    if debugging():
        _check_values(num_patches, context_index, target_index, lengths)
    tokens, ends = _empty(context, target_index, lengths, out_dtype)
    sequences, rows = lengths.shape[0] - 1, context.shape[0]
    images, blocks, length = target_index.shape
    if not sequences:
        return tokens, ends.zero_()
    tile = _tile(width)
    # a program for each tile of an average context
    parts = max(1, min(MAX_PARTS, -(-rows // (sequences * tile["BLOCK_R"]))))
    tensors = context, mask_token, pos_table, context_index, target_index, lengths
    inputs = [tensor.contiguous() for tensor in tensors]
    given = (*inputs, tokens, ends, rows, images, length)
    run(_predictor_tokens_fwd_kernel, (sequences, parts), *given, M=blocks, N=num_patches, **tile)
    return tokens, ends


def _predictor_tokens_bwd(
    grad: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
    num_patches: int,
    context_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of the context, and float32 (P,) of the mask token."""
    if debugging():
        _check_values(num_patches, context_index, target_index, lengths)
    rows, sequences, width = context_index.shape[0], lengths.shape[0] - 1, grad.shape[1]
    images, blocks, length = target_index.shape
    grad_context = grad.new_empty((rows, width), dtype=context_dtype)
    if not sequences:
        return grad_context, grad.new_zeros(width, dtype=torch.float32)
    tile = _tile(width)
    tiles = max(rows // sequences, blocks * length) // tile["BLOCK_R"] + 1
    parts = min(MAX_PARTS, -(-BACKWARD_PROGRAMS // sequences), tiles)
    partial = grad.new_empty((sequences * parts, width), dtype=torch.float32)
    inputs = [tensor.contiguous() for tensor in (grad, context_index, target_index, lengths)]
    given = (*inputs, grad_context, partial, rows, images, length)
    run(_predictor_tokens_bwd_kernel, (sequences, parts), *given, M=blocks, N=num_patches, **tile)
    return grad_context, partial.sum(0)


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, out_dtype = args
    _check_values(inputs[2].shape[-2], *inputs[3:])
    return predictor_tokens_ref(*inputs, out_dtype=out_dtype)


def _bwd_cpu(
    grad: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
    num_patches: int,
    context_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_values(num_patches, context_index, target_index, lengths)
    _, blocks, length = target_index.shape
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    sizes = [size for rows in lengths.diff().tolist() for size in (rows, length)]
    pieces = grad.split(sizes * blocks)
    copies = torch.cat([grad[:0], *pieces[::2]]).view(blocks, *context_index.shape, grad.shape[1])
    return copies.sum(0).to(context_dtype), torch.cat([grad[:0], *pieces[1::2]]).sum(0)


def _fwd_fake(context: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, target_index, lengths, out_dtype = rest
    return _empty(context, target_index, lengths, out_dtype)


def _bwd_fake(grad: Tensor, context_index: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    grad_context = grad.new_empty((context_index.shape[0], grad.shape[1]), dtype=rest[-1])
    return grad_context, grad.new_empty(grad.shape[1], dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    context, mask_token, pos_table, *indices, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*indices)
    ctx.mask_shape, ctx.mask_dtype = mask_token.shape, mask_token.dtype
    ctx.num_patches, ctx.context_dtype = pos_table.shape[-2], context.dtype


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_context, grad_mask = _bwd_op(grad, *ctx.saved_tensors, ctx.num_patches, ctx.context_dtype)
    grad_mask = grad_mask.to(ctx.mask_dtype).view(ctx.mask_shape)
    return grad_context, grad_mask, None, None, None, None, None


_bwd_op = define(
    "predictor_tokens_bwd(Tensor grad, Tensor context_index, Tensor target_index, Tensor lengths, "
    "SymInt num_patches, ScalarType context_dtype) -> (Tensor, Tensor)",
    cuda=_predictor_tokens_bwd,
    cpu=_bwd_cpu,
    fake=_bwd_fake,
)
_fwd_op = define(
    "predictor_tokens(Tensor context, Tensor mask_token, Tensor pos_table, Tensor context_index, "
    "Tensor target_index, Tensor lengths, ScalarType out_dtype) -> (Tensor, Tensor)",
    cuda=_predictor_tokens_fwd,
    cpu=_fwd_cpu,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def predictor_tokens(
    context: Tensor,
    mask_token: Tensor,
    pos_table: Tensor,
    context_index: Tensor,
    target_index: Tensor,
    lengths: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Builds the predictor's packed sequences, one for each target block, context block and image
    (Assran et al. 2023, section 3).

    Args:
        context: (R, P) context features, already projected to the predictor's width; float32,
            bfloat16 or float16 (float64 on the CPU).
        mask_token: (P,) or (1, 1, P).
        pos_table: (N, P) or (1, N, P), the fixed position table; it gets no gradient.
        context_index: int (R,), image * N + patch of each context row; only the patch is used.
        target_index: int (B, M, T), patches 0 .. N - 1.
        lengths: int (S + 1,), cumulative lengths of the S = C * B context sequences, ordered
            [context block, image]: where each begins, and R.
        out_dtype: of the tokens; the context's by default.

    Returns:
        Tokens (M * (R + S * T), P), sequences ordered [target block, context block, image], each
        its context rows, then its T targets; and int32 (M * S + 1,), their cumulative lengths.
        Differentiable, once, in context and mask_token. On CUDA outside `debug_checks`, lengths
        that do not rise from 0 to R give unspecified rows and gradients, but no bad access.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or pos_table requires a gradient.
    """
    check_dtype("context", context)
    check_dtype("mask_token", mask_token)
    check_dtype("pos_table", pos_table)
    check_dtype("out_dtype", context, dtype=out_dtype)
    if context.ndim != 2 or context.shape[1] == 0:
        raise ValueError(f"context must have shape (R, P), got {tuple(context.shape)}")
    rows, width = context.shape
    shape = (width,) if mask_token.ndim == 1 else (1, 1, width)
    check_shape("mask_token", mask_token, shape, context)
    if pos_table.ndim not in {2, 3} or pos_table.shape[-2] == 0:
        raise ValueError(
            f"pos_table must have shape (N, P) or (1, N, P), got {tuple(pos_table.shape)}"
        )
    shape = (1, pos_table.shape[-2], width)
    check_shape("pos_table", pos_table, shape[3 - pos_table.ndim :], context)
    if pos_table.requires_grad and torch.is_grad_enabled():
        raise ValueError("pos_table must not require a gradient: it is taken for fixed")
    check_index("context_index", context_index, context)
    check_shape("context_index", context_index, (rows,), context)
    check_index("target_index", target_index, context)
    if target_index.ndim != 3:
        raise ValueError(f"target_index must have shape (B, M, T), got {tuple(target_index.shape)}")
    check_index("lengths", lengths, context)
    images, blocks, length = target_index.shape
    sequences = lengths.numel() - 1
    if lengths.ndim != 1 or sequences < 0 or (sequences % images if images else sequences):
        raise ValueError(
            f"lengths must be cumulative, of shape (C * {images} + 1,) for {images} images, "
            f"got {tuple(lengths.shape)}"
        )
    if blocks * (rows + sequences * length) >= 2**31:
        raise ValueError("context and target_index must give fewer than 2**31 tokens")
    inputs = context, mask_token, pos_table, context_index, target_index, lengths
    return _fwd_op(*inputs, out_dtype or context.dtype)
