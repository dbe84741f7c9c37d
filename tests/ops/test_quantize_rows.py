"""Rows in float8 from all ops that write them, against float64, in every lane."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import Float8Rows, quantize_rows
from ijepa_kernels.add_layer_norm import add_layer_norm_float8
from ijepa_kernels.gelu import gelu_float8
from ijepa_kernels.quantize_rows import quantize_rows_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _rows(rows, width, device, dtype=torch.float32, seed=0, scale=3.0):
    x = torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))
    return (x * scale).to(device, dtype)


def _assert_rounds(out, truth, slack=1e-5):
    """Every value is the nearest float8: half of 2^-3 of itself, or of the smallest step."""
    rows, scale = out
    assert rows.dtype == torch.float8_e4m3fn
    assert rows.is_contiguous()
    assert rows.shape == truth.shape
    assert scale.dtype == torch.float32
    assert scale.shape == (len(truth), 1)
    truth, scale = truth.double(), scale.double()
    torch.testing.assert_close(scale, truth.abs().amax(1, keepdim=True) / 448, rtol=1e-4, atol=1e-6)
    limit = (truth.abs() * (2**-4 + slack)).maximum(scale * (2**-10 + slack))
    assert ((rows.double() * scale - truth).abs() <= limit).all()
    largest = rows.float().abs().amax(1)
    assert (largest[truth.abs().amax(1) > 1e-6] == 448).all()


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, width, dtype, scale, seed, device):
    x = _rows(rows, width, device, dtype, seed, scale)
    out = quantize_rows(x)
    _assert_rounds(out, x)
    # a power of two changes the scale and nothing else
    halved = quantize_rows(x.float() / 2)
    assert torch.equal(halved.rows.view(torch.uint8), out.rows.view(torch.uint8))
    assert torch.equal(halved.scale, out.scale / 2)


@pytest.mark.parametrize("width", [768, 1280, 5120, 6144])
@pytest.mark.parametrize("added", [True, False])
def test_widths(width, added, device):
    x, residual = _rows(3, width, device, torch.bfloat16), _rows(3, width, device, seed=1)
    _assert_rounds(quantize_rows(x), x)
    wide = x.double()
    truth = wide * torch.special.erfc(-wide / math.sqrt(2)) / 2
    _assert_rounds(gelu_float8(x), truth)
    weight, bias = _rows(2, width, device, seed=2)
    branch = x if added else None
    summed, normed = add_layer_norm_float8(residual, branch, weight, bias, 1e-6)
    expected = residual + x.float() if added else residual
    assert torch.equal(summed, expected)
    truth = F.layer_norm(expected.double(), (width,), weight.double(), bias.double(), 1e-6)
    _assert_rounds(normed, truth)


def test_bfloat16_residual(device):
    residual, x = _rows(9, 96, device, torch.bfloat16), _rows(9, 96, device, seed=1)
    weight, bias = torch.ones(96, device=device), torch.zeros(96, device=device)
    summed, normed = add_layer_norm_float8(residual, x, weight, bias, 1e-6)
    assert summed.dtype == torch.bfloat16
    _assert_rounds(normed, F.layer_norm(summed.double(), (96,)))


def test_into_given_memory(device):
    x = _rows(5, 33, device)
    out = Float8Rows(
        torch.zeros((5, 33), dtype=torch.float8_e4m3fn, device=device),
        torch.zeros((5, 1), device=device),
    )
    quantize_rows(x, out)
    fresh = quantize_rows_ref(x)
    assert torch.equal(out.rows.view(torch.uint8), fresh.rows.view(torch.uint8))
    torch.testing.assert_close(out.scale, fresh.scale)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_special_values(device):
    x = torch.zeros((5, 16), device=device)
    x[1, 3], x[2, 3], x[3, 3], x[4] = math.nan, math.inf, 1.0, -0.0
    rows, scale = quantize_rows(x)
    value = rows.float() * scale
    assert (value[[0, 4]] == 0).all()
    assert value[1:3].isnan().any(1).all()
    assert value[3, 3] == pytest.approx(1.0)
    assert quantize_rows(x[:0]).rows.shape == (0, 16)


def test_bad_arguments(device):
    x = torch.zeros((4, 16), device=device)
    with pytest.raises(ValueError, match=r"x must have shape \(R, D\)"):
        quantize_rows(x[0])
    with pytest.raises(ValueError, match="x must be float32"):
        quantize_rows(x.int())
    with pytest.raises(ValueError, match=r"out\.rows must have shape \(4, 16\)"):
        quantize_rows(x, quantize_rows(x[:3]))
    with pytest.raises(ValueError, match="out must be float8_e4m3fn and float32"):
        quantize_rows(x, Float8Rows(x.clone(), x[:, :1].clone()))
    with pytest.raises(ValueError, match=r"h must have shape \(R, F\)"):
        gelu_float8(x[0])
    with pytest.raises(ValueError, match=r"residual must have shape \(R, D\)"):
        add_layer_norm_float8(x[None], None, x[0], x[0], 1e-6)
