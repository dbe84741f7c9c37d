"""predictor_tokens against sequences concatenated one by one in float64, in every lane."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import sample_masks
from ijepa_kernels import debug_checks
from ijepa_kernels.predictor_tokens import (
    predictor_tokens,
    predictor_tokens_bytes,
    predictor_tokens_ref,
)
from ijepa_kernels.take_targets import take_targets
from ijepa_kernels.testing import assert_not_worse, relative_error
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# context, mask token, position table, tokens
DTYPES = [
    (F32, F32, F32, F32),
    (BF16, F32, F32, F32),
    (BF16, BF16, BF16, BF16),
    (F16, F32, F32, F16),
    (F32, F32, BF16, BF16),
]
PATCHES = 9


def _inputs(lengths, target_shape, width, dtypes, device, seed=0, index_dtype=torch.int32):
    """The six arguments, and a gradient of the tokens."""
    images, blocks, length = target_shape
    generator = torch.Generator().manual_seed(seed)
    context_dtype, mask_dtype, table_dtype, out_dtype = dtypes
    rows = sum(lengths)
    total = blocks * (rows + len(lengths) * length)

    def draw(shape, dtype, scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, F32))
        return (values * scale).to(device, dtype)

    image = torch.repeat_interleave(
        torch.arange(len(lengths)) % max(images, 1), torch.tensor(lengths, dtype=torch.long)
    )
    patch = torch.randint(PATCHES, (rows,), generator=generator)
    target = torch.randint(PATCHES, target_shape, generator=generator)
    cumulative = torch.tensor([0, *lengths]).cumsum(0)
    return (
        draw((rows, width), context_dtype, 2.0),
        draw((1, 1, width), mask_dtype),
        draw((1, PATCHES, width), table_dtype),
        (image * PATCHES + patch).to(device, index_dtype),
        target.to(device, index_dtype),
        cumulative.to(device, index_dtype),
        draw((total, width), out_dtype),
    )


def _run(function, inputs, out_dtype):
    """Tokens, their lengths, and both gradients."""
    context, mask_token, *rest, grad = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (context, mask_token)]
    tokens, lengths = function(*leaves, *rest, out_dtype=out_dtype)
    # a sequence may lack one or the other
    grads = torch.autograd.grad(tokens, leaves, grad, materialize_grads=True)
    return {
        "tokens": tokens.detach(),
        "lengths": lengths,
        "context": grads[0],
        "mask_token": grads[1],
    }


def _truth(inputs):
    """The same in float64: the sequences built one after another, as the predictor would."""
    context, mask_token, table, context_index, target_index, lengths, grad = inputs
    context, mask_token = (t.double().requires_grad_() for t in (context, mask_token))
    table = table.double().reshape(-1, table.shape[-1])
    images, blocks, _ = target_index.shape
    sequences, ends = [context[:0]], [0]
    for m in range(blocks):
        for c in range((len(lengths) - 1) // max(images, 1)):
            for b in range(images):
                first, last = lengths[c * images + b], lengths[c * images + b + 1]
                for r in range(first, last):
                    patch = int(context_index[r]) - b * len(table)
                    sequences.append((context[r] + table[patch])[None])
                for patch in target_index[b, m].tolist():
                    sequences.append((mask_token.flatten() + table[patch])[None])
                ends.append(sum(map(len, sequences)))
    tokens = torch.cat(sequences)
    leaves = context, mask_token
    grads = torch.autograd.grad(tokens, leaves, grad.double(), materialize_grads=True)
    return {
        "tokens": tokens.detach(),
        "lengths": torch.tensor(ends, dtype=torch.int32, device=lengths.device),
        "context": grads[0],
        "mask_token": grads[1],
    }


def _check(inputs, out_dtype, slack=1.0):
    ours = _run(predictor_tokens, inputs, out_dtype)
    same_dtype = _run(predictor_tokens_ref, inputs, out_dtype)
    truth = _truth(inputs)
    for result in (ours, same_dtype):
        assert result["lengths"].dtype == torch.int32
        assert torch.equal(result["lengths"], truth["lengths"])
    for name in ("tokens", "context", "mask_token"):
        assert_not_worse(name, ours[name], same_dtype[name], truth[name], slack=slack)
        # the CPU runs the reference itself, so that has to be right too: sums of a few terms
        limit = 4 * slack * torch.finfo(ours[name].dtype).eps
        assert relative_error(same_dtype[name], truth[name]) <= limit, name


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_not_worse_than_torch(width, dtypes, device):
    _check(_inputs([3, 1], (2, 2, 3), width, dtypes, device), dtypes[3])


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
def test_unequal_lengths(blocks, contexts, length, device):
    lengths = [1, 13, 4] if contexts == 1 else [1, 13, 4, 7, 1, 2]
    _check(_inputs(lengths, (3, blocks, length), 40, DTYPES[0], device), F32)


def test_longer_than_all_programs_of_a_sequence_take_at_once(device):
    """One sequence far longer than the mean gives every program several tiles."""
    _check(_inputs([1, 1, 1, 40], (4, 2, 19), 300, DTYPES[1], device), F32)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=2),
    images=st.sampled_from([1, 2]),
    blocks=st.integers(1, 2),
    length=st.integers(0, 9),
    width=st.integers(1, 130),
    dtypes=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(lengths, images, blocks, length, width, dtypes, index_dtype, seed, device):
    if len(lengths) % images:
        lengths = lengths * images
    shape = (images, blocks, length)
    _check(_inputs(lengths, shape, width, dtypes, device, seed, index_dtype), dtypes[3], slack=4)


@pytest.mark.parametrize("contexts", [1, 2])
def test_masks_of_the_trainer(contexts, device):
    """With the targets taken back out again."""
    config = MaskConfig(num_contexts=contexts, min_keep=2, truncation_group=1)
    masks = sample_masks(config, grid=(8, 8), seed=1, step=2, positions=np.arange(2)).to(device)
    assert len(masks.context_cu.diff().unique()) > 1
    generator = torch.Generator().manual_seed(0)
    context = torch.randn((len(masks.context_index), 24), generator=generator).to(device)
    mask_token = torch.randn((1, 1, 24), generator=generator).to(device)
    table = torch.randn((1, 64, 24), generator=generator).to(device)
    index = masks.context_index, masks.target_index, masks.context_cu
    _, blocks, length = masks.target_index.shape
    rows = blocks * (len(context) + (len(masks.context_cu) - 1) * length)
    grad = torch.randn((rows, 24), generator=generator).to(device)
    _check((context, mask_token, table, *index, grad), F32)

    tokens, lengths = predictor_tokens(context, mask_token, table, *index)
    assert int(lengths.diff().max()) == masks.max_context + length
    taken = take_targets(tokens, lengths, length).view(blocks, contexts, 2, length, 24)
    targets = mask_token + table[0][masks.target_index.long()].transpose(0, 1)
    for c in range(contexts):
        assert torch.equal(taken[:, c], targets)


def test_strides_and_flat_parameters(device):
    inputs = _inputs([2, 5, 1, 3], (2, 3, 4), 20, DTYPES[0], device)
    context, mask_token, table, context_index, target_index, lengths, grad = inputs
    strided = (
        context.repeat(1, 2)[:, ::2],
        mask_token.flatten().repeat_interleave(2)[::2],
        table[0].T.contiguous().T,
        context_index.repeat_interleave(3)[::3],
        target_index.transpose(0, 1).contiguous().transpose(0, 1),
        lengths.repeat_interleave(2)[::2],
        grad[:1].expand(len(grad), -1),
    )
    assert not any(t.is_contiguous() for t in strided)
    _check(strided, F32)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([], (0, 2, 3)),
        ([], (2, 2, 3)),
        ([3, 2], (2, 0, 3)),
        ([3, 2], (2, 2, 0)),
        ([0, 0], (1, 2, 3)),
    ],
)
def test_empty(lengths, shape, device):
    _check(_inputs(lengths, shape, 16, DTYPES[0], device), F32)


def test_nan_stays_in_its_row(device):
    inputs = _inputs([2, 3], (2, 2, 2), 96, DTYPES[0], device)
    clean = _run(predictor_tokens, inputs, F32)
    inputs[0][3, 7] = float("nan")
    dirty = _run(predictor_tokens, inputs, F32)
    bad = (dirty["tokens"] != clean["tokens"]).nonzero()
    # context row 3 is row 1 of sequence 1; 9 tokens a target block
    assert bad.tolist() == [[2 + 2 + 1, 7], [9 + 2 + 2 + 1, 7]]
    assert torch.equal(dirty["context"], clean["context"])


def test_twice_the_same_bits(device):
    inputs = _inputs([9, 17], (2, 2, 7), 200, DTYPES[1], device)
    first, second = (_run(predictor_tokens, inputs, F32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_half_precision_add_up_in_float32(device):
    """64 equal copies whose sum in bfloat16 would stop at 256 times the addend."""
    inputs = list(_inputs([1], (1, 64, 8), 16, DTYPES[2], device))
    inputs[-1] = torch.full_like(inputs[-1], 1.0 + 2**-7)
    grads = _run(predictor_tokens, inputs, BF16)
    assert torch.equal(grads["context"], torch.full_like(grads["context"], 64.5))
    assert torch.equal(grads["mask_token"], torch.full_like(grads["mask_token"], 516.0))


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (-1, torch.int32),
        (2 * PATCHES, torch.int32),
        (2**31 - 1, torch.int32),
        (-(2**31), torch.int32),
        (2**32, torch.int64),
    ],
)
def test_index_out_of_range(bad, dtype, device, kernels):
    inputs = list(_inputs([2, 3], (2, 2, 4), 24, DTYPES[0], device, index_dtype=dtype))
    clean = _run(predictor_tokens, inputs, F32)
    inputs[3], inputs[4] = inputs[3].clone(), inputs[4].clone()
    inputs[3][1] = bad
    message = f"context_index must lie in 0 .. {2 * PATCHES - 1}, got {bad} at position 1 of 5"
    with debug_checks(), pytest.raises(ValueError, match=message):
        predictor_tokens(*inputs[:-1])
    inputs[4][1, 0, 2] = bad
    if not kernels:
        with pytest.raises(ValueError, match="context_index must lie in"):
            predictor_tokens(*inputs[:-1])
        return
    ours = _run(predictor_tokens, inputs, F32)
    # 13 tokens a target block: 2 context rows, 4 targets, 3 context rows, 4 targets
    unknown = [1, 13 + 1, 9 + 2]
    known = [row for row in range(26) if row not in unknown]
    assert ours["tokens"][unknown].isnan().all()
    assert torch.equal(ours["tokens"][known], clean["tokens"][known])
    assert torch.equal(ours["context"][[0, 2, 3, 4]], clean["context"][[0, 2, 3, 4]])
    assert not ours["context"][1].any()
    inputs[-1][9 + 2] = 0.0
    assert torch.equal(ours["mask_token"], _run(predictor_tokens, inputs, F32)["mask_token"])
    without = clean["mask_token"] - ours["mask_token"]
    assert without.abs().max() > 0.1


def test_target_of_another_size_of_grid(device):
    """A target is out of range from N on, not from B * N on."""
    inputs = _inputs([2, 3], (2, 2, 4), 24, DTYPES[0], device)
    inputs[4][0, 1, 3] = PATCHES
    message = f"target_index must lie in 0 .. {PATCHES - 1}, got {PATCHES} at position 7 of 16"
    with debug_checks(), pytest.raises(ValueError, match=message):
        predictor_tokens(*inputs[:-1])


@pytest.mark.any_order
@pytest.mark.parametrize(
    "wrong", [[1, 2, 5], [0, 2, 4], [0, 6, 5], [0, -3, 5], [0, 2**31 - 1, -(2**31)], [9, 9, 9]]
)
def test_lengths_that_do_not_rise_to_the_rows(wrong, device, kernels):
    inputs = list(_inputs([2, 3], (2, 2, 4), 24, DTYPES[0], device))
    inputs[5] = torch.tensor(wrong, dtype=torch.int32, device=device)
    with debug_checks(), pytest.raises(ValueError, match="lengths must rise from 0 to the 5 rows"):
        predictor_tokens(*inputs[:-1])
    if kernels:
        # nothing is promised but that nothing outside is read or written, the new lengths too
        result = _run(predictor_tokens, inputs, F32)
        assert int(result["lengths"].min()) >= 0
        assert int(result["lengths"].max()) <= len(result["tokens"])


def test_compiles_whole_and_passes_opcheck(device):
    inputs = _inputs([2, 1], (2, 2, 3), 40, DTYPES[1], device)
    ops = torch.ops.ijepa_kernels
    leaves = tuple(t.requires_grad_() for t in inputs[:2])
    torch.library.opcheck(ops.predictor_tokens.default, (*leaves, *inputs[2:6], F32))
    torch.library.opcheck(
        ops.predictor_tokens_bwd.default, (inputs[6], *inputs[3:6], PATCHES, BF16)
    )
    for dynamic in (False, True):
        compiled = torch.compile(
            predictor_tokens, fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        eager, graph = (_run(f, inputs, F32) for f in (predictor_tokens, compiled))
        assert all(torch.equal(eager[name], graph[name]) for name in eager)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_gradcheck():
    inputs = _inputs([2, 1], (2, 2, 2), 5, (torch.float64,) * 4, "cpu")
    leaves = [t.requires_grad_() for t in inputs[:2]]
    torch.autograd.gradcheck(lambda c, m: predictor_tokens(c, m, *inputs[2:6])[0], leaves)


def test_fixed_table(device):
    *inputs, _ = _inputs([2, 3], (2, 2, 4), 8, DTYPES[0], device)
    inputs[2].requires_grad_()
    with torch.no_grad():
        predictor_tokens(*inputs)
    with pytest.raises(ValueError, match="pos_table must not require a gradient"):
        predictor_tokens(*inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(5)}, r"context must have shape \(R, P\), got \(5,\)"),
        ({"context": torch.zeros(5, 0)}, r"context must have shape \(R, P\), got \(5, 0\)"),
        ({"context": torch.zeros(5, 4).long()}, "context must be float32.*got torch.int64"),
        ({"mask_token": torch.zeros(5)}, r"mask_token must have shape \(4,\), got \(5,\)"),
        ({"mask_token": torch.zeros(1, 4)}, r"mask_token must have shape \(1, 1, 4\), got \(1, 4"),
        ({"pos_table": torch.zeros(4)}, r"pos_table must have shape \(N, P\) or .* got \(4,\)"),
        ({"pos_table": torch.zeros(2, 9, 4)}, r"pos_table must have shape \(1, 9, 4\), got \(2, 9"),
        ({"pos_table": torch.zeros(9, 5)}, r"pos_table must have shape \(9, 4\), got \(9, 5\)"),
        ({"context_index": torch.zeros(6).int()}, r"context_index must have shape \(5,\), got"),
        ({"context_index": torch.zeros(5)}, "context_index must be int32 or int64, got torch.flo"),
        ({"target_index": torch.zeros(2, 3).int()}, r"target_index must have shape \(B, M, T\)"),
        ({"lengths": torch.tensor([2, 3])}, r"lengths must be cumulative, of shape \(C \* 2 \+ 1"),
        ({"lengths": torch.zeros(0).int()}, "lengths must be cumulative"),
        ({"lengths": torch.zeros(3)}, "lengths must be int32 or int64, got torch.float32"),
        ({"mask_token": torch.zeros(4, device="meta")}, "mask_token must be on cpu, got meta"),
        ({"out_dtype": torch.int32}, "out_dtype must be float32.*got torch.int32"),
    ],
)
def test_bad_input(change, message):
    good = {"context": torch.zeros(5, 4), "mask_token": torch.zeros(1, 1, 4)}
    good |= {"pos_table": torch.zeros(9, 4), "context_index": torch.zeros(5).int()}
    good |= {"target_index": torch.zeros(2, 3, 6).int(), "lengths": torch.tensor([0, 2, 5])}
    predictor_tokens(**good)
    with pytest.raises(ValueError, match=message):
        predictor_tokens(**{**good, **change})


def test_too_many_tokens():
    """2**31 of them cannot be counted in int32 lengths."""
    context = torch.zeros((1, 1), device="meta")
    target_index = torch.zeros((1, 2**16, 2**15), dtype=torch.int32, device="meta")
    index = torch.zeros(1, dtype=torch.int32, device="meta")
    lengths = torch.zeros(2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 tokens"):
        predictor_tokens(context, context[0], context, index, target_index, lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 10 GB of GPU memory")
def test_rows_past_two_to_the_31_elements():
    """4 target blocks of 600,001 tokens of 1024: every row holds its own number, modulo 2048."""
    rows, width, device = 600_000, 1024, torch.device("cuda")
    number = (torch.arange(rows, device=device) % 2048).to(F16)
    context = number[:, None].repeat(1, width).requires_grad_()
    tokens, lengths = predictor_tokens(
        context,
        torch.full((width,), 7.0, device=device, dtype=F16),
        torch.zeros((1, width), device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros((1, 4, 1), dtype=torch.int32, device=device),
        torch.tensor([0, rows], device=device),
    )
    assert tokens.numel() > 2**31
    assert lengths.tolist() == [m * (rows + 1) for m in range(5)]
    expected = torch.cat([number, number.new_full((1,), 7.0)]).repeat(4)
    for column in (0, 511, width - 1):
        assert torch.equal(tokens.detach()[:, column], expected)
    (grad,) = torch.autograd.grad(tokens, context, tokens.detach())
    assert torch.equal(grad, 4 * context.detach())


def test_bytes():
    # 3 * (10 + 4 * 5) = 90 tokens of width 100; 10 context rows
    floats = 90 * 400 + 10 * 200
    index = 4 * (10 + 2 * 3 * 5 + 5)
    inputs = 400 + 9 * 400
    args = ((10, 100), 4, (2, 3, 5), 9, BF16, F32)
    assert predictor_tokens_bytes(*args) == floats + index + inputs + 4 * 13
    assert predictor_tokens_bytes(*args, backward=True) == floats + index + 400
