"""The reference step against a per-sequence loop in float64, and its promises one by one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ijepa_fast.config import MaskConfig, OptimConfig
from ijepa_fast.masks import Masks, sample_masks
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.reference import (
    ReferenceStep,
    ema_update_,
    latent_loss_sum,
    latent_targets,
    normalise,
    pad_contexts,
    parameter_groups,
    predict,
)
from ijepa_fast.schedules import StepValues
from tests.trainer import plain_step
from tests.trainer.plain_step import Indices, PlainNetworks

GRID = (3, 5)
CASE: dict[str, Any] = {
    "patch": 4,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "pdim": 12,
    "pdepth": 2,
    "B": 3,
    "nenc": 1,
    "npred": 2,
}
VALUES = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9)


def _pack(contexts: Indices, targets: Indices, patches: int = GRID[0] * GRID[1]) -> Masks:
    rows, ends = [], [0]
    for block in contexts:
        for image, context in enumerate(block):
            rows += [image * patches + patch for patch in context]
            ends.append(len(rows))
    return Masks(
        context_index=torch.tensor(rows, dtype=torch.int32),
        context_cu=torch.tensor(ends, dtype=torch.int32),
        max_context=max(b - a for a, b in pairwise(ends)),
        target_index=torch.tensor(targets, dtype=torch.int32).transpose(0, 1),
    )


def _networks(case: dict[str, Any], grid: tuple[int, int] = GRID, seed: int = 0) -> PlainNetworks:
    """Target encoder unlike the context encoder, as in the middle of a run."""
    generator = torch.Generator().manual_seed(seed)
    networks = plain_step.random_weights(case, grid, generator)
    networks.target = plain_step.random_weights(case, grid, generator).encoder
    return networks


def _load(module: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    # buffers are not in `weights`: the module has its own position table
    own = dict(module.named_parameters())
    assert own.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _modules(networks: PlainNetworks, case: dict[str, Any]) -> tuple[VisionTransformer, Predictor]:
    patch = networks.patch_size
    encoder = VisionTransformer(
        image_size=(networks.grid[0] * patch, networks.grid[1] * patch),
        patch_size=patch,
        width=case["dim"],
        depth=case["depth"],
        heads=case["heads"],
        mlp_hidden=4 * case["dim"],
    )
    predictor = Predictor(
        grid=networks.grid,
        encoder_width=case["dim"],
        width=case["pdim"],
        depth=case["pdepth"],
        heads=case["heads"],
        mlp_hidden=4 * case["pdim"],
    )
    _load(encoder, networks.encoder)
    _load(predictor, networks.predictor)
    return encoder, predictor


def _step(networks: PlainNetworks, case: dict[str, Any], **config: Any) -> ReferenceStep:
    encoder, predictor = _modules(networks, case)
    step = ReferenceStep(
        encoder,
        predictor,
        OptimConfig(**{"precision": "float32", **config}),
        mean=plain_step.MEAN,
        std=plain_step.STD,
    )
    _load(step.target_encoder, networks.target)
    return step


def _batch(
    case: dict[str, Any], *, context: int | None, target: int = 4, seed: int = 1
) -> tuple[Tensor, Indices, Indices]:
    generator = torch.Generator().manual_seed(seed)
    return plain_step.random_batch(case, GRID, generator, context=context, target=target)


def _accumulate(step: ReferenceStep, images: Tensor, contexts: Indices, targets: Indices) -> Tensor:
    """One micro-step of the whole batch; images (B, C, height, width)."""
    elements = len(targets) * len(contexts) * len(images) * len(targets[0][0]) * step.encoder.width
    loss, _ = step.accumulate(images.permute(0, 2, 3, 1), _pack(contexts, targets), elements)
    return loss


def _named(step: ReferenceStep) -> dict[str, torch.nn.Parameter]:
    named = {f"encoder.{k}": v for k, v in step.encoder.named_parameters()}
    return named | {f"predictor.{k}": v for k, v in step.predictor.named_parameters()}


def _grads(step: ReferenceStep) -> dict[str, Tensor]:
    result = {}
    for name, parameter in _named(step).items():
        assert parameter.grad is not None, name
        result[name] = parameter.grad.clone()
    return result


def _assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], *, limit: float, key_bias: float
) -> None:
    """Relative L2 per tensor; the key third of qkv biases, truly zero, absolutely."""
    assert actual.keys() == expected.keys()
    for name, given in expected.items():
        value, truth = actual[name].detach().double(), given.double()
        if name.endswith("qkv.bias"):
            assert (value.chunk(3)[1] - truth.chunk(3)[1]).abs().max() <= key_bias, name
            value = torch.cat(value.chunk(3)[::2])
            truth = torch.cat(truth.chunk(3)[::2])
        error = (value - truth).norm() / truth.norm()
        assert error <= limit, f"{name}: {error:.2e}"


def _snapshot(step: ReferenceStep) -> dict[str, Tensor]:
    """Everything that a step may change."""
    state = {k: v.detach().clone() for k, v in _named(step).items()}
    state |= {f"target.{k}": v.clone() for k, v in step.target_encoder.named_parameters()}
    for name, parameter in _named(step).items():
        for key, value in step.optimizer.state[parameter].items():
            state[f"{name}.{key}"] = value.clone()
    return state


# --- against the per-sequence loop ---------------------------------------------------------------


@pytest.mark.parametrize("loss", ["smooth_l1", "l2", "l1"])
@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize("length", [5, None], ids=["equal", "unequal"])
def test_loss_and_gradients_equal_the_per_sequence_loop(loss, contexts, length):
    case = {**CASE, "nenc": contexts}
    networks = _networks(case)
    step = _step(networks, case, loss=loss)
    images, context, target = _batch(case, context=length)
    if length is None:
        assert len({len(c) for block in context for c in block}) > 1
    expected, gradients = plain_step.gradients(networks, images, context, target, loss)
    value = _accumulate(step, images, context, target)
    assert value.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    _assert_close(_grads(step), gradients, limit=5e-6, key_bias=1e-7)


@pytest.mark.parametrize("contexts", [1, 2])
def test_predictions_and_gradients_in_float64(contexts):
    # without the rounding of float32 there is nothing to hide behind
    case = {**CASE, "nenc": contexts}
    networks = _networks(case)
    images, context, target = _batch(case, context=None)
    plain, gradients = plain_step.gradients(networks, images, context, target, "smooth_l1")
    modules = dict(zip(("encoder", "predictor"), _modules(networks, case), strict=True))
    for module in modules.values():
        module.double()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (plain_step.MEAN, plain_step.STD))
    normal = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    prediction = predict(modules["encoder"], modules["predictor"], normal, _pack(context, target))
    difference = prediction.flatten(0, 2) - torch.stack(plain.targets)
    torch.testing.assert_close(
        prediction.flatten(0, 2), torch.stack(plain.predictions), rtol=1e-11, atol=1e-11
    )
    (plain_step.distance_sum(difference, "smooth_l1") / difference.numel()).backward()
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            expected = gradients[f"{prefix}.{name}"]
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("group", [1, 3])
def test_masks_of_the_sampler_equal_the_per_sequence_loop(group):
    case = {**CASE, "B": 3, "nenc": 2, "npred": 3}
    grid = (6, 5)
    config = MaskConfig(num_targets=3, num_contexts=2, min_keep=2, truncation_group=group)
    masks = sample_masks(config, grid=grid, seed=0, step=3, positions=np.arange(3))
    patches = grid[0] * grid[1]
    flat = [
        [int(row) % patches for row in masks.context_index[a:b]]
        for a, b in pairwise(masks.context_cu.tolist())
    ]
    context = [flat[:3], flat[3:]]
    assert (len({len(c) for c in flat}) == 1) == (group == 3)
    target = masks.target_index.transpose(0, 1).tolist()
    networks = _networks(case, grid)
    step = _step(networks, case)
    images = torch.randint(
        0, 256, (3, 3, 24, 20), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    expected, gradients = plain_step.gradients(networks, images, context, target, "smooth_l1")
    elements = masks.target_index.numel() * 2 * case["dim"]
    loss, _ = step.accumulate(images.permute(0, 2, 3, 1), masks, elements)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    _assert_close(_grads(step), gradients, limit=5e-6, key_bias=1e-7)


# --- its pieces ----------------------------------------------------------------------------------


def test_normalise_by_hand():
    images = torch.tensor([[[[0, 255, 51]], [[102, 0, 255]]]], dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.25, 2.0])
    x = normalise(images, mean, std)
    assert x.shape == (1, 3, 2, 1)
    assert x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([-1.0, -0.2, 3.0, -1.0, 0.1, 0.5])


def test_pad_contexts_by_hand():
    masks = _pack([[[1, 3], [2]], [[0], [4, 5, 7]]], [[[0], [1]]], patches=8)
    rows, patches, valid = pad_contexts(masks, 8)
    assert valid is not None
    assert valid.tolist() == [
        [True, True, False],
        [True, False, False],
        [True, False, False],
        [True, True, True],
    ]
    real = [row[v].tolist() for row, v in zip(rows, valid, strict=True)]
    assert real == [[1, 3], [10], [0], [12, 13, 15]]
    assert torch.equal(patches, rows % 8)
    # padding stays inside its own image
    assert (rows // 8 == torch.tensor([[0], [1], [0], [1]])).all()


def test_equal_contexts_are_not_padded():
    masks = _pack([[[1, 3], [2, 7]]], [[[0], [1]]], patches=8)
    rows, patches, valid = pad_contexts(masks, 8)
    assert valid is None
    assert rows.tolist() == [[1, 3], [10, 15]]
    assert patches.tolist() == [[1, 3], [2, 7]]


def test_latent_targets_are_normalised_again_and_gathered():
    features = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)) * 1e-2
    masks = _pack([[[0], [0]]], [[[1, 2], [3, 4]], [[5, 0], [2, 2]], [[0, 1], [1, 0]]], patches=6)
    actual = latent_targets(features, masks)
    assert actual.shape == (3, 2, 2, 8)
    for block, images in enumerate([[[1, 2], [3, 4]], [[5, 0], [2, 2]], [[0, 1], [1, 0]]]):
        for image, patches in enumerate(images):
            # small features, so that the epsilon of 1e-5 shows
            expected = plain_step.layer_norm(features[image].double(), 1e-5, None, None)[patches]
            torch.testing.assert_close(
                actual[block, image].double(), expected, rtol=1e-5, atol=1e-6
            )


def test_latent_targets_are_normalised_in_float32():
    features = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    actual = latent_targets(features, _pack([[[0]]], [[[0, 1, 2]]], patches=3))
    assert actual.dtype == torch.float32
    expected = plain_step.layer_norm(features[0].double(), 1e-5, None, None)
    torch.testing.assert_close(actual[0, 0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "total"),
    [("smooth_l1", 0.125 + 0.5 + 2.5), ("l2", 0.25 + 1 + 9), ("l1", 0.5 + 1 + 3)],
)
def test_loss_by_hand(kind, total):
    target = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    prediction = torch.tensor([[[[[1.5, 1.0, 6.0]]], [[[1.0, 2.0, 3.0]]]]])
    assert latent_loss_sum(prediction, target, kind).item() == pytest.approx(total)


def test_an_unknown_loss_is_an_error():
    x = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="loss must be one of smooth_l1, l2, l1, got 'huber'"):
        latent_loss_sum(x, x[0], "huber")


def test_ema_by_hand():
    targets = [torch.tensor([1.0, 2.0]), torch.tensor([[4.0]])]
    sources = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0]])]
    ema_update_(targets, sources, torch.tensor(0.75), torch.tensor(0.25))
    assert targets[0].tolist() == [1.5, 1.5]
    assert targets[1].tolist() == [[3.0]]
    assert sources[0].tolist() == [3.0, 0.0]


def test_feature_std_goes_to_zero_when_features_collapse():
    networks = _networks(CASE)
    step = _step(networks, CASE)
    images, context, target = _batch(CASE, context=5)
    pixels, masks = images.permute(0, 2, 3, 1), _pack(context, target)
    _, _, features = step.forward(pixels, masks)
    _, spread = step.accumulate(pixels, masks, 1)
    # the rows that some target needs, each once
    needed = sorted(
        {(i, p) for i, row in enumerate(masks.target_index.flatten(1).tolist()) for p in row}
    )
    assert len(needed) < masks.target_index.numel()
    columns = torch.stack([features[i, p] for i, p in needed]).double()
    centred = columns - columns.mean(dim=0)
    by_hand = ((centred**2).sum(dim=0) / (len(columns) - 1)).sqrt().mean()
    assert spread.item() == pytest.approx(by_hand.item(), rel=1e-5)
    with torch.no_grad():
        step.target_encoder.norm.weight.zero_()
    _, spread = step.accumulate(pixels, masks, 1)
    assert spread.item() < 1e-8


# --- accumulation --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, None], ids=["equal", "unequal"])
@pytest.mark.parametrize("contexts", [1, 2])
def test_accumulation_changes_nothing(length, contexts):
    case = {**CASE, "B": 8, "nenc": contexts}
    networks = _networks(case)
    images, context, target = _batch(case, context=length)
    whole, parts = _step(networks, case), _step(networks, case)
    loss = _accumulate(whole, images, context, target)
    total = torch.zeros(())
    elements = 2 * contexts * 8 * 4 * 24
    for i in range(0, 8, 2):
        masks = _pack([b[i : i + 2] for b in context], [b[i : i + 2] for b in target])
        part, _ = parts.accumulate(images[i : i + 2].permute(0, 2, 3, 1), masks, elements)
        total += part
    assert total.item() == pytest.approx(loss.item(), rel=1e-6)
    expected = {k: v.double() for k, v in _grads(whole).items()}
    _assert_close(_grads(parts), expected, limit=2e-6, key_bias=1e-7)
    whole.update(VALUES)
    parts.update(VALUES)
    assert all(parameter.grad is None for parameter in _named(parts).values())


# --- AdamW and EMA -------------------------------------------------------------------------------


def test_mask_token_decays_and_norms_and_biases_do_not():
    encoder, predictor = _modules(_networks(CASE), CASE)
    names = {id(p): n for m in (encoder, predictor) for n, p in m.named_parameters()}
    groups: list[dict[str, Any]] = parameter_groups([encoder, predictor])
    decays, rest = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [group["decays"] for group in groups] == [True, False]
    assert decays | rest == set(names.values())
    assert not decays & rest
    assert rest == {n for n in names.values() if n.endswith(".bias") or "norm" in n}
    assert {"mask_token", "patch_embed.proj.weight", "predictor_proj.weight"} <= decays


def test_three_updates_equal_a_handwritten_adamw_and_ema():
    networks = _networks(CASE)
    step = _step(networks, CASE, beta1=0.8, beta2=0.95, eps=1e-3)
    initial = {k: v.detach().double().clone() for k, v in _named(step).items()}
    initial_target = {k: v.clone() for k, v in networks.target.items()}
    weights = {f"encoder.{k}": v for k, v in networks.encoder.items()}
    weights |= {f"predictor.{k}": v for k, v in networks.predictor.items()}
    plain = plain_step.PlainAdamW(beta1=0.8, beta2=0.95, eps=1e-3)
    generator = torch.Generator().manual_seed(5)
    for lr, decay, momentum in ((1e-2, 0.5, 0.9), (3e-2, 0.1, 0.5), (1e-3, 2.0, 0.99)):
        grads = {}
        for name, parameter in _named(step).items():
            parameter.grad = 1e-2 * torch.randn(parameter.shape, generator=generator)
            grads[name] = parameter.grad.double()
        step.update(StepValues(lr=lr, weight_decay=decay, momentum=momentum))
        plain.update_(weights, grads, lr, decay)
        for key, ema in networks.target.items():
            ema.copy_(momentum * ema + (1 - momentum) * networks.encoder[key])
    for name, parameter in _named(step).items():
        moved = (weights[name] - initial[name]).norm()
        assert moved > 0
        error = (parameter.detach().double() - weights[name]).norm()
        # float32 rounding of the weights themselves, and a small share of what they moved
        assert error <= 2e-7 * weights[name].norm() + 1e-6 * moved, name
        state = step.optimizer.state[parameter]
        assert state["step"].item() == 3
        torch.testing.assert_close(
            state["exp_avg"].double(), plain.first[name], rtol=1e-4, atol=1e-8
        )
        torch.testing.assert_close(
            state["exp_avg_sq"].double(), plain.second[name], rtol=1e-4, atol=1e-10
        )
    for name, ema in step.target_encoder.named_parameters():
        moved = (networks.target[name] - initial_target[name]).norm()
        error = (ema.double() - networks.target[name]).norm()
        assert error <= 3e-7 * networks.target[name].norm() + 1e-6 * moved, name


def test_target_encoder_starts_as_a_copy_and_gets_no_gradient():
    encoder, predictor = _modules(_networks(CASE), CASE)
    step = ReferenceStep(
        encoder, predictor, OptimConfig(precision="float32"), mean=[0.5] * 3, std=[0.5] * 3
    )
    source, target = step.encoder.state_dict(), step.target_encoder.state_dict()
    assert source.keys() == target.keys()
    assert all(torch.equal(source[k], target[k]) for k in source)
    assert not {v.data_ptr() for v in source.values()} & {v.data_ptr() for v in target.values()}
    _accumulate(step, *_batch(CASE, context=5))
    assert all(p.grad is None for p in step.target_encoder.parameters())
    trained = {id(p) for p in step.parameters}
    assert trained == {id(p) for p in [*encoder.parameters(), *predictor.parameters()]}


def test_update_without_gradients_is_an_error():
    step = _step(_networks(CASE), CASE)
    with pytest.raises(AssertionError, match="before accumulate"):
        step.update(VALUES)


# --- non-finite gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["encoder.norm.bias", "predictor.mask_token"])
def test_a_non_finite_gradient_skips_the_step(bad, name):
    step = _step(_networks(CASE), CASE)
    batch = _batch(CASE, context=5)

    def go(poison: bool) -> None:
        _accumulate(step, *batch)
        if poison:
            grad = _named(step)[name].grad
            assert grad is not None
            grad.view(-1)[3] = bad
        step.update(VALUES)

    go(poison=False)
    before = _snapshot(step)
    assert any(key.endswith(".exp_avg_sq") for key in before)
    go(poison=True)
    after = _snapshot(step)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert step.skipped.tolist() == [1, 1, 1, 0]
    assert all(parameter.grad is None for parameter in _named(step).values())
    go(poison=False)
    assert not any(torch.equal(before[k], v) for k, v in _snapshot(step).items() if "step" in k)
    assert step.skipped.tolist() == [0, 1, 1, 1]
    go(poison=True)
    # of two runs as long, the first counts
    assert step.skipped.tolist() == [1, 1, 2, 2]
    go(poison=True)
    assert step.skipped.tolist() == [2, 2, 3, 0]
    assert all(v.isfinite().all() for v in _snapshot(step).values())


def test_a_skipped_first_step_leaves_no_trace():
    skipped, fresh = (_step(_networks(CASE), CASE) for _ in range(2))
    batch = _batch(CASE, context=5)
    _accumulate(skipped, *batch)
    next(iter(_named(skipped).values())).grad.fill_(math.nan)  # type: ignore[union-attr]
    skipped.update(VALUES)
    for step in (skipped, fresh):
        _accumulate(step, *batch)
        step.update(VALUES)
    one, other = _snapshot(skipped), _snapshot(fresh)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- precision and host reads --------------------------------------------------------------------


def test_bfloat16_stays_near_float32():
    networks = _networks(CASE)
    full, half = _step(networks, CASE), _step(networks, CASE, precision="bfloat16")
    batch = _batch(CASE, context=None)
    losses = [_accumulate(step, *batch) for step in (full, half)]
    assert losses[1].dtype == torch.float32
    assert losses[1].item() != losses[0].item()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-2)
    exact, rounded = _grads(full), _grads(half)
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        if not name.endswith("qkv.bias"):
            error = (rounded[name] - gradient).norm() / gradient.norm()
            assert 1e-5 < error < 0.1, f"{name}: {error:.2e}"
    before = _snapshot(half)
    half.update(VALUES)
    after = _snapshot(half)
    assert {v.dtype for v in after.values()} == {torch.float32}
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_bfloat16_keeps_targets_and_features_exact_where_promised():
    step = _step(_networks(CASE), CASE, precision="bfloat16")
    images, context, target = _batch(CASE, context=5)
    prediction, latent, _ = step.forward(images.permute(0, 2, 3, 1), _pack(context, target))
    assert prediction.dtype == torch.bfloat16
    assert latent.dtype == torch.float32
    # normalised in float32: bfloat16 would leave means and variances off by 1e-3
    assert latent.mean(dim=-1).abs().max() < 1e-6
    variance = latent.var(dim=-1, unbiased=False)
    torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-4)


READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__")


@contextmanager
def _no_host_reads() -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a value was read back to the host inside the step")

    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [5, None], ids=["equal", "unequal"])
def test_nothing_is_read_back_to_the_host(precision, length):
    step = _step(_networks(CASE), CASE, precision=precision)
    images, context, target = _batch(CASE, context=length)
    pixels, masks = images.permute(0, 2, 3, 1), _pack(context, target)
    with _no_host_reads():
        for _ in range(2):
            loss, spread = step.accumulate(pixels, masks, 100)
            step.update(VALUES)
    assert loss.isfinite().all()
    assert spread.isfinite().all()
    assert step.skipped[:3].tolist() == [0, 0, 0]
