"""Launches of Triton kernels that cost the host little.

Triton's own `kernel[grid](...)` binds arguments, specialises each of them and writes a key as text
at every launch. Here the compiled kernel of the first launch is held under a key of what Triton
specialises on, or finer: dtypes, which addresses are multiples of 16, kinds of scalars, constants,
warps, device. A later launch with the same key hands addresses straight to Triton's C launcher.
Whatever is not certain goes through Triton: other devices and the interpreter, hooks, arguments of
unusual kinds, the first launch of every key.

Kernels take addresses first (their names end in `_ptr`), then scalars, then constants.
"""

from collections.abc import Callable
from functools import reduce
from operator import attrgetter, or_
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["contiguous", "run"]

# devices on which kernels are held
HELD_ON = {"cuda"}

WIDE = 2**31  # integers from here on have another type

Held = Callable[[tuple[int, ...], tuple[Any, ...]], None]


class _Kernel:
    """What is known of a kernel, and its compiled forms by key."""

    def __init__(self, kernel: Any) -> None:
        parameters = kernel.params if isinstance(kernel, JITFunction) else []
        variables = [p for p in parameters if not p.is_constexpr]
        addresses = [p for p in variables if p.name.endswith("_ptr")]
        scalars = variables[len(addresses) :]
        constants = parameters[len(variables) :]
        self.pointers = len(addresses)
        self.constants = [p.name for p in constants]
        in_order = [*addresses, *scalars, *constants] == [*parameters]
        # others Triton may take for constants or for divisible by 16
        plain = in_order and all(p.do_not_specialize for p in scalars)
        watched = plain and (kernel.pre_run_hooks or kernel.debug or _RUNTIME.debug)
        self.holds = bool(parameters) and plain and not watched
        self.held: dict[tuple[Any, ...], Held] = {}


_SCALARS = {int, float, bool}
_RUNTIME = triton.knobs.runtime
_kernels: dict[Any, _Kernel] = {}


# functions of C, mapped: no call of Python's for an argument
_address, _dtype, _is_contiguous = Tensor.data_ptr, attrgetter("dtype"), Tensor.is_contiguous
_is_int = int.__instancecheck__


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors, each copied if it has to be."""
    if all(map(_is_contiguous, tensors)):
        return tensors
    return tuple([t.contiguous() for t in tensors])


def run(
    kernel: Any, grid: tuple[int, ...], /, *arguments: Any, num_warps: int, **constants: Any
) -> None:
    """Does what `kernel[grid](*arguments, num_warps=num_warps, **constants)` does.

    Args:
        kernel: a `triton.jit` function.
        grid: numbers of programs.
        arguments: tensors, all on the current device, then scalars.
        num_warps: of a program.
        constants: the kernel's `tl.constexpr` arguments.
    """
    device, known = arguments[0].device, None
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    try:
        # somebody wants to know of every launch; chains of hooks may be empty
        is_watched = enter.calls or leave.calls
    except AttributeError:
        is_watched = enter is not None or leave is not None
    if device.type in HELD_ON and not is_watched:
        try:
            known = _kernels[kernel.fn]
        except KeyError:
            known = _kernels[kernel.fn] = _Kernel(kernel)
    if known is None or not known.holds:
        kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    tensors, scalars = arguments[: known.pointers], arguments[known.pointers :]
    addresses = [*map(_address, tensors)]
    aligned = not reduce(or_, addresses) & 15 or tuple([a % 16 == 0 for a in addresses])
    narrow = max(map(abs, filter(_is_int, scalars)), default=0) < WIDE
    given = (*constants.values(),)
    key = (device.index, num_warps, aligned, narrow, *map(_dtype, tensors), *map(type, scalars))
    key += (*constants, *given)
    held: Held | None
    try:
        held = known.held[key]
    except KeyError:
        held = None
    if held is not None:
        held(grid, (*addresses, *scalars, *given))
        return
    compiled = kernel[grid](*arguments, num_warps=num_warps, **constants)
    usual = narrow and _SCALARS.issuperset(map(type, scalars))
    if usual and list(constants) == known.constants:
        held = _hold(compiled, device.index)
        if held is not None:
            known.held[key] = held


def _hold(compiled: Any, index: int | None) -> Held | None:
    """Starts this compiled kernel on the device's current stream; None if that is not known to
    work.
    """
    active = driver.active
    if compiled is None or active.get_current_device() != index:
        return None
    wrapper, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = active.get_current_stream
    version = ".".join(triton.__version__.split(".")[:2])
    bare = (
        type(wrapper).__name__ == "CudaLauncher"
        and not wrapper.global_scratch_size
        and not wrapper.profile_scratch_size
    )
    if bare and version in _BARE_LAUNCHERS:
        return _BARE_LAUNCHERS[version](wrapper, function, packed, stream_of, index)

    def through_wrapper(grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        wrapper(*(*grid, 1, 1)[:3], stream_of(index), function, packed, None, None, None, *values)

    return through_wrapper


# What Triton's `CudaLauncher` does for kernels without scratch memory and hooks.


def _as_in_3_6(wrapper: Any, function: int, packed: Any, stream_of: Any, index: Any) -> Held:
    start = wrapper.launch
    fixed = (function, wrapper.launch_cooperative_grid, wrapper.launch_pdl, None, None, packed)

    def held(grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        start(*(*grid, 1, 1)[:3], stream_of(index), *fixed, None, None, None, *values)

    return held


def _as_in_3_7(wrapper: Any, function: int, packed: Any, stream_of: Any, index: Any) -> Held:
    start = wrapper.launch
    fixed = (function, wrapper.launch_cooperative_grid, wrapper.launch_pdl, packed)
    kinds = (*[None] * 5, wrapper.arg_annotations, wrapper.kernel_signature)

    def held(grid: tuple[int, ...], values: tuple[Any, ...]) -> None:
        start(*(*grid, 1, 1)[:3], stream_of(index), *fixed, *kinds, values)

    return held


_BARE_LAUNCHERS = {"3.6": _as_in_3_6, "3.7": _as_in_3_7}
