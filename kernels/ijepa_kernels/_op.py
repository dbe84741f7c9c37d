"""Registers an op with torch for CUDA (Triton), CPU, fake tensors and autograd.

Not `torch.library.custom_op`, and autograd by hand, for the host's sake: on one core of an EPYC an
empty op of two tensors costs 9 us with `custom_op`, 7 with `define` and `register_autograd`,
5 as here; with gradients 19, 16 and 10, and `register_autograd` grows with every further argument.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ijepa_kernels._torch import below_autograd, forward_level

__all__ = ["LAUNCHERS", "ON_CPU", "define", "launches", "raw"]

_LIBRARY = torch.library.Library("ijepa_kernels", "DEF")
# what runs on CUDA and on CPU tensors, by op name; `testing.launch_on_cpu` puts the first in the
# place of the second
LAUNCHERS: dict[str, Callable[..., Any]] = {}
ON_CPU: dict[str, Callable[..., Any]] = {}


def launches(name: str, device: torch.device) -> bool:
    """True where the kernels of this op run, False where its CPU implementation does."""
    return device.type == "cuda" or (device.type == "cpu" and ON_CPU[name] is LAUNCHERS[name])


def define(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Defines the op ``ijepa_kernels::<name>``.

    Args:
        schema: as torch writes it, e.g. ``"gather(Tensor x, Tensor index) -> Tensor"``, without
            defaults; the first argument is a tensor or a list of tensors, on the device that
            decides.
        cuda: the launcher, on CUDA tensors; the current device is already theirs.
        cpu: the same with torch operations, on CPU tensors.
        fake: shapes and dtypes of the outputs only.
        setup_context, backward: as in `torch.library.register_autograd`. Without them an op
            that returns something has no derivative and says so.

    Returns:
        The op, to be called with positional arguments.
    """
    name = schema.partition("(")[0]
    returns_nothing = schema.endswith("-> ()")

    def on_its_device(first: Tensor | list[Tensor], *rest: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device
        if device.index == torch.cuda.current_device():
            return cuda(first, *rest)
        with torch.cuda.device(device):
            return cuda(first, *rest)

    def on_cpu(*args: Any) -> Any:
        return ON_CPU[name](*args)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, on_its_device, "CUDA")
    _LIBRARY.impl(name, on_cpu, "CPU")
    LAUNCHERS[name], ON_CPU[name] = cuda, cpu
    torch.library.register_fake(f"ijepa_kernels::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.ijepa_kernels, name).default
    if returns_nothing and backward is None:
        return op

    def no_derivative(*_: Any) -> None:
        raise RuntimeError(f"ijepa_kernels::{name} has no derivative")

    def forward(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = op(*args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    derivative: Any = type(
        f"{name}_backward",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward or no_derivative)},
    )

    def with_autograd(*args: Any) -> Any:
        if forward_level() >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None
            for arg in args
        ):
            raise RuntimeError(f"ijepa_kernels::{name} has no forward-mode derivative")
        if torch.is_grad_enabled() and any(
            isinstance(arg, Tensor) and arg.requires_grad for arg in args
        ):
            return derivative.apply(*args)
        with below_autograd():
            return op(*args)

    _LIBRARY.impl(name, with_autograd, "Autograd")
    return op


_traits = attrgetter("shape", "dtype", "device")
_MOST_CASES = 4096


def raw(
    name: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    check: Callable[..., None],
) -> Callable[..., Any]:
    """A function that no dispatcher and no autograd knows, for code that writes its own derivative.

    Args:
        name: in `LAUNCHERS` and `ON_CPU`.
        cuda: the launcher, if the first argument is a CUDA tensor; the current device must be its.
        cpu: the same with torch operations, else.
        check: raises ValueError for arguments that do not fit; called once for all arguments of the
            same shapes, dtypes, devices and options.

    Returns:
        It takes a tuple of tensors, of which all but the first may be None, and then options, which
        can be hashed. The others get them one after the other.
    """
    LAUNCHERS[name], ON_CPU[name] = cuda, cpu
    valid: set[tuple[Any, ...]] = set()

    def call(tensors: tuple[Any, ...], *options: Any) -> Any:
        try:
            case = (*map(_traits, tensors), *options)
        except AttributeError:
            case = (*[isinstance(t, Tensor) and _traits(t) for t in tensors], *options)
        if case not in valid:
            check(*tensors, *options)
            if len(valid) >= _MOST_CASES:
                valid.clear()
            valid.add(case)
        if tensors[0].is_cuda:
            return cuda(*tensors, *options)
        return ON_CPU[name](*tensors, *options)

    return call
