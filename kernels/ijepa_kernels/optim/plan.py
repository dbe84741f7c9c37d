"""What `AdamWEMA` keeps between steps: lists of tensors and tables of their addresses."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ijepa_kernels._checks import FLOATS
from ijepa_kernels._op import launches
from ijepa_kernels._torch import local
from ijepa_kernels.optim import adamw_ema
from ijepa_kernels.optim._adam_cpu import update_on_cpu
from ijepa_kernels.optim._adam_step import SCALARS, launch_step
from ijepa_kernels.optim._table import (
    HALVES,
    EmaForm,
    Memory,
    Table,
    addresses,
    capturing,
    check_betas,
    check_disjoint,
    check_ema_form,
    check_list,
    check_scalar,
    on,
    upload,
)

__all__ = ["WIDE", "Plan", "options_of"]

WIDE = (torch.float32,)


class Part:
    """Parameters of a plan that one launch updates: of one device and one combination of dtypes.

    Args:
        numbers: of these parameters among all of the plan.
        groups: number of the parameter group of each.
        lists: local tensors of each: parameter, moments, step, average, copies; None for the last
            three where there are none.
        grad_dtype: of the gradients.
    """

    def __init__(
        self,
        numbers: list[int],
        groups: list[int],
        lists: list[list[Any]],
        grad_dtype: torch.dtype,
    ) -> None:
        self.numbers, self.lists, self.grad_dtype = numbers, lists, grad_dtype
        # first tensor and number of tensors of every group, which come one after the other
        self.groups = {g: (groups.index(g), groups.count(g)) for g in dict.fromkeys(groups)}
        self.device = lists[0][0].device
        self.launches = launches("adamw_ema_", self.device)
        # whatever autograd may have seen: an average with a rounded target is ours alone
        params, *_, emas, copies, targets = lists
        averages = [a if b is None else b for a, b in zip(emas, targets, strict=True)]
        self.written = [t for t in (*params, *copies, *averages) if t is not None]
        if not self.launches:
            return
        dtypes = [next((t.dtype for t in tensors if t is not None), None) for tensors in lists[4:]]
        columns = [*lists[:4], *(c for c, dtype in zip(lists[4:], dtypes, strict=True) if dtype)]
        self.has_ema, self.copy_dtypes, self.columns = bool(dtypes[0]), dtypes[1:], len(columns)
        self.table = Table(columns, adamw_ema.BLOCK)
        scalars = lists[0][0].new_empty((len(numbers), SCALARS), dtype=torch.float32)
        self.scalars = Memory(scalars)
        # whether a CUDA graph reads the table and addresses of gradients; earlier ones of these
        self.captured = False
        self.grads: Memory
        self._captured: list[Memory] = []

    def point_to(self, grad_pointers: list[int]) -> None:
        """Takes the addresses of the gradients of the part."""
        if self.launches:
            if self.captured:
                self._captured.append(self.grads)
            self.grads = upload(grad_pointers, self.device)

    def update(
        self,
        grads: list[Tensor],
        param_groups: list[dict[str, Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        ema_form: EmaForm,
    ) -> None:
        flags: dict[str, Any] = {
            name: None if flag is None else flag.to(self.device, torch.float32)
            for name, flag in (("grad_scale", grad_scale), ("found_inf", found_inf))
        }
        with on(self.device):
            for group, (first, count) in self.groups.items():
                options = {**flags, **options_of(param_groups[group], self.device)}
                if self.launches:
                    launch_step(self.table, self.scalars.data, first, count, **options)
                    continue
                parameters, *rest = [tensors[first : first + count] for tensors in self.lists]
                some = grads[first : first + count]
                update_on_cpu(parameters, some, *rest, **options, ema_form=ema_form)
            if not self.launches:
                return
            self.captured = self.captured or capturing(self.device)
            adamw_ema.launch(
                self.table,
                self.columns,
                self.grads.data,
                0,
                self.scalars.data,
                self.grad_dtype,
                self.has_ema,
                *self.copy_dtypes,
                ema_form=ema_form,
            )
        torch.autograd.graph.increment_version(self.written)


def options_of(group: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Numbers of a parameter group; values on the host as numbers where that is another device."""
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "momentum")}
    for name, value in options.items():
        if isinstance(value, Tensor) and value.device.type == "cpu" != device.type:
            options[name] = float(value)
        if name != "betas":
            high = 1.0 if name == "momentum" else float("inf")
            check_scalar(name, options[name], device, high)
    check_betas(options["betas"])
    return options


# ends a list, so that another that is longer or shorter differs from it
_END = object()
_dtype = attrgetter("dtype")


class Plan:
    """What a step needs for the parameters that have a gradient, as long as nothing moves.

    Addresses of parameters, targets and copies are read in every step. The state is the
    optimiser's own: that its tensors are the same objects is enough, which takes half the time.
    Addresses are read of the largest parameter's state only, because whoever moves data behind
    tensors (to free a GPU for a while) moves them all. Memory in the tables is held anyway.

    Args:
        optimizer: an `AdamWEMA`.
        params: of all its groups.
        active: whether each of them has a gradient.
        grads: these gradients.
    """

    def __init__(
        self,
        optimizer: Any,
        params: list[Tensor],
        active: Sequence[bool],
        grads: list[Tensor],
    ) -> None:
        groups = optimizer.param_groups
        self.all = params
        self.lengths = [len(group["params"]) for group in groups]
        group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        chosen = [number for number, has in enumerate(active) if has]
        self.params = [self.all[number] for number in chosen]
        shards = [local(p) for p in self.params]
        for n, p in enumerate(shards):
            # each may be on a device of its own
            check_list([f"params[{chosen[n]}]"], [p], [p], WIDE)
            check_list([f"gradient of params[{chosen[n]}]"], [local(grads[n])], [p], FLOATS)
        for p in self.params:
            optimizer.initialise(p)
        self.entries = list(optimizer.state.values())
        self.states = [optimizer.state[p] for p in self.params]
        targets = [optimizer.targets.get(p) for p in self.params]
        copies = [optimizer.copies.get(p) for p in self.params]
        # views show what a dictionary holds at any time
        self.views = [state.values() for state in self.states]
        self.values = [*chain.from_iterable(self.views), _END]
        largest = max(range(len(shards)), key=lambda n: shards[n].numel())
        some = [t for t in self.views[largest] if isinstance(t, Tensor)]
        self.watched = [*self.params, *(t for t in (*targets, *copies) if t is not None), *some]
        self.plain = all(local(t) is t for t in (*self.watched, *grads))
        self.pointers = self._addresses()
        self.grad_dtypes = [grad.dtype for grad in grads]
        self.contiguous = all(p.is_contiguous() for p in shards)
        self.strides = [p.stride() for p in shards]
        self.grad_pointers: list[int] = []
        columns: list[list[Any]] = [
            *([state[key] for state in self.states] for key in ("exp_avg", "exp_avg_sq", "step")),
            [
                s["ema"] if t is not None else None
                for s, t in zip(self.states, targets, strict=True)
            ],
            copies,
            [t if t is not None and t.dtype in HALVES else None for t in targets],
        ]
        lists: list[list[Any]] = [shards]
        lists += ([None if t is None else local(t) for t in c] for c in columns)
        check_disjoint(lists, [[local(grad) for grad in grads]])
        self.parts = []
        for numbers, dtype in _parts(lists, self.grad_dtypes):
            part_groups = [group_of[chosen[n]] for n in numbers]
            part = [[tensors[n] for n in numbers] for tensors in lists]
            self.parts.append(Part(numbers, part_groups, part, dtype))

    @property
    def captured(self) -> bool:
        """True if a CUDA graph will launch from these tables again."""
        return any(part.launches and part.captured for part in self.parts)

    def _addresses(self) -> list[int]:
        return addresses(self.watched if self.plain else map(local, self.watched))

    def fits(self, optimizer: Any, params: list[Tensor], grads: list[Tensor]) -> bool:
        """True if all tensors but the gradients still are where they were."""
        entries = optimizer.state.values()
        if self.lengths != [len(group["params"]) for group in optimizer.param_groups]:
            return False
        # not by ==, which compares values
        if not all(map(is_, params, self.all)):
            return False
        if len(entries) != len(self.entries) or not all(map(is_, entries, self.entries)):
            return False
        if not all(map(is_, chain(chain.from_iterable(self.views), (_END,)), self.values)):
            return False
        return self._addresses() == self.pointers and list(map(_dtype, grads)) == self.grad_dtypes

    def update(self, optimizer: Any, grads: list[Tensor]) -> None:
        """The step, with the optimiser's options as they are now."""
        if not self.plain:
            grads = list(map(local, grads))
        # in every step: memory that was freed may come back at the same address for others
        if not (self.contiguous and all(map(Tensor.is_contiguous, grads))):
            strides = list(map(Tensor.stride, grads))
            if strides != self.strides:
                check_list("gradients", grads, [local(p) for p in self.params], FLOATS)
        where = addresses(grads)
        if where != self.grad_pointers:
            self.grad_pointers = where
            for part in self.parts:
                alone = len(self.parts) == 1
                part.point_to(where if alone else [where[n] for n in part.numbers])
        flags = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
        check_ema_form(optimizer.ema_form)
        for part in self.parts:
            mine = grads if len(self.parts) == 1 else [grads[n] for n in part.numbers]
            part.update(mine, optimizer.param_groups, *flags, ema_form=optimizer.ema_form)


def _parts(
    lists: list[list[Any]], grad_dtypes: list[torch.dtype]
) -> list[tuple[list[int], torch.dtype]]:
    """Numbers of the tensors that one launch can update: one device, one dtype of gradients, one of
    either copies; tensors without a copy go with any.
    """
    parts: list[tuple[list[int], torch.dtype, torch.device, list[torch.dtype | None]]] = []
    for n, (p, grad_dtype) in enumerate(zip(lists[0], grad_dtypes, strict=True)):
        mine = [None if tensors[n] is None else tensors[n].dtype for tensors in lists[-2:]]
        for numbers, dtype, device, kinds in parts:
            fits = all(a is None or b is None or a == b for a, b in zip(mine, kinds, strict=True))
            if fits and dtype == grad_dtype and device == p.device:
                numbers.append(n)
                kinds[:] = [a or b for a, b in zip(mine, kinds, strict=True)]
                break
        else:
            parts.append(([n], grad_dtype, p.device, mine))
    return [(numbers, dtype) for numbers, dtype, _, _ in parts]
