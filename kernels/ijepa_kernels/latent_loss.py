"""Loss against rows of the target encoder's output, and its gradient, in one pass.

    t = target[index];  t = (t - mean(t)) / sqrt(var(t) + eps)
    loss = sum(weight * distance(prediction - t)) / count

Fused: the gather, the LayerNorm without affine (float32; mean, then variance of the centred row),
the distance, its sum and its gradient. Gathered and normalised rows live in registers only.

The forward pass writes the gradient for an upstream gradient of 1, with which `loss.backward()`
starts, and the backward pass hands that tensor over: a kernel reads the upstream gradient on the
device and leaves at once if it is 1. If it is not, or in a second pass through a retained graph,
the gradient is computed anew: scaling the stored one would round twice, and in float16 it has
underflowed by then. So the forward pass writes none for float16, whose losses are always scaled,
and under torch.compile, which would copy what its backward pass writes to.

Bytes per element with bfloat16 prediction and target: 2 + 2 read, 2 written = 6, both passes
together; 10 where the backward pass computes the gradient, 12 where it turns out that it must.
Unfused (gather, cast, LayerNorm, cast, loss, and back) about 50.

Shape letters: R rows of the prediction, S rows of the target, D width.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, check_range, check_shape, debugging
from ijepa_kernels._launch import run
from ijepa_kernels._op import define

__all__ = ["latent_loss", "latent_loss_bytes", "latent_loss_ref"]

Kind = Literal["smooth_l1", "l2", "l1"]
# smooth-L1 with this beta is l1: far below the differences, and 1 / TINY times them fits float32
TINY = 2.0**-64


def latent_loss_ref(
    prediction: Tensor,
    target: Tensor,
    index: Tensor,
    *,
    kind: Kind = "smooth_l1",
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    count: float | Tensor | None = None,
) -> Tensor:
    """The specification, in plain torch."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    width = prediction.shape[-1:]
    p = prediction.reshape(-1, *width).to(dtype)
    t = target.reshape(-1, *width)[index.long()].to(dtype)
    t = F.layer_norm(t, width, eps=eps) if normalize else t
    if kind == "smooth_l1":
        each = F.smooth_l1_loss(p, t, reduction="none", beta=beta)
    else:
        each = (F.mse_loss if kind == "l2" else F.l1_loss)(p, t, reduction="none")
    each = each if weight is None else each * weight.to(dtype)[:, None]
    return each.sum() / (each.numel() if count is None else count)


def latent_loss_bytes(
    rows: int,
    width: int,
    prediction_dtype: torch.dtype,
    target_dtype: torch.dtype,
    index_dtype: torch.dtype,
    *,
    gradient: bool = True,
) -> int:
    """Bytes that have to move at least, in both passes together: prediction, target row and index
    read once for each row of the prediction, its gradient written.
    """
    element = prediction_dtype.itemsize * (1 + gradient) + target_dtype.itemsize
    return rows * (width * element + index_dtype.itemsize)


# --- launch table --------------------------------------------------------------------------------

MAX_PROGRAMS = 1056  # 8 on each processor of an H100; each keeps one partial sum of the loss


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps, for rows of this width."""
    columns = 1 << (width - 1).bit_length()  # triton's next_power_of_2 takes the host 2 us
    rows = max(1, 1024 // columns)
    return rows, columns, min(16, max(4, rows * columns // 512))


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["R", "S", "rows_per_program", "scale", "beta", "inverse_beta", "eps"]
)
def _latent_loss_fwd_bwd_kernel(
    prediction_ptr,
    target_ptr,
    index_ptr,
    weight_ptr,
    count_ptr,
    grad_loss_ptr,
    gradient_ptr,
    partial_ptr,
    R,
    S,
    rows_per_program,
    scale,
    beta,
    inverse_beta,
    eps,
    SQUARE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    UNLESS_ONE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Forward with LOSS, backward without: one kernel, so that both give the same bits."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    in_column = column < D
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    if HAS_COUNT:
        scale /= tl.load(count_ptr).to(tl.float32)
    if LOSS:
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    else:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
        scale *= grad_loss
        if UNLESS_ONE:
            # what the forward pass wrote is right as it stands
            end = tl.where(grad_loss == 1.0, first, end)
    # indices are loaded one tile ahead: the target's rows wait for them
    row = first + tl.arange(0, BLOCK_R)
    source = tl.load(index_ptr + row, mask=row < end, other=-1).to(tl.int64)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        in_row = row < end
        mask = in_row[:, None] & in_column[None, :]
        offset = row[:, None] * D + column[None, :]
        prediction = tl.load(prediction_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        valid = (source >= 0) & (source < S)
        target = tl.load(
            target_ptr + source[:, None] * D + column[None, :],
            mask=valid[:, None] & in_column[None, :],
            other=0.0,
        ).to(tl.float32)
        ahead = row + BLOCK_R
        source = tl.load(index_ptr + ahead, mask=ahead < end, other=-1).to(tl.int64)

        if NORMALIZE:
            mean = tl.sum(target, axis=1) / D
            centred = tl.where(in_column[None, :], target - mean[:, None], 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
            target = centred * rstd[:, None]
        difference = prediction - target
        size = tl.abs(difference)
        if SQUARE:
            distance = size * size
            slope = 2.0 * difference
        else:
            # arranged so that the slope of NaN is NaN
            ratio = difference * inverse_beta
            distance = tl.where(size < beta, 0.5 * difference * ratio, size - 0.5 * beta)
            slope = tl.where(difference > beta, 1.0, tl.where(difference < -beta, -1.0, ratio))
        factor = tl.full((BLOCK_R,), 1.0, tl.float32)
        if HAS_WEIGHT:
            factor = tl.load(weight_ptr + row, mask=in_row, other=0.0).to(tl.float32)
        if LOSS:
            distance = tl.where(valid[:, None], distance * factor[:, None], float("nan"))
            total += tl.where(mask, distance, 0.0)
        if GRADIENT:
            gradient = tl.where(valid[:, None], slope * (factor * scale)[:, None], 0.0)
            tl.store(gradient_ptr + offset, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
    if LOSS:
        tl.store(partial_ptr + program, tl.sum(tl.sum(total, axis=1), axis=0) * scale)


# --- launchers -----------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """What both passes are given, in the order of the ops' schemas; see `latent_loss`.

    Index and count have other names here, for those are methods of tuples. The scale multiplies the
    sum; None is that of a mean, which a compiled graph would hold as a number, a graph for each R.
    """

    prediction: Tensor
    target: Tensor
    source: Tensor
    weight: Tensor | None
    divisor: Tensor | None
    scale: float | None
    square: bool
    beta: float
    normalize: bool
    eps: float
    with_gradient: bool = False


def _scale(given: _Inputs) -> float:
    return 1.0 / (given.prediction.numel() or math.nan) if given.scale is None else given.scale


def _launch(
    given: _Inputs,
    grad_loss: Tensor | None,
    gradient: Tensor | None,
    *,
    unless_one: bool = False,
) -> Tensor:
    """Fills `gradient`, if given. Without `grad_loss` returns the loss, a sum still to be made."""
    _, target, index, weight, count, *_ = given
    prediction, width = given.prediction.contiguous(), given.prediction.shape[-1]
    rows, target_count = prediction.numel() // width, target.numel() // width
    if debugging():
        check_range("index", index, target_count)
    block_r, block_d, warps = _tile(width)
    tiles, loss = -(-rows // block_r), grad_loss is None
    programs = max(1, min(MAX_PROGRAMS, tiles))
    partial = prediction.new_empty(programs, dtype=torch.float32) if loss else prediction
    run(
        _latent_loss_fwd_bwd_kernel,
        (programs,),
        prediction,
        target.contiguous(),
        index.contiguous(),
        prediction if weight is None else weight.contiguous(),
        prediction if count is None else count,
        prediction if loss else grad_loss,
        prediction if gradient is None else gradient,
        partial,
        *(rows, target_count, -(-tiles // programs) * block_r),
        *(_scale(given), given.beta, 1.0 / given.beta, given.eps),
        SQUARE=given.square,
        NORMALIZE=given.normalize,
        HAS_WEIGHT=weight is not None,
        HAS_COUNT=count is not None,
        LOSS=loss,
        GRADIENT=gradient is not None,
        UNLESS_ONE=unless_one,
        D=width,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return partial


def _latent_loss_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    """The loss, float32 (), and the gradient of the prediction (empty if not asked for)."""
    given = _Inputs(*inputs)
    gradient = given.prediction.new_empty(given.prediction.shape if given.with_gradient else (0,))
    partial = _launch(given, None, gradient if given.with_gradient else None)
    return partial.sum(), gradient


def _latent_loss_bwd(grad_loss: Tensor, *inputs: Any) -> Tensor:
    """The gradient of the prediction."""
    given = _Inputs(*inputs)
    gradient = given.prediction.new_empty(given.prediction.shape)
    _launch(given, grad_loss, gradient)
    return gradient


def _latent_loss_bwd_(grad_loss: Tensor, gradient: Tensor, *inputs: Any) -> None:
    """Overwrites the gradient that the forward pass wrote, unless `grad_loss` is 1."""
    _launch(_Inputs(*inputs), grad_loss, gradient, unless_one=True)


# --- registration --------------------------------------------------------------------------------


def _bwd_cpu(grad_loss: Tensor, *inputs: Any) -> Tensor:
    given = _Inputs(*inputs)
    prediction, target, index, weight, count, *_ = given
    dtype, width = torch.promote_types(prediction.dtype, torch.float32), prediction.shape[-1:]
    rows = target.reshape(-1, *width)[index.long()].to(dtype)
    rows = F.layer_norm(rows, width, eps=given.eps) if given.normalize else rows
    difference = prediction.reshape(-1, *width).to(dtype) - rows
    slope = 2 * difference if given.square else (difference / given.beta).clamp(-1, 1)
    factor = grad_loss.to(dtype) * _scale(given)
    factor = factor if count is None else factor / count.to(dtype)
    factor = factor if weight is None else factor * weight.to(dtype)[:, None]
    return (slope * factor).to(prediction.dtype).contiguous().view(prediction.shape)


def _fwd_cpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    given = _Inputs(*inputs)
    prediction, target, index, weight, count, *_ = given
    check_range("index", index, target.numel() // prediction.shape[-1])
    loss = latent_loss_ref(
        *(prediction, target, index),
        kind="l2" if given.square else "smooth_l1",
        beta=given.beta,
        normalize=given.normalize,
        eps=given.eps,
        weight=weight,
        count=1,
    )
    loss = loss * _scale(given) / (1 if count is None else count.to(loss.dtype))
    one = torch.ones_like(loss)
    return loss, _bwd_cpu(one, *given) if given.with_gradient else prediction.new_empty(0)


def _bwd_cpu_(grad_loss: Tensor, gradient: Tensor, *inputs: Any) -> None:
    if grad_loss != 1:
        gradient.copy_(_bwd_cpu(grad_loss, *inputs))


def _fwd_fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    given = _Inputs(*inputs)
    dtype = torch.promote_types(given.prediction.dtype, torch.float32)
    gradient = given.prediction.new_empty(given.prediction.shape if given.with_gradient else (0,))
    return given.prediction.new_empty((), dtype=dtype), gradient


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, target, index, weight, count, *ctx.numbers, with_gradient = inputs
    _, gradient = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(prediction, target, index, weight, count)
    # stand-ins of tensors mean that a graph is traced: it may not hold a write to an output
    ctx.gradient = gradient if with_gradient and type(gradient) is Tensor else None


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    others = (None,) * 10
    if grad_loss is None:
        return None, *others
    inputs = (*ctx.saved_tensors, *ctx.numbers)
    if ctx.gradient is None or torch.is_grad_enabled():
        # the op that says that it cannot be differentiated again
        return _bwd_op(grad_loss, *inputs), *others
    # handed over: autograd may keep it and write to it, so a second pass makes its own
    gradient, ctx.gradient = ctx.gradient, None
    _bwd_op_(grad_loss, gradient, *inputs)
    return gradient, *others


_INPUTS = (
    "Tensor prediction, Tensor target, Tensor index, Tensor? weight, Tensor? count, float? scale, "
    "bool square, float beta, bool normalize, float eps"
)
_bwd_op = define(
    f"latent_loss_bwd(Tensor grad_loss, {_INPUTS}) -> Tensor",
    cuda=_latent_loss_bwd,
    cpu=_bwd_cpu,
    fake=lambda _, prediction, *__: prediction.new_empty(prediction.shape),
)
_bwd_op_ = define(
    f"latent_loss_bwd_(Tensor grad_loss, Tensor(a!) gradient, {_INPUTS}) -> ()",
    cuda=_latent_loss_bwd_,
    cpu=_bwd_cpu_,
    fake=lambda *_: None,
)
_fwd_op = define(
    f"latent_loss({_INPUTS}, bool with_gradient) -> (Tensor, Tensor)",
    cuda=_latent_loss_fwd,
    cpu=_fwd_cpu,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public --------------------------------------------------------------------------------------


def latent_loss(
    prediction: Tensor,
    target: Tensor,
    index: Tensor,
    *,
    kind: Kind = "smooth_l1",
    beta: float = 1.0,
    normalize: bool = True,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    count: float | Tensor | None = None,
) -> Tensor:
    """Distance between predictions and normalised target features (I-JEPA, Assran et al. 2023,
    section 3), differentiable once with respect to the prediction.

    `loss.backward()` costs next to nothing; an upstream gradient other than 1 costs a second pass,
    so let `count` include micro-steps and ranks rather than dividing the loss by them.

    Args:
        prediction: (..., D), float32, bfloat16 or float16 (float64 on the CPU), R rows in all.
        target: (S, D) or (B, N, D) output of the target encoder; its dtype may differ.
        index: (R,) int32 or int64, the target's row for each of the prediction.
        kind: `smooth_l1`, `l2` (the square, without 1/2) or `l1`.
        beta: where smooth-L1 turns from the square to the line.
        normalize: LayerNorm without affine of the target's rows, `eps` added to the variance.
        weight: (R,) factors of the rows.
        count: what the sum is divided by, a number or a () tensor on the device; by default
            R * D, which makes it the mean (NaN if R is 0).

    Returns:
        float32 () (float64 for float64). NaN if an index is out of range; that row's gradient is 0.

    Raises:
        ValueError: kind, shapes, dtypes or devices do not fit, beta or eps is negative, count is
            not positive, or target, weight or count requires a gradient, which it would not get.
    """
    if kind not in ("smooth_l1", "l2", "l1"):
        raise ValueError(f"kind must be smooth_l1, l2 or l1, got {kind!r}")
    if kind == "smooth_l1" and not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    beta = max(beta, TINY) if kind == "smooth_l1" else TINY
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    check_dtype("prediction", prediction)
    check_dtype("target", target)
    if prediction.ndim == 0 or prediction.shape[-1] == 0:
        raise ValueError(f"prediction must have shape (..., D), got {tuple(prediction.shape)}")
    width, rows = prediction.shape[-1], prediction.numel() // prediction.shape[-1]
    if target.ndim not in (2, 3) or target.shape[-1] != width:
        raise ValueError(
            f"target must be (S, {width}) or (B, N, {width}), got {tuple(target.shape)}"
        )
    if target.device != prediction.device:
        raise ValueError(f"target must be on {prediction.device}, got {target.device}")
    check_index("index", index, prediction)
    check_shape("index", index, (rows,), prediction)
    if weight is not None:
        check_dtype("weight", weight)
        check_shape("weight", weight, (rows,), prediction)
    compiling, scale = torch.compiler.is_compiling(), None if count is None else 1.0
    if isinstance(count, Tensor):
        check_shape("count", count, (), prediction)
    elif count is not None:
        if not count > 0:
            raise ValueError(f"count must be positive, got {count}")
        scale = 1.0 if compiling else 1.0 / count
        # a number would be a constant of the compiled graph, unless it multiplies a tensor
        count = prediction.new_ones((), dtype=torch.float64) * count if compiling else None
    differentiating = torch.is_grad_enabled()
    for name, tensor in (("target", target), ("weight", weight), ("count", count)):
        if differentiating and tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, it gets none: detach it")
    late = prediction.dtype == torch.float16 or compiling
    with_gradient = differentiating and prediction.requires_grad and not late
    numbers = (scale, kind == "l2", beta, normalize, eps)
    return _fwd_op(prediction, target, index, weight, count, *numbers, with_gradient)[0]
