"""latent_loss against float64, in every lane."""

import gc
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from ijepa_kernels import debug_checks
from ijepa_kernels.latent_loss import latent_loss, latent_loss_bytes, latent_loss_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]
KINDS = ["smooth_l1", "l2", "l1"]
# the package has a function of the same name
MODULE = sys.modules["ijepa_kernels.latent_loss"]
OP, BWD, BWD_ = (
    getattr(torch.ops.ijepa_kernels, name).default
    for name in ("latent_loss", "latent_loss_bwd", "latent_loss_bwd_")
)


def _inputs(rows, width, dtypes, device, seed=0, sources=11, index_dtype=torch.int32):
    """Prediction, target, index; the target's rows with a mean far from zero, the prediction at a
    distance of its normalised rows on both sides of beta 1.
    """
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn((rows, width), generator=generator) * 1.5
    target = torch.randn((sources, width), generator=generator) * 3 + 2
    index = torch.randint(sources, (rows,), generator=generator, dtype=index_dtype)
    return prediction.to(device, dtypes[0]), target.to(device, dtypes[1]), index.to(device)


def _run(function, inputs, grad_loss=1.0, **options):
    """Loss and gradient of the prediction."""
    prediction, target, index = inputs
    leaf = prediction.detach().clone().requires_grad_()
    loss = function(leaf, target, index, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, grad_loss))
    return loss.detach(), gradient


def _truth(
    inputs,
    grad_loss=1.0,
    *,
    kind="smooth_l1",
    beta=1.0,
    normalize=True,
    eps=1e-5,
    weight=None,
    count=None,
):
    """Both in float64, each distance and slope written out."""
    p, t, index = inputs
    p, t = p.double(), t.double().reshape(-1, p.shape[-1])[index.long()].reshape(p.shape)
    if normalize:
        centred = t - t.mean(-1, keepdim=True)
        t = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    d = p - t
    if kind == "l2":
        distance, slope = d**2, 2 * d
    elif kind == "l1" or beta == 0:
        distance, slope = d.abs(), d.sign()
    else:
        near = d.abs() < beta
        distance = torch.where(near, d**2 / (2 * beta), d.abs() - beta / 2)
        slope = torch.where(near, d / beta, d.sign())
    w = 1 if weight is None else weight.double().reshape(*p.shape[:-1], 1)
    count = p.numel() if count is None else count
    return (distance * w).sum() / count, slope * w * (grad_loss / count)


def _check(inputs, grad_loss=1.0, slack=1.0, **options):
    ours = _run(latent_loss, inputs, grad_loss, **options)
    same_dtype = _run(latent_loss_ref, inputs, grad_loss, **options)
    truth = _truth(inputs, grad_loss, **options)
    assert_not_worse("gradient", ours[1], same_dtype[1], truth[1], slack=slack)
    # the error of a single scalar may be 0 by chance: the rule is kept over many seeds below
    assert_not_worse("loss", ours[0], same_dtype[0], truth[0], slack=max(slack, 2))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_not_worse_than_torch(width, dtypes, device):
    _check(_inputs(5, width, dtypes, device))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_kinds(kind, dtypes, normalize, device):
    _check(_inputs(6, 48, dtypes, device), kind=kind, normalize=normalize)


@pytest.mark.parametrize("beta", [0.0, 1e-30, 0.1, 2.0, 50.0])
def test_beta(beta, device):
    _check(_inputs(6, 48, (F32, F32), device), beta=beta)


@pytest.mark.parametrize("kind", KINDS)
def test_no_distance_has_no_gradient(kind, device):
    """And exactly beta has the gradient 1."""
    target = torch.tensor([[2.0, -1.0, 0.0]], device=device)
    inputs = (target.clone(), target, torch.zeros(1, dtype=torch.int32, device=device))
    loss, gradient = _run(latent_loss, inputs, kind=kind, normalize=False)
    assert loss == 0
    assert not gradient.any()
    inputs[0].add_(torch.tensor([0.5, -0.5, 0.5], device=device))
    _, gradient = _run(latent_loss, inputs, beta=0.5, normalize=False, count=1)
    assert gradient.tolist() == [[1.0, -1.0, 1.0]]


@pytest.mark.parametrize("width", [1, 192])
def test_more_rows_than_programs(width, device, monkeypatch):
    """Every program has several tiles, the last of them fewer rows."""
    monkeypatch.setattr(MODULE, "MAX_PROGRAMS", 3)
    for rows in (29, 30, 2053 if width == 1 else 31):
        _check(_inputs(rows, width, (F32, F32), device))


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 300),
    dtypes=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    normalize=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    weighted=st.booleans(),
    count=st.sampled_from([None, 7, 1000.5]),
    grad_loss=st.sampled_from([1.0, -0.3, 1024.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    rows, width, dtypes, kind, beta, normalize, eps, weighted, count, grad_loss, seed, device
):
    inputs = _inputs(rows, width, dtypes, device, seed)
    weight = torch.rand(rows, device=device) if weighted else None
    options = {"kind": kind, "beta": beta, "normalize": normalize, "eps": eps}
    _check(inputs, grad_loss, slack=4, weight=weight, count=count, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_over_seeds(kind, device):
    """The rule for scalars: RMS of the relative error, 24 seeds."""
    errors = []
    for seed in range(24):
        inputs = _inputs(5, 200, (F32, BF16), device, seed)
        truth = _truth(inputs, kind=kind)[0]
        both = [f(*inputs, kind=kind).double() for f in (latent_loss, latent_loss_ref)]
        errors.append(torch.stack(both) / truth - 1)
    ours, theirs = torch.stack(errors).square().mean(0).sqrt().tolist()
    assert ours <= max(2 * theirs, 2 * torch.finfo(F32).eps)


@pytest.mark.parametrize("count", [3, 12345.5, 2.7e7])
def test_count(count, device):
    inputs = _inputs(5, 64, (F32, F32), device)
    _check(inputs, count=count)
    number = _run(latent_loss, inputs, count=count)
    for dtype in (F32, F64, torch.int64):
        tensor = torch.tensor(count, device=device).to(dtype)
        given = _run(latent_loss, inputs, count=tensor)
        expected = number if tensor == count else _run(latent_loss, inputs, count=tensor.item())
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)


def test_weight(device):
    inputs = _inputs(6, 64, (BF16, BF16), device)
    weight = torch.tensor([1.0, 0.0, 2.5, -1.0, 0.3, 4.0], device=device)
    for dtype in (F32, BF16):
        _check(inputs, weight=weight.to(dtype))
        _check(inputs, 3.0, weight=weight.to(dtype), kind="l2", count=10)


def test_float16_gradients_survive_a_loss_scale(device):
    """Divided by the elements of a large batch a float16 gradient is 0; a GradScaler's factor has
    to come before the rounding.
    """
    inputs = _inputs(7, 200, (F16, F16), device)
    assert _run(latent_loss, inputs, count=2.7e8)[1].count_nonzero() == 0
    for count in (2.7e7, torch.tensor(2.7e7, device=device)):
        ours = _run(latent_loss, inputs, 2.0**16, count=count)[1]
        same_dtype = _run(latent_loss_ref, inputs, 2.0**16, count=count)[1]
        truth = _truth(inputs, 2.0**16, count=2.7e7)[1]
        assert_not_worse("gradient", ours, same_dtype, truth)


# --- the gradient that the forward pass wrote ----------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_graph_may_be_retained(dtype, device):
    """Each pass gives a tensor of its own, right whatever came before and was done to it."""
    prediction, target, index = _inputs(5, 96, (dtype, dtype), device)
    expected = {g: _run(latent_loss, (prediction, target, index), g)[1] for g in (1.0, 4.0, 0.0)}
    if dtype != F16:  # it has underflowed
        assert torch.equal(expected[1.0] * 4, expected[4.0])
    for order in [(1.0, 1.0, 4.0, 1.0), (4.0, 1.0, 4.0), (0.0, 1.0), (1.0, 0.0, 1.0)]:
        leaf = prediction.clone().requires_grad_()
        loss = latent_loss(leaf, target, index)
        seen = []
        for grad in order:
            grad_loss = torch.full_like(loss, grad)
            (gradient,) = torch.autograd.grad(loss, leaf, grad_loss, retain_graph=True)
            assert torch.equal(gradient, expected[grad]), order
            seen.append((gradient, grad))
            assert len({g.data_ptr() for g, _ in seen}) == len(seen)
            if len(seen) == 2:
                seen[0][0].fill_(float("nan"))
        assert torch.equal(seen[-1][0], expected[seen[-1][1]])


def test_leaf_accumulates(device):
    prediction, target, index = _inputs(5, 96, (F32, F32), device)
    leaf = prediction.clone().requires_grad_()
    loss = latent_loss(leaf, target, index)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(leaf.grad, 5 * first, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_writes_a_gradient_only_if_wanted(device, monkeypatch):
    asked = []

    def record(*args):
        asked.append(args[-1])
        return OP(*args)

    monkeypatch.setattr(MODULE, "_fwd_op", record)
    prediction, target, index = _inputs(3, 16, (BF16, BF16), device)
    latent_loss(prediction, target, index)
    leaf = prediction.requires_grad_()
    latent_loss(leaf, target, index)
    latent_loss(leaf.half(), target, index)
    with torch.no_grad():
        latent_loss(leaf, target, index)
    assert asked == [False, True, False, False]


def test_the_handed_over_gradient_is_not_computed_again(device, monkeypatch):
    """With an upstream gradient of 1 the backward kernel leaves the stored tensor as it is."""
    prediction, target, index = _inputs(3, 16, (BF16, BF16), device)
    numbers = (0.01, False, 1.0, True, 1e-5)
    for grad_loss, untouched in ((1.0, True), (2.0, False), (float("nan"), False)):
        stored = torch.full_like(prediction, 7)
        grad = torch.tensor(grad_loss, device=device)
        BWD_(grad, stored, prediction, target, index, None, None, *numbers)
        assert bool((stored == 7).all()) == untouched
        expected = BWD(grad, prediction, target, index, None, None, *numbers)
        if not untouched:
            torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_kept_alive(device):
    prediction, target, index = _inputs(3, 16, (F32, F32), device)
    leaf = prediction.requires_grad_()
    loss, stored = OP(leaf, target, index, None, None, 1.0, False, 1.0, True, 1e-5, True)
    watch = weakref.ref(stored)
    del stored
    gc.disable()
    try:
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient is not None
        del gradient
        assert watch() is None
        loss, stored = OP(leaf, target, index, None, None, 1.0, False, 1.0, True, 1e-5, True)
        watch = weakref.ref(stored)
        del loss, stored
        assert watch() is None
    finally:
        gc.enable()


def test_no_second_derivative(device):
    prediction, target, index = _inputs(3, 16, (F32, F32), device)
    leaf = prediction.requires_grad_()
    loss = latent_loss(leaf, target, index)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


# --- shapes, values that are not numbers ---------------------------------------------------------


def test_leading_dimensions_and_strides(device):
    prediction, target, index = _inputs(12, 64, (F32, F32), device, sources=10)
    expected = _run(latent_loss, (prediction, target, index))
    weight = torch.rand(12, device=device)
    strided = (
        prediction.view(3, 4, 64).transpose(0, 1).contiguous().transpose(0, 1),
        target.repeat(1, 2)[:, ::2].repeat_interleave(2, 1)[:, ::2].view(2, 5, 64),
        index.repeat_interleave(2)[::2],
    )
    strided = (strided[0], target.t().contiguous().t(), strided[2])
    assert not any(t.is_contiguous() for t in strided)
    loss, gradient = _run(latent_loss, strided)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1].view(3, 4, 64))
    loss, gradient = _run(latent_loss, (prediction, target.view(2, 5, 64), index))
    assert torch.equal(loss, expected[0])
    _check((prediction, target, index), weight=weight.repeat_interleave(3)[::3])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_empty(shape, device):
    inputs = (
        torch.zeros(shape, device=device),
        torch.zeros(4, 16, device=device),
        torch.zeros(0, dtype=torch.int32, device=device),
    )
    loss, gradient = _run(latent_loss, inputs)
    assert loss.isnan()
    assert gradient.shape == shape
    assert _run(latent_loss, inputs, count=5)[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind, device):
    inputs = _inputs(5, 96, (F32, F32), device)
    inputs[2].copy_(torch.tensor([3, 4, 5, 4, 0]))
    clean = _run(latent_loss, inputs, kind=kind)
    others = [0, 1, 3, 4]
    inputs[0][2, 7] = float("nan")
    loss, gradient = _run(latent_loss, inputs, kind=kind)
    assert loss.isnan()
    assert torch.equal(gradient[others], clean[1][others])
    assert gradient[2].isnan().nonzero().tolist() == [[7]]
    inputs[0][2, 7] = 0
    inputs[1][5, 3] = float("nan")
    loss, gradient = _run(latent_loss, inputs, kind=kind)
    assert loss.isnan()
    assert torch.equal(gradient[others], clean[1][others])
    assert gradient[2].isnan().all()


@pytest.mark.parametrize("bad", [-1, 11, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_index_out_of_range(bad, index_dtype, device, kernels):
    inputs = _inputs(5, 96, (F32, F32), device, index_dtype=index_dtype)
    clean = _run(latent_loss, inputs)
    inputs[2][3] = bad
    message = rf"index must lie in 0 .. 10, got {bad} at position 3 of 5"
    with debug_checks(), pytest.raises(ValueError, match=message):
        latent_loss(*inputs)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            latent_loss(*inputs)
        return
    loss, gradient = _run(latent_loss, inputs)
    assert loss.isnan()
    assert not gradient[3].any()
    others = [0, 1, 2, 4]
    assert torch.equal(gradient[others], clean[1][others])
    assert torch.equal(_run(latent_loss, inputs, 2.0)[1][others], 2 * clean[1][others])


def test_twice_the_same_bits(device):
    inputs = _inputs(67, 128, (BF16, BF16), device, sources=3)
    first, second = (_run(latent_loss, inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_statistics_are_float32(device):
    """Target rows whose mean is 1000 times their deviation, and long sums."""
    inputs = _inputs(4, 256, (F32, F32), device)
    inputs[1].add_(3000)
    _check(inputs, kind="l2")
    _check(_inputs(16, 1024, (F16, F16), device))


# --- compilers, checks, helpers ------------------------------------------------------------------


@pytest.mark.parametrize(("with_gradient", "weighted"), [(True, True), (False, False)])
def test_opcheck(with_gradient, weighted, device):
    prediction, target, index = _inputs(6, 40, (F32, BF16), device)
    weight = torch.rand(6, device=device) if weighted else None
    count = torch.tensor(50.0, device=device) if weighted else None
    inputs = (target, index, weight, count, 0.01, weighted, 1.0, True, 1e-5)
    leaf = prediction.clone().requires_grad_()
    torch.library.opcheck(OP, (leaf, *inputs, with_gradient))
    grad_loss = torch.tensor(2.0, device=device)
    torch.library.opcheck(BWD, (grad_loss, prediction, *inputs))
    torch.library.opcheck(BWD_, (grad_loss, torch.ones_like(prediction), prediction, *inputs))


def test_compiles_whole(device):
    compiled = torch.compile(latent_loss, fullgraph=True, backend="aot_eager")
    inputs = _inputs(6, 40, (F32, BF16), device)
    weight = torch.rand(6, device=device)
    count = torch.tensor(50.0, device=device)
    for options in ({}, {"kind": "l2", "weight": weight, "count": 99}, {"count": count}):
        eager, graph = (_run(f, inputs, 2.0, **options) for f in (latent_loss, compiled))
        # a compiled graph divides by a number on the device, which may round otherwise
        torch.testing.assert_close(graph, eager, rtol=1e-6 if "kind" in options else 0.0, atol=0.0)
    # other sizes, and all of a step in one graph
    whole = torch.compile(
        lambda p, t, i: latent_loss(p * 2, t, i.flatten()),
        fullgraph=True,
        backend="aot_eager",
    )
    for rows in (2, 3):
        prediction, target, _ = _inputs(2 * rows * 4, 40, (F32, BF16), device, sources=10)
        index = torch.arange(2 * rows * 4, device=device).view(2, -1) % 10
        eager = latent_loss(prediction * 2, target, index.flatten())
        assert torch.equal(whole(prediction, target, index), eager)


@pytest.mark.parametrize("count", [None, 7.0, 7, "rows"], ids=str)
def test_numbers_of_rows_share_a_graph(count, device):
    """A loss whose R differs at every step, as masks make it, is compiled once."""

    def loss(prediction, target, index, per_row):
        divisor = prediction.shape[0] if count == "rows" else per_row
        return latent_loss(prediction, target, index, count=divisor)

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=graphs)
    for rows in range(5, 10):
        per_row = None if count is None or count == "rows" else count * rows
        inputs = (*_inputs(rows, 40, (F32, F32), device), per_row)
        torch.testing.assert_close(compiled(*inputs), loss(*inputs), rtol=1e-6, atol=0.0)
        if rows == 6:
            before = graphs.frame_count
    assert graphs.frame_count == before


def test_gradients_are_contiguous(device):
    """As compilers are told, whatever the strides of the prediction."""
    prediction, target, index = _inputs(6, 40, (F32, F32), device)
    transposed = prediction.t().contiguous().t()
    options = (transposed, target, index, None, None, None, False, 1.0, True, 1e-5)
    assert OP(*options, True)[1].is_contiguous()
    assert BWD(torch.tensor(2.0, device=device), *options).is_contiguous()


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    prediction, target, index = _inputs(3, 10, (F64, F64), "cpu")
    weight = torch.rand(3, dtype=F64)

    def function(p):
        return latent_loss(p, target, index, kind=kind, beta=0.7, weight=weight, count=13)

    torch.autograd.gradcheck(function, prediction.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "huber"}, "kind must be smooth_l1, l2 or l1, got 'huber'"),
        ({"beta": -0.5}, "beta must be finite and not negative, got -0.5"),
        ({"beta": float("nan")}, "beta must be finite and not negative, got nan"),
        ({"eps": -1.0}, "eps must not be negative, got -1.0"),
        ({"prediction": torch.zeros(3, 4).long()}, "prediction must be float32.*got torch.int64"),
        ({"prediction": torch.zeros(3, 0)}, r"prediction must have shape \(..., D\), got \(3, 0\)"),
        ({"target": torch.zeros(3, 4).int()}, "target must be float32.*got torch.int32"),
        ({"target": torch.zeros(5, 3)}, r"target must be \(S, 4\) or \(B, N, 4\), got \(5, 3\)"),
        ({"target": torch.zeros(4)}, r"target must be \(S, 4\) or \(B, N, 4\), got \(4,\)"),
        ({"target": torch.zeros(5, 4, device="meta")}, "target must be on cpu, got meta"),
        ({"target": torch.zeros(5, 4).requires_grad_()}, "target must not require a gradient"),
        ({"index": torch.zeros(3)}, "index must be int32 or int64, got torch.float32"),
        ({"index": torch.zeros(2, dtype=torch.int32)}, r"index must have shape \(3,\), got \(2,\)"),
        ({"weight": torch.ones(3, 1)}, r"weight must have shape \(3,\), got \(3, 1\)"),
        ({"weight": torch.ones(3).int()}, "weight must be float32.*got torch.int32"),
        ({"weight": torch.ones(3).requires_grad_()}, "weight must not require a gradient"),
        ({"count": 0}, "count must be positive, got 0"),
        ({"count": float("nan")}, "count must be positive, got nan"),
        ({"count": torch.ones(1)}, r"count must have shape \(\), got \(1,\)"),
        ({"count": torch.tensor(1.0).requires_grad_()}, "count must not require a gradient"),
    ],
)
def test_bad_input(change, message):
    good = {"prediction": torch.zeros(3, 4), "target": torch.zeros(5, 4)}
    good |= {"index": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        latent_loss(**{**good, **change})


def test_target_of_a_trained_encoder_is_welcome_without_grad_mode(device):
    prediction, target, index = _inputs(3, 16, (F32, F32), device)
    expected = latent_loss(prediction, target, index)
    with torch.no_grad():
        loss = latent_loss(prediction, target.requires_grad_(), index)
    assert torch.equal(loss, expected)
    assert not loss.requires_grad


def test_bytes():
    # 6 bytes an element and an index a row; without the gradient 4
    assert latent_loss_bytes(10, 100, BF16, BF16, torch.int32) == 6000 + 40
    assert latent_loss_bytes(10, 100, BF16, BF16, torch.int64, gradient=False) == 4000 + 80
    assert latent_loss_bytes(10, 100, F32, BF16, torch.int32) == 10000 + 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_past_2_to_the_31_elements():
    """Target (6 GB) and prediction (5 GB) both beyond int32 offsets; rows are constant before and
    at the boundary, so that losses are plain."""
    width, sources = 1024, 2**21 + 2**20
    target = torch.zeros((sources, width), dtype=BF16, device="cuda")
    rows = 2**21 + 5
    prediction = torch.zeros((rows, width), dtype=BF16, device="cuda")
    index = torch.arange(rows, device="cuda", dtype=torch.int32)
    index[-1] = sources - 1
    target[sources - 1] = 3
    prediction[-1] = 5
    leaf = prediction.requires_grad_()
    loss = latent_loss(leaf, target, index, kind="l2", normalize=False, count=width)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss == 4
    assert (gradient[-1] == 4 / width).all()
    assert not gradient[:-1].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph():
    """Forward and backward are captured; the replay follows an upstream gradient on the device."""
    prediction, target, index = _inputs(64, 192, (BF16, BF16), "cuda")
    leaf = prediction.clone().requires_grad_()
    grad_loss = torch.ones((), device="cuda")

    def step():
        loss = latent_loss(leaf, target, index)
        return loss, torch.autograd.grad(loss, leaf, grad_loss)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for value in (1.0, 3.0, 1.0):
        grad_loss.fill_(value)
        graph.replay()
        expected = _run(latent_loss, (prediction, target, index), value)
        assert torch.equal(loss, expected[0])
        assert torch.equal(gradient, expected[1])
