"""Counts Adam's steps on the device and forms the scalars of every tensor's update, in float64.

The step counts belong to the tensors (as in `torch.optim.AdamW`'s state), and every program of the
update needs what follows from them; so a launch of one program a tensor goes before the update.
Learning rate, weight decay and momentum may be values on the device, and `found_inf` is read here:
a CUDA graph can replay both launches.

A row of the scalars, float32 (L, 16): 0 whether the step counts, 1 factor of weight decay, 2 step
size, 3 factor of sqrt(v), 4 eps, 5 1 - beta1, 6 beta2, 7 1 - beta2, 8 1 - momentum, 9 momentum,
10 factor of the gradient.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._launch import run
from ijepa_kernels.optim._table import Table

__all__ = ["SCALARS", "launch_step"]

SCALARS = 16


@triton.jit(
    do_not_specialize=[
        *("L", "first", "lr", "weight_decay", "log_beta1", "log_beta2", "beta2"),
        *("rest1", "rest2", "eps", "weight", "keep"),
    ]
)
def _adamw_ema_step_kernel(
    table_ptr,
    scalars_ptr,
    lr_ptr,
    weight_decay_ptr,
    momentum_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    L,
    first,
    lr,
    weight_decay,
    log_beta1,
    log_beta2,
    beta2,
    rest1,
    rest2,
    eps,
    weight,
    keep,
    LR_ON_DEVICE: tl.constexpr,
    WEIGHT_DECAY_ON_DEVICE: tl.constexpr,
    MOMENTUM_ON_DEVICE: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    SCALARS: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64) + first
    step_ptr = tl.load(table_ptr + 4 * L + tensor).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr)
    live = step >= 0
    if HAS_FOUND_INF:
        live = tl.load(found_inf_ptr) == 0
    step = tl.where(live, step + 1, step)
    tl.store(step_ptr, step)
    count = tl.maximum(step, 1.0).to(tl.float64)
    # sums, because arguments are plain numbers in the interpreter
    zero = count * 0.0
    rate = (tl.load(lr_ptr) if LR_ON_DEVICE else lr) + zero
    decay = (tl.load(weight_decay_ptr) if WEIGHT_DECAY_ON_DEVICE else weight_decay) + zero
    if MOMENTUM_ON_DEVICE:
        momentum = tl.load(momentum_ptr).to(tl.float64)
        weight = (1.0 - momentum).to(tl.float32)
        keep = momentum.to(tl.float32)
    correction1 = 1.0 - tl.exp(count * (log_beta1 + zero))
    correction2 = 1.0 - tl.exp(count * (log_beta2 + zero))
    out_ptr = scalars_ptr + tensor * SCALARS
    tl.store(out_ptr, tl.where(live, 1.0, 0.0))
    tl.store(out_ptr + 1, (1.0 - rate * decay).to(tl.float32))
    tl.store(out_ptr + 2, (rate / correction1).to(tl.float32))
    tl.store(out_ptr + 3, (1.0 / tl.sqrt(correction2)).to(tl.float32))
    tl.store(out_ptr + 4, eps)
    tl.store(out_ptr + 5, rest1)
    tl.store(out_ptr + 6, beta2)
    tl.store(out_ptr + 7, rest2)
    tl.store(out_ptr + 8, weight)
    tl.store(out_ptr + 9, keep)
    tl.store(out_ptr + 10, 1.0 / tl.load(grad_scale_ptr).to(tl.float32) if HAS_GRAD_SCALE else 1.0)


def launch_step(
    table: Table,
    scalars: Tensor,
    first: int,
    count: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Counts the step of `count` tensors of a table and forms their scalars, float32 (L, 16)."""
    values = (lr, weight_decay, momentum)
    on_device = [isinstance(value, Tensor) for value in values]
    rate, decay, kept = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
    run(
        _adamw_ema_step_kernel,
        (count,),
        table.data,
        scalars,
        *[value if isinstance(value, Tensor) else scalars for value in values],
        scalars if grad_scale is None else grad_scale,
        scalars if found_inf is None else found_inf,
        table.length,
        first,
        rate,
        decay,
        *[math.log(beta) if beta else -math.inf for beta in betas],
        betas[1],
        1.0 - betas[0],
        1.0 - betas[1],
        float(eps),
        1.0 - kept,
        kept,
        LR_ON_DEVICE=on_device[0],
        WEIGHT_DECAY_ON_DEVICE=on_device[1],
        MOMENTUM_ON_DEVICE=on_device[2],
        HAS_GRAD_SCALE=grad_scale is not None,
        HAS_FOUND_INF=found_inf is not None,
        SCALARS=SCALARS,
        num_warps=1,
    )
