"""Token rows picked by an index, with the rows of a position table added on the way.

    out[r] = x[index[r]] + table[index[r] % N]

Fused: the copy of the picked rows, the addition (in float32, rounded once) and the dtype of the
table. Backward writes every row of x's gradient once, zeros included, where torch zeroes the
gradient first and then adds rows to it one by one.

Bytes with bfloat16 rows and a float32 table: 2 D read and 2 D written a picked row, the table read
once; unfused (gather, cast, gather of the table, addition, cast) 36 D a picked row. Backward: 2 D
read a picked row and 2 D written a row of x; unfused the gradient is zeroed, then read and written
again where it is named. Without `unique` a stable sort of the R row numbers comes on top.

Repeated indices have the sum of their gradients, added in a fixed order: see `_segments.py`.

Shape letters: B images, N patches of an image, K picked patches of an image, R picked rows, D
width.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, check_shape
from ijepa_kernels._op import define, launches
from ijepa_kernels._segments import (
    MAX_ROWS,
    check_indices,
    flat_rows,
    inverse_or_segments,
    sum_segments,
    take_rows,
)

__all__ = [
    "Gather",
    "gather_rows",
    "gather_tokens",
    "gather_tokens_bytes",
    "gather_tokens_ref",
    "sum_rows",
]


def gather_tokens_ref(
    x: Tensor, index: Tensor, table: Tensor | None = None, *, unique: bool = False
) -> Tensor:
    """The specification, in plain torch; `unique` changes nothing here."""
    index = index.long()
    if index.ndim == 1:
        out = x.flatten(0, -2).index_select(0, index)
    else:
        out = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[-1]))
    if table is None:
        return out
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (out.to(dtype) + table.to(dtype)[index % table.shape[0]]).to(x.dtype)


def gather_tokens_bytes(
    rows: int,
    picked: int,
    width: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
) -> int:
    """Bytes that have to move at least, without a table: every picked row and its int32 index read
    once, every output (backward all `rows` of x's gradient) written once.
    """
    written = rows if backward else picked
    return (picked + written) * width * dtype.itemsize + picked * 4


# --- launchers; the kernels and their launch table are in _segments.py ---------------------------


def _gather_tokens_fwd(x: Tensor, index: Tensor, table: Tensor | None, unique: bool) -> Tensor:
    size = _size(x.shape, index)
    check_indices(index, size, unique=unique)
    return take_rows(x, index, size, table, nan_if_invalid=True)


def _gather_tokens_bwd(
    grad: Tensor,
    index: Tensor,
    x_shape: list[int],
    table_rows: int,
    table_dtype: torch.dtype,
    unique: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, empty if not needed, and of the table, empty if `table_rows` is 0."""
    size = _size(x_shape, index)
    check_indices(index, size, unique=unique)
    grad = grad.contiguous()
    grad_x = grad.new_empty(x_shape if need_x else (0,))
    width = grad.shape[-1]
    grad_table = grad.new_empty((table_rows, width) if table_rows else (0,), dtype=table_dtype)
    rows = math.prod(x_shape[:-1])
    key_n = max(1, table_rows)
    images = rows // key_n
    listed, starts = inverse_or_segments(index, size, rows, key_n, inverse=unique)
    if need_x:
        sum_segments(grad, listed, starts, grad_x, images=images, key_n=key_n)
    if table_rows:
        sum_segments(grad, listed, starts, grad_table, images=images, key_n=key_n, by_patch=True)
    return grad_x, grad_table


def _size(shape: list[int] | torch.Size, index: Tensor) -> int:
    """Rows that an index chooses from."""
    return math.prod(shape[:-1]) if index.ndim == 1 else shape[1]


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(x: Tensor, index: Tensor, table: Tensor | None, unique: bool) -> Tensor:
    check_indices(index, _size(x.shape, index), unique=unique, always=True)
    return gather_tokens_ref(x, index, table).contiguous()


def _bwd_cpu(
    grad: Tensor,
    index: Tensor,
    x_shape: list[int],
    table_rows: int,
    table_dtype: torch.dtype,
    unique: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor]:
    size, width = _size(x_shape, index), x_shape[-1]
    check_indices(index, size, unique=unique, always=True)
    row = flat_rows(index, size)
    flat = grad.reshape(-1, width).to(torch.promote_types(grad.dtype, torch.float32))
    grad_x, grad_table = grad.new_empty(0), grad.new_empty(0, dtype=table_dtype)
    if need_x:
        grad_x = flat.new_zeros((math.prod(x_shape[:-1]), width)).index_add(0, row, flat)
        grad_x = grad_x.view(x_shape).to(grad.dtype)
    if table_rows:
        grad_table = flat.new_zeros((table_rows, width)).index_add(0, row % table_rows, flat)
        grad_table = grad_table.to(table_dtype)
    return grad_x, grad_table


def _bwd_fake(
    grad: Tensor, _: Tensor, x_shape: list[int], rows: int, dtype: torch.dtype, *flags: bool
) -> tuple[Tensor, Tensor]:
    need_x = flags[1]
    grad_x = grad.new_empty(x_shape if need_x else (0,))
    return grad_x, grad.new_empty((rows, x_shape[-1]) if rows else (0,), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, table, unique = inputs
    ctx.save_for_backward(index)
    ctx.x_shape, ctx.unique = x.shape, unique
    ctx.table = (0, x.dtype) if table is None else (table.shape[0], table.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    need_x, _, need_table, _ = ctx.needs_input_grad
    table_rows, table_dtype = ctx.table
    table_rows = table_rows if need_table else 0
    grad_x, grad_table = _bwd_op(
        grad, index, ctx.x_shape, table_rows, table_dtype, ctx.unique, need_x
    )
    return grad_x if need_x else None, None, grad_table if need_table else None, None


_bwd_op = define(
    "gather_tokens_bwd(Tensor grad, Tensor index, SymInt[] x_shape, SymInt table_rows, "
    "ScalarType table_dtype, bool unique, bool need_x) -> (Tensor, Tensor)",
    cuda=_gather_tokens_bwd,
    cpu=_bwd_cpu,
    fake=_bwd_fake,
)
_fwd_op = define(
    "gather_tokens(Tensor x, Tensor index, Tensor? table, bool unique) -> Tensor",
    cuda=_gather_tokens_fwd,
    cpu=_fwd_cpu,
    fake=lambda x, index, *_: x.new_empty((*index.shape, x.shape[-1])),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def gather_tokens(
    x: Tensor, index: Tensor, table: Tensor | None = None, *, unique: bool = False
) -> Tensor:
    """Picks token rows, and adds each one's position embedding if there is a table.

    Args:
        x: (rows, D) or (B, N, D), float32, bfloat16 or float16 (float64 on the CPU).
        index: int32 or int64. Packed: (R,), rows of x, which are image * N + patch. Rectangular:
            (B, K), patches of each image, x (B, N, D).
        table: (N, D), row `patch` of it is added to each picked row; its dtype may differ. Packed,
            N must divide the rows of x.
        unique: a promise that no index repeats within an image, which I-JEPA's masks with one
            context block keep: backward then needs no sort. If it is broken, a row's gradient is
            one of those it should have summed; `debug_checks` finds out.

    Returns:
        (R, D) or (B, K, D) in x's dtype, contiguous. x and the table are differentiable, once;
        gradients are the same bits every time, also with repeated indices.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; on the CPU and within `debug_checks` also
            indices out of range, or repeated although `unique`.
    """
    check_dtype("x", x)
    check_index("index", index, x)
    if x.ndim not in (2, 3) or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (rows, D) or (B, N, D), got {tuple(x.shape)}")
    if index.ndim not in (1, 2):
        raise ValueError(f"index must have shape (R,) or (B, K), got {tuple(index.shape)}")
    if index.ndim == 2 and (x.ndim != 3 or x.shape[0] != index.shape[0]):
        raise ValueError(
            f"x must have shape (B, N, D) for an index (B, K) of shape {tuple(index.shape)}, "
            f"got {tuple(x.shape)}"
        )
    rows = math.prod(x.shape[:-1])
    if rows > MAX_ROWS or index.numel() > MAX_ROWS:
        got = max(rows, index.numel())
        raise ValueError(f"x and index must have at most {MAX_ROWS} rows, got {got}")
    if table is not None:
        check_dtype("table", table)
        if index.ndim == 2:
            check_shape("table", table, x.shape[1:], x)
        if table.ndim != 2 or table.shape[0] == 0 or rows % table.shape[0]:
            raise ValueError(
                f"table must have shape (N, D) with N dividing the {rows} rows of x, "
                f"got {tuple(table.shape)}"
            )
        check_shape("table", table, (table.shape[0], x.shape[-1]), x)
    return _fwd_op(x, index, table, unique)


class Gather(NamedTuple):
    """Which rows are picked, and, the other way round, which picked ones each row has become.

    Attributes:
        picked: int32 (R,), the row of each picked one.
        listed: int32; with `starts` the picked rows 0 .. R - 1 in the order of what they are copies
            of, else (rows,) the picked one that each row has become, or -1.
        starts: int32 (rows + 1,), where each row's copies begin in `listed`; None where no row is
            picked twice.
    """

    picked: Tensor
    listed: Tensor
    starts: Tensor | None


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows x[index], (R, D), for code that differentiates itself: no checks, no autograd."""
    if not launches("gather_tokens", x.device):
        return x.index_select(0, index.long())  # four times as fast as with int32
    return take_rows(x, index, len(x), None, nan_if_invalid=False)


def sum_rows(grad: Tensor, gather: Gather, rows: int) -> Tensor:
    """Gradient of what `gather_rows` picked from: each row gets the sum of its copies' gradients,
    in a fixed order; no checks, no autograd.

    Args:
        grad: (R, D).
        gather: how the rows were picked.
        rows: how many there were.

    Returns:
        (rows, D), contiguous, in grad's dtype.
    """
    if not launches("gather_tokens", grad.device):
        index, wide = gather.picked.long(), torch.promote_types(grad.dtype, torch.float32)
        if gather.starts is None:
            return grad.new_zeros((rows, grad.shape[1])).index_copy_(0, index, grad)
        total = grad.new_zeros((rows, grad.shape[1]), dtype=wide).index_add_(
            0, index, grad.to(wide)
        )
        return total.to(grad.dtype)
    out = grad.new_empty((rows, grad.shape[1]))
    sum_segments(grad.contiguous(), gather.listed, gather.starts, out, images=rows)
    return out
