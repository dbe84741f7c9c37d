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
from operator import or_
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["launch"]

# devices on which kernels are held
HELD_ON = {"cuda"}
# Triton's versions whose launcher is called without its Python wrapper
_KNOWN_LAUNCHERS = {"3.6", "3.7"}

Start = Callable[[tuple[int, ...], tuple[Any, ...]], None]


class _Kernel:
    """What is known of a kernel, and its compiled forms by key."""

    def __init__(self, kernel: Any) -> None:
        parameters = kernel.params if isinstance(kernel, JITFunction) else []
        scalars = [p for p in parameters if not p.is_constexpr]
        self.pointers = sum(p.name.endswith("_ptr") for p in scalars)
        # scalars that Triton makes constants of or asks for divisibility
        self.special = [not p.do_not_specialize for p in scalars[self.pointers :]]
        names = [p.name for p in parameters]
        self.constants = names[len(scalars) :]
        ordered = [p.name.endswith("_ptr") for p in scalars]
        self.holds = bool(parameters) and (
            ordered == sorted(ordered, reverse=True)
            and not any(p.is_constexpr for p in parameters[: len(scalars)])
            and not (kernel.pre_run_hooks or kernel.debug or triton.knobs.runtime.debug)
        )
        self.held: dict[tuple[Any, ...], Start] = {}


_kernels: dict[Any, _Kernel] = {}


def _hooked() -> bool:
    """True if somebody wants to know of every launch."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # a chain of hooks may be empty
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any
) -> None:
    """Does what `kernel[grid](*arguments, num_warps=num_warps, **constants)` does.

    Args:
        kernel: a `triton.jit` function.
        grid: numbers of programs.
        arguments: tensors, all on the current device, then scalars.
        num_warps: of a program.
        constants: the kernel's `tl.constexpr` arguments.
    """
    known = _kernels.get(kernel.fn)
    if known is None:
        known = _kernels[kernel.fn] = _Kernel(kernel)
    device = arguments[0].device
    if not known.holds or device.type not in HELD_ON or _hooked():
        kernel[grid](*arguments, num_warps=num_warps, **constants)
        return
    tensors, scalars = arguments[: known.pointers], arguments[known.pointers :]
    values = [tensor.data_ptr() for tensor in tensors]
    aligned = not reduce(or_, values) & 15 or tuple([value % 16 == 0 for value in values])
    kinds = [_kind(*pair) for pair in zip(scalars, known.special, strict=True)]
    dtypes = [tensor.dtype for tensor in tensors]
    given = constants.values()
    key = (device.index, num_warps, aligned, *dtypes, *kinds, *constants, *given)
    start = known.held.get(key)
    if start is not None:
        start(grid, (*values, *scalars, *given))
        return
    compiled = kernel[grid](*arguments, num_warps=num_warps, **constants)
    if None not in kinds and list(constants) == known.constants:
        start = _start(compiled, device.index)
        if start is not None:
            known.held[key] = start


def _kind(value: Any, special: bool) -> Any:
    """What Triton may see in a scalar; None for what is not held."""
    kind = value.__class__
    if kind is not int:
        return kind if kind is float or kind is bool else None
    if not -(2**31) <= value < 2**31:
        return None
    return (value == 1, value % 16 == 0) if special else kind


def _start(compiled: Any, index: int | None) -> Start | None:
    """Starts this compiled kernel on the device's current stream; None if that is not known to
    work.
    """
    active = driver.active
    if compiled is None or active.get_current_device() != index:
        return None
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = active.get_current_stream
    launcher = _launcher(run)
    if launcher is not None:
        return lambda grid, values: launcher(
            grid[0], grid[1] if len(grid) > 1 else 1, stream_of(index), function, metadata, values
        )
    return lambda grid, values: run(
        *(*grid, 1, 1)[:3], stream_of(index), function, metadata, None, None, None, *values
    )


def _launcher(run: Any) -> Callable[..., None] | None:
    """What Triton's `CudaLauncher` does for kernels without scratch memory, without its wrapper."""
    version = ".".join(triton.__version__.split(".")[:2])
    if (
        version not in _KNOWN_LAUNCHERS
        or type(run).__name__ != "CudaLauncher"
        or run.global_scratch_size
        or run.profile_scratch_size
    ):
        return None
    start, flags = run.launch, (run.launch_cooperative_grid, run.launch_pdl)
    if version == "3.6":
        return lambda x, y, stream, function, metadata, values: start(
            *(x, y, 1, stream, function, *flags, None, None, metadata, None, None, None), *values
        )
    tail = (None, None, None, None, None, run.arg_annotations, run.kernel_signature)
    return lambda x, y, stream, function, metadata, values: start(
        x, y, 1, stream, function, *flags, metadata, *tail, values
    )
