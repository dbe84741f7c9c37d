"""What `EMA` keeps between updates: pairs of tensors and tables of their addresses."""

from collections.abc import Iterable
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_kernels._checks import FLOATS
from ijepa_kernels._op import launches
from ijepa_kernels.optim._table import (
    HALVES,
    Table,
    addresses,
    capturing,
    check_disjoint,
    check_list,
    check_scalar,
    local,
    on,
)

__all__ = ["Link"]


def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    """All values that are not None, in order."""
    return [value for entries in dicts for value in entries.values() if value is not None]


class _Tree:
    """The parameters and buffers of a module, read anew each time without a walk of its names."""

    def __init__(self, module: nn.Module) -> None:
        modules = [m for _, m in module.named_modules(remove_duplicate=False)]
        self.module = module
        self.parameters = [m._parameters for m in modules if m._parameters]
        self.buffers = [m._buffers for m in modules]
        children = [m._modules for m in modules]
        # these views show what a dictionary holds at any time
        self.children = [entries.values() for entries in children if entries]
        self.structure = list(chain.from_iterable(self.children))
        self.empty = [d for m in modules for d in (m._parameters, m._modules) if not d]
        self.names = [name for name, _ in module.named_parameters(remove_duplicate=False)]

    def changed(self) -> bool:
        """True if submodules were replaced, added or removed, or a module without parameters got
        some.
        """
        # modules are equal only to themselves
        return any(self.empty) or list(chain.from_iterable(self.children)) != self.structure


class Link:
    """A model's tensors paired with those of its average, and the tables for them.

    Args:
        average, copy: modules of an `EMA`.
        model: the one that is averaged.
        op: the module of `ema_update_`, handed over because nothing shared imports an op.
    """

    def __init__(
        self, average: nn.Module, copy: nn.Module | None, model: nn.Module, op: ModuleType
    ) -> None:
        self.op = op
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
            self.tables.append((Table(columns, op.BLOCK), dtype, copy_dtype))

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
                    self.op.launch(table, source_dtype, copy_dtype, momentum)
            torch.autograd.graph.increment_version(self.written)
        elif self.lists[0]:
            sources, targets, *copies = self.lists
            self.op.ema_update_(targets, sources, momentum, copies=copies[0] if copies else None)
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
            torch._foreach_copy_(tensors, sources)
