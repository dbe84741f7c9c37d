"""column_sums against float64, in every lane."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import column_sums
from ijepa_kernels.column_sums import column_sums_bytes, column_sums_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _rows(rows, width, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # a mean, so that no sum is near zero by chance
    return (torch.randn((rows, width), generator=generator) + 1.0).to(device, dtype)


def _check(d, slack=1.0):
    truth = d.double().sum(0)
    assert_not_worse("sums", column_sums(d), column_sums_ref(d), truth, slack=slack)


@pytest.mark.parametrize("width", [384, 1280, 1, 7, 100, 1023])
@pytest.mark.parametrize("rows", [1, 8, 63, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_worse_than_torch(rows, width, dtype, device):
    _check(_rows(rows, width, dtype, device))


def test_more_rows_than_programs_at_the_least_each(device):
    """Where programs get more rows than the least."""
    _check(_rows(64 * 512 + 3, 3, torch.float32, device))


@given(
    rows=st.integers(1, 200),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, width, dtype, seed, device):
    _check(_rows(rows, width, dtype, device, seed), slack=4)


def test_strides(device):
    d = _rows(40, 30, torch.bfloat16, device)
    assert torch.equal(column_sums(d.t().contiguous().t()), column_sums(d))


def test_no_rows(device):
    assert torch.equal(column_sums(torch.zeros((0, 16), device=device)).cpu(), torch.zeros(16))


def test_twice_the_same_bits(device):
    d = _rows(300, 70, torch.bfloat16, device)
    assert torch.equal(column_sums(d), column_sums(d))


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64():
    d = torch.randn(50, 8, dtype=torch.float64)
    assert torch.equal(column_sums(d), d.sum(0))


@pytest.mark.parametrize(
    ("d", "message"),
    [
        (torch.zeros(3), r"d must have shape \(R, F\), got \(3,\)"),
        (torch.zeros(3, 0), r"d must have shape \(R, F\), got \(3, 0\)"),
        (torch.zeros(3, 2).long(), "d must be float32.*got torch.int64"),
    ],
)
def test_bad_input(d, message):
    with pytest.raises(ValueError, match=message):
        column_sums(d)


def test_bytes():
    assert column_sums_bytes(10, 100, torch.bfloat16) == 2000 + 400
