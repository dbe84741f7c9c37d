"""add_layer_norm against float64, in every lane."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import add_layer_norm
from ijepa_kernels.add_layer_norm import add_layer_norm_bytes, add_layer_norm_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32, F32), (F32, BF16, BF16), (BF16, BF16, BF16), (F16, F16, F32), (BF16, F32, F32)]
NAMES = ("residual", "x", "weight", "bias")


def _inputs(shape, dtypes, device, seed=0, weight_dtype=F32):
    """Residual, x, weight, bias, and gradients of both outputs; values of a trained network's
    size, with a mean far from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_dtype, x_dtype, out_dtype = dtypes
    wide = torch.promote_types(x_dtype, F32)

    def draw(shape, dtype, scale=1.0, shift=0.0):
        values = torch.randn(shape, generator=generator, dtype=wide) * scale + shift
        return values.to(device, dtype)

    return (
        draw(shape, residual_dtype, 3.0, 1.5),
        draw(shape, x_dtype),
        draw(shape[-1:], weight_dtype, 0.3, 1.0),
        draw(shape[-1:], weight_dtype),
        draw(shape, residual_dtype),
        draw(shape, out_dtype),
    )


def _run(function, inputs, out_dtype, eps=1e-6):
    """Both outputs and all four gradients."""
    *tensors, grad_sum, grad_normed = inputs
    # not cloned: that would make every stride an ordinary one
    leaves = [t.detach().requires_grad_() for t in tensors]
    summed, normed = function(*leaves, eps, out_dtype=out_dtype)
    grads = torch.autograd.grad((summed, normed), leaves, (grad_sum, grad_normed))
    return {
        "sum": summed.detach(),
        "normed": normed.detach(),
        **dict(zip(NAMES, grads, strict=True)),
    }


def _truth(inputs, eps=1e-6):
    """The same in float64, from the rounded inputs, by torch's own LayerNorm."""

    def plain(residual, x, weight, bias, eps, *, out_dtype):
        summed = residual + x
        return summed, F.layer_norm(summed, summed.shape[-1:], weight, bias, eps)

    return _run(plain, [t.double() for t in inputs], None, eps)


def _input_gradient_terms(inputs, eps):
    """What the input's gradient adds up, without signs: that of the sum, and the norm's three terms
    (a row of width 1 has no gradient through the norm: the first two cancel, a thousandfold by
    1 / sqrt(eps)).
    """
    residual, x, weight, _, grad_sum, grad_normed = (t.double() for t in inputs)
    summed = residual + x
    rstd = (summed.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    unit = (summed - summed.mean(-1, keepdim=True)) * rstd
    inner = (grad_normed * weight).abs()
    means = inner.mean(-1, keepdim=True), (inner * unit.abs()).mean(-1, keepdim=True)
    return grad_sum.abs() + rstd * (inner + means[0] + unit.abs() * means[1])


def _check(inputs, out_dtype, eps=1e-6, slack=1.0):
    ours = _run(add_layer_norm, inputs, out_dtype, eps)
    same_dtype = _run(add_layer_norm_ref, inputs, out_dtype, eps)
    truth = _truth(inputs, eps)
    terms = dict.fromkeys(("residual", "x"), _input_gradient_terms(inputs, eps))
    for name, value in ours.items():
        assert_not_worse(
            name, value, same_dtype[name], truth[name], terms=terms.get(name), slack=slack
        )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_not_worse_than_torch(width, dtypes, device):
    _check(_inputs((5, width), dtypes, device), dtypes[2])


@pytest.mark.parametrize("shape", [(192,), (1, 192), (2, 192), (31, 192), (3, 5, 2, 192)])
def test_leading_shapes(shape, device):
    _check(_inputs(shape, (F32, BF16, BF16), device), BF16)


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    dtypes=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from([F32, BF16]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rows, width, dtypes, weight_dtype, eps, seed, device):
    _check(_inputs((rows, width), dtypes, device, seed, weight_dtype), dtypes[2], eps, slack=4)


def test_leading_dimensions_and_strides(device):
    residual, x, weight, bias, grad_sum, grad_normed = _inputs((4, 6, 64), (F32,) * 3, device)
    inputs = (
        residual.transpose(0, 1),
        x.repeat(1, 1, 2)[..., ::2].transpose(0, 1),
        weight.repeat(2)[::2],
        bias.expand(2, -1)[1],
        grad_sum[:1, :1].expand(6, 4, 64),
        grad_normed.transpose(0, 1),
    )
    assert not inputs[1].is_contiguous()
    _check(inputs, F32)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty(shape, device):
    result = _run(add_layer_norm, _inputs(shape, (F32, BF16, BF16), device), BF16)
    assert result["sum"].shape == result["normed"].shape == shape
    assert torch.equal(result["weight"], torch.zeros(16, device=device))
    assert torch.equal(result["bias"], torch.zeros(16, device=device))


def test_either_output_alone_may_be_used(device):
    inputs = _inputs((3, 20), (F32, BF16, BF16), device)
    leaves = [t.clone().requires_grad_() for t in inputs[:4]]
    summed, _ = add_layer_norm(*leaves)
    grads = torch.autograd.grad(summed, leaves, inputs[4], allow_unused=True)
    assert torch.equal(grads[0], inputs[4])
    assert torch.equal(grads[1], inputs[4].bfloat16())
    assert grads[2] is None
    assert grads[3] is None
    _, normed = add_layer_norm(*leaves)
    alone = torch.autograd.grad(normed, leaves, inputs[5])
    zeros = _run(add_layer_norm, (*inputs[:4], torch.zeros_like(inputs[4]), inputs[5]), BF16)
    for name, grad in zip(NAMES, alone, strict=True):
        assert torch.equal(grad, zeros[name]), name


def test_gradients_of_mixed_affine_dtypes(device):
    """Each in its own dtype, rounded once."""
    residual, x, weight, bias, _, grad_normed = _inputs((50, 16), (F32, F32, F32), device)
    bias.requires_grad_()
    exact, mixed = (
        torch.autograd.grad(add_layer_norm(residual, x, w, bias)[1], bias, grad_normed)[0]
        for w in (weight, weight.bfloat16())
    )
    assert torch.equal(exact, mixed)


def test_nan_stays_in_its_row(device):
    inputs = _inputs((5, 96), (F32,) * 3, device)
    clean = _run(add_layer_norm, inputs, F32)
    inputs[1][2, 7] = float("nan")
    dirty = _run(add_layer_norm, inputs, F32)
    others = [0, 1, 3, 4]
    for name in ("sum", "normed", "residual", "x"):
        assert torch.equal(dirty[name][others], clean[name][others]), name
    assert dirty["normed"][2].isnan().all()


def test_twice_the_same_bits(device):
    inputs = _inputs((33, 128), (F32, BF16, BF16), device)
    first, second = (_run(add_layer_norm, inputs, BF16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_are_float32(device):
    """Rows whose mean is 1000 times their deviation: statistics in half precision lose all."""
    inputs = list(_inputs((4, 256), (F32, F32, F32), device))
    inputs[0] += 3000
    _check(inputs, F32)


def test_compiles_whole_and_passes_opcheck(device):
    inputs = _inputs((6, 40), (F32, BF16, BF16), device)
    leaves = tuple(t.requires_grad_() for t in inputs[:4])
    torch.library.opcheck(torch.ops.ijepa_kernels.add_layer_norm.default, (*leaves, 1e-6, BF16))
    grad_normed, grad_sum = inputs[5], inputs[4]
    statistics = torch.rand(2, 6, device=device)
    args = (grad_normed, grad_sum, inputs[0].detach(), inputs[2].detach(), statistics, BF16)
    torch.library.opcheck(torch.ops.ijepa_kernels.add_layer_norm_bwd.default, args)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(f, inputs, BF16) for f in (add_layer_norm, compiled))
    assert all(torch.equal(eager[name], graph[name]) for name in eager)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_gradcheck():
    inputs = [
        t.requires_grad_() for t in _inputs((3, 10), (torch.float64,) * 3, "cpu", 0, torch.float64)
    ]
    torch.autograd.gradcheck(add_layer_norm, tuple(inputs[:4]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x must have shape \(3, 4\), got \(3, 5\)"),
        ({"weight": torch.zeros(5)}, r"weight must have shape \(4,\), got \(5,\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must have shape \(4,\), got \(1, 4\)"),
        ({"residual": torch.zeros(3, 4).long()}, "residual must be float32.*got torch.int64"),
        ({"residual": torch.zeros(3, 0)}, r"residual must have shape \(..., D\), got \(3, 0\)"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"eps": float("nan")}, "eps must not be negative, got nan"),
        ({"weight": torch.zeros(4).int()}, "weight must be float32.*got torch.int32"),
        ({"bias": torch.zeros(4).bool()}, "bias must be float32.*got torch.bool"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32.*got torch.int32"),
        ({"bias": torch.zeros(4, device="meta")}, "bias must be on cpu, got meta"),
    ],
)
def test_bad_input(change, message):
    good = {"residual": torch.zeros(3, 4), "x": torch.zeros(3, 4)}
    good |= {"weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**{**good, **change})


def test_bytes():
    # 12 bytes an element, two statistics a row, weight and bias
    assert add_layer_norm_bytes(10, 100, F32, BF16, BF16) == 12000 + 80 + 800
    assert add_layer_norm_bytes(10, 100, F32, BF16, BF16, backward=True) == 16000 + 80 + 1200
    assert add_layer_norm_bytes(10, 100, BF16, BF16, BF16, backward=True) == 8000 + 80 + 1200
