"""Residual add, LayerNorm and cast in one pass.

    r = residual + x
    y = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias

Fused: the addition, both statistics, the affine map and the cast to the dtype of the next matrix
product. The sum is rounded to the residual's dtype first, and the statistics (float32) are those of
the rounded rows that are returned, so that the backward pass sees what the forward pass saw.

Bytes per element with a float32 residual and bfloat16 x and y: 4 + 2 read, 4 + 2 written = 12;
unfused (add, LayerNorm, cast) 10 + 8 + 6 = 24. Backward: the residual and the gradients of both
outputs read, the gradients of both inputs written, and in the same pass, for a block that writes
its own derivative, the normalised rows again and the column sums of x's gradient. Column sums go
through one partial row a program and a second pass in fixed order: no atomics.

Shape letters: R rows after flattening, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_shape
from ijepa_kernels._float8 import Float8Rows, round_rows
from ijepa_kernels._layer_norm import (
    add_layer_norm_bwd,
    add_layer_norm_fwd,
    add_layer_norm_fwd_float8,
)
from ijepa_kernels._op import define, raw

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_layer_norm_bytes",
    "add_layer_norm_float8",
    "add_layer_norm_forward",
    "add_layer_norm_ref",
]


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


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed, shape = residual.contiguous(), residual.shape[-1:]
    dtype = torch.promote_types(residual.dtype, torch.float32)
    if x is not None:
        summed = (summed.to(dtype) + x.to(dtype)).to(residual.dtype).contiguous()
    normed, mean, rstd = torch.native_layer_norm(
        summed.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps
    )
    return summed, normed.to(out_dtype), mean.flatten(), rstd.flatten()


def _float8_cpu(*given: Any) -> tuple[Tensor, Float8Rows]:
    summed, normed, *_ = _fwd_cpu(*(*given, torch.float32))
    return summed, round_rows(normed)


def _bwd_cpu(
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
    dtype, shape = mean.dtype, (*summed.shape[:-1], 1)
    mean, rstd, weight = mean.view(shape), rstd.view(shape), weight.to(dtype)
    wide, *sums = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(dtype).contiguous(),
        summed.to(dtype).contiguous(),
        summed.shape[-1:],
        mean,
        rstd,
        weight,
        weight,
        [True, True, True],
    )
    if grad_sum is not None:
        wide.add_(grad_sum)
    if with_low_sums:
        sums.append(wide.sum(0))
    grad, low, normed = wide.to(summed.dtype), None, None
    if with_low:
        low = grad if low_dtype == summed.dtype else wide.to(low_dtype)
    if with_normed:
        hat = (summed.to(dtype) - mean).mul_(rstd)
        normed = hat.mul_(weight).add_(bias.to(dtype)).to(low_dtype)
    return grad, low, normed, torch.cat(sums)


def _for_autograd(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients of the residual, of x (empty where the dtypes agree: the residual's serves as
    both), and of weight and bias, (2, D).
    """

    def bwd(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, x_dtype = given
        summed, weight = tensors[2], tensors[5]
        separate = x_dtype != summed.dtype
        grad, grad_x, _, sums = backward(*tensors, weight, x_dtype, separate, False, False)
        return grad, grad_x if separate else grad.new_empty(0, dtype=x_dtype), sums.view(2, -1)

    return bwd


def _fwd_fake(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(residual.dtype, torch.float32)
    mean = residual.new_empty(residual.numel() // residual.shape[-1], dtype=dtype)
    normed = residual.new_empty(residual.shape, dtype=out_dtype)
    return residual.new_empty(residual.shape), normed, mean, torch.empty_like(mean)


def _bwd_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, summed, mean, *_, x_dtype = given
    grad_x = summed.new_empty(summed.shape if x_dtype != summed.dtype else (0,), dtype=x_dtype)
    return torch.empty_like(summed), grad_x, mean.new_empty((2, summed.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, weight, bias, *_ = inputs
    summed, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(summed, mean, rstd, weight)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, bias.dtype


def _backward(
    ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    summed, mean, rstd, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_x = None if grad_sum is None else grad_sum.to(ctx.x_dtype)
        return grad_sum, grad_x, None, None, None, None
    grad_residual, grad_x, grad_affine = _bwd_op(
        grad_normed, grad_sum, summed, mean, rstd, weight, ctx.x_dtype
    )
    if ctx.x_dtype == summed.dtype:
        grad_x = grad_residual
    # one cast for both where it can be
    grad_weight, grad_bias = grad_affine.to(torch.promote_types(weight.dtype, ctx.bias_dtype))
    grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)
    return grad_residual, grad_x, grad_weight, grad_bias, None, None


_bwd_op = define(
    "add_layer_norm_bwd(Tensor grad_normed, Tensor? grad_sum, Tensor summed, Tensor mean, "
    "Tensor rstd, Tensor weight, ScalarType x_dtype) -> (Tensor, Tensor, Tensor)",
    cuda=_for_autograd(add_layer_norm_bwd),
    cpu=_for_autograd(_bwd_cpu),
    fake=_bwd_fake,
)
_fwd_op = define(
    "add_layer_norm(Tensor residual, Tensor x, Tensor weight, Tensor bias, float eps, "
    "ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=add_layer_norm_fwd,
    cpu=_fwd_cpu,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None,
) -> None:
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    tensors = (residual, x, weight, bias)
    for name, tensor in zip(("residual", "x", "weight", "bias"), tensors, strict=True):
        if tensor is not None:
            check_dtype(name, tensor)
    check_dtype("out_dtype", residual, dtype=out_dtype)
    if residual.ndim == 0 or residual.shape[-1] == 0:
        raise ValueError(f"residual must have shape (..., D), got {tuple(residual.shape)}")
    if x is not None:
        check_shape("x", x, residual.shape, residual)
    check_shape("weight", weight, residual.shape[-1:], residual)
    check_shape("bias", bias, residual.shape[-1:], residual)


def _check_float8(
    residual: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> None:
    if residual.ndim != 2:
        raise ValueError(f"residual must have shape (R, D), got {tuple(residual.shape)}")
    _check(residual, x, weight, bias, eps, None)


def _check_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    low_dtype: torch.dtype,
    *_: bool,
) -> None:
    _check(summed, None, weight, bias, 0.0, low_dtype)
    if summed.ndim != 2:
        raise ValueError(f"summed must have shape (R, D), got {tuple(summed.shape)}")
    for name, tensor in (("grad_normed", grad_normed), ("grad_sum", grad_sum)):
        if tensor is not None:
            check_dtype(name, tensor)
            check_shape(name, tensor, summed.shape, summed)
    for name, tensor in (("mean", mean), ("rstd", rstd)):
        check_shape(name, tensor, summed.shape[:1], summed)


_fwd_raw = raw("add_layer_norm_forward", cuda=add_layer_norm_fwd, cpu=_fwd_cpu, check=_check)
_bwd_raw = raw("add_layer_norm_backward", cuda=add_layer_norm_bwd, cpu=_bwd_cpu, check=_check_bwd)
_float8_raw = raw(
    "add_layer_norm_float8", cuda=add_layer_norm_fwd_float8, cpu=_float8_cpu, check=_check_float8
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
    _check(residual, x, weight, bias, eps, out_dtype)
    return _fwd_op(residual, x, weight, bias, eps, out_dtype or x.dtype)[:2]


# --- for code that writes its own derivative -----------------------------------------------------


def add_layer_norm_forward(
    residual: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_layer_norm` without a derivative; CUDA tensors must be on the current device.

    Args:
        residual: (R, D), and the rest as there.
        x: None for nothing to add.

    Returns:
        The sum (the residual itself if x is None), its LayerNorm in `out_dtype`, and the sum's
        means and 1 / standard deviations, (R,), float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.
    """
    return _fwd_raw((residual, x, weight, bias), eps, out_dtype)


def add_layer_norm_float8(
    residual: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Float8Rows]:
    """`add_layer_norm_forward` with the normalised rows in float8 (e4m3), in the same pass; CUDA
    tensors must be on the current device.

    Args:
        residual: (R, D), and the rest as there.

    Returns:
        The sum (the residual itself if x is None), and its LayerNorm: values (R, D) with a scale
        for each row (R, 1), as `quantize_rows` rounds it.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or eps is negative.
    """
    return _float8_raw((residual, x, weight, bias), eps)


def add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    low_dtype: torch.dtype,
    with_low: bool = True,
    with_low_sums: bool = True,
    with_normed: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Backward pass of `add_layer_norm_forward`, in one pass over the rows.

    Args:
        grad_normed: (R, D), gradient of the normalised rows.
        grad_sum: (R, D), of the sum through the residual stream; None for zeros.
        summed, mean, rstd: what the forward pass returned.
        weight, bias: (D,) of the LayerNorm.
        low_dtype: of x's gradient and of the normalised rows.
        with_low, with_low_sums, with_normed: which of these are wanted.

    Returns:
        In this order, None for what is not wanted:

        - gradient of the sum and of the residual, (R, D), in the sum's dtype;
        - x's gradient: the same in `low_dtype`, the same tensor if that is the sum's;
        - its column sums (D,), the gradient of a bias before x;
        - the normalised rows again, in `low_dtype`;
        - gradients of weight and bias (D,).

        Sums are float32 (float64 for float64) and the same bits every time.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    tensors = (grad_normed, grad_sum, summed, mean, rstd, weight, bias)
    grad, low, normed, sums = _bwd_raw(tensors, low_dtype, with_low, with_low_sums, with_normed)
    grad_weight, grad_bias, *low_sums = sums.chunk(3 if with_low_sums else 2)
    return grad, low, low_sums[0] if low_sums else None, normed, grad_weight, grad_bias
