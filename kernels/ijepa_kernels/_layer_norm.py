"""Kernels and launchers of `add_layer_norm`.

Shape letters: R rows after flattening, D width.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._float8 import FLOAT8, Float8Rows, _rounded, empty_rows
from ijepa_kernels._launch import contiguous, run
from ijepa_kernels._sums import add_up

__all__ = ["add_layer_norm_bwd", "add_layer_norm_fwd", "add_layer_norm_fwd_float8"]

# --- launch table --------------------------------------------------------------------------------

WARPS_PER_SM = 16  # of the backward pass: that many fit, with up to 128 registers a thread


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps, for rows of this width: 8 columns of 2 rows a thread.

    All warps lie along the columns, so that a thread adds up its columns' gradients alone.
    """
    columns = triton.next_power_of_2(width)
    return max(2, min(8, 512 // columns)), columns, min(16, max(1, columns // 256))


@functools.lru_cache(1024)
def _row_programs(rows: int, block_r: int, warps: int, device: torch.device) -> tuple[int, int]:
    """Programs of the backward pass, and how many rows each has."""
    multiprocessors = 132
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    most, tiles = multiprocessors * WARPS_PER_SM // warps, -(-rows // block_r)
    each = max(1, -(-tiles // most)) * block_r
    return max(1, -(-rows // each)), each


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "eps"])
def _add_layer_norm_fwd_kernel(
    residual_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    eps,
    FLOAT8: tl.constexpr,
    HAS_X: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    in_row, in_column = row < R, column < D
    mask = in_row[:, None] & in_column[None, :]
    offset = row[:, None] * D + column[None, :]

    stored = tl.load(residual_ptr + offset, mask=mask, other=0.0)
    if HAS_X:
        x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        stored = (stored.to(tl.float32) + x).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offset, stored, mask=mask)

    r = stored.to(tl.float32)
    mean = tl.sum(r, axis=1) / D
    centred = tl.where(in_column[None, :], r - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    if FLOAT8:
        # the scale where the mean goes otherwise; statistics are for a backward pass
        narrow, scale = _rounded(normed, normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + offset, narrow, mask=mask)
        tl.store(mean_ptr + row, scale, mask=in_row)
    else:
        tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + row, mean, mask=in_row)
        tl.store(rstd_ptr + row, rstd, mask=in_row)


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def _add_layer_norm_bwd_kernel(
    grad_normed_ptr,
    grad_sum_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    grad_residual_ptr,
    grad_x_ptr,
    normed_ptr,
    partial_ptr,
    R,
    rows_per_program,
    HAS_GRAD_SUM: tl.constexpr,
    WITH_GRAD_X: tl.constexpr,
    WITH_GRAD_X_SUMS: tl.constexpr,
    WITH_NORMED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_column = column < D
    weight = tl.load(weight_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_D,), tl.float32)
    grad_bias = tl.zeros((BLOCK_D,), tl.float32)
    grad_x_sums = tl.zeros((BLOCK_D,), tl.float32)
    if WITH_NORMED:
        bias = tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_row = row < end
        mask = in_row[:, None] & in_column[None, :]
        offset = row[:, None] * D + column[None, :]
        r = tl.load(sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
        # where there is no column it is not 0, but the gradient is
        hat = (r - mean[:, None]) * rstd[:, None]
        if WITH_NORMED:
            normed = (hat * weight[None, :] + bias[None, :]).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + offset, normed, mask=mask)
        grad_weight += tl.sum(grad * hat, axis=0)
        grad_bias += tl.sum(grad, axis=0)
        grad_hat = grad * weight[None, :]
        along_ones = tl.sum(grad_hat, axis=1) / D
        along_hat = tl.sum(grad_hat * hat, axis=1) / D
        grad_r = (grad_hat - along_ones[:, None] - hat * along_hat[:, None]) * rstd[:, None]
        if HAS_GRAD_SUM:
            grad_r += tl.load(grad_sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(
            grad_residual_ptr + offset, grad_r.to(grad_residual_ptr.dtype.element_ty), mask=mask
        )
        if WITH_GRAD_X:
            tl.store(grad_x_ptr + offset, grad_r.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if WITH_GRAD_X_SUMS:
            grad_x_sums += tl.sum(tl.where(mask, grad_r, 0.0), axis=0)
    # row `program` holds [weight | bias | sums of x's gradient]
    COLUMNS: tl.constexpr = 3 * D if WITH_GRAD_X_SUMS else 2 * D
    partial = partial_ptr + program * COLUMNS + column
    tl.store(partial, grad_weight, mask=in_column)
    tl.store(partial + D, grad_bias, mask=in_column)
    if WITH_GRAD_X_SUMS:
        tl.store(partial + 2 * D, grad_x_sums, mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def add_layer_norm_fwd(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New residual (the old one if x is None), normalised rows, and float32 (R,) twice: mean and
    1 / standard deviation.
    """
    # the residual in the place of x: not read
    inputs = contiguous(residual, residual if x is None else x, weight, bias)
    residual = inputs[0]
    normed = torch.empty_like(residual, dtype=out_dtype)
    mean = residual.new_empty(residual.numel() // residual.shape[-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    return _launch_fwd(inputs, x is not None, eps, normed, mean, rstd), normed, mean, rstd


def add_layer_norm_fwd_float8(
    residual: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Float8Rows]:
    """New residual (the old one if x is None) and normalised rows, of (R, D)."""
    inputs = contiguous(residual, residual if x is None else x, weight, bias)
    out = empty_rows(residual.shape[0], residual.shape[1], residual)
    return _launch_fwd(inputs, x is not None, eps, *out, out.scale), out


def _launch_fwd(
    inputs: tuple[Tensor, ...],
    has_x: bool,
    eps: float,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    """The sum; fills normalised rows, mean (in float8: scale) and 1 / standard deviation.

    Args:
        inputs: residual, x (not read if there is none), weight and bias, contiguous.
    """
    residual = inputs[0]
    summed = torch.empty_like(residual) if has_x else residual
    width = residual.shape[-1]
    rows = residual.numel() // width
    if rows:
        block_r, block_d, warps = _tile(width)
        run(
            _add_layer_norm_fwd_kernel,
            (-(-rows // block_r),),
            *(*inputs, summed, normed, mean, rstd, rows, eps),
            FLOAT8=normed.dtype == FLOAT8,
            HAS_X=has_x,
            D=width,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return summed


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    low_dtype: torch.dtype,
    with_low: bool,
    with_low_sums: bool,
    with_normed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradient of the sum; the same in `low_dtype`, the same tensor if that is its own; the
    normalised rows; float32 (2 * D,) or (3 * D,): gradients of weight and bias, column sums of the
    first.
    """
    # what is not there is not read
    inputs = contiguous(
        *(grad_normed, grad_normed if grad_sum is None else grad_sum),
        *(summed, mean, rstd, weight, bias),
    )
    summed = inputs[2]
    rows, width = inputs[3].shape[0], summed.shape[-1]
    grad = torch.empty_like(summed)
    separate = with_low and low_dtype != summed.dtype
    low = summed.new_empty(summed.shape, dtype=low_dtype) if separate else grad
    normed = summed.new_empty(summed.shape, dtype=low_dtype) if with_normed else None
    block_r, block_d, warps = _tile(width)
    programs, each = _row_programs(rows, block_r, warps, summed.device)
    sums = 3 if with_low_sums else 2
    partial = summed.new_empty((programs, sums * width), dtype=torch.float32)
    run(
        _add_layer_norm_bwd_kernel,
        (programs,),
        *(*inputs, grad, low, summed if normed is None else normed, partial, rows, each),
        HAS_GRAD_SUM=grad_sum is not None,
        WITH_GRAD_X=separate,
        WITH_GRAD_X_SUMS=with_low_sums,
        WITH_NORMED=with_normed,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return grad, low if with_low else None, normed, add_up(partial)
