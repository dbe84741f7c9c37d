"""What `add_layer_norm` does on CPU tensors, with torch operations."""

from typing import Any

import torch
from torch import Tensor

from ijepa_kernels._float8 import Float8Rows, round_rows

__all__ = ["backward", "backward_rows", "forward", "forward_float8"]


def forward(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its LayerNorm, mean and 1 / standard deviation, (R,)."""
    summed = residual.contiguous()
    dtype = torch.promote_types(residual.dtype, torch.float32)
    if x is not None:
        summed = (summed.to(dtype) + x.to(dtype)).to(residual.dtype).contiguous()
    normed, mean, rstd = _norm(summed, weight, bias, eps, dtype)
    return summed, normed.to(out_dtype), mean.flatten(), rstd.flatten()


def forward_float8(
    residual: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Float8Rows]:
    """The sum and its LayerNorm in float8, of (R, D)."""
    summed, normed, _, _ = forward(residual, x, weight, bias, eps, torch.float32)
    return summed, round_rows(normed)


def backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of x (empty where the dtypes agree), of weight and bias (2, D)."""
    grad, *affine = _wide(grad_normed, grad_sum, summed, mean, rstd, weight)
    separate = x_dtype != summed.dtype
    grad_x = grad.to(x_dtype, copy=True) if separate else grad.new_empty(0, dtype=x_dtype)
    return grad.to(summed.dtype), grad_x, torch.stack(affine)


def backward_rows(
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
) -> tuple[Tensor | None, ...]:
    """What `add_layer_norm_backward` returns."""
    wide, *affine = _wide(grad_normed, grad_sum, summed, mean, rstd, weight)
    grad = wide.to(summed.dtype)
    low = None
    if with_low:
        low = grad if low_dtype == summed.dtype else wide.to(low_dtype)
    normed = None
    if with_normed:
        hat = (summed.to(mean.dtype) - mean[:, None]).mul_(rstd[:, None])
        normed = hat.mul_(weight.to(mean.dtype)).add_(bias.to(mean.dtype)).to(low_dtype)
    return grad, low, wide.sum(0) if with_low_sums else None, normed, *affine


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Any:
    shape = x.shape[-1:]
    return torch.native_layer_norm(x.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps)


def _wide(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of weight and of bias, in the dtype of the statistics."""
    dtype, shape = mean.dtype, (*summed.shape[:-1], 1)
    weight = weight.to(dtype)
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(dtype).contiguous(),
        summed.to(dtype).contiguous(),
        summed.shape[-1:],
        mean.view(shape),
        rstd.view(shape),
        weight,
        weight,
        [True, True, True],
    )
    return grad if grad_sum is None else grad.add_(grad_sum), grad_weight, grad_bias
