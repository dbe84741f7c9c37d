"""What compute-sanitizer does on a GPU, done in Triton's interpreter.

Within `checked_memory` every address that a kernel loads from or stores to must lie within a
tensor that was passed to the launch (directly, or as an address in a table), and no program may
touch what another program of the same launch stores: on a GPU they run in no order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

__all__ = ["BadAccess", "checked_memory"]

# smaller numbers in a table are sizes and places, larger ones are addresses
LOWEST_ADDRESS = 2**40
NOBODY, SEVERAL = -1, -2
# kernels whose programs may store to one place, since any of the values will do
ANY_WINS = {
    "_keys_kernel",  # which of the positions that name a row; asked is only whether there is one
}


class BadAccess(AssertionError):
    """An access outside of all tensors, or one that depends on the order of the programs."""


class _Launch:
    """Ranges of memory that one launch may touch, and which program touched what."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        ranges = {
            (t.data_ptr(), t.data_ptr() + _span(t))
            for t in arguments.values()
            if isinstance(t, torch.Tensor) and t.numel()
        }
        ranges |= set(_in_tables(arguments))
        merged: list[list[int]] = []
        for begin, end in sorted(ranges):
            if merged and begin < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self.begins = np.array([b for b, _ in merged], dtype=np.int64)
        self.ends = np.array([e for _, e in merged], dtype=np.int64)
        lengths = self.ends - self.begins
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.writer = np.full(self.offsets[-1], NOBODY, dtype=np.int32)
        self.reader = np.full(self.offsets[-1], NOBODY, dtype=np.int32)

    def access(self, addresses: Any, mask: Any, size: int, program: int, *, store: bool) -> None:
        """Notes the access of a program; raises BadAccess."""
        addresses, mask = np.broadcast_arrays(addresses, mask)
        touched = addresses[mask.astype(bool)].astype(np.int64)
        if not touched.size:
            return
        number = np.searchsorted(self.begins, touched, side="right") - 1
        inside = (number >= 0) & (touched + size <= self.ends[number])
        what = "stores to" if store else "loads from"
        if not inside.all():
            raise BadAccess(f"{self.name}, program {program}, {what} memory of no tensor")
        places = self.offsets[number] + touched - self.begins[number]
        writer = self.writer[places]
        by_another = (writer != NOBODY) & (writer != program)
        if by_another.any() and not (store and self.name in ANY_WINS):
            raise BadAccess(f"{self.name}, program {program}, {what} what another program stores")
        reader = self.reader[places]
        if store:
            if ((reader != NOBODY) & (reader != program)).any():
                raise BadAccess(f"{self.name}, program {program}, stores to what another loads")
            self.writer[places] = program
        else:
            alone = (reader == NOBODY) | (reader == program)
            self.reader[places] = np.where(alone, program, SEVERAL)


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((n - 1) * s for n, s in strides) + 1) * tensor.element_size()


def _in_tables(arguments: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Ranges that tables of addresses name: `sizes (L) | addresses (L) | ...`, and addresses of
    gradients from `grads_at` on. Dtypes are not known here, so the ranges are those of float32.
    """
    table, length = arguments.get("table_ptr"), arguments.get("L")
    if table is None or not length:
        return
    rows = table.flatten()[: table.numel() // length * length].view(-1, length)
    columns = list(rows[1:])
    if "grads_ptr" in arguments:
        at = arguments["grads_at"]
        columns.append(arguments["grads_ptr"].flatten()[at : at + length])
    for column in columns:
        for size, address in zip(rows[0].tolist(), column.tolist(), strict=True):
            if address >= LOWEST_ADDRESS:
                # the step count of an empty tensor is one element too
                yield address, address + 4 * max(size, 1)


@contextmanager
def checked_memory() -> Iterator[None]:
    """See above. Kernels raise BadAccess, within the interpreter's own error if it wraps it."""
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    shipped = executor.__call__, builder.create_masked_load, builder.create_masked_store
    launches: list[_Launch] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(_Launch(self.fn.__name__, arguments))
        try:
            shipped[0](self, *args, **kwargs)
        finally:
            launches.pop()

    def program(self: Any) -> int:
        (x, y, z), (_, height, depth) = self.grid_idx, self.grid_dim
        return (x * height + y) * depth + z

    def load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        size = np.dtype(interpreter._get_np_dtype(ptrs.get_element_ty())).itemsize
        launches[-1].access(ptrs.data, mask.data, size, program(self), store=False)
        return shipped[1](self, ptrs, mask, *rest)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = value.data.dtype.itemsize
        launches[-1].access(ptrs.data, mask.data, size, program(self), store=True)
        return shipped[2](self, ptrs, value, mask, *rest)

    executor.__call__, builder.create_masked_load, builder.create_masked_store = call, load, store
    try:
        yield
    finally:
        (
            executor.__call__,
            builder.create_masked_load,
            builder.create_masked_store,
        ) = shipped
