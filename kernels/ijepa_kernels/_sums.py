"""Sums of columns in two passes, without atomics: programs add up rows, then their partial sums.

Shape letters: R rows, D columns.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._launch import run
from ijepa_kernels._segments import columns_of_tile

__all__ = ["add_up", "partial_sums", "row_programs"]

# --- launch table --------------------------------------------------------------------------------

TILE = 2048  # elements, 4 warps: 32 bytes a thread in bfloat16
# rows that a program adds up: enough that partial sums are a few percent of the bytes read
MIN_ROWS_PER_PROGRAM, MAX_ROW_PROGRAMS = 64, 512
# of the second pass: few columns a program, so that there are many of them
SECOND_ROWS, SECOND_COLUMNS = 64, 32


@functools.lru_cache(1024)
def row_programs(rows: int) -> tuple[int, int]:
    """Programs along the rows, at least 1, and how many rows each has, a multiple of 8."""
    each = max(MIN_ROWS_PER_PROGRAM, -(-rows // (MAX_ROW_PROGRAMS * 8)) * 8)
    return max(1, -(-rows // each)), each


# --- kernel --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def _column_sums_kernel(
    x_ptr,
    out_ptr,
    R,
    rows_per_program,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    program = tl.program_id(1).to(tl.int64)
    in_column = column < D
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    # a register an element: nothing crosses threads before the end
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & in_column[None, :]
        offset = row[:, None] * D + column[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + program * D + column, tl.sum(total, axis=0), mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def partial_sums(x: Tensor) -> Tensor:
    """Float32 (programs, D) of contiguous rows (R, D); R may be 0."""
    rows, width = x.shape
    programs, each = row_programs(rows)
    block_d = columns_of_tile(width)
    out = x.new_empty((programs, width), dtype=torch.float32)
    grid = (-(-width // block_d), programs)
    run(
        _column_sums_kernel,
        grid,
        *(x, out, rows, each),
        D=width,
        BLOCK_R=TILE // block_d,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return out


def add_up(partial: Tensor) -> Tensor:
    """Float32 (D,): the sum of partial sums (programs, D), contiguous, in fixed order."""
    programs, width = partial.shape
    if programs == 1:
        return partial.view(width)
    out = partial.new_empty(width)
    grid = (-(-width // SECOND_COLUMNS), 1)
    run(
        _column_sums_kernel,
        grid,
        *(partial, out, programs, programs),
        D=width,
        BLOCK_R=SECOND_ROWS,
        BLOCK_D=SECOND_COLUMNS,
        num_warps=4,
    )
    return out
