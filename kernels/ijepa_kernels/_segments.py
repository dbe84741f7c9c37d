"""Rows picked by an index, and sums of the rows that an index sends to one place.

    take_rows     out[r] = x[row(r)] + table[row(r) % N]
    sum_segments  out[n] = sum of x[r] over all r with row(r) = n, or fill, + table[n % N]

These are transposes of each other: `gather_tokens` is the first forward and the second backward,
`scatter_tokens` the other way round. An index (R,) holds rows of the whole batch ("packed"), an
index (B, K) rows of image b: row(r) = r // K * size + index[r]. Indices outside 0 .. size - 1 are
masked.

A sum needs to know who names its row. With a promise that no index repeats that is an inverse map:
int32, filled with -1, positions stored into it, no sorting. Otherwise positions are sorted by the
row they name, stably, and a row's addends are a segment of the sorted list. Either way one program
adds a row's addends in a fixed order in float32 and writes every row once: no atomics, and no
zeroing before.

Segments are ordered by key(row) = row % N * images + row // N, patch before image, if sums by patch
are wanted too (the gradient of a position table): the segments of a patch's rows then lie side by
side and one sort serves both sums. Elsewhere N = 1 and key(row) = row.

Shape letters: R picked rows, N rows of the table, D width.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_range, debugging
from ijepa_kernels._launch import run

__all__ = [
    "MAX_ROWS",
    "check_indices",
    "columns_of_tile",
    "flat_rows",
    "inverse_or_segments",
    "sum_segments",
    "take_rows",
]

# rows are counted in int32; offsets of elements are int64
MAX_ROWS = 2**31 - 1

# --- launch table --------------------------------------------------------------------------------

TILE = 4096  # elements of a program, 4 warps: up to 128 bytes a thread in flight
KEYS = 256  # positions of a program that touches indices only


@functools.cache
def columns_of_tile(width: int) -> int:
    """Columns of a tile: 256, or fewer if that leaves none of them idle."""
    even = width & -width  # largest power of 2 that divides the width
    return min(256, even if even >= 64 else triton.next_power_of_2(width))


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _my_tile(BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns of this program: neighbours in time are neighbours in memory."""
    program = tl.program_id(0).to(tl.int64)
    across: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = program // across * BLOCK + tl.arange(0, BLOCK)
    return rows, program % across * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _key(row, images, N: tl.constexpr):
    """Place of a row among the segments; divided as int32, which `MAX_ROWS` allows."""
    number = row.to(tl.int32)
    return (number % N).to(tl.int64) * images + number // N


@triton.jit
def _named_row(position, index_ptr, R, K, size, PACKED: tl.constexpr):
    """Row of the batch that each position names, and whether there is one."""
    index = tl.load(index_ptr + position, mask=position < R, other=-1).to(tl.int64)
    valid = (index >= 0) & (index < size)
    row = index if PACKED else (position.to(tl.int32) // K).to(tl.int64) * size + index
    return row, valid


@triton.jit(do_not_specialize=["R", "K", "size"])
def _take_rows_kernel(
    x_ptr,
    index_ptr,
    table_ptr,
    out_ptr,
    R,
    K,
    size,
    PACKED: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    NAN_IF_INVALID: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    position, column = _my_tile(BLOCK_R, D, BLOCK_D)
    in_column = column < D
    row, valid = _named_row(position, index_ptr, R, K, size, PACKED)
    mask = valid[:, None] & in_column[None, :]
    nothing = float("nan") if NAN_IF_INVALID else 0.0
    tile = tl.load(x_ptr + row[:, None] * D + column[None, :], mask=mask, other=nothing)
    if HAS_TABLE:
        patch = (row.to(tl.int32) % N).to(tl.int64)
        place = tl.load(table_ptr + patch[:, None] * D + column[None, :], mask=mask, other=0.0)
        tile = tile.to(tl.float32) + place.to(tl.float32)
    tl.store(
        out_ptr + position[:, None] * D + column[None, :],
        tile.to(out_ptr.dtype.element_ty),
        mask=(position < R)[:, None] & in_column[None, :],
    )


@triton.jit(do_not_specialize=["R", "K", "size", "rows", "images"])
def _keys_kernel(
    index_ptr,
    out_ptr,
    R,
    K,
    size,
    rows,
    images,
    PACKED: tl.constexpr,
    INVERT: tl.constexpr,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row, valid = _named_row(position, index_ptr, R, K, size, PACKED)
    key = _key(row, images, N)
    if INVERT:
        tl.store(out_ptr + key, position.to(tl.int32), mask=valid)
    else:
        # what names no row comes after all rows
        tl.store(out_ptr + position, tl.where(valid, key, rows).to(tl.int32), mask=position < R)


@triton.jit(do_not_specialize=["outputs", "images"])
def _sum_segments_kernel(
    x_ptr,
    listed_ptr,
    starts_ptr,
    fill_ptr,
    table_ptr,
    out_ptr,
    outputs,
    images,
    BY_PATCH: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_FILL: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    KEY_N: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    output, column = _my_tile(BLOCK_O, D, BLOCK_D)
    in_output, in_column = output < outputs, column < D
    key = _key(output, images, KEY_N)
    span = images if BY_PATCH else 1
    if HAS_STARTS:
        begin = tl.load(starts_ptr + key, mask=in_output, other=0)
        end = tl.load(starts_ptr + key + span, mask=in_output, other=0)
        longest = tl.max(end - begin, axis=0)
    else:
        # the inverse map is a list of one position, or -1, for each key
        begin = key
        end = tl.where(in_output, key + span, key)
        longest = span
    total = tl.zeros((BLOCK_O, BLOCK_R, BLOCK_D), tl.float32)
    named = tl.zeros((BLOCK_O, BLOCK_R), tl.int32)
    for step in range(0, longest, BLOCK_R):
        place = begin[:, None] + step + tl.arange(0, BLOCK_R)[None, :]
        position = tl.load(listed_ptr + place, mask=place < end[:, None], other=-1).to(tl.int64)
        there = position >= 0
        tile = tl.load(
            x_ptr + position[:, :, None] * D + column[None, None, :],
            mask=there[:, :, None] & in_column[None, None, :],
            other=0.0,
        )
        total += tile.to(tl.float32)
        named = tl.where(there, 1, named)
    result = tl.sum(total, axis=1)
    if HAS_FILL:
        fill = tl.load(fill_ptr + column, mask=in_column, other=0.0).to(tl.float32)
        result = tl.where((tl.max(named, axis=1) > 0)[:, None], result, fill[None, :])
    mask = in_output[:, None] & in_column[None, :]
    if HAS_TABLE:
        patch = (output.to(tl.int32) % N).to(tl.int64)
        table = tl.load(table_ptr + patch[:, None] * D + column[None, :], mask=mask, other=0.0)
        result += table.to(tl.float32)
    tl.store(
        out_ptr + output[:, None] * D + column[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


# --- launchers -----------------------------------------------------------------------------------


def take_rows(
    x: Tensor, index: Tensor, size: int, table: Tensor | None, *, nan_if_invalid: bool
) -> Tensor:
    """Rows of x, shaped like the index with the width appended; where the index is invalid the row
    is NaN or zero.

    Args:
        x: any shape (..., D); `size` of its rows make an image if the index has shape (B, K), and
            all of them otherwise.
    """
    width = x.shape[-1]
    out = x.new_empty((*index.shape, width))
    picked = index.numel()
    if picked:
        block_d = columns_of_tile(width)
        block_r = TILE // block_d
        run(
            _take_rows_kernel,
            (-(-picked // block_r) * -(-width // block_d),),
            x.contiguous(),
            index.contiguous(),
            x if table is None else table.contiguous(),
            out,
            picked,
            index.shape[-1],
            size,
            PACKED=index.ndim == 1,
            HAS_TABLE=table is not None,
            NAN_IF_INVALID=nan_if_invalid,
            N=1 if table is None else table.shape[0],
            D=width,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out


def inverse_or_segments(
    index: Tensor, size: int, rows: int, key_n: int, *, inverse: bool
) -> tuple[Tensor, Tensor | None]:
    """Who names each row, by key.

    Returns:
        The inverse map, int32 (rows,) with -1 for rows not named (of several positions that name
        one row any may be there), and None; or all positions sorted by key, int64 (R,), and where
        the segment of each key starts, int32 (rows + 1,).
    """
    picked = index.numel()
    if inverse:
        out = torch.full((rows,), -1, dtype=torch.int32, device=index.device)
    else:
        out = torch.empty((picked,), dtype=torch.int32, device=index.device)
    if picked:
        run(
            _keys_kernel,
            (-(-picked // KEYS),),
            index.contiguous(),
            out,
            picked,
            index.shape[-1],
            size,
            rows,
            rows // key_n,
            PACKED=index.ndim == 1,
            INVERT=inverse,
            N=key_n,
            BLOCK_R=KEYS,
            num_warps=4,
        )
    if inverse:
        return out, None
    keys, order = out.sort(stable=True)
    every = torch.arange(rows + 1, dtype=torch.int32, device=index.device)
    return order, torch.searchsorted(keys, every, out_int32=True)


def sum_segments(
    x: Tensor,
    listed: Tensor,
    starts: Tensor | None,
    out: Tensor,
    *,
    images: int,
    key_n: int = 1,
    by_patch: bool = False,
    fill: Tensor | None = None,
    table: Tensor | None = None,
) -> None:
    """Writes every row of `out`: the sum of the rows of x that name it, or `fill`, plus `table`.

    Args:
        x: contiguous, (..., D).
        listed, starts: of `inverse_or_segments`, with the same `key_n`.
        out: contiguous, (..., D); with `by_patch` its rows are the `key_n` patches and each sums
            over all images.
        images: rows that a patch has.
    """
    width = x.shape[-1]
    outputs = out.numel() // width
    if not outputs:
        return
    block_d = columns_of_tile(width)
    # a patch is named by dozens of rows and worth a program; a row by few, if any
    block_o, block_r = (1, TILE // block_d) if by_patch else (TILE // block_d, 1)
    run(
        _sum_segments_kernel,
        (-(-outputs // block_o) * -(-width // block_d),),
        x,
        listed,
        listed if starts is None else starts,
        x if fill is None else fill.contiguous(),
        x if table is None else table.contiguous(),
        out,
        outputs,
        images,
        BY_PATCH=by_patch,
        HAS_STARTS=starts is not None,
        HAS_FILL=fill is not None,
        HAS_TABLE=table is not None,
        KEY_N=key_n,
        N=1 if table is None else table.shape[0],
        D=width,
        BLOCK_O=block_o,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=4,
    )


# --- with torch operations -----------------------------------------------------------------------


def flat_rows(index: Tensor, size: int) -> Tensor:
    """Rows of the batch, int64 (R,): what `row(r)` is above."""
    if index.ndim == 1:
        return index.long()
    image = torch.arange(index.shape[0], device=index.device)
    return (index + image[:, None] * size).flatten()


def check_indices(index: Tensor, size: int, *, unique: bool, always: bool = False) -> None:
    """Within `debug_checks` (or always): ValueError for a value out of range, and for one that
    occurs twice in its image although the caller promised that none does.
    """
    if not (always or debugging()):
        return
    check_range("index", index, size)
    if not unique:
        return
    values, order = index.sort(dim=-1, stable=True)
    twice = (values[..., 1:] == values[..., :-1]).nonzero()
    if len(twice):
        *image, place = twice[0].tolist()
        first, second = order[(*image, slice(place, place + 2))].tolist()
        value = int(values[(*image, place)])
        where = f" of image {image[0]}" if image else ""
        raise ValueError(
            f"index must not repeat with unique=True, got {value} at positions {first} and "
            f"{second}{where}"
        )
