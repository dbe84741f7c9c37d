"""What the tests of the ops need, and what yours may: the Triton kernels on CPU tensors, NaN-filled
memory, and the rule for errors.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

import ijepa_kernels  # noqa: F401  # all ops are registered
from ijepa_kernels._op import LAUNCHERS, ON_CPU

__all__ = ["assert_not_worse", "launch_on_cpu", "nan_filled", "relative_error"]


@contextmanager
def launch_on_cpu() -> Iterator[None]:
    """Within it ops on CPU tensors run their Triton kernels in Triton's interpreter.

    Raises:
        RuntimeError: the process was not started with ``TRITON_INTERPRET=1``.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("start the process with TRITON_INTERPRET=1 to launch kernels on the CPU")
    before = dict(ON_CPU)
    ON_CPU.update(LAUNCHERS)
    try:
        yield
    finally:
        ON_CPU.update(before)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Within it `torch.empty` gives NaN (integers: the largest), so that what a kernel forgets to
    write shows; operations without a deterministic implementation warn.
    """
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference over the norm of the truth, in float64; absolute where the truth
    is zero, infinite where anything is not finite.
    """
    difference = torch.linalg.vector_norm(actual.double() - truth.double()).item()
    norm = torch.linalg.vector_norm(truth.double()).item()
    error = difference / norm if norm > 0 else difference
    return error if math.isfinite(error) else math.inf


def assert_not_worse(
    name: str,
    actual: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    terms: Tensor | None = None,
    slack: float = 1.0,
) -> None:
    """Asserts an error of at most max(2 x the error of the same-dtype torch code, 2 ulp).

    Where large terms cancel, the truth may be as small as zero, and the torch code right by chance.
    Each of the terms is rounded all the same, so that an error of one ulp of their sum is allowed.

    Args:
        name: for the message.
        actual: result under test.
        same_dtype: what plain torch code gives in the same dtypes.
        truth: computed in float64.
        terms: of each element, the sum of the magnitudes that are added up to it. The ulp is that
            of float32 in half precision, in which the result alone is rounded.
        slack: multiplies the limit; 1 is the rule, more is for single draws of a few elements,
            whose rounding errors differ by chance.
    """
    assert actual.dtype == same_dtype.dtype, (name, actual.dtype, same_dtype.dtype)
    assert actual.shape == same_dtype.shape == truth.shape, (name, actual.shape, truth.shape)
    error, reference = relative_error(actual, truth), relative_error(same_dtype, truth)
    limit = max(2 * reference, 2 * torch.finfo(actual.dtype).eps)
    if terms is not None:
        ulp = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
        norm = torch.linalg.vector_norm(truth.double()).item()
        limit = max(limit, ulp * torch.linalg.vector_norm(terms.double()).item() / (norm or 1.0))
    limit *= slack
    assert error <= limit, f"{name}: error {error:.2e}, torch {reference:.2e}, limit {limit:.2e}"
