"""GELU with the normal distribution itself (Hendrycks and Gimpel 2016), and its backward pass.

    g  = h * cdf(h)                        cdf(h) = (1 + erf(h / sqrt 2)) / 2
    dh = dg * (cdf(h) + h * pdf(h))        pdf(h) = exp(-h^2 / 2) / sqrt(2 pi)

Fused into the backward pass: the column sums of dh, which are the gradient of the bias before the
GELU, and the GELU again, so that a forward pass need not keep it. In bfloat16 that pass moves 8
bytes an element; apart (gradient, sum, GELU) 12.

The distribution is a polynomial in 1 / (1 + 0.23 |h|) times exp(-h^2 / 2), which the density needs
anyway: on an sm_90 39 instructions an element backward instead of 53 with `tl.erf`, of which some
42 hide behind the memory of an H200, and a tail that stays exact where 1 + erf cancels.

Shape letters: R rows after flattening, F width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ijepa_kernels._checks import check_dtype, check_shape
from ijepa_kernels._float8 import Float8Rows, _rounded, empty_rows, round_rows, row_tile
from ijepa_kernels._launch import contiguous, run
from ijepa_kernels._op import define, raw
from ijepa_kernels._segments import columns_of_tile
from ijepa_kernels._sums import add_up, row_programs

__all__ = ["gelu", "gelu_backward", "gelu_bytes", "gelu_float8", "gelu_ref"]


def gelu_ref(h: Tensor) -> Tensor:
    """The specification, in plain torch."""
    return functional.gelu(h)


def gelu_bytes(rows: int, width: int, dtype: torch.dtype, *, backward: bool = False) -> int:
    """Bytes that have to move at least: every input read once, every output written once."""
    return rows * width * (3 if backward else 2) * dtype.itemsize


# --- launch table --------------------------------------------------------------------------------

FORWARD_TILE = 2048  # elements, 4 warps: 32 bytes a thread in bfloat16
TILE = 1024  # backward: 16 bytes of each input


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _normal(h):
    """The normal distribution at h, float32, and exp(-h^2 / 2)."""
    bell = tl.exp2(h * h * -0.72134752)
    t = 1.0 / (1.0 + 0.23 * tl.abs(h))
    q = 0.271755664 - 0.0746805063 * t
    q = q * t - 0.239078733
    q = q * t + 0.256283963
    q = q * t - 0.00140769359
    q = q * t + 0.106009714
    q = q * t + 0.0892204089
    q = q * t + 0.0918971731
    tail = q * t * bell
    return tl.where(h > 0.0, 1.0 - tail, tail), bell


@triton.jit(do_not_specialize=["R"])
def _gelu_fwd_kernel(
    h_ptr, g_ptr, R, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < R)[:, None] & (column < F)[None, :]
    offset = row[:, None] * F + column[None, :]
    h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    cdf, _ = _normal(h)
    tl.store(g_ptr + offset, (h * cdf).to(g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _gelu_float8_kernel(
    h_ptr, rows_ptr, scale_ptr, R, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_F)
    mask = (row < R)[:, None] & (column < F)[None, :]
    offset = row[:, None] * F + column[None, :]
    h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    cdf, _ = _normal(h)
    narrow, scale = _rounded(h * cdf, rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + offset, narrow, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < R)


@triton.jit(do_not_specialize=["R", "rows_per_program"])
def _gelu_bwd_kernel(
    dg_ptr,
    h_ptr,
    dh_ptr,
    g_ptr,
    partial_ptr,
    R,
    rows_per_program,
    WITH_SUMS: tl.constexpr,
    WITH_ACTIVATION: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    program = tl.program_id(1).to(tl.int64)
    in_column = column < F
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, R)
    total = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for start in range(first, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & in_column[None, :]
        offset = row[:, None] * F + column[None, :]
        h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        dg = tl.load(dg_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        cdf, bell = _normal(h)
        dh = dg * (cdf + h * bell * 0.3989422804)
        tl.store(dh_ptr + offset, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if WITH_ACTIVATION:
            tl.store(g_ptr + offset, (h * cdf).to(g_ptr.dtype.element_ty), mask=mask)
        if WITH_SUMS:
            total += dh
    if WITH_SUMS:
        tl.store(partial_ptr + program * F + column, tl.sum(total, axis=0), mask=in_column)


# --- launchers -----------------------------------------------------------------------------------


def _gelu_fwd(h: Tensor) -> Tensor:
    h = h.contiguous()
    g = torch.empty_like(h)
    if h.numel():
        width = h.shape[-1]
        block_f = columns_of_tile(width)
        rows, block_r = h.numel() // width, FORWARD_TILE // block_f
        grid = (-(-width // block_f), -(-rows // block_r))
        run(
            _gelu_fwd_kernel,
            grid,
            *(h, g, rows),
            F=width,
            BLOCK_R=block_r,
            BLOCK_F=block_f,
            num_warps=4,
        )
    return g


def _gelu_float8(h: Tensor) -> Float8Rows:
    h = h.contiguous()
    rows, width = h.shape
    out = empty_rows(rows, width, h)
    if rows:
        block_r, block_f, warps = row_tile(width)
        run(
            _gelu_float8_kernel,
            (-(-rows // block_r),),
            *(h, *out, rows),
            F=width,
            BLOCK_R=block_r,
            BLOCK_F=block_f,
            num_warps=warps,
        )
    return out


def _launch_bwd(
    dg: Tensor, h: Tensor, with_sums: bool, with_activation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h, partial sums of its columns (programs, F), GELU of h; what is not asked for
    is any tensor.
    """
    dg, h = contiguous(dg, h)
    dh = torch.empty_like(h)
    width = h.shape[-1]
    block_f = columns_of_tile(width)
    rows, block_r = h.numel() // width, TILE // block_f
    programs, each = row_programs(rows)
    partial = h.new_empty((programs, width), dtype=torch.float32) if with_sums else dh
    g = torch.empty_like(h) if with_activation else dh
    run(
        _gelu_bwd_kernel,
        (-(-width // block_f), programs),
        *(dg, h, dh, g, partial, rows, each),
        WITH_SUMS=with_sums,
        WITH_ACTIVATION=with_activation,
        F=width,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        num_warps=4,
    )
    return dh, partial, g


def _gelu_bwd_sums(
    dg: Tensor, h: Tensor, with_activation: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dh, partial, g = _launch_bwd(dg, h, True, with_activation)
    return dh, add_up(partial), g if with_activation else None


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(h: Tensor) -> Tensor:
    return functional.gelu(h.contiguous())


def _bwd_cpu(dg: Tensor, h: Tensor) -> Tensor:
    # computed in float32 whatever the dtype
    return torch.ops.aten.gelu_backward(dg.to(h.dtype).contiguous(), h.contiguous())


def _bwd_sums_cpu(
    dg: Tensor, h: Tensor, with_activation: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dh = _bwd_cpu(dg, h)
    sums = dh.sum(0, dtype=torch.promote_types(h.dtype, torch.float32))
    return dh, sums, _fwd_cpu(h) if with_activation else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dg: Tensor) -> Tensor:
    return _bwd_op(dg, *ctx.saved_tensors)


_bwd_op = define(
    "gelu_bwd(Tensor dg, Tensor h) -> Tensor",
    cuda=lambda dg, h: _launch_bwd(dg, h, False, False)[0],
    cpu=_bwd_cpu,
    fake=lambda _, h: h.new_empty(h.shape),
)
_fwd_op = define(
    "gelu(Tensor h) -> Tensor",
    cuda=_gelu_fwd,
    cpu=_fwd_cpu,
    fake=lambda h: h.new_empty(h.shape),
    setup_context=_setup_context,
    backward=_backward,
)


def _check_rows(h: Tensor) -> None:
    check_dtype("h", h)
    if h.ndim != 2 or h.shape[-1] == 0:
        raise ValueError(f"h must have shape (R, F), got {tuple(h.shape)}")


def _check_bwd(dg: Tensor, h: Tensor, with_activation: bool) -> None:
    check_dtype("dg", dg)
    _check_rows(h)
    check_shape("dg", dg, h.shape, h)


_bwd_raw = raw("gelu_backward", cuda=_gelu_bwd_sums, cpu=_bwd_sums_cpu, check=_check_bwd)
_float8_raw = raw(
    "gelu_float8",
    cuda=_gelu_float8,
    cpu=lambda h: round_rows(functional.gelu(h.float())),
    check=_check_rows,
)


# --- public --------------------------------------------------------------------------------------


def gelu(h: Tensor) -> Tensor:
    """GELU with the exact normal distribution, as `torch.nn.functional.gelu` (Hendrycks and Gimpel
    2016), differentiable once.

    Args:
        h: (..., F), float32, bfloat16 or float16 (float64 on the CPU).

    Returns:
        The same shape and dtype, contiguous.

    Raises:
        ValueError: shape or dtype does not fit.
    """
    check_dtype("h", h)
    if h.ndim == 0 or h.shape[-1] == 0:
        raise ValueError(f"h must have shape (..., F), got {tuple(h.shape)}")
    return _fwd_op(h)


def gelu_float8(h: Tensor) -> Float8Rows:
    """`gelu` written in float8 (e4m3) in the same pass, without a derivative; a CUDA tensor must be
    on the current device.

    Args:
        h: (R, F), float32, bfloat16 or float16 (float64 on the CPU).

    Returns:
        Values (R, F) with a scale for each row (R, 1), as `quantize_rows` rounds them.

    Raises:
        ValueError: shape or dtype does not fit.
    """
    return _float8_raw((h,))


def gelu_backward(
    dg: Tensor, h: Tensor, *, with_activation: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward pass of a bias and the GELU behind it, in one pass over the rows; for code that
    writes its own derivative. It has none itself, and CUDA tensors must be on the current device.

    Args:
        dg: (R, F) gradient of the GELU.
        h: (R, F) what the GELU was taken of, its dtype may differ.
        with_activation: whether the GELU of h is wanted again.

    Returns:
        Gradient of h (R, F) in h's dtype; its column sums (F,), the bias's gradient, float32
        (float64 for float64), the same bits every time; the GELU (R, F) in h's dtype, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _bwd_raw((dg, h), with_activation)
