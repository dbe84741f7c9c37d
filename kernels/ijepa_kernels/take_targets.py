"""The target rows of the predictor's packed output: the last T rows of every sequence.

    out[i * T + t] = tokens[lengths[i + 1] - T + t]    for sequence i and t = 0 .. T - 1

Fused: the row numbers and the copy forward; backward, zeros for the context rows and the copy for
the target rows in one pass that writes every row once. Sequences ordered [target block, context
block, image], as `predictor_tokens` packs them, give rows ordered [target block, context block,
image, t], as `latent_loss` takes them.

Bytes: n * T * P read and written; backward n * T * P read and the whole of the tokens' gradient
written. Unfused the row numbers take a handful of small launches, and the backward pass writes the
target rows twice.

Shape letters: n sequences, R rows of all of them, T target rows of a sequence, P width.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, debugging
from ijepa_kernels._launch import run
from ijepa_kernels._op import define

__all__ = ["take_targets", "take_targets_bytes", "take_targets_ref"]


def take_targets_ref(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    """The specification, in plain torch."""
    ends = lengths.tolist()[1:]
    return torch.cat([tokens[:0], *(tokens[end - target_length : end] for end in ends)])


def take_targets_bytes(
    rows: int,
    sequences: int,
    target_length: int,
    width: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> int:
    """Bytes that have to move at least: every input read once, every output written once."""
    taken = sequences * target_length
    return (taken + (rows if backward else taken)) * width * dtype.itemsize + 4 * (sequences + 1)


# --- launch table --------------------------------------------------------------------------------

# programs that share a sequence
MAX_PARTS = 64


@functools.cache
def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a tile, and warps, for rows of this width."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(8, 2048 // columns))
    warps = min(16, max(4, rows * columns // 512))
    return {"P": width, "BLOCK_R": rows, "BLOCK_P": columns, "num_warps": warps}


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "T"])
def _take_targets_fwd_kernel(
    tokens_ptr,
    lengths_ptr,
    out_ptr,
    R,
    T,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    begin = tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int64), 0)
    end = tl.load(lengths_ptr + sequence + 1).to(tl.int64)
    column = tl.arange(0, BLOCK_P)[None, :]
    # Triton's interpreter knows no constants of bfloat16
    nan = tl.full((1, 1), float("nan"), tl.float32).to(out_ptr.dtype.element_ty)
    for start in range(part * BLOCK_R, T, tl.num_programs(1) * BLOCK_R):
        t = start + tl.arange(0, BLOCK_R)
        row = end - T + t
        # lengths that make no sense stay inside the tokens
        known = (row >= begin) & (row < R)
        mask = (t < T)[:, None] & (column < P)
        x = tl.load(tokens_ptr + row[:, None] * P + column, mask=mask & known[:, None], other=0.0)
        x = tl.where(known[:, None], x, nan)
        tl.store(out_ptr + (sequence * T + t)[:, None] * P + column, x, mask=mask)


@triton.jit(do_not_specialize=["R", "T"])
def _take_targets_bwd_kernel(
    grad_ptr,
    lengths_ptr,
    grad_tokens_ptr,
    R,
    T,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    begin = tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int64), 0)
    end = tl.load(lengths_ptr + sequence + 1).to(tl.int64)
    last = tl.minimum(end, R)
    column = tl.arange(0, BLOCK_P)[None, :]
    for start in range(begin + part * BLOCK_R, last, tl.num_programs(1) * BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        t = row - (end - T)
        mask = (row < last)[:, None] & (column < P)
        taken = ((t >= 0) & (row < last))[:, None] & (column < P)
        grad = tl.load(grad_ptr + (sequence * T + t)[:, None] * P + column, mask=taken, other=0.0)
        tl.store(grad_tokens_ptr + row[:, None] * P + column, grad, mask=mask)


# --- launchers -----------------------------------------------------------------------------------


def _check_values(lengths: Tensor, rows: int, target_length: int) -> None:
    """Raises ValueError unless every sequence holds its targets and all of them all rows."""
    offsets = lengths.tolist()
    shortest = min((end - begin for begin, end in pairwise(offsets)), default=target_length)
    if offsets[0] != 0 or offsets[-1] != rows or shortest < target_length:
        raise ValueError(
            f"lengths must rise from 0 to the {rows} rows of tokens by at least target_length = "
            f"{target_length} a sequence, got {lengths}"
        )


def _take_targets_fwd(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    rows, width = tokens.shape
    if debugging():
        _check_values(lengths, rows, target_length)
    sequences = lengths.shape[0] - 1
    out = tokens.new_empty((sequences * target_length, width))
    if out.numel():
        tile = _tile(width)
        parts = min(MAX_PARTS, -(-target_length // tile["BLOCK_R"]))
        run(
            _take_targets_fwd_kernel,
            (sequences, parts),
            tokens.contiguous(),
            lengths.contiguous(),
            out,
            rows,
            target_length,
            **tile,
        )
    return out


def _take_targets_bwd(grad: Tensor, lengths: Tensor, rows: int, target_length: int) -> Tensor:
    if debugging():
        _check_values(lengths, rows, target_length)
    sequences, width = lengths.shape[0] - 1, grad.shape[1]
    grad_tokens = grad.new_empty((rows, width))
    if rows and sequences:
        tile = _tile(width)
        # a program for each tile of an average sequence
        parts = min(MAX_PARTS, -(-rows // (sequences * tile["BLOCK_R"])))
        run(
            _take_targets_bwd_kernel,
            (sequences, parts),
            grad.contiguous(),
            lengths.contiguous(),
            grad_tokens,
            rows,
            target_length,
            **tile,
        )
    return grad_tokens


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    _check_values(lengths, tokens.shape[0], target_length)
    return take_targets_ref(tokens, lengths, target_length)


def _bwd_cpu(grad: Tensor, lengths: Tensor, rows: int, target_length: int) -> Tensor:
    _check_values(lengths, rows, target_length)
    first = lengths[1:].long() - target_length
    row = (first[:, None] + torch.arange(target_length)).flatten()
    return grad.new_zeros((rows, grad.shape[1])).index_copy_(0, row, grad)


def _fwd_fake(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    return tokens.new_empty(((lengths.shape[0] - 1) * target_length, tokens.shape[1]))


def _bwd_fake(grad: Tensor, lengths: Tensor, rows: int, target_length: int) -> Tensor:
    return grad.new_empty((rows, grad.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, lengths, ctx.target_length = inputs
    ctx.save_for_backward(lengths)
    ctx.rows = tokens.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _bwd_op(grad, *ctx.saved_tensors, ctx.rows, ctx.target_length), None, None


_bwd_op = define(
    "take_targets_bwd(Tensor grad, Tensor lengths, SymInt rows, SymInt target_length) -> Tensor",
    cuda=_take_targets_bwd,
    cpu=_bwd_cpu,
    fake=_bwd_fake,
)
_fwd_op = define(
    "take_targets(Tensor tokens, Tensor lengths, SymInt target_length) -> Tensor",
    cuda=_take_targets_fwd,
    cpu=_fwd_cpu,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def take_targets(tokens: Tensor, lengths: Tensor, target_length: int) -> Tensor:
    """Picks the target rows out of packed predictor sequences (Assran et al. 2023, section 3).

    Args:
        tokens: (R, P), the sequences of `predictor_tokens`, after any layers that keep rows where
            they are; float32, bfloat16 or float16 (float64 on the CPU).
        lengths: int (n + 1,), cumulative lengths of the sequences: what `predictor_tokens`
            returns beside the tokens.
        target_length: T; the targets are the last T rows of every sequence.

    Returns:
        (n * T, P) in the order of the sequences. Differentiable, once; the gradient of all other
        rows is zero.

        On CUDA and outside `debug_checks`, a sequence shorter than T gives NaN rows, and lengths
        that do not rise from 0 to R unspecified ones and gradients, without an access outside the
        tensors.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_dtype("tokens", tokens)
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens must have shape (R, P), got {tuple(tokens.shape)}")
    check_index("lengths", lengths, tokens)
    if lengths.ndim != 1 or lengths.shape[0] == 0:
        raise ValueError(
            f"lengths must be cumulative, of shape (n + 1,), got {tuple(lengths.shape)}"
        )
    if target_length < 0:
        raise ValueError(f"target_length must not be negative, got {target_length}")
    return _fwd_op(tokens, lengths, target_length)
