"""Rows rounded to float8 (e4m3), each with a scale of its own: operands of a product with scales.

    scale[r] = max over d of |x[r, d]| / 448          rows[r, d] = x[r, d] / scale[r], rounded

One pass: 2 bytes read and 1 written an element in bfloat16, 4 and 1 in float32; apart (maximum,
division, cast) 2 + 6 + 5 and 4 + 8 + 5. No gradients.

Shape letters: R rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_shape
from ijepa_kernels._float8 import FLOAT8, Float8Rows, _rounded, empty_rows, round_rows, row_tile
from ijepa_kernels._launch import contiguous, run
from ijepa_kernels._op import raw

__all__ = ["Float8Rows", "quantize_rows", "quantize_rows_bytes", "quantize_rows_ref"]


def quantize_rows_ref(x: Tensor) -> Float8Rows:
    """The specification, in plain torch."""
    return round_rows(x)


def quantize_rows_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that have to move at least."""
    return rows * width * (dtype.itemsize + 1) + rows * 4


@triton.jit(do_not_specialize=["R"])
def _quantize_rows_kernel(
    x_ptr, rows_ptr, scale_ptr, R, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    mask = (row < R)[:, None] & (column < D)[None, :]
    offset = row[:, None] * D + column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    narrow, scale = _rounded(x, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + offset, narrow, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < R)


def _given(rows: Tensor | None, scale: Tensor | None) -> Float8Rows | None:
    return None if rows is None or scale is None else Float8Rows(rows, scale)


def _quantize_rows(x: Tensor, *out: Tensor | None) -> Float8Rows:
    (x,) = contiguous(x)
    rows, width = x.shape
    written = _given(*out) or empty_rows(rows, width, x)
    if rows:
        block_r, block_d, warps = row_tile(width)
        run(
            _quantize_rows_kernel,
            (-(-rows // block_r),),
            *(x, *written, rows),
            D=width,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return written


def _check(x: Tensor, rows: Tensor | None, scale: Tensor | None) -> None:
    check_dtype("x", x)
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"x must have shape (R, D), got {tuple(x.shape)}")
    if rows is not None and scale is not None:
        check_shape("out.rows", rows, x.shape, x)
        check_shape("out.scale", scale, (len(x), 1), x)
        if (rows.dtype, scale.dtype) != (FLOAT8, torch.float32):
            got = f"{rows.dtype} and {scale.dtype}"
            raise ValueError(f"out must be float8_e4m3fn and float32, got {got}")


_raw = raw(
    "quantize_rows",
    cuda=_quantize_rows,
    cpu=lambda x, *out: round_rows(x, _given(*out)),
    check=_check,
)


def quantize_rows(x: Tensor, out: Float8Rows | None = None) -> Float8Rows:
    """Rounds rows to float8, for code that differentiates itself; CUDA tensors must be on the
    current device.

    Args:
        x: (R, D), float32, bfloat16 or float16 (float64 on the CPU).
        out: written instead of new memory.

    Returns:
        Values float8_e4m3fn (R, D) and scales float32 (R, 1), whose product is x, rounded.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _raw((x, *(out or (None, None))))
