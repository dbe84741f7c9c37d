"""Rows in float8 (e4m3), each with a scale of its own: what the ops that write them share.

    scale[r] = max over d of |y[r, d]| / 448          rows[r, d] = y[r, d] / scale[r], rounded

A scale for each row costs nothing where a program holds whole rows, needs no history, and saturates
nothing. A row with something infinite or NaN in it has NaN in its place.

Shape letters: R rows, D width.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["FLOAT8", "Float8Rows", "empty_rows", "round_rows", "row_tile"]

FLOAT8 = torch.float8_e4m3fn


class Float8Rows(NamedTuple):
    """Rows of float8 values; what they stand for is rows * scale.

    Attributes:
        rows: float8_e4m3fn (R, D), contiguous.
        scale: float32 (R, 1).
    """

    rows: Tensor
    scale: Tensor


def round_rows(y: Tensor, out: Float8Rows | None = None) -> Float8Rows:
    """The specification, in plain torch; y is (R, D)."""
    wide = y.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) * (1 / 448)
    new = Float8Rows((wide / scale).to(FLOAT8), scale)
    if out is None:
        return new
    return Float8Rows(out.rows.copy_(new.rows), out.scale.copy_(new.scale))


@triton.jit
def _rounded(y, dtype: tl.constexpr):
    """Rows of a tile (float32, zero where there is nothing) in float8, and their scales."""
    largest = tl.maximum(tl.max(tl.abs(y), axis=1), 1e-30)
    scale = largest * 0.002232142857142857
    return (y / scale[:, None]).to(dtype), scale


def empty_rows(rows: int, width: int, like: Tensor) -> Float8Rows:
    """Memory for rows, on the device of `like`."""
    return Float8Rows(
        like.new_empty((rows, width), dtype=FLOAT8),
        like.new_empty((rows, 1), dtype=torch.float32),
    )


@functools.cache
def row_tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of whole rows, and warps: 8 columns a thread, 16 beyond 4,096."""
    columns = triton.next_power_of_2(width)
    return max(1, min(8, 1024 // columns)), columns, min(16, max(1, columns // 256))
