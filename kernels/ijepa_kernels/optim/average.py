"""Averages of weights, as a class that keeps its tables of addresses between updates.

See `optimizer.py` for what is compared before every launch.
"""

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_kernels._checks import FLOATS
from ijepa_kernels._op import launches
from ijepa_kernels._torch import buffers_of, foreach_copy_, local, modules_of, parameters_of
from ijepa_kernels.optim import ema_update
from ijepa_kernels.optim._table import (
    HALVES,
    Table,
    addresses,
    capturing,
    check_disjoint,
    check_list,
    check_scalar,
    on,
)

__all__ = ["EMA"]


def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    """All values that are not None, in order."""
    return [value for entries in dicts for value in entries.values() if value is not None]


class _Tree:
    """The parameters and buffers of a module, read anew each time without a walk of its names."""

    def __init__(self, module: nn.Module) -> None:
        modules = [m for _, m in module.named_modules(remove_duplicate=False)]
        self.module = module
        parameters, children = list(map(parameters_of, modules)), list(map(modules_of, modules))
        self.parameters = list(filter(None, parameters))
        self.buffers = list(map(buffers_of, modules))
        # these views show what a dictionary holds at any time
        self.children = [entries.values() for entries in children if entries]
        self.structure = list(chain.from_iterable(self.children))
        self.empty = [entries for entries in (*parameters, *children) if not entries]
        self.names = [name for name, _ in module.named_parameters(remove_duplicate=False)]

    def changed(self) -> bool:
        """True if submodules were replaced, added or removed, or a module without parameters got
        some.
        """
        # modules are equal only to themselves
        return any(self.empty) or list(chain.from_iterable(self.children)) != self.structure


class _Link:
    """A model's tensors paired with those of its average, and the tables for them.

    Args:
        average, copy: modules of an `EMA`.
        model: the one that is averaged.
    """

    def __init__(self, average: nn.Module, copy: nn.Module | None, model: nn.Module) -> None:
        self.source, self.target = _Tree(model), _Tree(average)
        self.trees = [self.source, self.target]
        if copy is not None:
            self.trees.append(_Tree(copy))
        self.dicts = [entries for tree in self.trees for entries in tree.parameters]
        self.views = [entries.values() for entries in self.dicts]
        lists = [[local(t) for t in _values(tree.parameters)] for tree in self.trees]
        flat = [t for tensors in lists for t in tensors]
        # missing biases and DTensors take a slower way to the addresses
        self.plain = not any(
            value is None or local(value) is not value
            for entries in self.dicts
            for value in entries.values()
        )
        self.pointers = addresses(flat)
        sources, targets, *copies = lists
        self._check_names()
        # a tied weight appears once for each of its names, and is averaged once
        first = {id(t): number for number, t in reversed(list(enumerate(targets)))}
        for number, target in enumerate(targets):
            if sources[number] is not sources[first[id(target)]]:
                raise ValueError(
                    f"{self.source.names[number]} was tied to another parameter when its average "
                    "was made, and is no longer; make a new EMA"
                )
        chosen = [n for n in sorted(first.values()) if targets[n].is_floating_point()]
        others = [n for n in sorted(first.values()) if not targets[n].is_floating_point()]
        self.others = [[tensors[n] for n in others] for tensors in lists]
        self.lists = [[tensors[n] for n in chosen] for tensors in lists]
        sources, targets, *copies = self.lists
        names = [self.target.names[n] for n in chosen]
        for where, tensors, dtypes in zip(
            ("model.", "EMA.module.", "EMA.copy."),
            self.lists,
            (FLOATS, (torch.float32,), HALVES),
            strict=False,
        ):
            check_list([where + name for name in names], tensors, targets, dtypes)
        check_disjoint([targets, *copies], [sources])
        self.written = [t for tensors in (targets, *copies) for t in tensors]
        # whether a CUDA graph reads the tables
        self.captured = False
        self.device = targets[0].device if targets else torch.device("cpu")
        self.tables: list[tuple[Table, torch.dtype, torch.dtype | None]] = []
        if not launches("ema_update_", self.device):
            return
        copy_dtype = copies[0][0].dtype if copies and targets else None
        for dtype in dict.fromkeys(t.dtype for t in sources):
            numbers = [n for n, t in enumerate(sources) if t.dtype == dtype]
            columns = [[tensors[n] for n in numbers] for tensors in (targets, *copies, sources)]
            self.tables.append((Table(columns, ema_update.BLOCK), dtype, copy_dtype))

    def _check_names(self) -> None:
        names, own = self.source.names, self.target.names
        if len(names) != len(own):
            raise ValueError(
                f"model must have {len(own)} parameters like EMA.module, got {len(names)}"
            )
        for name, other in zip(names, own, strict=True):
            # wrappers such as DistributedDataParallel and torch.compile put prefixes
            if name != other and not name.endswith("." + other):
                raise ValueError(f"model must have a parameter {other} like EMA.module, got {name}")

    def fits(self, model: nn.Module) -> bool:
        """True if all parameters still are where they were."""
        if model is not self.source.module:
            return False
        entries = chain.from_iterable(self.views)
        try:
            tensors = entries if self.plain else [local(t) for t in entries if t is not None]
            same = addresses(tensors) == self.pointers
        except TypeError:  # a parameter became None
            return False
        return same and not self.source.changed()

    def update(self, momentum: float | Tensor) -> None:
        check_scalar("momentum", momentum, self.device, 1.0)
        if self.tables:
            with on(self.device):
                self.captured = self.captured or capturing(self.device)
                for table, source_dtype, copy_dtype in self.tables:
                    ema_update.launch(table, source_dtype, copy_dtype, momentum)
            torch.autograd.graph.increment_version(self.written)
        elif self.lists[0]:
            sources, targets, *copies = self.lists
            ema_update.ema_update_(targets, sources, momentum, copies=copies[0] if copies else None)
        self.copy_rest()

    def copy_rest(self) -> None:
        """Copies buffers, and parameters that are not floating point."""
        if not self.others[0] and not any(self.source.buffers):
            return
        sources, *others = (
            [*map(local, _values(filter(None, tree.buffers))), *rest]
            for tree, rest in zip(self.trees, self.others, strict=True)
        )
        for tensors in others if sources else ():
            foreach_copy_(tensors, sources)


def _after_load(ema: nn.Module, _: object) -> None:
    assert isinstance(ema, EMA)
    ema.round()


class EMA(nn.Module):
    """Keeps an exponential moving average of a model's weights, in float32.

    Used like timm's ModelEmaV3::

        ema = EMA(model, decay=0.9999)
        ...
        optimizer.step()
        ema.update(model)

    Parameters are averaged; buffers, and parameters that are not floating point, are copied as they
    are at every update. Tied weights stay tied. The state dict is that of `module`, its names
    prefixed ``module.``.

    Host time of an update is mostly the reading of addresses, 50 to 60 ns a tensor of either
    model; one launch for each dtype among the model's parameters.

    Args:
        model: to be averaged; its weights now are the start. May be wrapped later
            (DistributedDataParallel, torch.compile).
        decay: momentum, the weight of the old value, where `update` is given none.
        copy_dtype: bfloat16 or float16: keep a second module, `copy`, with the averages rounded to
            it, written in the same pass and used by `forward`. It is not part of the state dict.

    Attributes:
        module: the averaged model, in evaluation mode and without gradients; float32 parameters
            whatever the model's (float64 where the model's are).
        copy: the rounded one, or None.

    Raises:
        ValueError: decay or copy_dtype is out of range.
    """

    # Any: what they are is the model's business
    module: Any
    copy: Any

    def __init__(
        self, model: nn.Module, decay: float = 0.9999, *, copy_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_scalar("decay", decay, torch.device("cpu"), 1.0)
        if copy_dtype is not None and copy_dtype not in HALVES:
            raise ValueError(f"copy_dtype must be bfloat16 or float16, got {copy_dtype}")
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in self.module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(
                    torch.promote_types(parameter.dtype, torch.float32)
                )
        # not registered, or it would be in the state dict
        self.__dict__["copy"] = None
        if copy_dtype is not None:
            self.__dict__["copy"] = copy.deepcopy(self.module).to(copy_dtype)
        self._link: _Link | None = None
        # links that CUDA graphs captured
        self._captured: list[_Link] = []
        self.register_load_state_dict_post_hook(_after_load)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the averaged model; the rounded one if there is one."""
        return (self.module if self.copy is None else self.copy)(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | Tensor | None = None) -> None:
        """average = momentum * average + (1 - momentum) * model.

        Args:
            model: with parameters named like those at construction.
            momentum: a number in 0 .. 1, or one float32 or float64 value on the device; `decay` by
                default.

        Raises:
            ValueError: the model's parameters do not pair up with the average's.
        """
        self._linked(model).update(self.decay if momentum is None else momentum)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Starts again from the model's weights, as they are."""
        link = self._linked(model)
        sources, *others = link.lists
        for tensors in others if sources else ():
            foreach_copy_(tensors, sources)
        link.copy_rest()

    @torch.no_grad()
    def round(self) -> None:
        """Writes the averages into `copy`, after something else than `update` changed them."""
        if self.copy is not None:
            for tensor, mine in (
                *zip(self.copy.parameters(), self.module.parameters(), strict=True),
                *zip(self.copy.buffers(), self.module.buffers(), strict=True),
            ):
                tensor.copy_(mine)

    def _linked(self, model: nn.Module) -> _Link:
        if self._link is None or not self._link.fits(model):
            if self._link is not None and self._link.captured:
                self._captured.append(self._link)
            self._link = None
            self._link = _Link(self.module, self.copy, model)
        return self._link

    def _apply(self, fn: Any, recurse: bool = True) -> "EMA":
        super()._apply(fn, recurse)
        if self.copy is not None:
            self.copy._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # addresses mean nothing in a copy
        return {**self.__dict__, "_link": None, "_captured": []}
