"""add_layer_norm against float64, in every lane."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import add_layer_norm
from ijepa_kernels.add_layer_norm import (
    add_layer_norm_backward,
    add_layer_norm_bytes,
    add_layer_norm_forward,
    add_layer_norm_ref,
)
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
    # of one column the norm's gradient is 0: a rounding error times 1 / sqrt(eps) = 1000
    _check(_inputs((5, width), dtypes, device), dtypes[2], slack=1000 if width == 1 else 1)


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
    mean, rstd = torch.rand(2, 6, device=device)
    args = (grad_normed, grad_sum, inputs[0].detach(), mean, rstd, inputs[2].detach(), BF16)
    torch.library.opcheck(torch.ops.ijepa_kernels.add_layer_norm_bwd.default, args)
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(f, inputs, BF16) for f in (add_layer_norm, compiled))
    assert all(torch.equal(eager[name], graph[name]) for name in eager)


# --- for code that writes its own derivative -----------------------------------------------------

ALL = {"with_low": True, "with_low_sums": True, "with_normed": True}


def _forward(inputs, out_dtype) -> Any:
    residual, x, weight, bias, *_ = inputs
    return add_layer_norm_forward(residual, x, weight, bias, 1e-6, out_dtype)


def _backward(inputs, low_dtype, **options) -> Any:
    """What the backward pass returns, behind the forward pass of the same inputs."""
    _, _, weight, bias, grad_sum, grad_normed = inputs
    summed, _, mean, rstd = _forward(inputs, low_dtype)
    return add_layer_norm_backward(
        *(grad_normed, grad_sum, summed, mean, rstd, weight, bias), low_dtype=low_dtype, **options
    )


@pytest.mark.parametrize(("rows", "width"), [(3, 1280), (9, 768), (1, 384), (40, 100), (5, 7)])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_passes_by_hand_are_those_of_the_op(rows, width, dtypes, device):
    inputs = _inputs((rows, width), dtypes, device)
    expected, truth = _run(add_layer_norm, inputs, dtypes[2]), _truth(inputs)
    same_dtype = _run(add_layer_norm_ref, inputs, dtypes[2])
    summed, normed, mean, rstd = _forward(inputs, dtypes[2])
    assert torch.equal(summed, expected["sum"])
    assert torch.equal(normed, expected["normed"])
    assert mean.shape == rstd.shape == (rows,)
    rows64 = summed.double()
    assert_not_worse("mean", mean, rows64.mean(1).float(), rows64.mean(1), slack=2)
    true_rstd = (rows64.var(1, correction=0) + 1e-6).rsqrt()
    assert_not_worse("rstd", rstd, true_rstd.float(), true_rstd, slack=2)
    dx, low, low_sums, again, grad_weight, grad_bias = _backward(inputs, dtypes[1])
    for name, value in (("residual", dx), ("x", low), ("weight", grad_weight), ("bias", grad_bias)):
        assert torch.equal(value, expected[name]), name
    assert_not_worse("normed", again, same_dtype["normed"], truth["normed"])
    true_sums = truth["x"].sum(0)
    assert_not_worse("sums", low_sums, same_dtype["x"].sum(0, dtype=F32), true_sums, slack=2)


def test_nothing_added_copies_nothing(device):
    inputs = list(_inputs((6, 40), (F32, BF16, BF16), device))
    zeros = torch.zeros_like(inputs[0])
    summed, *rest = _forward([inputs[0], None, *inputs[2:]], BF16)
    assert summed is inputs[0]
    _, *with_zeros = _forward([inputs[0], zeros, *inputs[2:]], BF16)
    assert all(torch.equal(a, b) for a, b in zip(rest, with_zeros, strict=True))


def test_no_gradient_of_the_sum(device):
    inputs = list(_inputs((6, 40), (F32, BF16, BF16), device))
    zeros = [*inputs[:4], torch.zeros_like(inputs[4]), inputs[5]]
    without = [*inputs[:4], None, inputs[5]]
    pairs = zip(_backward(without, BF16), _backward(zeros, BF16), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16)], ids=str)
def test_what_is_not_wanted_is_none(dtypes, device):
    inputs = _inputs((9, 72), dtypes, device)
    full = _backward(inputs, dtypes[1])
    # the same tensor serves as both gradients where the dtypes agree
    assert (full[0] is full[1]) == (dtypes[0] == dtypes[1])
    for number, name in enumerate(ALL, start=1):
        some = _backward(inputs, dtypes[1], **{name: False})
        assert some[number] is None
        for n, (a, b) in enumerate(zip(some, full, strict=True)):
            assert n == number or torch.equal(a, b), (name, n)
    none = _backward(inputs, dtypes[1], **dict.fromkeys(ALL, False))
    assert none[1:4] == (None, None, None)
    assert all(torch.equal(none[n], full[n]) for n in (0, 4, 5))


def test_strides_by_hand(device):
    plain = _inputs((6, 20), (F32, BF16, BF16), device)
    odd = [t.repeat_interleave(2, -1)[..., ::2] for t in plain]
    for a, b in zip(_backward(odd, BF16), _backward(plain, BF16), strict=True):
        assert torch.equal(a, b)
    summed, _, mean, rstd = _forward(plain, BF16)
    tall = summed.t().contiguous().t()
    gradients = (plain[5], plain[4])
    again = add_layer_norm_backward(*gradients, tall, mean, rstd, *plain[2:4], low_dtype=BF16)
    assert torch.equal(again[0], _backward(plain, BF16)[0])


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64_by_hand():
    inputs = _inputs((5, 12), (torch.float64,) * 3, "cpu", 0, torch.float64)
    truth = _run(add_layer_norm_ref, inputs, torch.float64)
    names = ("residual", "x", None, "normed", "weight", "bias")
    values = _backward(inputs, torch.float64)
    for name, value in zip(names, values, strict=True):
        expected = truth["x"].sum(0) if name is None else truth[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summed": torch.zeros(3, 4, 4)}, r"summed must have shape \(R, D\), got \(3, 4, 4\)"),
        ({"grad_normed": torch.zeros(3, 5)}, r"grad_normed must have shape \(3, 4\), got"),
        ({"grad_sum": torch.zeros(2, 4)}, r"grad_sum must have shape \(3, 4\), got"),
        ({"grad_sum": torch.zeros(3, 4).int()}, "grad_sum must be float32.*got torch.int32"),
        ({"mean": torch.zeros(4)}, r"mean must have shape \(3,\), got \(4,\)"),
        ({"weight": torch.zeros(3)}, r"weight must have shape \(4,\), got \(3,\)"),
        ({"low_dtype": torch.int8}, "out_dtype must be float32.*got torch.int8"),
    ],
)
def test_bad_input_by_hand(change, message):
    good = {name: torch.zeros(3, 4) for name in ("grad_normed", "grad_sum", "summed")}
    good |= {name: torch.zeros(3) for name in ("mean", "rstd")}
    good |= {name: torch.zeros(4) for name in ("weight", "bias")}
    add_layer_norm_backward(**good, low_dtype=F32)
    with pytest.raises(ValueError, match=message):
        add_layer_norm_backward(**{"low_dtype": F32, **good, **change})


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
