"""Checks of arguments that several ops share, and the debug mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "check_dtype",
    "check_index",
    "check_range",
    "check_shape",
    "debug_checks",
    "debugging",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_depth = 0


@contextmanager
def debug_checks() -> Iterator[None]:
    """Within it every op checks the values of its indices before it launches, and raises
    ValueError naming the first one out of range.

    That makes the host wait for the device, so it is off by default. Without it an index out of
    range never leads to an access outside the tensors: its output rows are NaN and it contributes
    nothing to any gradient. On CPU tensors indices are always checked.
    """
    # not a ContextVar: CUDA backward passes run in a thread of their own
    global _depth  # noqa: PLW0603
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def debugging() -> bool:
    """True within `debug_checks`."""
    return _depth > 0


# --- checks --------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raises ValueError unless all values lie in 0 .. size - 1. Reads the values."""
    bad = (index < 0).flatten()
    if size <= torch.iinfo(index.dtype).max:  # otherwise the comparison would wrap
        bad |= (index >= size).flatten()
    if bad.any():
        position = int(bad.nonzero()[0])
        value = int(index.flatten()[position])
        raise ValueError(
            f"{name} must lie in 0 .. {size - 1}, got {value} at position {position} "
            f"of {index.numel()}"
        )


def check_dtype(
    name: str,
    tensor: Tensor,
    *,
    also: tuple[torch.dtype, ...] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Raises ValueError unless the dtype is a float the kernels know; float64 on the CPU only.

    Args:
        dtype: asked for, of an output beside the tensor; None for the tensor's own.
    """
    _check_tensor(name if dtype is None else "the input", tensor)
    allowed, dtype = (*FLOATS, *also), dtype or tensor.dtype
    if dtype in allowed or (dtype == torch.float64 and not tensor.is_cuda):
        return
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    raise ValueError(
        f"{name} must be {names} (or float64 on the CPU), got {dtype} on {tensor.device}"
    )


def check_index(name: str, index: Tensor, like: Tensor) -> None:
    """Raises ValueError unless it is an int32 or int64 tensor on the device of `like`."""
    _check_tensor(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {index.dtype}")
    if index.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {index.device}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless the tensor has this shape and the device of `like`."""
    _check_tensor(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
