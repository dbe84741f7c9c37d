"""AdamW, the average of the updated weights, and the rounded copies of both, in one pass.

    step += 1;  p *= 1 - lr * weight_decay;  g = grad / grad_scale
    m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g^2
    p -= lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    ema += (1 - momentum) * (p - ema)                       optional, of the new p; "lerp"
    or ema = momentum * ema + (1 - momentum) * p            "sum", where momentum * ema is rounded
    copies of p and ema, rounded                            optional

for any number of tensors (Loshchilov and Hutter 2019, as in `torch.optim.AdamW`; paper: Targets).
Two launches: one program a tensor counts the step and forms the scalars of its update
(`_adam_step.py`), then one launch over all elements. If `found_inf` is not zero, neither changes
anything.

Bytes an element with float32 gradients: parameter, moments and average read and written, gradient
read, two bfloat16 copies written = 32 + 4 + 4 = 40; as separate fused kernels (AdamW, EMA, two
casts) 28 + 12 + 12 = 52.

Shape letters: L tensors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import FLOATS
from ijepa_kernels._launch import run
from ijepa_kernels._op import define
from ijepa_kernels.optim._adam_cpu import update_on_cpu
from ijepa_kernels.optim._adam_step import SCALARS, launch_step
from ijepa_kernels.optim._table import (
    HALVES,
    TRITON_DTYPES,
    EmaForm,
    Table,
    cached_table,
    check_betas,
    check_disjoint,
    check_ema_form,
    check_list,
    check_scalar,
)

__all__ = ["adamw_ema_", "adamw_ema_bytes", "adamw_ema_ref"]


def adamw_ema_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum: float,
    emas: Sequence[Tensor | None],
    ema_form: EmaForm = "lerp",
) -> None:
    """The specification, in plain torch."""
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, emas)
    for p, grad, m, v, step, ema in zip(*lists, strict=True):
        step.add_(1)
        g = grad.to(p.dtype)
        p.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        corrections = [1 - beta ** float(step) for beta in betas]
        p.addcdiv_(m, (v.sqrt() / math.sqrt(corrections[1])).add_(eps), value=-lr / corrections[0])
        if ema is not None and ema_form == "sum":
            ema.mul_(momentum).add_((1 - momentum) * p)
        elif ema is not None:
            ema.lerp_(p, 1 - momentum)


def adamw_ema_bytes(
    elements: int,
    grad_dtype: torch.dtype,
    *,
    param_copy: torch.dtype | None = None,
    ema_copy: torch.dtype | None = None,
) -> int:
    """Bytes that have to move at least, where all elements have an average."""
    copies = sum(copy.itemsize for copy in (param_copy, ema_copy) if copy)
    return elements * (32 + grad_dtype.itemsize + copies)


# --- launch table --------------------------------------------------------------------------------

# 8 elements a thread: 10 independent 128-bit loads. Ends of tensors and unaligned ones go in
# pieces, so that their many narrow accesses take few registers.
BLOCK, PIECE, WARPS = 2048, 256, 8


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _adamw_ema_block(
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    ema_ptr,
    copy_ptr,
    ema_copy_ptr,
    scalars_ptr,
    mask,
    averaged,
    copied,
    average_copied,
    HAS_EMA: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_EMA_COPY: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    p = tl.load(p_ptr + column, mask=mask)
    g = tl.load(g_ptr + column, mask=mask).to(tl.float32)
    m = tl.load(m_ptr + column, mask=mask)
    v = tl.load(v_ptr + column, mask=mask)
    if HAS_EMA:
        ema_mask = averaged if mask is None else mask & averaged
        ema = tl.load(ema_ptr + column, mask=ema_mask)
    g *= tl.load(scalars_ptr + 10)
    m += tl.load(scalars_ptr + 5) * (g - m)
    v = tl.load(scalars_ptr + 6) * v + tl.load(scalars_ptr + 7) * g * g
    denominator = tl.sqrt(v) * tl.load(scalars_ptr + 3) + tl.load(scalars_ptr + 4)
    p = p * tl.load(scalars_ptr + 1) - tl.load(scalars_ptr + 2) * (m / denominator)
    tl.store(p_ptr + column, p, mask=mask)
    tl.store(m_ptr + column, m, mask=mask)
    tl.store(v_ptr + column, v, mask=mask)
    if HAS_COPY:
        copy_mask = copied if mask is None else mask & copied
        tl.store(copy_ptr + column, p.to(copy_ptr.dtype.element_ty), mask=copy_mask)
    if HAS_EMA:
        take, keep = tl.load(scalars_ptr + 8), tl.load(scalars_ptr + 9)
        if SUM:
            # each product by an fma, or the compiler would leave one of them unrounded
            ema = tl.fma(keep, ema, 0.0) + tl.fma(take, p, 0.0)
        else:
            difference = p - ema
            ema = tl.where(take < 0.5, ema + take * difference, p - keep * difference)
        tl.store(ema_ptr + column, ema, mask=ema_mask)
        if HAS_EMA_COPY:
            copy_mask = average_copied if mask is None else mask & average_copied
            tl.store(ema_copy_ptr + column, ema.to(ema_copy_ptr.dtype.element_ty), mask=copy_mask)


@triton.jit(do_not_specialize=["L", "grads_at"])
def _adamw_ema_fwd_kernel(
    table_ptr,
    grads_ptr,
    scalars_ptr,
    L,
    grads_at,
    COLUMNS: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,
    EMA_COPY: tl.constexpr,
    HAS_EMA: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_EMA_COPY: tl.constexpr,
    SUM: tl.constexpr,
    SCALARS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    place = tl.load(table_ptr + (COLUMNS + 1) * L + program)
    tensor, start = place >> 32, (place & 0xFFFFFFFF) * BLOCK
    scalars_ptr += tensor * SCALARS
    left = tl.load(table_ptr + tensor) - start
    # a skipped step: nothing is left to do
    left = tl.where(tl.load(scalars_ptr) != 0, left, 0)
    p = tl.load(table_ptr + L + tensor)
    g = tl.load(grads_ptr + grads_at + tensor)
    m = tl.load(table_ptr + 2 * L + tensor)
    v = tl.load(table_ptr + 3 * L + tensor)
    ema = tl.load(table_ptr + 5 * L + tensor) if HAS_EMA else p
    copy = tl.load(table_ptr + (5 + HAS_EMA) * L + tensor) if HAS_COPY else p
    ema_copy = tl.load(table_ptr + (5 + HAS_EMA + HAS_COPY) * L + tensor) if HAS_EMA_COPY else p
    # tensors without an average or a copy have address 0
    averaged, copied, average_copied = ema != 0, copy != 0, ema_copy != 0
    p_ptr = p.to(tl.pointer_type(tl.float32)) + start
    g_ptr = g.to(tl.pointer_type(GRAD)) + start
    m_ptr = m.to(tl.pointer_type(tl.float32)) + start
    v_ptr = v.to(tl.pointer_type(tl.float32)) + start
    ema_ptr = ema.to(tl.pointer_type(tl.float32)) + start
    copy_ptr = copy.to(tl.pointer_type(COPY)) + start
    ema_copy_ptr = ema_copy.to(tl.pointer_type(EMA_COPY)) + start
    # whole aligned blocks go by 128-bit accesses, the rest element by element; 64 bits in 16-bit
    # dtypes, so that a thread has the same elements of all tensors and nothing is exchanged
    if (left >= BLOCK) & (((p | g | m | v | ema | copy | ema_copy) & 15) == 0):
        _adamw_ema_block(
            tl.multiple_of(p_ptr, 16),
            tl.multiple_of(g_ptr, GRAD.primitive_bitwidth // 2),
            tl.multiple_of(m_ptr, 16),
            tl.multiple_of(v_ptr, 16),
            tl.multiple_of(ema_ptr, 16),
            tl.multiple_of(copy_ptr, 8),
            tl.multiple_of(ema_copy_ptr, 8),
            scalars_ptr,
            None,
            averaged,
            copied,
            average_copied,
            HAS_EMA,
            HAS_COPY,
            HAS_EMA_COPY,
            SUM,
            BLOCK,
        )
    else:
        for piece in range(0, tl.minimum(left, BLOCK), PIECE):
            _adamw_ema_block(
                p_ptr + piece,
                g_ptr + piece,
                m_ptr + piece,
                v_ptr + piece,
                ema_ptr + piece,
                copy_ptr + piece,
                ema_copy_ptr + piece,
                scalars_ptr,
                tl.arange(0, PIECE) < left - piece,
                averaged,
                copied,
                average_copied,
                HAS_EMA,
                HAS_COPY,
                HAS_EMA_COPY,
                SUM,
                PIECE,
            )


# --- launchers -----------------------------------------------------------------------------------


def launch(
    table: Table,
    columns: int,
    grads: Tensor,
    grads_at: int,
    scalars: Tensor,
    grad_dtype: torch.dtype,
    has_ema: bool,
    copy_dtype: torch.dtype | None,
    ema_copy_dtype: torch.dtype | None,
    *,
    ema_form: EmaForm = "lerp",
) -> None:
    """One launch over a table of parameters, both moments, steps, averages, copies of parameters
    and of averages (the last three if there are any), and then other columns up to `columns`.

    The addresses of the gradients are in `grads` from `grads_at` on.
    """
    if not table.blocks:
        return
    run(
        _adamw_ema_fwd_kernel,
        (table.blocks,),
        table.data,
        grads,
        scalars,
        table.length,
        grads_at,
        COLUMNS=columns,
        GRAD=TRITON_DTYPES[grad_dtype],
        COPY=TRITON_DTYPES[copy_dtype or torch.bfloat16],
        EMA_COPY=TRITON_DTYPES[ema_copy_dtype or torch.bfloat16],
        HAS_EMA=has_ema,
        HAS_COPY=copy_dtype is not None,
        HAS_EMA_COPY=ema_copy_dtype is not None,
        SUM=ema_form == "sum",
        SCALARS=SCALARS,
        BLOCK=BLOCK,
        PIECE=PIECE,
        num_warps=WARPS,
    )


class _Inputs(NamedTuple):
    """What the op is given, in the order of its schema; see `adamw_ema_`. Lists are empty where
    there is nothing; numbers are in `scalars`, values on the device by name.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    emas: list[Tensor]
    param_copies: list[Tensor]
    ema_copies: list[Tensor]
    scalars: list[float]
    lr: Tensor | None
    weight_decay: Tensor | None
    momentum: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    ema_form: EmaForm

    def options(self) -> dict[str, Any]:
        """The arguments of `launch_step`: numbers or values on the device."""
        lr, beta1, beta2, eps, weight_decay, momentum = self.scalars
        return {
            "lr": lr if self.lr is None else self.lr,
            "betas": (beta1, beta2),
            "eps": eps,
            "weight_decay": weight_decay if self.weight_decay is None else self.weight_decay,
            "momentum": momentum if self.momentum is None else self.momentum,
            "grad_scale": self.grad_scale,
            "found_inf": self.found_inf,
        }


def _adamw_ema_fwd(*inputs: Any) -> None:
    given = _Inputs(*inputs)
    params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies, ema_copies, *_ = given
    written = [params, exp_avgs, exp_avg_sqs, steps, emas, param_copies, ema_copies]
    kinds = [
        (grad.dtype, [c[n].dtype if c else None for c in (param_copies, ema_copies)])
        for n, grad in enumerate(grads)
    ]
    # one launch for each combination of dtypes, so one as a rule
    for number, (dtype, copy_dtypes) in enumerate(kinds):
        if kinds.index(kinds[number]) < number:
            continue
        chosen = [n for n, kind in enumerate(kinds) if kind == kinds[number]]
        columns = [[tensors[n] for n in chosen] for tensors in written if tensors]
        table = cached_table(columns, [[grads[n] for n in chosen]], BLOCK)
        memory = params[0].new_empty((table.length, SCALARS), dtype=torch.float32)
        launch_step(table, memory, 0, table.length, **given.options())
        width = len(columns) + 1
        places = (table.data, width * table.length)
        form = given.ema_form
        launch(table, width, *places, memory, dtype, bool(emas), *copy_dtypes, ema_form=form)
    torch.autograd.graph.increment_version([*params, *emas, *param_copies, *ema_copies])


# --- registration --------------------------------------------------------------------------------


def _fwd_cpu(*inputs: Any) -> None:
    given = _Inputs(*inputs)
    params, grads, exp_avgs, exp_avg_sqs, steps, emas, param_copies, ema_copies, *_ = given
    optional: tuple[list[Any], ...] = (emas, param_copies, ema_copies)
    check_disjoint([params, exp_avgs, exp_avg_sqs, steps, *optional], [grads])
    update_on_cpu(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        *[tensors or [None] * len(params) for tensors in optional],
        **given.options(),
        ema_form=given.ema_form,
    )


_fwd_op: Callable[..., None] = define(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] emas, Tensor(f!)[] param_copies, "
    "Tensor(g!)[] ema_copies, float[] scalars, Tensor? lr, Tensor? weight_decay, "
    "Tensor? momentum, Tensor? grad_scale, Tensor? found_inf, str ema_form) -> ()",
    cuda=_adamw_ema_fwd,
    cpu=_fwd_cpu,
    fake=lambda *_: None,
)


# --- public --------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Tensor = 1e-2,
    momentum: float | Tensor = 1.0,
    emas: Sequence[Tensor] | None = None,
    param_copies: Sequence[Tensor] | None = None,
    ema_copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    ema_form: EmaForm = "lerp",
) -> None:
    """One AdamW step for many tensors, and the average of the new parameters in the same pass.

    `AdamWEMA` is the optimiser over it; this function takes one parameter group.

    Args:
        params: float32 (float64 on the CPU), updated in place, of any number and shapes.
        grads: of the same shapes; float32, bfloat16 or float16. They stay as they are.
        exp_avgs, exp_avg_sqs: first and second moments, like the parameters.
        steps: the updates done so far of every parameter, one float32 value each, on the device.
        lr, weight_decay, momentum: numbers, or one float32 or float64 value on the device.
        betas, eps: of AdamW.
        emas: averages, like the parameters: ema = momentum * ema + (1 - momentum) * new parameter.
        param_copies, ema_copies: bfloat16 or float16 tensors that receive the new values, rounded.
        grad_scale: one float32 value that gradients are divided by.
        found_inf: one float32 value; if it is not zero, nothing is changed.
        ema_form: "lerp" moves averages by (1 - momentum) * (parameter - average), which is more
            accurate; "sum" rounds momentum * average first, as `average.mul_(momentum)` does.

    Raises:
        ValueError: lists do not pair up in shape, dtype, device or strides, tensors are not dense,
            one that is written shares memory with another, or a number is out of range.
    """
    params, wide = list(params), (torch.float32,)
    check_list("params", params, params, wide)
    check_ema_form(ema_form)
    if ema_copies is not None and emas is None:
        raise ValueError("ema_copies must come with emas, got emas None")
    if not params:
        return
    lists: list[list[Tensor]] = [params]
    for name, tensors, dtypes in (
        ("grads", grads, FLOATS),
        ("exp_avgs", exp_avgs, wide),
        ("exp_avg_sqs", exp_avg_sqs, wide),
        ("emas", emas, wide),
        ("param_copies", param_copies, HALVES),
        ("ema_copies", ema_copies, HALVES),
    ):
        given = [] if tensors is None else list(tensors)
        if tensors is not None:
            check_list(name, given, params, dtypes)
        lists.append(given)
    device = params[0].device
    check_list("steps", steps, [p.new_empty(()) for p in params], wide)
    check_betas(betas)
    values = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    others = {"eps": eps, "grad_scale": grad_scale, "found_inf": found_inf}
    for name, value in {**values, **others}.items():
        if value is not None:
            check_scalar(name, value, device, 1.0 if name == "momentum" else math.inf)
    rate, decay, kept = [0.0 if isinstance(v, Tensor) else float(v) for v in values.values()]
    _fwd_op(
        *lists[:4],
        list(steps),
        *lists[4:],
        [rate, *map(float, betas), float(eps), decay, kept],
        *[value if isinstance(value, Tensor) else None for value in values.values()],
        grad_scale,
        found_inf,
        ema_form,
    )
