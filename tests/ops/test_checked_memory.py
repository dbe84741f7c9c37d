"""The interpreter's memory check finds what is planted, and lets correct kernels pass."""

import pytest
import torch
import triton
import triton.language as tl

from tests.ops.checked_memory import BadAccess, checked_memory
from tests.ops.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="checks the interpreter")


@triton.jit
def _shift_kernel(
    x_ptr, out_ptr, R, LOAD_END: tl.constexpr, STORE_END: tl.constexpr, B: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    x = tl.load(x_ptr + row, mask=row < R + LOAD_END, other=0.0)
    tl.store(out_ptr + row, x, mask=row < R + STORE_END)


@triton.jit
def _from_kernel(x_ptr, out_ptr, FROM: tl.constexpr, TO: tl.constexpr):
    """Each program loads one element and stores one."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + program * TO, tl.load(x_ptr + program * FROM))


@triton.jit
def _table_kernel(table_ptr, L, EXTRA: tl.constexpr):
    tensor = tl.program_id(0).to(tl.int64)
    size = tl.load(table_ptr + tensor) + EXTRA
    pointer = tl.load(table_ptr + L + tensor).to(tl.pointer_type(tl.float32))
    column = tl.arange(0, 16)
    tl.store(pointer + column, tl.full((16,), 1.0, tl.float32), mask=column < size)


def _fails(kernel, grid, message, *args, **constants):
    with (
        pytest.raises(Exception, match=r"memory of no|another") as error,
        checked_memory(),
    ):
        kernel[grid](*args, **constants)
    causes = [error.value, error.value.__cause__]
    assert any(isinstance(c, BadAccess) and message in str(c) for c in causes), causes


def test_loads_and_stores_outside_are_found():
    x, out = torch.randn(100), torch.empty(100)
    with checked_memory():
        _shift_kernel[(4,)](x, out, 100, LOAD_END=0, STORE_END=0, B=32)
    assert torch.equal(x, out)
    _fails(_shift_kernel, (4,), "loads from memory", x, out, 100, LOAD_END=1, STORE_END=0, B=32)
    _fails(_shift_kernel, (4,), "stores to memory", x, out, 100, LOAD_END=0, STORE_END=1, B=32)


def test_the_rest_of_the_storage_is_outside_too():
    whole = torch.randn(200)
    out = torch.empty(100)
    _fails(_shift_kernel, (4,), "loads", whole[:100], out, 100, LOAD_END=1, STORE_END=0, B=32)


def test_programs_must_not_meet():
    x, out = torch.randn(8), torch.empty(8)
    with checked_memory():
        _from_kernel[(8,)](x, out, FROM=1, TO=1)
        _from_kernel[(8,)](x, x, FROM=1, TO=1)  # each its own
        _from_kernel[(8,)](x, out, FROM=0, TO=1)  # all load the same
    _fails(_from_kernel, (8,), "stores to what another program stores", x, out, FROM=1, TO=0)
    _fails(_from_kernel, (8,), "loads from what another program stores", x, x, FROM=0, TO=1)
    both = torch.randn(16)
    _fails(_from_kernel, (8,), "stores to what another loads", both, both, FROM=2, TO=1)


@pytest.mark.any_order
def test_without_order_programs_may_meet():
    """The fixture of every test here is a checked_memory too, and follows the marker."""
    x, out = torch.randn(8), torch.empty(8)
    with checked_memory(order=False):
        _from_kernel[(8,)](x, out, FROM=1, TO=0)
        with pytest.raises(Exception, match="stores to memory of no tensor"):
            _from_kernel[(9,)](x, out, FROM=0, TO=1)


def test_addresses_in_tables_count():
    tensors = [torch.zeros(5), torch.zeros(9)]
    table = torch.tensor([5, 9, *(t.data_ptr() for t in tensors)])
    with checked_memory():
        _table_kernel[(2,)](table, 2, EXTRA=0)
    assert all(t.sum() == t.numel() for t in tensors)
    _fails(_table_kernel, (2,), "stores to memory of no tensor", table, 2, EXTRA=1)
