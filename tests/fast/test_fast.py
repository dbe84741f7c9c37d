"""The fast step against the reference step, and what it leaves out against what it must not."""

import copy
import importlib.util
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ijepa_fast.config import MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.fast import FastStep, attention, block
from ijepa_fast.fast.attention import Pair, Sequences
from ijepa_fast.fast.layout import grid_sequences, pack, views
from ijepa_fast.masks import Masks, sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues
from ijepa_kernels.add_layer_norm import add_layer_norm_forward

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALUES = StepValues(lr=1e-3, weight_decay=0.05, momentum=0.99)
CUDA = torch.cuda.is_available()
OPTIMISER = {"optimizer.py", "plan.py", "_table.py", "_adam_cpu.py"}


def _networks(*, patch=8, crop=48, depth=3, predictor_depth=3, heads=2, width=24, predictor=16):
    config = ModelConfig(
        name="vit_tiny",
        patch_size=patch,
        width=width,
        heads=heads,
        depth=depth,
        predictor_width=predictor,
        predictor_depth=predictor_depth,
    )
    networks = build_models(config, (crop, crop), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for network in networks for p in network.parameters()):
            # norms and biases away from 1 and 0
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return networks


def _steps(networks, device="cpu", optim=None, **settings):
    """A reference step and a fast one with the same weights."""
    optim = optim or OptimConfig(precision="float32")
    made: list[Any] = []
    plain: Any = OptimConfig(**{**vars(optim), "residual": "float32"})
    kinds: list[Any] = [(ReferenceStep, plain, {}), (FastStep, optim, settings)]
    for kind, config, options in kinds:
        own = [copy.deepcopy(network).to(device) for network in networks]
        made.append(kind(*own, config, mean=MEAN, std=STD, **options))
    return made


def _batch(encoder, *, images=4, group=1, contexts=1, targets=4, step=0):
    height, width = (encoder.grid[i] * encoder.patch_embed.proj.kernel_size[i] for i in (0, 1))
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (images, height, width, 3), generator=generator)
    config = MaskConfig(
        min_keep=1, truncation_group=group, num_contexts=contexts, num_targets=targets
    )
    where = np.arange(images)
    masks = sample_masks(config, grid=encoder.grid, seed=0, step=step, positions=where)
    return pixels.to(torch.uint8), masks


def _elements(masks, encoder):
    sequences = masks.context_cu.numel() - 1
    _, blocks, length = masks.target_index.shape
    return sequences * blocks * length * encoder.width


def _error(actual, expected):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _without_keys(name, tensor):
    """The true gradient of a key's bias is zero: what is left of it is rounding."""
    if not name.endswith("qkv.bias"):
        return tensor
    q, _, v = tensor.chunk(3)
    return torch.cat([q, v])


def _gradients(step):
    named = [*step.encoder.named_parameters("e"), *step.predictor.named_parameters("p")]
    return {name: _without_keys(name, p.grad) for name, p in named}


def _assert_same(steps, batches, limit=2e-5, weights=2e-5):
    """Losses, feature std, gradients and, after updates, all weights."""
    reference, fast = steps
    for images, masks in batches:
        elements = _elements(masks, reference.encoder)
        pixels = images.to(reference.device)
        loss, std = reference.accumulate(pixels, reference.prepare(masks), elements)
        own_loss, own_std = fast.accumulate(pixels, fast.prepare(masks), elements)
        assert own_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert own_std.item() == pytest.approx(std.item(), rel=1e-5)
        expected, actual = _gradients(reference), _gradients(fast)
        for name, grad in expected.items():
            assert _error(actual[name], grad) < limit, name
        for step in (reference, fast):
            step.update(VALUES)
    expected, actual = reference.masters(), fast.masters()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype == torch.float32
        error = _error(_without_keys(name, actual[name]), _without_keys(name, tensor))
        assert error < weights, name


CASES: dict[str, dict[str, Any]] = {
    "equal lengths": {"group": 4},
    "whole contexts": {"group": 1},
    "two groups": {"group": 2},
    "three contexts": {"group": 1, "contexts": 3},
    "two contexts of equal length, two targets": {"group": 4, "contexts": 2, "targets": 2},
    "one image": {"images": 1},
    "odd numbers": {"images": 7, "targets": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_as_the_reference(case):
    networks = _networks()
    reference, fast = _steps(networks)
    batches = [_batch(networks[0], step=step, **case) for step in range(3)]
    # else nothing is packed, or nothing dense
    dense = case.get("group", 1) == case.get("images", 4)
    equal = [fast.prepare(masks).context.queries.equal for _, masks in batches]
    assert all(equal) if dense else not all(equal)
    _assert_same((reference, fast), batches)


@pytest.mark.parametrize(
    "shape",
    [
        {"depth": 1, "predictor_depth": 1},
        {"depth": 1, "predictor_depth": 2},
        {"depth": 2, "predictor_depth": 1},
        {"patch": 14, "crop": 98},  # rows padded to a multiple of 16
        {"heads": 3, "width": 36, "predictor": 24},
    ],
)
def test_every_shape_of_network(shape):
    networks = _networks(**shape)
    _assert_same(_steps(networks), [_batch(networks[0], step=step) for step in range(2)])


@pytest.mark.parametrize("group", [1, 4])
def test_recomputation_changes_nothing(group):
    networks = _networks()
    plain = _steps(networks)[1]
    lean = _steps(networks, memory="full")[1]
    images, masks = _batch(networks[0], group=group)
    for step in (plain, lean):
        step.accumulate(images, step.prepare(masks), _elements(masks, step.encoder))
    expected, actual = _gradients(plain), _gradients(lean)
    for name, grad in expected.items():
        assert _error(actual[name], grad) < 1e-6, name


def _saved_bytes(step, images, masks):
    """Of all that autograd keeps for the backward pass, weights and inputs left out."""
    known = {p.untyped_storage().data_ptr() for p in step.parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = step.forward(images, step.prepare(masks))[0]
    assert prediction.requires_grad
    return sum(kept.values())


def test_recomputation_saves_memory():
    networks = _networks(width=64, depth=4, predictor=32)
    images, masks = _batch(networks[0], group=4)
    reference, fast = (_saved_bytes(step, images, masks) for step in _steps(networks))
    full = _saved_bytes(_steps(networks, memory="full")[1], images, masks)
    assert fast < 0.7 * reference
    assert full < 0.4 * fast


@pytest.mark.parametrize("kind", ["smooth_l1", "l2", "l1"])
def test_every_kind_of_loss(kind):
    networks = _networks()
    steps = _steps(networks, optim=OptimConfig(precision="float32", loss=kind))
    # l1: where a difference is near 0, its sign is a matter of rounding
    limit = 1e-3 if kind == "l1" else 2e-5
    _assert_same(steps, [_batch(networks[0])], limit=limit, weights=1e-4)


def test_micro_steps_add_up():
    networks = _networks()
    reference, fast = _steps(networks)
    images, masks = _batch(networks[0], images=6, group=3)
    elements = _elements(masks, networks[0])
    loss, _ = reference.accumulate(images, reference.prepare(masks), elements)
    config = MaskConfig(min_keep=1, truncation_group=3)
    losses = []
    for start in (0, 2, 4):
        where = np.arange(start, start + 2)
        part = sample_masks(config, grid=networks[0].grid, seed=0, step=0, positions=where)
        losses.append(fast.accumulate(images[start : start + 2], fast.prepare(part), elements)[0])
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-6)
    expected, actual = _gradients(reference), _gradients(fast)
    for name, grad in expected.items():
        assert actual[name].dtype == torch.float32
        assert _error(actual[name], grad) < 2e-5, name


# --- bfloat16 and the ownership of weights -------------------------------------------------------


def _half(**settings):
    return OptimConfig(precision="bfloat16", **settings)


def test_bfloat16_is_no_worse_than_autocast():
    """Against the float32 reference, gradients and predictions of both paths in bfloat16."""
    networks = _networks(width=48, predictor=32, depth=4)
    truth, _ = _steps(networks)
    reference, fast = _steps(networks, optim=_half())
    images, masks = _batch(networks[0], images=8)
    elements = _elements(masks, networks[0])
    for step in (truth, reference, fast):
        step.accumulate(images, step.prepare(masks), elements)
    exact, theirs, ours = (_gradients(step) for step in (truth, reference, fast))

    def rms(gradients):
        errors = [_error(gradients[name], exact[name]) for name in exact]
        return np.sqrt(np.mean(np.square(errors)))

    assert rms(theirs) > 1e-3
    assert rms(ours) <= 1.5 * rms(theirs)


def test_who_owns_which_weights():
    networks = _networks()
    _, fast = _steps(networks, optim=_half())
    for step in range(3):
        images, masks = _batch(networks[0], step=step)
        fast.accumulate(images, fast.prepare(masks), _elements(masks, networks[0]))
        assert all(p.grad.dtype == torch.float32 for p in fast.parameters)
        fast.update(VALUES)
    masters = fast.masters()
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    rounded = 0
    for name, p in fast.target_encoder.named_parameters():
        average = masters[f"target_encoder.{name}"]
        norm = "norm" in name
        assert p.dtype == (torch.float32 if norm else torch.bfloat16), name
        assert torch.equal(p, average.to(p.dtype)), name
        rounded += not norm
        assert not torch.equal(average, masters[f"encoder.{name}"]), name
    assert rounded == 4 * 3 * 2 + 2
    # every matrix of the context side has a copy, and it is what the optimiser last wrote
    layers = [m for n in (fast.encoder, fast.predictor) for m in n.modules() if "copies" in vars(m)]
    assert len(layers) == 1 + 4 * 3 + 4 * 3 + 2
    for layer in layers:
        for p, copied in zip((layer.weight, layer.bias), layer.copies, strict=True):
            assert copied.dtype == torch.bfloat16
            assert torch.equal(copied, p.bfloat16())


class _Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the sizes of what is rounded from float32 to bfloat16."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            source, target = args[0].dtype, (kwargs or {}).get("dtype")
            if source == torch.float32 and target == torch.bfloat16:
                self.storages.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def test_no_step_casts_a_weight():
    networks = _networks()
    reference, fast = _steps(networks, optim=_half())
    images, masks = _batch(networks[0])
    for step, expected in ((reference, True), (fast, False)):
        weights = {p.untyped_storage().data_ptr() for p in step.parameters}
        weights |= {p.untyped_storage().data_ptr() for p in step.target_encoder.parameters()}
        batch = step.prepare(masks)
        with _Casts() as casts:
            step.accumulate(images, batch, _elements(masks, networks[0]))
            step.update(VALUES)
        assert casts.storages
        assert bool(weights.intersection(casts.storages)) == expected


def test_bfloat16_residual():
    networks = _networks()
    _, fast = _steps(networks, optim=_half())
    _, narrow = _steps(networks, optim=_half(residual="bfloat16"))
    images, masks = _batch(networks[0])
    seen = []
    for each in narrow.encoder.blocks:
        each.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    losses = [
        step.accumulate(images, step.prepare(masks), _elements(masks, networks[0]))[0].item()
        for step in (fast, narrow)
    ]
    assert seen == [torch.bfloat16] * 3
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    with pytest.raises(ValueError, match=r"optim.residual must be float32 where"):
        OptimConfig(precision="float32", residual="bfloat16")


# --- nothing is read back ------------------------------------------------------------------------


def test_no_host_reads(monkeypatch):
    """No `.item()`, `float()` or `bool()` of a tensor in a step. The ops' CPU versions stand for
    kernels and check indices on the way, which their kernels do not: they are left out, but the
    optimiser is not.
    """
    networks = _networks()
    for optim in (OptimConfig(precision="float32"), _half()):
        for step in _steps(networks, optim=optim):
            images, masks = _batch(networks[0])
            batch = step.prepare(masks)
            step.accumulate(images, batch, _elements(masks, networks[0]))
            step.update(VALUES)  # optimisers set themselves up
            found: list[str] = []
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
                    _forbid(patch, name, found)
                step.accumulate(images, batch, _elements(masks, networks[0]))
                step.update(VALUES)
            assert not found, found[0]
    with monkeypatch.context() as patch:
        _forbid(patch, "item", found)
        torch.ones(()).item()
    assert found


def _forbid(patch, name, found):
    original = getattr(torch.Tensor, name)

    def read(self):
        stack = traceback.extract_stack(sys._getframe(1))
        kernels = [
            path.name
            for path in (Path(frame.filename) for frame in stack[-6:])
            if path.parent.name == "ijepa_kernels"
        ]
        if not kernels or OPTIMISER.intersection(kernels):
            found.append(f"{name} at {stack[-1].filename}:{stack[-1].lineno}")
        return original(self)

    patch.setattr(torch.Tensor, name, read)


# --- dead work, each part against the whole ------------------------------------------------------


def test_last_target_block_on_needed_rows():
    """`TargetEncoder` against the plain encoder on all rows, and split as for a CUDA graph."""
    networks = _networks()
    _, fast = _steps(networks)
    images, masks = _batch(networks[0])
    batch, grid = fast.prepare(masks), grid_sequences(len(images), 36, torch.device("cpu"))
    x = (images.permute(0, 3, 1, 2) / 255 - fast.mean.view(3, 1, 1)) / fast.std.view(3, 1, 1)
    plain = networks[0](x).flatten(0, 1)
    needed = {
        i * 36 + p for i, row in enumerate(masks.target_index.flatten(1).tolist()) for p in row
    }
    assert batch.needed.tolist() == sorted(needed)
    assert len(needed) < masks.target_index.numel()
    arguments = images, fast.mean, fast.std
    some = fast.target_encoder(*arguments, batch, grid)
    torch.testing.assert_close(some, plain[sorted(needed)], rtol=1e-4, atol=1e-5)
    trunk = fast.target_encoder.trunk(*arguments, grid)
    assert [t.shape for t in trunk] == [(144, 24), (144, 24), (144, 48)]
    assert torch.equal(fast.target_encoder.head(*trunk, batch), some)


@pytest.mark.parametrize("group", [1, 4])
def test_predictor_shares_first_rows_and_ends_on_target_rows(group):
    networks = _networks()
    _, fast = _steps(networks)
    _, masks = _batch(networks[0], group=group)
    batch = fast.prepare(masks)
    sizes = []
    original = add_layer_norm_forward

    def normed(x, *rest):
        sizes.append(len(x))
        return original(x, *rest)

    z = torch.randn(len(masks.context_index), 24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "add_layer_norm_forward", normed)
        fast.predictor(z, batch)
    rows, targets = len(masks.context_index), masks.target_index.numel()
    every = 4 * rows + targets
    # both norms of three blocks, and the final one
    assert sizes == [rows + 36, every, every, every, every, targets, targets]


def test_packed_predictor_is_the_plain_one():
    networks = _networks()
    _, fast = _steps(networks)
    for group in (1, 4):
        _, masks = _batch(networks[0], group=group)
        batch = fast.prepare(masks)
        z = torch.randn(len(masks.context_index), 24)
        actual = fast.predictor(z, batch).view(4, 4, -1, 24)
        for image in range(4):
            here = slice(*masks.context_cu[image : image + 2].tolist())
            for number in range(4):
                patches = masks.context_index[here].long()[None] % 36
                target = masks.target_index[image, number].long()[None]
                expected = networks[1](z[here][None], patches, target)
                torch.testing.assert_close(actual[number, image], expected[0], rtol=1e-4, atol=1e-5)


# --- layout and attention ------------------------------------------------------------------------


def test_layout_by_hand():
    """Two images of 6 patches, contexts of 2 and 3, two target blocks of 2."""
    masks = Masks(
        context_index=torch.tensor([0, 5, 6, 7, 11], dtype=torch.int32),
        context_cu=torch.tensor([0, 2, 5], dtype=torch.int32),
        max_context=3,
        target_index=torch.tensor([[[1, 2], [2, 3]], [[4, 5], [2, 3]]], dtype=torch.int32),
    )
    flat, key = pack(masks, 6, padded=True)
    layout = views(torch.from_numpy(flat), key)
    assert layout.context_patch.tolist() == [0, 5, 0, 1, 5]
    assert layout.needed.tolist() == [1, 2, 3, 8, 9, 10, 11]
    assert layout.counted.tolist() == [1.0] * 7
    assert layout.loss_index.tolist() == [0, 1, 5, 6, 1, 2, 3, 4]
    # rows 0..4 are the context's, 5 + patch those of mask tokens
    assert layout.source.picked.tolist() == [0, 1, 6, 7, 2, 3, 4, 9, 10, 0, 1, 7, 8, 2, 3, 4, 7, 8]
    assert layout.taken.picked.tolist() == [2, 3, 7, 8, 11, 12, 16, 17]
    for gather in (layout.source, layout.taken):
        _assert_inverse(gather)
    assert layout.predictor.queries.cu.tolist() == [0, 4, 9, 13, 18]
    assert layout.last_predictor.queries.cu.tolist() == [0, 2, 4, 6, 8]
    assert layout.last_target.queries.cu.tolist() == [0, 3, 7]
    assert layout.last_target.keys.cu.tolist() == [0, 6, 12]
    assert layout.context.queries.pad is not None
    assert layout.context.queries.pad.tolist() == [0, 1, 1, 2, 3, 4]
    assert layout.context.queries.valid.tolist() == [[True, True, False], [True, True, True]]
    assert layout.context.queries.longest == 3
    assert layout.context.queries.bucket == 32


def _assert_inverse(gather):
    """What a GPU sums by lists of copies is what a CPU sums by index."""
    index, listed = gather.picked.tolist(), gather.listed.tolist()
    if gather.starts is None:
        assert {i: row for row, i in enumerate(listed) if i >= 0} == dict(enumerate(index))
        return
    starts = gather.starts.tolist()
    for row in range(len(starts) - 1):
        copies = listed[starts[row] : starts[row + 1]]
        assert copies == [i for i, source in enumerate(index) if source == row]
    assert starts[-1] == len(index)


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("few", [False, True])
def test_layout_of_sampled_masks(few, group, contexts):
    networks = _networks()
    _, masks = _batch(networks[0], group=group, contexts=contexts)
    flat, key = pack(masks, 36, padded=False, few=few)
    layout = views(torch.from_numpy(flat), key)
    for gather in (layout.source, layout.taken):
        _assert_inverse(gather)
    rows, real = len(layout.context_index), len(masks.context_index)
    fillers = rows - real
    assert bool(fillers) == bool(key.fillers) == (few and group == 1)
    assert layout.context_index[:real].tolist() == masks.context_index.tolist()
    # every row of every kind belongs to one sequence, and none is longer than is said
    for pair, count in ((layout.context, rows), (layout.predictor, len(layout.source.picked))):
        assert pair.keys.cu[0] == 0
        assert pair.keys.cu[-1] == count
        assert pair.keys.cu.diff().max() <= pair.keys.longest
        assert pair.keys.cu.diff().min() >= 1
    assert layout.last_predictor.queries.cu[-1] == len(layout.taken.picked)
    # the rows that targets need are marked once, the others not at all
    needed = layout.needed[layout.counted > 0].tolist()
    images = torch.arange(4)[:, None, None] * 36
    assert needed == sorted(set((masks.target_index + images).flatten().tolist()))
    assert len(set(layout.needed.tolist())) == len(layout.needed)
    blocks, length = masks.target_index.shape[1:]
    place = layout.loss_index.view(blocks, -1)[:, : 4 * contexts * length]
    target = layout.needed[place.long()].view(blocks, contexts, 4, length)
    expected = (masks.target_index + images).transpose(0, 1)[:, None].expand_as(target)
    assert torch.equal(target.long(), expected.long())
    if few and group == 1:
        assert rows % 256 == 0
        assert layout.loss_weight is not None
        weight = layout.loss_weight.view(blocks, -1)
        assert weight.sum() == masks.target_index.numel() * contexts
        assert not weight[:, 4 * contexts * length :].any()


def _sequences(lengths, device="cpu"):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    longest, count = max(lengths), len(lengths)
    cu = torch.tensor(starts, device=device)
    if len(set(lengths)) == 1:
        return Sequences(cu, count, longest, True)
    pad = [s + min(c, n - 1) for s, n in zip(starts, lengths, strict=False) for c in range(longest)]
    unpad = [i * longest + c for i, n in enumerate(lengths) for c in range(n)]
    places = (torch.tensor(x, device=device) for x in (pad, unpad))
    return Sequences(cu, count, longest, False, *places)


BACKENDS = [
    "sdpa",
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("xformers", "varlen", "cudnn")),
]


@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88, 128])
@pytest.mark.parametrize("lengths", [([5, 5, 5], [5, 5, 5]), ([3, 1, 6], [4, 9, 6])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_one_sequence_at_a_time(backend, lengths, head_dim):
    """Forward and backward against softmax in float64."""
    if backend != "sdpa" and not CUDA:
        pytest.skip("needs a GPU")
    if backend == "xformers":
        pytest.importorskip("xformers")
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    pair = Pair(*(_sequences(side, device) for side in lengths))
    torch.manual_seed(0)
    # as views of one product, as in the step
    q = torch.randn(sum(lengths[0]), 2, head_dim, dtype=dtype, device=device)
    kv = torch.randn(sum(lengths[1]), 2, 2, head_dim, dtype=dtype, device=device)
    k, v = kv.unbind(1)
    mine = attention.CUDNN if backend == "cudnn" else attention.BACKENDS[backend]
    if backend == "cudnn" and not pair.equal:
        pytest.skip("for equal lengths")
    out, kept = mine.forward(q, k, v, pair, True)
    weight = torch.randn(out.shape, device=device, dtype=dtype)
    dq, dk, dv = mine.backward(weight, out, kept, pair)
    wide_q, wide_kv = (t.detach().double().requires_grad_() for t in (q, kv))
    pieces = []
    for own, (k, v) in zip(
        wide_q.split(lengths[0]), (p.unbind(1) for p in wide_kv.split(lengths[1])), strict=True
    ):
        scores = torch.einsum("qhe,khe->hqk", own, k) * head_dim**-0.5
        pieces.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v))
    expected = torch.cat(pieces)
    (expected * weight.double()).sum().backward()
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert _error(out, expected) < limit
    assert _error(dq, wide_q.grad) < limit
    assert _error(torch.stack([dk, dv], 1), wide_kv.grad) < limit


def test_attention_that_cannot_run_here():
    networks = _networks()
    for name in ("xformers", "varlen", "fa3"):
        with pytest.raises(ValueError, match=rf"must be sdpa or auto here, got '{name}'.*half"):
            _steps(networks, attention=name)
    if not CUDA:
        with pytest.raises(ValueError, match=r"got 'varlen': flash kernels need CUDA"):
            _steps(networks, optim=_half(), attention="varlen")
    with pytest.raises(ValueError, match=r"attention must be one of auto, .*got 'flash'"):
        _steps(networks, attention="flash")


def _choose(monkeypatch, *, times, capability=(9, 0), packages=(), broken=(), cuda="13.0"):
    """The choice on a CUDA device that runs all back ends but some, at given speeds."""
    switched = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(attention, "_installed", lambda package: package in packages)
    monkeypatch.setattr(attention, "_milliseconds", lambda backend, *_: times[backend.name])
    monkeypatch.setattr(attention, "_activate", lambda b: switched.append(b.name))

    def trial(backend, *_):
        if backend.name in broken:
            raise RuntimeError("no kernel for this head dim\nand more")

    monkeypatch.setattr(attention, "_trial", trial)
    chosen = attention.choose_attention(
        "auto", torch.device("cuda"), torch.bfloat16, [(196, 12, 64), (98, 12, 32)]
    )
    return chosen, switched[-1]


def test_attention_by_shape_on_a_gpu(monkeypatch):
    chosen, _ = _choose(monkeypatch, times={})
    assert str(chosen) == "cudnn where lengths are equal, varlen elsewhere"
    assert chosen.why == "the first that run"
    equal, unequal = (Pair(s, s) for s in (_sequences([4, 4]), _sequences([4, 3])))
    assert (chosen.of(equal).name, chosen.of(unequal).name) == ("cudnn", "varlen")
    # before Hopper, and where cuDNN cannot
    assert str(_choose(monkeypatch, times={}, capability=(8, 0))[0]) == "varlen"
    chosen, _ = _choose(monkeypatch, times={}, broken=("cudnn",))
    assert (str(chosen), chosen.why) == (
        "varlen",
        "the first that run; cudnn: no kernel for this head dim",
    )
    chosen, _ = _choose(monkeypatch, times={}, broken=("cudnn", "varlen"))
    assert (str(chosen), chosen.why) == ("sdpa", "varlen: no kernel for this head dim")


def test_another_kernel_must_be_faster_by_the_margin(monkeypatch):
    packages = ("flash_attn_interface", "flash_attn.cute")
    times = {"varlen": 10.0, "fa3": 6.0, "fa4": 5.8, "cudnn": 5.5}
    chosen, active = _choose(monkeypatch, times=times, packages=packages)
    # fa4 is the fastest of the packed ones; cuDNN stays where lengths are equal
    assert (chosen.packed.name, chosen.dense.name, active) == ("fa4", "cudnn", "fa4")
    assert "varlen 10.00 ms, fa3 6.00 ms, fa4 5.80 ms" in chosen.why
    assert "cudnn 5.50 ms, fa4 5.80 ms" in chosen.why
    times |= {"fa3": 9.5, "fa4": 9.2}
    chosen, active = _choose(monkeypatch, times=times, packages=packages)
    assert (chosen.packed.name, chosen.dense.name, active) == ("varlen", "cudnn", "varlen")


def test_why_xformers_is_not_used(monkeypatch, tmp_path):
    """Read from its files; it is not imported."""
    (tmp_path / "cpp_lib.json").write_text('{"version": {"cuda": 1208}}')
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    chosen, _ = _choose(monkeypatch, times={}, packages=("xformers",))
    reason = "xformers: its library is built for CUDA 12.8, this torch has 13.0"
    assert chosen.why == f"the first that run; {reason}"
    assert "xformers" not in sys.modules
    # beside the torch that it is built for it is a candidate like others
    times = {"varlen": 10.0, "xformers": 9.9}
    chosen, _ = _choose(monkeypatch, times=times, packages=("xformers",), cuda="12.8")
    assert chosen.packed.name == "varlen"
    assert "xformers 9.90 ms" in chosen.why


def test_a_back_end_that_computes_something_else_is_not_used():
    """The trial compares with float32, on any device."""
    sdpa = attention.BACKENDS["sdpa"]
    attention._trial(sdpa, torch.device("cpu"), 2, 32)
    wrong = sdpa._replace(backward=lambda *a: sdpa.backward(*a)[::-1])
    with pytest.raises(attention._Failed, match="its dq is off by"):
        attention._trial(wrong, torch.device("cpu"), 2, 32)


# --- skipped steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_bad_step_changes_nothing(where):
    networks = _networks()
    for step in _steps(networks, optim=_half()):
        images, masks = _batch(networks[0])
        elements = _elements(masks, networks[0])
        step.accumulate(images, step.prepare(masks), elements)
        step.update(VALUES)
        before = {name: t.clone() for name, t in step.masters().items()}
        moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
        step.accumulate(images, step.prepare(masks), elements)
        if where == "loss":
            step._loss = step._loss * torch.inf
        else:
            step.parameters[5].grad.view(-1)[0] = torch.nan
        step.update(VALUES)
        assert step.skipped[:3].tolist() == [1, 1, 1]
        for name, tensor in step.masters().items():
            assert torch.equal(tensor, before[name]), name
        for old, state in zip(moments, step.optimizer.state.values(), strict=True):
            assert torch.equal(old, state["exp_avg"])
            assert state["step"].item() == 1
        step.accumulate(images, step.prepare(masks), elements)
        step.update(VALUES)
        assert step.skipped[:3].tolist() == [0, 1, 1]
        assert not torch.equal(step.masters()["encoder.norm.weight"], before["encoder.norm.weight"])


def test_modules_share_parameters_with_the_networks_given():
    networks = _networks()
    own = [copy.deepcopy(network) for network in networks]
    fast = FastStep(own[0], own[1], OptimConfig(precision="float32"), mean=MEAN, std=STD)
    given = {id(p) for network in own for p in network.parameters()}
    assert {id(p) for p in fast.parameters} == given
    assert all(isinstance(network, nn.Module) for network in own)
    # the networks given still are plain ones
    x = torch.randn(1, 3, 48, 48)
    assert torch.equal(own[0](x), networks[0](x))
