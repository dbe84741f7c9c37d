"""Casts to float8 in Triton's interpreter as GPUs do them: to the nearest, saturating.

The interpreter's own loses the carry into the exponent and most subnormal values (Triton 3.7.1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["interpreted_float8"]


@contextmanager
def interpreted_float8() -> Iterator[None]:
    """Within it casts to float8_e4m3fn are torch's."""
    builder: Any = interpreter.InterpreterBuilder
    original = builder.create_fp_to_fp

    def cast(self: Any, source: Any, dtype: Any, rounding: Any) -> Any:
        if dtype.scalar != tl.float8e4nv:
            return original(self, source, dtype, rounding)
        values = torch.as_tensor(source.data).clamp(-448, 448).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(values.view(torch.uint8).numpy(), dtype.scalar)

    with mock.patch.object(builder, "create_fp_to_fp", cast):
        yield
