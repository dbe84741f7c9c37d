"""The optimiser that keeps averages of the weights, as a class.

It keeps tables of addresses between steps and launches without torch's dispatcher, which costs
0.8 us a tensor. Before every launch the addresses of weights and averages are read and compared,
and moments must be the same tensors: what was moved, replaced or loaded meanwhile is found, and
memory in a table is held until then. Not found is `.data` of single moments set to other memory.
Gradients may be elsewhere in every step; theirs is a table of its own. Tables that a CUDA graph
captured are kept.
"""

from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_kernels._torch import local, reads_scaler
from ijepa_kernels.optim._table import HALVES, EmaForm, check_ema_form, check_list
from ijepa_kernels.optim.plan import WIDE, Plan, options_of

__all__ = ["AdamWEMA"]

# plans kept, one for each set of parameters with a gradient
_PLANS = 8


def _pairs(source: Any, target: Any) -> list[tuple[Tensor, Tensor]]:
    """Parameters of two modules by name, or two sequences of tensors by position."""
    if isinstance(source, nn.Module) and isinstance(target, nn.Module):
        theirs, mine = dict(source.named_parameters()), dict(target.named_parameters())
        if set(theirs) != set(mine):
            odd = sorted(set(theirs) ^ set(mine))
            raise ValueError(
                f"source and target must have the same parameters, got {odd[0]} in one"
            )
        return [(theirs[name], mine[name]) for name in theirs]
    left, right = (
        list(side.parameters()) if isinstance(side, nn.Module) else list(side)
        for side in (source, target)
    )
    if len(left) != len(right):
        raise ValueError(f"target must have {len(left)} tensors like source, got {len(right)}")
    return list(zip(left, right, strict=True))


class AdamWEMA(torch.optim.Optimizer):
    """AdamW that also keeps the averages of the weights it updates, in the same pass.

    ::

        optimizer = AdamWEMA(groups, lr=1e-3, weight_decay=0.05, momentum=0.996)
        optimizer.track(context_encoder, target_encoder)
        ...
        optimizer.step()                    # updates target_encoder too

    Parameters and moments are float32, gradients float32, bfloat16 or float16. A tracked target
    that is float32 is itself the average; for one in bfloat16 or float16 the float32 average is
    kept in the state, under "ema", and the target receives it rounded. It starts at the source's
    weight where that rounds to the target, else at the target. Buffers are not tracked. A parameter
    without a gradient in a step is left out: its weight, moments, step and average stay.

    Groups are those of `torch.optim.AdamW` with one key more, "momentum" (of the average); lr,
    weight_decay and momentum may be changed at any time, as numbers or in place as values on the
    device. State dicts load both ways between the two; an average that is missing starts as above.
    Each step counts on the device, and with `found_inf` (as `torch.amp.GradScaler` sets it) a step
    changes nothing; `grad_scale` divides the gradients, which themselves stay as they are.

    On DTensors the shard of this rank is updated, and the state holds DTensors.

    Launches: one for each parameter group, of one small program a tensor, and one for everything,
    provided that gradients and copies have one dtype each.

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        momentum: weight of the old value in the averages, 0 .. 1.
        ema_form: how averages are rounded. "lerp": ema += (1 - momentum) * (p - ema), the more
            accurate; "sum": ema = momentum * ema + (1 - momentum) * p, with momentum * ema rounded
            first, as in `ema.mul_(momentum).add_((1 - momentum) * p)`.

    Attributes:
        ema_form: as given; not part of the state dict.

    Raises:
        ValueError: a number is out of range, a tensor has a dtype or strides that are not
            supported, or one that is written shares memory with another.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        momentum: float | Tensor = 0.996,
        ema_form: EmaForm = "lerp",
    ) -> None:
        check_ema_form(ema_form)
        self.ema_form: EmaForm = ema_form
        self.targets: dict[Tensor, Tensor] = {}
        self.copies: dict[Tensor, Tensor] = {}
        self._plans: dict[tuple[bool, ...], Plan] = {}
        # plans that CUDA graphs captured
        self._captured: list[Plan] = []
        reads_scaler(self)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        numbers = {
            name: float(value) if isinstance(value, Tensor) else value
            for name, value in {**defaults, "momentum": momentum}.items()
        }
        options_of(numbers, torch.device("cpu"))
        # `fused`: AdamW, given this state, keeps its steps on the device
        flags: dict[str, bool | None] = dict.fromkeys(
            ("amsgrad", "maximize", "capturable", "differentiable"), False
        )
        flags |= {"foreach": None, "fused": True, "decoupled_weight_decay": True}
        super().__init__(params, {**defaults, **flags, "momentum": momentum})

    def track(self, source: nn.Module | Sequence[Tensor], target: Any) -> None:
        """Makes the parameters of `target` averages of those of `source`, from the next step on.

        Args:
            source: a module or tensors, all of them parameters of this optimiser.
            target: the same modules' or tensors' counterparts; float32, bfloat16 or float16.

        Raises:
            ValueError: they do not pair up in name, number, shape or device, or are updated twice.
        """
        self._write_to(self.targets, "target", source, target, (*WIDE, *HALVES))

    def mirror(self, source: nn.Module | Sequence[Tensor], copies: Any) -> None:
        """Makes bfloat16 or float16 tensors receive the rounded weights in every step."""
        self._write_to(self.copies, "copy", source, copies, HALVES)

    def _write_to(
        self,
        known: dict[Tensor, Tensor],
        name: str,
        source: Any,
        written: Any,
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        mine = {p for group in self.param_groups for p in group["params"]}
        taken = {*mine, *self.targets.values(), *self.copies.values()}
        pairs = _pairs(source, written)
        for number, (p, tensor) in enumerate(pairs):
            if p not in mine:
                raise ValueError(f"source[{number}] must be a parameter of this optimizer")
            if p in known or tensor in taken:
                raise ValueError(f"{name}[{number}] must be written by one parameter, got a second")
            if (p is local(p)) != (tensor is local(tensor)):
                raise ValueError(f"{name}[{number}] must be sharded like its source")
            check_list([f"{name}[{number}]"], [local(tensor)], [local(p)], dtypes)
            taken.add(tensor)
        known.update(pairs)
        self._drop_plans()

    def _drop_plans(self) -> None:
        self._captured += [plan for plan in self._plans.values() if plan.captured]
        self._plans.clear()

    @torch.no_grad()
    def initialise(self, p: Tensor) -> None:
        """Completes the state of a parameter."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
        target = self.targets.get(p)
        if target is None:
            return
        if target.dtype not in HALVES:
            now = state.get("ema")
            if now is None or local(now).data_ptr() != local(target).data_ptr():
                state["ema"] = target.detach()
        elif "ema" not in state:
            near = target == p.to(target.dtype)
            state["ema"] = torch.where(near, p.detach(), target.detach().to(p.dtype))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = list(chain.from_iterable(map(itemgetter("params"), self.param_groups)))
        found = [p.grad for p in params]
        active = tuple([grad is not None for grad in found])
        grads = found if all(active) else list(compress(found, active))
        if not grads:
            return loss
        plan = self._plans.get(active)
        if plan is None or not plan.fits(self, params, grads):
            # none that is out of date holds memory
            if plan is not None or len(self._plans) >= _PLANS:
                self._drop_plans()
            plan = self._plans[active] = Plan(self, params, active, grads)
        plan.update(self, grads)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch."""
        self._drop_plans()
        super().add_param_group(param_group)
        _check_flags(self.param_groups[-1])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an `AdamWEMA` or a `torch.optim.AdamW`, and writes averages that it
        holds to the targets.
        """
        for group in state_dict["param_groups"]:
            _check_flags(group)
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            step = torch.as_tensor(state["step"], dtype=torch.float32)
            state["step"] = step.to(p.device, copy=True)
            target = self.targets.get(p)
            if target is not None and "ema" in state:
                target.copy_(state["ema"])
            if target is not None:
                self.initialise(p)

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: getattr(self, name) for name in ("targets", "copies", "ema_form")}
        return {**super().__getstate__(), **mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # of an optimizer that is being made of a pickle there are none yet
        self._plans = getattr(self, "_plans", {})
        self._captured = getattr(self, "_captured", [])
        self._drop_plans()
        reads_scaler(self)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _check_flags(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize", "differentiable"):
        if group.get(name):
            raise ValueError(f"{name} must be False, got {group[name]}")
    if not group.get("decoupled_weight_decay", True):
        raise ValueError("decoupled_weight_decay must be True, got the state of Adam without it")
