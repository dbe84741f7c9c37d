"""The target encoder's products in float8: that they run, and what they change."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ijepa_fast.config import Config, DataConfig, ModelConfig, OptimConfig, as_dict
from ijepa_fast.fast import CapturedStep, FastStep, capture
from ijepa_fast.fast.float8 import Float8Block, check_device, product
from ijepa_fast.state.checkpoint import load_weights
from ijepa_fast.state.run_folder import recipe_difference
from ijepa_kernels import quantize_rows
from tests.fast.test_fast import MEAN, STD, VALUES, _batch, _elements, _networks

DIMS: dict[str, Any] = {"width": 64, "heads": 4, "depth": 4}


def _step(target_precision="fp8", kind: type[FastStep] = FastStep):
    encoder, predictor = _networks(**DIMS)
    return kind(
        encoder, predictor, OptimConfig(), mean=MEAN, std=STD, target_precision=target_precision
    )


def _train(step, batches):
    losses = []
    for images, masks in batches:
        loss, _ = step.accumulate(images, step.prepare(masks), _elements(masks, step.encoder))
        step.update(VALUES)
        losses.append(loss)
    return losses


@torch.no_grad()
def _targets(step, images, masks):
    return step.forward(images, step.prepare(masks))[1].double()


def test_targets_are_near_those_of_bfloat16():
    plain, narrow = _step("same"), _step()
    batch = _batch(plain.encoder)
    for _ in range(3):
        expected, actual = _targets(plain, *batch), _targets(narrow, *batch)
        assert not torch.equal(actual, expected)
        assert F.cosine_similarity(actual, expected, dim=-1).min() > 0.999
        _train(plain, [batch] * 2)
        load_weights(narrow, plain.masters())


def test_every_product_of_the_targets_blocks_runs_in_float8(monkeypatch):
    step = _step()
    images, masks = _batch(step.encoder)
    narrow: list[Any] = []
    scaled_mm, linear = F.scaled_mm, F.linear

    def spy(a, b, *args, **options):
        narrow.append((a.dtype, b.dtype, a.shape[1]))
        return scaled_mm(a, b, *args, **options)

    wide: list[Any] = []
    monkeypatch.setattr(F, "scaled_mm", spy)

    def wide_spy(x, weight, bias):
        wide.append(weight.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", wide_spy)
    step._target(images, step.prepare(masks))
    # qkv (in the last block q apart), proj, fc1, fc2
    assert [width for *_, width in narrow] == [64, 64, 64, 256] * 3 + [64, 64, 64, 64, 256]
    assert {dtype for *dtypes, _ in narrow for dtype in dtypes} == {torch.float8_e4m3fn}
    # the embedding
    assert wide == [(64, 3 * 8 * 8)]


def _assert_rounded(step):
    named = dict(step.encoder.named_parameters())
    checked = 0
    for name, block in step.target_encoder.named_modules():
        if isinstance(block, Float8Block):
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
                average = step.optimizer.state[named[f"{name}.{layer}.weight"]]["ema"]
                rounded = block.get_submodule(layer).__dict__["rounded"]
                fresh = quantize_rows(average)
                assert torch.equal(rounded.rows.float(), fresh.rows.float())
                assert torch.equal(rounded.scale, fresh.scale)
                checked += 1
    assert checked == 16


def test_weights_are_the_averages_rounded():
    step, other = _step(), _step()
    _assert_rounded(step)
    before = step.target_encoder.blocks[0].mlp.fc1.__dict__["rounded"].rows.data_ptr()
    batches = [_batch(step.encoder, step=n) for n in range(3)]
    _train(step, batches)
    _assert_rounded(step)
    # what a captured step reads never moves
    assert step.target_encoder.blocks[0].mlp.fc1.__dict__["rounded"].rows.data_ptr() == before
    load_weights(other, step.masters())
    _assert_rounded(other)
    assert torch.equal(_targets(other, *batches[0]), _targets(step, *batches[0]))
    assert step.masters().keys() == _step("same").masters().keys()


def test_captured(monkeypatch):
    monkeypatch.setattr(capture, "_record", lambda body, pool: body)
    plain, captured = _step(), _step(kind=CapturedStep)
    batches = [_batch(plain.encoder, group=4, step=n % 2) for n in range(5)]
    losses = [_train(step, batches) for step in (plain, captured)]
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    expected = plain.masters()
    assert all(torch.equal(t, expected[name]) for name, t in captured.masters().items())


def test_the_part_of_fixed_shape_and_the_rest_are_the_whole():
    step = _step()
    images, masks = _batch(step.encoder)
    layout = step.prepare(masks)
    whole = step._target(images, layout)
    trunk = step.target_encoder.trunk(images, step.mean, step.std, step._grids[len(images)])
    assert torch.equal(step.target_encoder.head(*trunk, layout), whole)


def test_product():
    y, weight, bias = torch.randn(33, 64), torch.randn(48, 64), torch.randn(48).bfloat16()
    # rows and columns of different sizes: each has its own scale
    y *= torch.logspace(-3, 3, 33)[:, None]
    weight *= torch.logspace(-2, 2, 48)[:, None]
    out = product(quantize_rows(y), quantize_rows(weight), bias)
    assert out.dtype == torch.bfloat16
    a, b = (rows.double() * scale for rows, scale in map(quantize_rows, (y, weight)))
    torch.testing.assert_close(out.double(), a @ b.t() + bias, rtol=2**-8, atol=1e-3)


# --- where it cannot run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "reference"}, "target_precision must be same with path reference, got 'fp8'"),
        ({"optim": OptimConfig(precision="float32")}, "same where optim.precision is float32"),
        ({"shard": "full"}, "same where shard is full"),
        ({"model": ModelConfig(width=72, heads=3)}, r"not a multiple of 16 \(72\)"),
        ({"model": ModelConfig(mlp_hidden=1000)}, r"not a multiple of 16 \(1000\)"),
    ],
)
def test_refused_by_the_configuration(settings, message):
    data = DataConfig(crop=224)
    Config(data=data, target_precision="fp8")
    with pytest.raises(ValueError, match=message):
        Config(data=data, target_precision="fp8", **settings)


def test_part_of_the_recipe():
    """Runs of before the setting go on without it."""
    new = as_dict(Config())
    old = {key: value for key, value in new.items() if key != "target_precision"}
    assert recipe_difference(old, new) == []
    changed = as_dict(Config(target_precision="fp8"))
    assert recipe_difference(old, changed) == ["target_precision: same -> fp8"]


def test_refused_by_the_step():
    encoder, predictor = _networks(**DIMS)
    config = OptimConfig(precision="float32")
    with pytest.raises(ValueError, match=r"must have optim\.precision bfloat16 .* got float32"):
        FastStep(encoder, predictor, config, mean=MEAN, std=STD, target_precision="fp8")
    mesh: Any = object()
    with pytest.raises(ValueError, match="got bfloat16 and sharded ones"):
        FastStep(
            encoder, predictor, OptimConfig(), mean=MEAN, std=STD, mesh=mesh, target_precision="fp8"
        )


@pytest.mark.parametrize(("has", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_refused_by_older_gpus(has, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: has)
    if runs:
        check_device(torch.device("cuda"))
        return
    with pytest.raises(ValueError, match=r"capability 8\.9 or higher .*, got 8\.0"):
        check_device(torch.device("cuda"))
