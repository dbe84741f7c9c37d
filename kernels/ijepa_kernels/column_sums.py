"""Sums of columns: the gradient of a bias whose gradient rows nothing else passes over.

    s[f] = sum over r of d[r, f]

Programs add up rows in float32, a second pass adds up what they wrote: no atomics, the same bits
every time. Every element is read once.

Shape letters: R rows, F columns.
"""

import torch
from torch import Tensor

from ijepa_kernels._checks import check_dtype
from ijepa_kernels._op import raw
from ijepa_kernels._sums import add_up, partial_sums

__all__ = ["column_sums", "column_sums_bytes", "column_sums_ref"]


def column_sums_ref(d: Tensor) -> Tensor:
    """The specification, in plain torch."""
    return d.sum(0, dtype=torch.promote_types(d.dtype, torch.float32))


def column_sums_bytes(rows: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that have to move at least."""
    return rows * width * dtype.itemsize + width * 4


def _column_sums(d: Tensor) -> Tensor:
    return add_up(partial_sums(d.contiguous()))


def _check(d: Tensor) -> None:
    check_dtype("d", d)
    if d.ndim != 2 or d.shape[1] == 0:
        raise ValueError(f"d must have shape (R, F), got {tuple(d.shape)}")


_raw = raw("column_sums", cuda=_column_sums, cpu=column_sums_ref, check=_check)


def column_sums(d: Tensor) -> Tensor:
    """Sums of the columns, for code that writes its own derivative. It has none itself, and a CUDA
    tensor must be on the current device.

    Args:
        d: (R, F), float32, bfloat16 or float16 (float64 on the CPU).

    Returns:
        (F,), float32 (float64 for float64); zeros if R is 0.

    Raises:
        ValueError: shape or dtype does not fit.
    """
    return _raw((d,))
