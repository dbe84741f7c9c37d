"""Gradients of queries, keys and values side by side, and their column sums, in one pass.

    joined[r, p * D + h * E + e] = part_p[r, h, e]        s[c] = sum over r of joined[r, c]

Attention's backward pass writes two or three tensors (R, H, E); the product behind it wants one,
and the bias its column sums. In bfloat16 4 bytes an element, 6 if joined and summed apart.

The parts may have any strides as long as a head's elements are neighbours. Strides are not
constants of the kernel, since some depend on R; that they are multiples of UNIT elements is, so
that loads are wide.

Shape letters: R rows, H heads, E head dim, D = H * E, P parts.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_shape
from ijepa_kernels._launch import run
from ijepa_kernels._op import raw
from ijepa_kernels._segments import columns_of_tile
from ijepa_kernels._sums import add_up, row_programs

__all__ = ["join_heads", "join_heads_bytes", "join_heads_ref"]


def join_heads_ref(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The specification, in plain torch."""
    joined = torch.cat([part.flatten(1) for part in parts], 1)
    return joined, joined.sum(0, dtype=torch.promote_types(joined.dtype, torch.float32))


def join_heads_bytes(rows: int, width: int, parts: int, dtype: torch.dtype) -> int:
    """Bytes that have to move at least."""
    return rows * width * parts * 2 * dtype.itemsize + width * parts * 4


# --- launch table --------------------------------------------------------------------------------

TILE = 1024  # elements of each part, 4 warps: 16 bytes a thread in bfloat16


@functools.lru_cache(1024)
def _steps(shape: torch.Size, *strides: tuple[int, ...]) -> tuple[int, list[int]]:
    """The power of two, up to 16, that divides all strides of rows and heads, and these strides
    over it.
    """
    steps = [
        stride if size > 1 else 0
        for of_part in strides
        for stride, size in zip(of_part[:2], shape[:2], strict=True)
    ]
    unit = math.gcd(16, *steps)
    return unit, [step // unit for step in steps]


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _part(ptr, row, head, place, row_step, head_step, mask, UNIT: tl.constexpr):
    """A tile of one of the parts."""
    start = row[:, None] * row_step + head[None, :] * head_step
    return tl.load(ptr + start * UNIT + place[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        *("R", "rows_per_program"),
        *("a_row", "a_head", "b_row", "b_head", "c_row", "c_head"),
    ]
)
def _join_heads_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    partial_ptr,
    R,
    rows_per_program,
    a_row,
    a_head,
    b_row,
    b_head,
    c_row,
    c_head,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    program = tl.program_id(1).to(tl.int64)
    in_column = column < D
    head, place = (column // E).to(tl.int64), column % E
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    sum_a = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    sum_c = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & in_column[None, :]
        out = out_ptr + row[:, None] * (P * D) + column[None, :]
        a = _part(a_ptr, row, head, place, a_row, a_head, mask, UNIT)
        if P > 1:
            b = _part(b_ptr, row, head, place, b_row, b_head, mask, UNIT)
        if P > 2:
            c = _part(c_ptr, row, head, place, c_row, c_head, mask, UNIT)
        tl.store(out, a, mask=mask)
        sum_a += a.to(tl.float32)
        if P > 1:
            tl.store(out + D, b, mask=mask)
            sum_b += b.to(tl.float32)
        if P > 2:
            tl.store(out + 2 * D, c, mask=mask)
            sum_c += c.to(tl.float32)
    partial = partial_ptr + program * (P * D) + column
    tl.store(partial, tl.sum(sum_a, axis=0), mask=in_column)
    if P > 1:
        tl.store(partial + D, tl.sum(sum_b, axis=0), mask=in_column)
    if P > 2:
        tl.store(partial + 2 * D, tl.sum(sum_c, axis=0), mask=in_column)


# --- launcher ------------------------------------------------------------------------------------


def _join_heads(*given: Any) -> tuple[Tensor, Tensor]:
    """Of the parts, with the strides of each behind them."""
    count = len(given) // 2
    first, stride = given[0], given[count]
    # a third part is not looked at where there is none
    a, b, c = (*given[:count], first, first)[:3]
    rows, heads, head_dim = shape = first.shape
    width = heads * head_dim
    unit, steps = _steps(shape, *(*given[count:], stride, stride)[:3])
    programs, each = row_programs(rows)
    joined = first.new_empty((rows, count * width))
    partial = first.new_empty((programs, count * width), dtype=torch.float32)
    block_d = columns_of_tile(width)
    run(
        _join_heads_kernel,
        (-(-width // block_d), programs),
        *(a, b, c, joined, partial, rows, each, *steps),
        P=count,
        UNIT=unit,
        E=head_dim,
        D=width,
        BLOCK_R=TILE // block_d,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return joined, add_up(partial)


# --- registration --------------------------------------------------------------------------------


def _cpu(*given: Any) -> tuple[Tensor, Tensor]:
    return join_heads_ref(given[: len(given) // 2])


def _check(*given: Any) -> None:
    parts, strides = given[: len(given) // 2], given[len(given) // 2 :]
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"parts must be 1 to 3 tensors, got {len(parts)}")
    for number, part in enumerate(parts):
        check_dtype(f"parts[{number}]", part)
        check_shape(f"parts[{number}]", part, parts[0].shape, parts[0])
        if part.dtype != parts[0].dtype:
            raise ValueError(f"parts must have one dtype, got {parts[0].dtype} and {part.dtype}")
    if parts[0].ndim != 3 or 0 in parts[0].shape[1:]:
        raise ValueError(f"parts must have shape (R, H, E), got {tuple(parts[0].shape)}")
    if any(stride[2] != 1 for stride in strides) and parts[0].shape[2] > 1:
        raise ValueError(
            "a head's elements must be neighbours, got strides " + " and ".join(map(str, strides))
        )


_raw = raw("join_heads", cuda=_join_heads, cpu=_cpu, check=_check)


# --- public --------------------------------------------------------------------------------------


def join_heads(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Puts up to three tensors of heads side by side, with the sums of all columns; for code that
    writes its own derivative. It has none itself, and CUDA tensors must be on the current device.

    Args:
        parts: 1 to 3 tensors (R, H, E) of one dtype, float32, bfloat16 or float16 (float64 on the
            CPU), each with strides of its own; a head's elements are neighbours.

    Returns:
        (R, n * H * E) in their dtype, part after part, and its column sums (n * H * E,), float32
        (float64 for float64), the same bits every time.

    Raises:
        ValueError: the number of parts, shapes, dtypes, strides or devices do not fit.
    """
    return _raw(tuple(parts), *map(Tensor.stride, parts))
