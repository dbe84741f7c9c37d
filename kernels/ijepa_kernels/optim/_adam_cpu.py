"""The update of `adamw_ema.py` with torch operations, for CPU tensors.

Adam's part is torch's own fused kernel, so it has the bits of `torch.optim.AdamW(fused=True)`.
Nothing is read to the host: the flag itself leaves steps out that do not count. Averages go one
tensor after the other and through the same memory, so that this stays in the cache: for the 22
million weights of a ViT-S, on two cores, temporary lists of tensors take twice as long.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ijepa_kernels._torch import foreach_add_, foreach_mul_, fused_adamw_
from ijepa_kernels.optim._table import EmaForm

__all__ = ["update_on_cpu"]

_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def update_on_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    emas: Sequence[Tensor | None],
    param_copies: Sequence[Tensor | None],
    ema_copies: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Tensor,
    momentum: float | Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    ema_form: EmaForm,
) -> None:
    """One step; lists of averages and copies may hold None."""
    live = None if found_inf is None else found_inf.reshape(()) == 0
    grads = [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]
    if grad_scale is not None:
        grads = [g / grad_scale.reshape(()).to(g.dtype) for g in grads]
    if isinstance(weight_decay, Tensor):
        # torch's kernel takes a number
        kept = 1 - lr * weight_decay.reshape(()).double()
        kept = kept if live is None else torch.where(live, kept, 1.0)
        foreach_mul_(params, kept.reshape(()))
        weight_decay = 0.0
    foreach_add_(steps, steps[0].new_ones(()) if live is None else live.float())
    fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        # it skips a step if this is 1 and nothing else
        found_inf=None if live is None else (~live).float(),
    )
    # which that does not
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
    scratch = _Scratch(max(map(Tensor.numel, params)))
    keep = momentum.reshape(()).double() if isinstance(momentum, Tensor) else momentum
    for p, ema in zip(params, emas, strict=True):
        if ema is not None:
            _average(ema, p, keep, live, ema_form, scratch)
    for copies, tensors in ((param_copies, params), (ema_copies, emas)):
        for copy, tensor in zip(copies, tensors, strict=True):
            if copy is not None and tensor is not None:
                _store(copy, tensor, live, scratch)


class _Scratch:
    """Memory for results of one tensor at a time, uninitialised.

    The allocator would return it to the system after every tensor, and page faults cost more than
    the arithmetic.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory: dict[tuple[torch.dtype, int], Tensor] = {}

    def like(self, tensor: Tensor, number: int = 0) -> Tensor:
        key = (tensor.dtype, number)
        if key not in self.memory:
            self.memory[key] = tensor.new_empty(self.size)
        return self.memory[key].as_strided(tensor.shape, tensor.stride())


def _average(
    ema: Tensor,
    p: Tensor,
    keep: float | Tensor,
    live: Tensor | None,
    ema_form: EmaForm,
    scratch: _Scratch,
) -> None:
    """Moves an average in place, unless the step does not count."""
    new = ema if live is None else scratch.like(ema)
    take = 1 - keep
    if isinstance(keep, Tensor) and isinstance(take, Tensor):
        keep, take = keep.to(ema.dtype), take.to(ema.dtype)
    if ema_form == "sum":
        torch.mul(ema, keep, out=new).add_(torch.mul(p, take, out=scratch.like(p, 1)))
    else:
        torch.lerp(ema, p, take, out=new)
    _store(ema, new, live, scratch)


def _store(target: Tensor, new: Tensor, live: Tensor | None, scratch: _Scratch) -> None:
    """Rounds values to a tensor, unless the step does not count; may overwrite scratch memory."""
    if live is None:
        target.copy_(new)
        return
    if new.dtype != target.dtype:
        new = scratch.like(target).copy_(new)
    # by bits: weights of 0 and 1 turn -0 into 0 and pass on NaN, torch.where takes twice as long
    bits = _BITS[target.dtype]
    change, target = new.view(bits), target.view(bits)
    target.bitwise_xor_(change.bitwise_xor_(target).bitwise_and_(-live.to(bits)))
