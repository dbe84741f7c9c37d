"""Residual add, LayerNorm and cast in one pass.

    r = residual + x
    y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias

Fused: the addition, both statistics, the affine map and the cast to the dtype of the next matrix
product. The sum is rounded to the residual's dtype first, and the statistics (float32) are those of
the rounded rows that are returned, so that the backward pass sees what the forward pass saw.

Bytes per element with a float32 residual and bfloat16 x and y: 4 + 2 read, 4 + 2 written = 12;
unfused (add, LayerNorm, cast) 10 + 8 + 6 = 24. Backward: the residual and the gradients of both
outputs read, the gradients of both inputs written. Its column sums (weight, bias) go through one
partial row a program and a second pass in fixed order: no atomics.

Shape letters: R rows after flattening, D width.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_shape
from ijepa_kernels._op import define

__all__ = ["add_layer_norm", "add_layer_norm_bytes", "add_layer_norm_ref"]


def add_layer_norm_ref(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain torch."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    summed = (residual.to(dtype) + x.to(dtype)).to(residual.dtype)
    normed = F.layer_norm(
        summed.to(dtype), summed.shape[-1:], weight.to(dtype), bias.to(dtype), eps
    )
    return summed, normed.to(out_dtype or x.dtype)


def add_layer_norm_bytes(
    rows: int,
    width: int,
    residual_dtype: torch.dtype,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    backward: bool = False,
) -> int:
    """Bytes that have to move at least: every input read once, every output written once."""
    elements = rows * width
    if backward:
        inputs = residual_dtype.itemsize * 2 + out_dtype.itemsize
        # one tensor serves as both gradients where the dtypes agree
        grads = residual_dtype.itemsize + (residual_dtype != x_dtype) * x_dtype.itemsize
        return elements * (inputs + grads) + 2 * rows * 4 + 3 * width * 4
    return elements * (2 * residual_dtype.itemsize + x_dtype.itemsize + out_dtype.itemsize) + (
        2 * rows * 4 + 2 * width * 4
    )


# --- launch table --------------------------------------------------------------------------------

# programs of the backward pass: each keeps one partial sum of the weight's and bias's gradients
MAX_BACKWARD_PROGRAMS = 1056


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps, for rows of this width."""
    columns = triton.next_power_of_2(width)
    rows = max(1, 1024 // columns)
    return rows, columns, min(16, max(4, rows * columns // 512))


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "eps"])
def _add_layer_norm_fwd_kernel(
    residual_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    statistics_ptr,
    R,
    eps,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    in_row, in_column = row < R, column < D
    mask = in_row[:, None] & in_column[None, :]
    offset = row[:, None] * D + column[None, :]

    residual = tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    stored = (residual + x).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + offset, stored, mask=mask)

    r = stored.to(tl.float32)
    mean = tl.sum(r, axis=1) / D
    centred = tl.where(in_column[None, :], r - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    weight = tl.load(weight_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offset, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(statistics_ptr + row, mean, mask=in_row)
    tl.store(statistics_ptr + R + row, rstd, mask=in_row)


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def _add_layer_norm_bwd_kernel(
    grad_normed_ptr,
    grad_sum_ptr,
    sum_ptr,
    weight_ptr,
    statistics_ptr,
    grad_residual_ptr,
    grad_x_ptr,
    partial_ptr,
    R,
    rows_per_program,
    HAS_GRAD_SUM: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
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
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_row = row < end
        mask = in_row[:, None] & in_column[None, :]
        offset = row[:, None] * D + column[None, :]
        r = tl.load(sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(statistics_ptr + row, mask=in_row, other=0.0)
        rstd = tl.load(statistics_ptr + R + row, mask=in_row, other=0.0)
        hat = tl.where(mask, (r - mean[:, None]) * rstd[:, None], 0.0)
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
        if HAS_GRAD_X:
            tl.store(grad_x_ptr + offset, grad_r.to(grad_x_ptr.dtype.element_ty), mask=mask)
    # row `program` holds [weight | bias]
    partial = partial_ptr + program * 2 * D + column
    tl.store(partial, grad_weight, mask=in_column)
    tl.store(partial + D, grad_bias, mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def _add_layer_norm_fwd(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """New residual, normalised rows, and float32 (2, R): mean and 1 / standard deviation."""
    residual, x = residual.contiguous(), x.contiguous()
    summed = torch.empty_like(residual)
    normed = torch.empty_like(residual, dtype=out_dtype)
    width = residual.shape[-1]
    rows = residual.numel() // width
    statistics = residual.new_empty((2, rows), dtype=torch.float32)
    if rows:
        block_r, block_d, warps = _tile(width)
        _add_layer_norm_fwd_kernel[(-(-rows // block_r),)](
            residual,
            x,
            weight.contiguous(),
            bias.contiguous(),
            summed,
            normed,
            statistics,
            rows,
            eps,
            D=width,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return summed, normed, statistics


def _add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    statistics: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of x (empty where the dtypes agree: the residual's serves as
    both), and float32 (2, D) of weight and bias.
    """
    grad_normed = grad_normed.contiguous()
    grad_residual = torch.empty_like(summed)
    separate = x_dtype != summed.dtype
    grad_x = summed.new_empty(summed.shape if separate else (0,), dtype=x_dtype)
    width = summed.shape[-1]
    rows = summed.numel() // width
    block_r, block_d, warps = _tile(width)
    programs = max(1, min(MAX_BACKWARD_PROGRAMS, -(-rows // block_r)))
    partial = summed.new_empty((programs, 2, width), dtype=torch.float32)
    _add_layer_norm_bwd_kernel[(programs,)](
        grad_normed,
        grad_normed if grad_sum is None else grad_sum.contiguous(),
        summed,
        weight.contiguous(),
        statistics,
        grad_residual,
        grad_x,
        partial,
        rows,
        -(-rows // programs),
        HAS_GRAD_SUM=grad_sum is not None,
        HAS_GRAD_X=separate,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return grad_residual, grad_x, partial.sum(0)


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    residual = residual.contiguous()
    dtype = torch.promote_types(residual.dtype, torch.float32)
    summed = (residual.to(dtype) + x.to(dtype)).to(residual.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        summed.to(dtype), summed.shape[-1:], weight.to(dtype), bias.to(dtype), eps
    )
    return summed, normed.to(out_dtype), torch.stack([mean.flatten(), rstd.flatten()])


def _bwd_cpu(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    statistics: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    # not aten's backward: that one leaves rounding noise times rstd where the true gradient is zero
    dtype = statistics.dtype
    mean, rstd = statistics.view(2, *summed.shape[:-1], 1)
    grad = grad_normed.to(dtype)
    hat = (summed.to(dtype) - mean) * rstd
    grad_hat = grad * weight.to(dtype)
    along_hat = (grad_hat * hat).mean(-1, keepdim=True)
    grad_r = (grad_hat - grad_hat.mean(-1, keepdim=True) - hat * along_hat) * rstd
    if grad_sum is not None:
        grad_r = grad_r + grad_sum.to(dtype)
    separate = x_dtype != summed.dtype
    grad_x = grad_r.to(x_dtype, copy=True) if separate else grad_r.new_empty(0, dtype=x_dtype)
    width = summed.shape[-1]
    grad_affine = torch.stack([t.reshape(-1, width).sum(0) for t in (grad * hat, grad)])
    return grad_r.to(summed.dtype).contiguous(), grad_x.contiguous(), grad_affine


def _fwd_fake(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    summed = residual.new_empty(residual.shape)
    statistics_dtype = torch.promote_types(residual.dtype, torch.float32)
    return (
        summed,
        residual.new_empty(residual.shape, dtype=out_dtype),
        residual.new_empty((2, residual.numel() // residual.shape[-1]), dtype=statistics_dtype),
    )


def _bwd_fake(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    statistics: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = summed.shape if x_dtype != summed.dtype else (0,)
    return (
        torch.empty_like(summed),
        summed.new_empty(shape, dtype=x_dtype),
        statistics.new_empty((2, summed.shape[-1])),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, weight, bias, *_ = inputs
    summed, _, statistics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(summed, weight, statistics)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype


def _backward(
    ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    summed, weight, statistics = ctx.saved_tensors
    if grad_normed is None:
        grad_x = None if grad_sum is None else grad_sum.to(ctx.x_dtype)
        return grad_sum, grad_x, None, None, None, None
    grad_residual, grad_x, grad_affine = _bwd_op(
        grad_normed, grad_sum, summed, weight, statistics, ctx.x_dtype
    )
    if ctx.x_dtype == summed.dtype:
        grad_x = grad_residual
    # one cast for both where it can be
    grad_weight, grad_bias = grad_affine.to(torch.promote_types(weight.dtype, ctx.bias_dtype))
    return (
        grad_residual,
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias.to(ctx.bias_dtype),
        None,
        None,
    )


_bwd_op = define(
    "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor summed, Tensor weight, "
    "Tensor statistics, ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    cuda=_add_layer_norm_bwd,
    cpu=_bwd_cpu,
    fake=_bwd_fake,
)
_fwd_op = define(
    "add_layer_norm(Tensor residual, Tensor x, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    cuda=_add_layer_norm_fwd,
    cpu=_fwd_cpu,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def add_layer_norm(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum (pre-norm ViT; Ba et al. 2016).

    Args:
        residual: (..., D), float32, bfloat16 or float16 (float64 on the CPU).
        x: what to add, the same shape; its dtype may differ.
        weight, bias: (D,) of the LayerNorm.
        eps: added to the variance.
        out_dtype: of the normalised rows; x's by default.

    Returns:
        residual + x in the residual's dtype, and its LayerNorm in `out_dtype`, both contiguous. All
        four tensors are differentiable, once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.
    """
    check_dtype("residual", residual)
    check_dtype("x", x)
    check_dtype("weight", weight)
    check_dtype("bias", bias)
    check_dtype("out_dtype", x, dtype=out_dtype)
    if residual.ndim == 0 or residual.shape[-1] == 0:
        raise ValueError(f"residual must have shape (..., D), got {tuple(residual.shape)}")
    check_shape("x", x, residual.shape, residual)
    check_shape("weight", weight, residual.shape[-1:], residual)
    check_shape("bias", bias, residual.shape[-1:], residual)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    summed, normed, _ = _fwd_op(residual, x, weight, bias, eps, out_dtype or x.dtype)
    return summed, normed
