"""Token rows put back where an index says, a mask token everywhere else, positions on top.

    out[n] = (sum of x[r] over all r with index[r] = n, or fill if there is none) + table[n % N]

Fused: the fill, the scatter and the addition of the position table: every row of the output is
written once, where torch writes it with the fill, again (read and written) with the rows that name
it, and again with the positions.

Bytes with bfloat16 rows: 2 D read a row of x and 2 D written a row of the output, fill and table
read once; unfused (zeros, index_add, where, addition in float32, cast) 18 D a row of x and 26 D a
row of the output. Without `unique` a stable sort of the R row numbers comes on top. Backward: rows
that are named are read for the gradient of x, the others for that of the fill, whose column sums go
through one partial row a program and a second pass in fixed order: no atomics.

Rows that are named several times have the sum, added in a fixed order: see `_segments.py`.

Shape letters: B images, N rows of the table, K given patches of an image, R given rows, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, check_shape
from ijepa_kernels._launch import run
from ijepa_kernels._op import define
from ijepa_kernels._segments import (
    MAX_ROWS,
    TILE,
    check_indices,
    columns_of_tile,
    flat_rows,
    inverse_or_segments,
    sum_segments,
    take_rows,
)

__all__ = ["scatter_tokens", "scatter_tokens_bytes", "scatter_tokens_ref"]

Maybe = Tensor | None


def scatter_tokens_ref(
    x: Tensor,
    index: Tensor,
    num_tokens: int,
    fill: Tensor | None = None,
    table: Tensor | None = None,
    *,
    unique: bool = False,
) -> Tensor:
    """The specification, in plain torch; `unique` changes nothing here."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    row, shape = flat_rows(index, num_tokens), (*index.shape[:-1], num_tokens, x.shape[-1])
    out = x.new_zeros(shape, dtype=dtype).flatten(0, -2)
    out = out.index_add(0, row, x.flatten(0, -2).to(dtype))
    if fill is not None:
        named = torch.zeros(len(out), dtype=torch.bool, device=x.device).index_fill(0, row, True)
        out = torch.where(named[:, None], out, fill.to(dtype))
    if table is not None:
        out = (out.view(-1, *table.shape) + table.to(dtype)).flatten(0, 1)
    return out.view(shape).to(x.dtype)


def scatter_tokens_bytes(
    rows: int,
    given: int,
    width: int,
    dtype: torch.dtype,
    *,
    fill_dtype: torch.dtype | None = None,
    table_rows: int = 0,
    backward: bool = False,
) -> int:
    """Bytes that have to move at least: every input read once, every output written once.

    Args:
        rows: of the output.
        given: rows of x.
        fill_dtype: None without a fill or, backward, without its gradient.
        table_rows: of the float32 table that is added or, backward, that has a gradient.
    """
    fill = 0 if fill_dtype is None else width * fill_dtype.itemsize
    table = table_rows * width * 4
    # without fill and table only the named rows of the gradient matter
    moved = rows if fill or table or not backward else given
    return (moved + given) * width * dtype.itemsize + given * 4 + fill + table


# --- launch table; that of the other kernels is in _segments.py ----------------------------------

# rows of programs of the fill's gradient: each keeps one partial sum of every column
MAX_FILL_PROGRAMS = 256


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _scatter_tokens_bwd_kernel(
    grad_ptr,
    inverse_ptr,
    partial_ptr,
    rows,
    rows_per_program,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Column sums of the gradient over rows that nothing names."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    program = tl.program_id(1).to(tl.int64)
    in_column = column < D
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, rows)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        unnamed = tl.load(inverse_ptr + row, mask=row < end, other=0) < 0
        tile = tl.load(
            grad_ptr + row[:, None] * D + column[None, :],
            mask=unnamed[:, None] & in_column[None, :],
            other=0.0,
        )
        total += tile.to(tl.float32)
    tl.store(partial_ptr + program * D + column, tl.sum(total, axis=0), mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def _scatter_tokens_fwd(
    x: Tensor, index: Tensor, num_tokens: int, fill: Maybe, table: Maybe, unique: bool
) -> Tensor:
    check_indices(index, num_tokens, unique=unique)
    out = x.new_empty((*index.shape[:-1], num_tokens, x.shape[-1]))
    rows = out.numel() // x.shape[-1]
    listed, starts = inverse_or_segments(index, num_tokens, rows, 1, inverse=unique)
    sum_segments(x.contiguous(), listed, starts, out, images=rows, fill=fill, table=table)
    return out


def _scatter_tokens_bwd(
    grad: Tensor, index: Tensor, need_x: bool, need_fill: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, float32 (D,), of the fill; empty if not needed."""
    size, width = grad.shape[-2:]
    check_indices(index, size, unique=False)
    grad = grad.contiguous()
    if need_x:
        grad_x = take_rows(grad, index, size, None, nan_if_invalid=False)
    else:
        grad_x = grad.new_empty(0)
    if not need_fill:
        return grad_x, grad.new_empty(0, dtype=torch.float32)
    rows = grad.numel() // width
    # of several positions in one place any will do: only their presence is read
    inverse, _ = inverse_or_segments(index, size, rows, 1, inverse=True)
    block_d = columns_of_tile(width)
    block_r = TILE // block_d
    programs = max(1, min(MAX_FILL_PROGRAMS, -(-rows // block_r)))
    partial = grad.new_empty((programs, width), dtype=torch.float32)
    run(
        _scatter_tokens_bwd_kernel,
        (-(-width // block_d), programs),
        grad,
        inverse,
        partial,
        rows,
        -(-rows // programs),
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return grad_x, partial.sum(0)


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(
    x: Tensor, index: Tensor, num_tokens: int, fill: Maybe, table: Maybe, unique: bool
) -> Tensor:
    check_indices(index, num_tokens, unique=unique, always=True)
    return scatter_tokens_ref(x, index, num_tokens, fill, table)


def _bwd_cpu(grad: Tensor, index: Tensor, need_x: bool, need_fill: bool) -> tuple[Tensor, Tensor]:
    size, width = grad.shape[-2:]
    check_indices(index, size, unique=False, always=True)
    row, flat = flat_rows(index, size), grad.reshape(-1, width)
    grad_x = grad.new_empty(0)
    grad_fill = grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32))
    if need_x:
        grad_x = flat.index_select(0, row).view(*index.shape, width)
    if need_fill:
        unnamed = torch.ones(len(flat), dtype=torch.bool).index_fill(0, row, False)
        grad_fill = flat[unnamed].to(grad_fill.dtype).sum(0)
    return grad_x, grad_fill


def _bwd_fake(grad: Tensor, index: Tensor, need_x: bool, need_fill: bool) -> tuple[Tensor, Tensor]:
    width = grad.shape[-1]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    return (
        grad.new_empty((*index.shape, width) if need_x else (0,)),
        grad.new_empty((width,) if need_fill else (0,), dtype=dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _, fill, table, _ = inputs
    ctx.save_for_backward(index)
    ctx.fill_dtype = None if fill is None else fill.dtype
    ctx.table = None if table is None else (table.shape, table.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    need_x, _, _, need_fill, need_table, _ = ctx.needs_input_grad
    grad_x = grad_fill = grad_table = None
    if need_x or need_fill:
        grad_x, grad_fill = _bwd_op(grad, index, need_x, need_fill)
        grad_x = grad_x if need_x else None
        grad_fill = grad_fill.to(ctx.fill_dtype) if need_fill else None
    if need_table:
        # every row takes part: a sum over images that torch does well
        shape, dtype = ctx.table
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_table = grad.reshape(-1, *shape).sum(0, dtype=wide).to(dtype)
    return grad_x, None, None, grad_fill, grad_table, None


_bwd_op = define(
    "scatter_tokens_bwd(Tensor grad, Tensor index, bool need_x, bool need_fill) "
    "-> (Tensor, Tensor)",
    cuda=_scatter_tokens_bwd,
    cpu=_bwd_cpu,
    fake=_bwd_fake,
)
_fwd_op = define(
    "scatter_tokens(Tensor x, Tensor index, SymInt num_tokens, Tensor? fill, Tensor? table, "
    "bool unique) -> Tensor",
    cuda=_scatter_tokens_fwd,
    cpu=_fwd_cpu,
    fake=lambda x, index, rows, *_: x.new_empty((*index.shape[:-1], rows, x.shape[-1])),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def scatter_tokens(
    x: Tensor,
    index: Tensor,
    num_tokens: int,
    fill: Tensor | None = None,
    table: Tensor | None = None,
    *,
    unique: bool = False,
) -> Tensor:
    """Puts token rows in their places and a fill (MAE's mask token) in all others; the inverse of
    `gather_tokens`.

    Args:
        x: (R, D) or (B, K, D), float32, bfloat16 or float16 (float64 on the CPU).
        index: int32 or int64, (R,) or (B, K): the row of the output that each row of x is added to;
            with (B, K) the row of its image.
        num_tokens: rows of the output; with (B, K) those of an image.
        fill: (D,), for rows that nothing is added to; zeros by default. Its dtype may differ.
        table: (N, D), row n % N of it is added to each row n; its dtype may differ. N must divide
            `num_tokens`; with (B, K) it must be `num_tokens`.
        unique: a promise that no index repeats within an image: no sort is needed. If it is
            broken, a row gets one of those it should have summed; `debug_checks` finds out.

    Returns:
        (num_tokens, D) or (B, num_tokens, D) in x's dtype, summed in float32 and rounded once,
        contiguous. x, fill and table are differentiable, once. Sums are the same bits every time.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU and within `debug_checks` also
            indices out of range, or repeated although `unique`.
    """
    check_dtype("x", x)
    check_index("index", index, x)
    if index.ndim not in (1, 2):
        raise ValueError(f"index must have shape (R,) or (B, K), got {tuple(index.shape)}")
    if x.ndim != index.ndim + 1 or x.shape[:-1] != index.shape or x.shape[-1] == 0:
        raise ValueError(
            f"x must have the shape of index, {tuple(index.shape)}, and a width, "
            f"got {tuple(x.shape)}"
        )
    rows = num_tokens if index.ndim == 1 else num_tokens * index.shape[0]
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be positive, got {num_tokens}")
    if rows > MAX_ROWS or index.numel() > MAX_ROWS:
        got = max(rows, index.numel())
        raise ValueError(f"x and the output must have at most {MAX_ROWS} rows, got {got}")
    if fill is not None:
        check_dtype("fill", fill)
        check_shape("fill", fill, x.shape[-1:], x)
    if table is not None:
        check_dtype("table", table)
        if index.ndim == 2:
            check_shape("table", table, (num_tokens, x.shape[-1]), x)
        if table.ndim != 2 or table.shape[0] == 0 or num_tokens % table.shape[0]:
            raise ValueError(
                f"table must have shape (N, D) with N dividing num_tokens = {num_tokens}, "
                f"got {tuple(table.shape)}"
            )
        check_shape("table", table, (table.shape[0], x.shape[-1]), x)
    return _fwd_op(x, index, num_tokens, fill, table, unique)
