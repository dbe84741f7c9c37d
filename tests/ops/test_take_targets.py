"""take_targets against slices of every sequence, in every lane. It copies: all is exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import debug_checks
from ijepa_kernels.take_targets import take_targets, take_targets_bytes, take_targets_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _inputs(lengths, target_length, width, dtype, device, seed=0, index_dtype=torch.int32):
    """Tokens, their cumulative lengths, and a gradient of the targets."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn((sum(lengths), width), generator=generator).to(device, dtype)
    grad = torch.randn((len(lengths) * target_length, width), generator=generator)
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(device, index_dtype)
    return tokens, cumulative, grad.to(device, dtype)


def _run(function, inputs, target_length):
    """Targets, and the gradient of the tokens."""
    tokens, lengths, grad = inputs
    leaf = tokens.detach().clone().requires_grad_()
    out = function(leaf, lengths, target_length)
    return {"targets": out.detach(), "tokens": torch.autograd.grad(out, leaf, grad)[0]}


def _truth(inputs, target_length):
    """Row by row in float64, backward too."""
    tokens, lengths, grad = inputs
    targets = torch.empty_like(grad, dtype=torch.float64)
    grad_tokens = torch.zeros_like(tokens, dtype=torch.float64)
    for i in range(len(lengths) - 1):
        for t in range(target_length):
            row = int(lengths[i + 1]) - target_length + t
            targets[i * target_length + t] = tokens[row].double()
            grad_tokens[row] = grad[i * target_length + t].double()
    return {"targets": targets, "tokens": grad_tokens}


def _check(inputs, target_length):
    ours = _run(take_targets, inputs, target_length)
    same_dtype = _run(take_targets_ref, inputs, target_length)
    truth = _truth(inputs, target_length)
    for name, value in ours.items():
        assert_not_worse(name, value, same_dtype[name], truth[name])
        assert torch.equal(value.double(), truth[name]), name
        assert value.is_contiguous()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_exact(width, dtype, device):
    _check(_inputs([5, 3, 9], 3, width, dtype, device), 3)


@pytest.mark.parametrize(
    ("lengths", "target_length"),
    [([7], 1), ([7], 7), ([1, 1, 1], 1), ([2, 90, 3], 2), ([31, 37], 29), ([5, 0, 2], 0)],
)
def test_lengths(lengths, target_length, device):
    _check(_inputs(lengths, target_length, 300, F32, device), target_length)


@given(
    contexts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    target_length=st.integers(0, 9),
    width=st.integers(1, 300),
    dtype=st.sampled_from([F32, BF16, F16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(contexts, target_length, width, dtype, index_dtype, seed, device):
    lengths = [context + target_length for context in contexts]
    _check(_inputs(lengths, target_length, width, dtype, device, seed, index_dtype), target_length)


def test_strides(device):
    tokens, lengths, grad = _inputs([5, 3, 9], 3, 20, F32, device)
    strided = (
        tokens.repeat(1, 2)[:, ::2],
        lengths.repeat_interleave(2)[::2],
        grad[:1].expand(len(grad), -1),
    )
    assert not any(t.is_contiguous() for t in strided)
    _check(strided, 3)


@pytest.mark.parametrize(("lengths", "target_length"), [([], 3), ([0, 0], 0)])
def test_empty(lengths, target_length, device):
    _check(_inputs(lengths, target_length, 16, F32, device), target_length)


def test_nan_and_infinity_stay_in_their_rows(device):
    tokens, lengths, grad = _inputs([4, 5], 2, 16, F32, device)
    tokens[[0, 3]] = float("nan")
    grad[1, 5] = float("inf")
    result = _run(take_targets, (tokens, lengths, grad), 2)
    assert result["targets"].isnan().any(1).tolist() == [False, True, False, False]
    assert (~result["tokens"].isfinite()).nonzero().tolist() == [[3, 5]]
    assert not result["tokens"][[0, 1, 4, 5, 6]].any()


def test_twice_the_same_bits(device):
    inputs = _inputs([9, 20, 11], 7, 128, BF16, device)
    first, second = (_run(take_targets, inputs, 7) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("short", [0, 2])
def test_sequence_shorter_than_its_targets(short, device, kernels):
    inputs = _inputs([6, short, 5], 3, 24, F32, device)
    message = "by at least target_length = 3 a sequence"
    with debug_checks(), pytest.raises(ValueError, match=message):
        take_targets(inputs[0], inputs[1], 3)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            take_targets(inputs[0], inputs[1], 3)
        return
    result = _run(take_targets, inputs, 3)
    tokens, _, grad = inputs
    # what is there, behind NaN rows for what is not
    assert result["targets"][3 : 6 - short].isnan().all()
    assert torch.equal(result["targets"][6 - short : 6], tokens[6 : 6 + short])
    assert torch.equal(result["targets"][:3], tokens[3:6])
    assert torch.equal(result["targets"][6:], tokens[-3:])
    assert torch.equal(result["tokens"][6 : 6 + short], grad[6 - short : 6])
    assert not result["tokens"][:3].any()


@pytest.mark.parametrize(
    "wrong",
    [[1, 6, 11], [0, 6, 10], [0, 6, 12], [0, 14, 11], [0, 2**31 - 1, -(2**31)], [0, -7, 11]],
)
def test_lengths_that_do_not_rise_to_the_rows(wrong, device, kernels):
    inputs = list(_inputs([6, 5], 3, 24, F32, device))
    inputs[1] = torch.tensor(wrong, dtype=torch.int32, device=device)
    with debug_checks(), pytest.raises(ValueError, match="lengths must rise from 0 to the 11 rows"):
        take_targets(inputs[0], inputs[1], 3)
    if kernels:
        # nothing is promised but that nothing outside is read or written
        result = _run(take_targets, inputs, 3)
        assert result["tokens"].shape == (11, 24)


def test_compiles_whole_and_passes_opcheck(device):
    tokens, lengths, grad = _inputs([5, 3], 2, 40, BF16, device)
    ops = torch.ops.ijepa_kernels
    leaf = tokens.clone().requires_grad_()
    torch.library.opcheck(ops.take_targets.default, (leaf, lengths, 2))
    torch.library.opcheck(ops.take_targets_bwd.default, (grad, lengths, 8, 2))
    for dynamic in (False, True):
        compiled = torch.compile(take_targets, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        eager, graph = (_run(f, (tokens, lengths, grad), 2) for f in (take_targets, compiled))
        assert all(torch.equal(eager[name], graph[name]) for name in eager)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_gradcheck():
    tokens, lengths, _ = _inputs([4, 3], 2, 5, torch.float64, "cpu")
    torch.autograd.gradcheck(lambda x: take_targets(x, lengths, 2), tokens.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(5)}, r"tokens must have shape \(R, P\), got \(5,\)"),
        ({"tokens": torch.zeros(5, 0)}, r"tokens must have shape \(R, P\), got \(5, 0\)"),
        ({"tokens": torch.zeros(5, 4).int()}, "tokens must be float32.*got torch.int32"),
        ({"lengths": torch.zeros(2, 2).int()}, r"of shape \(n \+ 1,\), got \(2, 2\)"),
        ({"lengths": torch.zeros(0).int()}, r"of shape \(n \+ 1,\), got \(0,\)"),
        ({"lengths": torch.zeros(3)}, "lengths must be int32 or int64, got torch.float32"),
        ({"lengths": torch.zeros(3, device="meta").int()}, "lengths must be on cpu, got meta"),
        ({"target_length": -1}, "target_length must not be negative, got -1"),
    ],
)
def test_bad_input(change, message):
    good = {"tokens": torch.zeros(5, 4), "lengths": torch.tensor([0, 2, 5]), "target_length": 2}
    take_targets(**good)
    with pytest.raises(ValueError, match=message):
        take_targets(**{**good, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 18 GB of GPU memory")
def test_rows_past_two_to_the_31_elements():
    """3 sequences of 800,000 tokens of 1024 which each hold their own number, modulo 2048."""
    rows, width, device = 800_000, 1024, torch.device("cuda")
    number = (torch.arange(3 * rows, device=device) % 2048).to(F16)
    tokens = number[:, None].repeat(1, width).requires_grad_()
    assert tokens.numel() > 2**31
    lengths = torch.arange(4, device=device) * rows
    out = take_targets(tokens, lengths, rows - 1)
    expected = number.view(3, rows)[:, 1:]
    for column in (0, 511, width - 1):
        assert torch.equal(out.detach()[:, column].view(3, -1), expected)
    (grad,) = torch.autograd.grad(out, tokens, out.detach())
    for column in (0, 511, width - 1):
        assert torch.equal(grad[:, column].view(3, rows)[:, 1:], expected)
        assert not grad[::rows, column].any()


def test_bytes():
    # 4 sequences of 5 targets: 20 rows of 100 elements, out of 70
    assert take_targets_bytes(70, 4, 5, 100, BF16) == 2 * 20 * 200 + 20
    assert take_targets_bytes(70, 4, 5, 100, F32, backward=True) == (20 + 70) * 400 + 20
