"""Exponential moving average of many tensors in one launch.

    target = target + (1 - momentum) * (source - target)          in float32, in place
    copy = target rounded to bfloat16                             optional, in the same pass

that is momentum * target + (1 - momentum) * source, with the momentum as the weight of the old
value (paper: Targets). 1 - momentum is formed in float64 and rounded once: in float32 it would lose
a tenth of a percent at 0.99996 and 5 percent at 0.999999. Above a weight of one half the sum is
anchored at the source, as in `torch.lerp`, so that momentum 0 copies exactly.

Fused: all tensors of a model, whatever their number and sizes, the subtraction, the scaled addition
and the cast. Bytes an element with float32 sources: 8 read, 4 written = 12 (14 with a bfloat16
copy), 10 with bfloat16 sources; unfused (mul_, add_, cast) 8 + 12 + 6 = 26.

Shape letters: L tensors.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import FLOATS
from ijepa_kernels._launch import run
from ijepa_kernels._op import define
from ijepa_kernels.optim._table import (
    HALVES,
    TRITON_DTYPES,
    Table,
    cached_table,
    check_disjoint,
    check_list,
    check_scalar,
)

__all__ = ["ema_update_", "ema_update_bytes", "ema_update_ref"]


def ema_update_ref(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """The specification, in plain torch."""
    weight = 1.0 - float(momentum)
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source.to(target.dtype), weight)
    for copy, target in zip(copies or (), targets, strict=False):
        copy.copy_(target)


def ema_update_bytes(elements: int, source_dtype: torch.dtype) -> int:
    """Bytes that have to move at least: targets read and written, sources read."""
    return elements * (8 + source_dtype.itemsize)


# --- launch table --------------------------------------------------------------------------------

# 16 elements a thread: 8 independent 128-bit loads from float32 sources. Ends of tensors and
# unaligned ones go in pieces, so that their many narrow accesses take few registers.
BLOCK, PIECE, WARPS = 4096, 1024, 8


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _ema_update_block(
    target_ptr,
    source_ptr,
    copy_ptr,
    mask,
    weight,
    keep,
    HAS_COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    target = tl.load(target_ptr + column, mask=mask)
    source = tl.load(source_ptr + column, mask=mask).to(tl.float32)
    difference = source - target
    mean = tl.where(weight < 0.5, target + weight * difference, source - keep * difference)
    tl.store(target_ptr + column, mean, mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + column, mean.to(copy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["L", "weight", "keep"])
def _ema_update_fwd_kernel(
    table_ptr,
    momentum_ptr,
    L,
    weight,
    keep,
    SOURCE: tl.constexpr,
    COPY: tl.constexpr,
    HAS_COPY: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places_ptr = table_ptr + L * (4 if HAS_COPY else 3)
    place = tl.load(places_ptr + program)
    tensor, start = place >> 32, (place & 0xFFFFFFFF) * BLOCK
    left = tl.load(table_ptr + tensor) - start
    target = tl.load(table_ptr + L + tensor)
    source = tl.load(table_ptr + L * (3 if HAS_COPY else 2) + tensor)
    copy = tl.load(table_ptr + 2 * L + tensor) if HAS_COPY else target
    target_ptr = target.to(tl.pointer_type(tl.float32)) + start
    source_ptr = source.to(tl.pointer_type(SOURCE)) + start
    copy_ptr = copy.to(tl.pointer_type(COPY)) + start
    if MOMENTUM_ON_DEVICE:
        momentum = tl.load(momentum_ptr).to(tl.float64)
        weight = (1.0 - momentum).to(tl.float32)
        keep = momentum.to(tl.float32)
    # whole aligned blocks go by 128-bit accesses, the rest element by element; 64 bits in 16-bit
    # dtypes, so that a thread has the same elements of all tensors and nothing is exchanged
    if (left >= BLOCK) & (((target | source | copy) & 15) == 0):
        _ema_update_block(
            tl.multiple_of(target_ptr, 16),
            tl.multiple_of(source_ptr, SOURCE.primitive_bitwidth // 2),
            tl.multiple_of(copy_ptr, 8),
            None,
            weight,
            keep,
            HAS_COPY,
            BLOCK,
        )
    else:
        for piece in range(0, tl.minimum(left, BLOCK), PIECE):
            _ema_update_block(
                target_ptr + piece,
                source_ptr + piece,
                copy_ptr + piece,
                tl.arange(0, PIECE) < left - piece,
                weight,
                keep,
                HAS_COPY,
                PIECE,
            )


# --- launchers -----------------------------------------------------------------------------------


def launch(
    table: Table,
    source_dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    momentum: float | Tensor,
) -> None:
    """One launch over a table of targets, copies (with a `copy_dtype`) and sources."""
    if not table.blocks:
        return
    on_device = isinstance(momentum, Tensor)
    host = 0.0 if on_device else float(momentum)
    run(
        _ema_update_fwd_kernel,
        (table.blocks,),
        table.data,
        momentum if on_device else table.data,
        table.length,
        1.0 - host,
        host,
        SOURCE=TRITON_DTYPES[source_dtype],
        COPY=TRITON_DTYPES[copy_dtype or torch.bfloat16],
        HAS_COPY=copy_dtype is not None,
        MOMENTUM_ON_DEVICE=on_device,
        BLOCK=BLOCK,
        PIECE=PIECE,
        num_warps=WARPS,
    )


def _ema_update_fwd(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    # one launch for each pair of dtypes, so one as a rule
    kinds = [
        (source.dtype, copies[number].dtype if copies else None)
        for number, source in enumerate(sources)
    ]
    for kind in dict.fromkeys(kinds):
        chosen = [number for number, other in enumerate(kinds) if other == kind]
        written = [
            [tensors[number] for number in chosen] for tensors in (targets, copies) if tensors
        ]
        table = cached_table(written, [[sources[number] for number in chosen]], BLOCK)
        launch(table, *kind, momentum if momentum_tensor is None else momentum_tensor)
    torch.autograd.graph.increment_version([*targets, *copies])


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(
    targets: list[Tensor],
    sources: list[Tensor],
    copies: list[Tensor],
    momentum: float,
    momentum_tensor: Tensor | None,
) -> None:
    check_disjoint([targets, copies], [sources])
    if momentum_tensor is not None:
        momentum = float(momentum_tensor)
    ema_update_ref(targets, sources, momentum, copies=copies)


_fwd_op: Callable[..., None] = define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] copies, float momentum, "
    "Tensor? momentum_tensor) -> ()",
    cuda=_ema_update_fwd,
    cpu=_fwd_cpu,
    fake=lambda *_: None,
)


# --- public --------------------------------------------------------------------------------------


@torch.no_grad()
def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    copies: Sequence[Tensor] | None = None,
) -> None:
    """Moves every target towards its source: target = momentum * target + (1 - momentum) * source.

    The list goes through torch's dispatcher, which costs about 0.8 us a tensor; `AdamWEMA`, which
    keeps its tables, does not.

    Args:
        targets: float32 (float64 on the CPU), updated in place, of any number and shapes.
        sources: the same shapes; float32, bfloat16 or float16, also mixed.
        momentum: weight of the old value, 0 .. 1: a number, or one value on the device, float32 or
            float64. Of a float32 value close to one few digits are left of 1 - momentum.
        copies: bfloat16 or float16 tensors that receive the rounded new targets.

    Raises:
        ValueError: lists do not pair up in shape, dtype, device or strides, tensors are not dense,
            one that is written shares memory with another, or momentum is out of range.
    """
    targets, sources = list(targets), list(sources)
    check_list("targets", targets, targets, (torch.float32,))
    check_list("sources", sources, targets, FLOATS)
    if copies is not None:
        copies = list(copies)
        check_list("copies", copies, targets, HALVES)
    if not targets:
        return
    check_scalar("momentum", momentum, targets[0].device, 1.0)
    on_device = isinstance(momentum, Tensor)
    _fwd_op(
        targets,
        sources,
        copies or [],
        0.0 if on_device else float(momentum),
        momentum if on_device else None,
    )
