"""gelu and its fused backward pass against float64, in every lane."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import gelu
from ijepa_kernels.gelu import gelu_backward, gelu_bytes, gelu_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
NAMES = ("dh", "bias_grad", "g")
# typed so because the last result may be None
fused: Any = gelu_backward


def _inputs(shape, dtype, device, seed=0, scale=2.0):
    """Gradient and rows before the GELU, which reach both of its tails."""
    generator = torch.Generator().manual_seed(seed)
    dg, h = torch.randn((2, *shape), generator=generator)
    return dg.to(device, dtype), (h * scale).to(device, dtype)


def _truth(dg, h):
    """By the formula, in float64; erfc, which does not cancel."""
    dg, h = dg.double(), h.double()
    cdf = torch.special.erfc(-h / math.sqrt(2)) / 2
    slope = cdf + h * torch.exp(-(h**2) / 2) / math.sqrt(2 * math.pi)
    dh = dg * slope
    return dh, dh.sum(0), h * cdf


def _same_dtype(dg, h):
    """What plain torch gives."""
    leaf = h.detach().clone().requires_grad_()
    g = gelu_ref(leaf)
    (dh,) = torch.autograd.grad(g, leaf, dg)
    return dh, dh.sum(0, dtype=F32), g.detach()


def _check(dg, h, slack=1.0):
    results = zip(fused(dg, h), _same_dtype(dg, h), _truth(dg, h), strict=True)
    for name, (ours, same_dtype, truth) in zip(NAMES, results, strict=True):
        assert_not_worse(name, ours, same_dtype, truth, slack=slack)


def _differentiated(dg, h):
    leaf = h.detach().requires_grad_()
    g = gelu(leaf)
    return torch.autograd.grad(g, leaf, dg)[0], g.detach()


@pytest.mark.parametrize("width", [768, 1536, 3072, 4096, 5120, 1, 7, 100, 1023])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_worse_than_torch(width, dtype, device):
    dg, h = _inputs((5, width), dtype, device)
    _check(dg, h)
    truth = _truth(dg, h)
    same_dtype = _same_dtype(dg, h)
    for n, ours in zip((0, 2), _differentiated(dg, h), strict=True):
        assert_not_worse(NAMES[n], ours, same_dtype[n], truth[n])


@given(
    rows=st.integers(1, 70),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.01, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, width, dtype, scale, seed, device):
    dg, h = _inputs((rows, width), dtype, device, seed, scale)
    results = list(zip(fused(dg, h), _same_dtype(dg, h), _truth(dg, h), strict=True))
    _, (ours, same_dtype, truth), _ = results
    for n in (0, 2):
        assert_not_worse(NAMES[n], *results[n], slack=4)
    # may be near zero by chance: relative to what was multiplied and added
    assert ours.dtype == same_dtype.dtype == F32
    limit = 2 * torch.finfo(dtype).eps * dg.double().abs().sum(0)
    assert ((ours - truth).abs() <= limit).all()


def test_tails(device):
    """Each piece of the curve alone: relative to itself, where 1 + erf has nothing left."""
    h = torch.linspace(-9, 9, 3601, device=device)[:, None]
    dg = torch.ones_like(h)
    ours, theirs, truth = fused(dg, h), _same_dtype(dg, h), _truth(dg, h)
    edges = [-9.0, -5.0, -2.0, -0.6, 0.0, 1.0, 4.0, 9.1]
    for low, high in pairwise(edges):
        piece = ((h >= low) & (h < high))[:, 0]
        for n in (0, 2):
            name = f"{NAMES[n]} in {low} .. {high}"
            assert_not_worse(name, ours[n][piece], theirs[n][piece], truth[n][piece])


def test_special_values(device):
    h = torch.tensor([[0.0, -0.0, math.nan, 1e15, -1e15, 1e-30, -1e-30]], device=device)
    torch.testing.assert_close(gelu(h), F.gelu(h), equal_nan=True)
    finite = h[:, [0, 1, 3, 4, 5, 6]].contiguous()
    dh, _, _ = fused(torch.ones_like(finite), finite)
    expected = torch.tensor([[0.5, 0.5, 1.0, 0.0, 0.5, 0.5]], device=device)
    torch.testing.assert_close(dh, expected)


def test_mixed_dtypes_and_strides(device):
    dg, h = _inputs((6, 40), F32, device)
    wide, tall = dg.repeat(1, 2)[:, ::2], h.bfloat16().t().contiguous().t()
    for ours, plain in zip(
        fused(wide, tall),
        fused(wide.contiguous(), tall.contiguous()),
        strict=True,
    ):
        assert torch.equal(ours, plain)
        assert ours.is_contiguous()
    dh, bias_grad, g = fused(wide, tall)
    assert (dh.dtype, bias_grad.dtype, g.dtype) == (BF16, F32, BF16)
    _check(*(t.bfloat16().contiguous() for t in (wide, tall)))


def test_without_activation(device):
    dg, h = _inputs((9, 33), BF16, device)
    full, some = fused(dg, h), gelu_backward(dg, h, with_activation=False)
    assert some[2] is None
    assert torch.equal(full[0], some[0])
    assert torch.equal(full[1], some[1])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty(shape, device):
    h = torch.zeros(shape, device=device).requires_grad_()
    g = gelu(h)
    assert g.shape == shape
    assert torch.autograd.grad(g.sum(), h)[0].shape == shape
    if h.ndim == 2:
        dh, bias_grad, again = fused(h.detach(), h.detach())
        assert dh.shape == again.shape == shape
        assert torch.equal(bias_grad, torch.zeros(16, device=device))


def test_twice_the_same_bits(device):
    dg, h = _inputs((300, 70), BF16, device)
    first, second = fused(dg, h), fused(dg, h)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiles_whole_and_passes_opcheck(device):
    dg, h = _inputs((2, 3, 20), F32, device)
    leaf = h.requires_grad_()
    torch.library.opcheck(torch.ops.ijepa_kernels.gelu.default, (leaf,))
    torch.library.opcheck(torch.ops.ijepa_kernels.gelu_bwd.default, (dg, h.detach()))
    compiled = torch.compile(gelu, fullgraph=True, backend="aot_eager")
    for eager, graph in zip(
        _differentiated(dg, h),
        (torch.autograd.grad(compiled(leaf), leaf, dg)[0], compiled(leaf).detach()),
        strict=True,
    ):
        assert torch.equal(eager, graph)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64():
    dg, h = (t.double() for t in _inputs((4, 10), F32, "cpu"))
    torch.autograd.gradcheck(gelu, (h.clone().requires_grad_(),))
    for ours, truth in zip(fused(dg, h), _truth(dg, h), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dg": torch.zeros(3, 5)}, r"dg must have shape \(3, 4\), got \(3, 5\)"),
        ({"dg": torch.zeros(3, 4).int()}, "dg must be float32.*got torch.int32"),
        ({"h": torch.zeros(3, 4).long()}, "h must be float32.*got torch.int64"),
        ({"h": torch.zeros(2, 3, 4)}, r"h must have shape \(R, F\), got \(2, 3, 4\)"),
        ({"h": torch.zeros(3, 0)}, r"h must have shape \(R, F\), got \(3, 0\)"),
        ({"dg": torch.zeros(3, 4, device="meta")}, "dg must be on cpu, got meta"),
        ({"h": [1.0]}, "h must be a tensor, got list"),
    ],
)
def test_bad_input(change, message):
    """Every time, also after good arguments."""
    good = {"dg": torch.zeros(3, 4), "h": torch.zeros(3, 4)}
    for _ in range(2):
        fused(**good)
        with pytest.raises(ValueError, match=message):
            fused(**(good | change))


def test_bad_input_of_the_forward_pass():
    with pytest.raises(ValueError, match=r"h must have shape \(\.\.\., F\), got \(\)"):
        gelu(torch.zeros(()))
    with pytest.raises(ValueError, match=r"h must be float32.*got torch\.int64"):
        gelu(torch.zeros(3).long())


def test_bytes():
    assert gelu_bytes(10, 100, BF16) == 4000
    assert gelu_bytes(10, 100, BF16, backward=True) == 6000
