"""Averages of weights, as a class."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ijepa_kernels._torch import foreach_copy_, local
from ijepa_kernels.optim._table import HALVES, check_scalar
from ijepa_kernels.optim.ema_update import ema_update_

__all__ = ["EMA"]


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

    One launch for each dtype among the model's parameters. Both models are walked at every update,
    so what was moved, replaced or loaded meanwhile is found.

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
        (sources, targets, *copies), others = self._lists(model)
        momentum = self.decay if momentum is None else momentum
        ema_update_(targets, sources, momentum, copies=copies[0] if copies else None)
        _copy_to_all(others)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Starts again from the model's weights, as they are."""
        for lists in self._lists(model):
            _copy_to_all(lists)

    @torch.no_grad()
    def round(self) -> None:
        """Writes the averages into `copy`, after something else than `update` changed them."""
        if self.copy is not None:
            self.set(self.module)

    def _lists(self, model: nn.Module) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Tensors of the model, of `module` and of `copy` if there is one: first those that are
        averaged, then those that are copied. A tied weight is one tensor.
        """
        modules = [m for m in (model, self.module, self.copy) if m is not None]
        names = [dict(module.named_parameters()) for module in modules]
        if len(names[0]) != len(names[1]):
            raise ValueError(
                f"model must have {len(names[1])} parameters like EMA.module, got {len(names[0])}"
            )
        for (name, source), (own, target) in zip(names[0].items(), names[1].items(), strict=True):
            # wrappers such as DistributedDataParallel and torch.compile put prefixes
            if name != own and not name.endswith("." + own):
                raise ValueError(f"model must have a parameter {own} like EMA.module, got {name}")
            if source.shape != target.shape:
                shape, got = tuple(target.shape), tuple(source.shape)
                raise ValueError(f"model.{own} must have shape {shape}, got {got}")
        parameters = [list(map(local, tensors.values())) for tensors in names]
        averaged = [[t for t in tensors if t.is_floating_point()] for tensors in parameters]
        copied = [[t for t in tensors if not t.is_floating_point()] for tensors in parameters]
        for others, module in zip(copied, modules, strict=True):
            others.extend(map(local, module.buffers()))
        return averaged, copied

    def _apply(self, fn: Any, recurse: bool = True) -> "EMA":
        super()._apply(fn, recurse)
        if self.copy is not None:
            self.copy._apply(fn, recurse)
        return self


def _copy_to_all(lists: list[list[Tensor]]) -> None:
    """Copies the first list to the others."""
    sources, *others = lists
    for tensors in others if sources else ():
        foreach_copy_(tensors, sources)
