"""The captured step, with a stand-in for CUDA graphs that replays by calling."""

import functools
import importlib
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_fast.config import MaskConfig, OptimConfig, preset
from ijepa_fast.estimate import estimate
from ijepa_fast.fast import CapturedStep, FastStep, capture
from ijepa_fast.fast.layout import pack
from ijepa_fast.masks import sample_masks
from ijepa_fast.schedules import StepValues
from ijepa_fast.state import checkpoint
from ijepa_fast.step import graphs_would_pay
from tests.fast.test_fast import MEAN, STD, _batch, _elements, _networks

VALUES = [
    StepValues(lr=1e-3 * (1 + n), weight_decay=0.05 + n / 100, momentum=0.99 + n / 1000)
    for n in range(10)
]


@pytest.fixture(autouse=True)
def _by_calling(monkeypatch):
    # as a graph, it is recorded without being run
    monkeypatch.setattr(capture, "_record", lambda body, pool: body)


def _pair(precision="float32", **dims):
    made: list[Any] = []
    kinds: list[Any] = [FastStep, CapturedStep]
    for kind in kinds:
        networks: Any = _networks(**dims)
        made.append(kind(*networks, OptimConfig(precision=precision), mean=MEAN, std=STD))
    return made


def _run(step, images, masks, values=None):
    loss, std = step.accumulate(images, step.prepare(masks), _elements(masks, step.encoder))
    if values:
        step.update(values)
    return loss, std


def _assert_equal(plain, captured, *, exactly=True):
    expected, actual = plain.masters(), captured.masters()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        if exactly:
            assert torch.equal(actual[name], tensor), name
        else:
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replays_are_the_step(precision):
    """Bit for bit where no row count was rounded up, over keys that come back."""
    plain, captured = _pair(precision)
    batches = [_batch(plain.encoder, group=4, step=step % 3) for step in range(9)]
    for (images, masks), values in zip(batches, VALUES, strict=False):
        expected, actual = (_run(step, images, masks, values) for step in (plain, captured))
        assert torch.equal(actual[0], expected[0])
        assert actual[1].item() == pytest.approx(expected[1].item(), rel=1e-5)
    _assert_equal(plain, captured)
    assert torch.equal(plain.skipped, captured.skipped)
    # three batches, one update
    assert len(captured._graphs) == 4


@pytest.mark.parametrize("contexts", [1, 2])
def test_fillers_and_padding_change_nothing(contexts):
    """Whole contexts: rows of the context encoder, the predictor and the targets are rounded up."""
    plain, captured = _pair()
    padded = 0
    for number, values in zip(range(4), VALUES, strict=False):
        images, masks = _batch(plain.encoder, group=1, contexts=contexts, step=number)
        key = captured.prepare(masks).key
        assert key.fillers == 8
        assert key.context_rows == 256 * -(-(len(masks.context_index) + 8) // 256)
        padded += key.needed - plain.prepare(masks).key.needed
        expected, actual = (_run(step, images, masks, values) for step in (plain, captured))
        for mine, true in zip(actual, expected, strict=True):
            assert mine.item() == pytest.approx(true.item(), rel=2e-6)
    assert padded > 0
    _assert_equal(plain, captured, exactly=False)


def test_few_keys():
    """Of 200 steps of 64 images; without rounding nearly every step has its own."""
    config = MaskConfig(min_keep=10, truncation_group=1)
    keys: dict[bool, set[Any]] = {few: set() for few in (False, True)}
    for step in range(200):
        masks = sample_masks(config, grid=(14, 14), seed=0, step=step, positions=np.arange(64))
        for few, found in keys.items():
            found.add(pack(masks, 196, padded=False, few=few)[1])
    assert len(keys[False]) > 150
    assert len(keys[True]) < 30


class _Refuse(TorchDispatchMode):
    """Nothing that a graph cannot hold: reads by the host, pinned memory, copies to the device."""

    REFUSED = ("_local_scalar_dense", "is_nonzero", "pin_memory", "_pin_memory", "nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, name
        assert "device" not in (kwargs or {}) or str(kwargs["device"]) == "cpu"
        return func(*args, **(kwargs or {}))


def _without_checks(monkeypatch):
    """The ops' CPU versions check indices, which their kernels do not."""
    for op in ("patchify", "latent_loss"):
        module = importlib.import_module(f"ijepa_kernels.{op}")
        monkeypatch.setattr(module, "check_range", lambda *_: None)


def test_bodies_depend_on_memory_that_stays(monkeypatch):
    _without_checks(monkeypatch)
    _, captured = _pair()
    bodies: dict[Any, list[Any]] = {}
    original = capture._Graphs.run

    def run(self, key, body):
        bodies.setdefault(key, []).append(body)
        original(self, key, body)

    monkeypatch.setattr(capture._Graphs, "run", run)
    images, masks = _batch(captured.encoder, group=4)
    found = []
    for values in VALUES[:3]:
        _run(captured, images, masks, values)
        found.append(
            [
                t.data_ptr()
                for t in (
                    *(p for p in captured.parameters),
                    *(p.grad for p in captured.parameters),
                    *captured.target_encoder.parameters(),
                    captured._gradients.flat,
                    captured._numbers,
                    captured._values,
                    captured._counted,
                    *captured._layouts.values(),
                    *(pixels for pixels, _ in captured._images.values()),
                )
            ]
        )
    assert found[0] == found[1] == found[2]
    assert {len(each) for each in bodies.values()} == {3}
    (forward,) = (each[-1] for key, each in bodies.items() if key != "update")
    with _Refuse():
        forward()
    with pytest.raises(AssertionError), _Refuse():
        torch.ones(()).item()


def test_a_bad_step_changes_nothing():
    plain, captured = _pair()
    images, masks = _batch(plain.encoder, group=4)
    for number in range(6):
        for step in (plain, captured):
            _run(step, images, masks)
            if number in (2, 3):
                step.parameters[5].grad.view(-1)[0] = torch.nan
            step.update(VALUES[number])
    _assert_equal(plain, captured)
    assert captured.skipped.tolist() == plain.skipped.tolist() == [0, 2, 2, 2]


def test_micro_steps_add_up():
    plain, captured = _pair()
    config = MaskConfig(min_keep=1, truncation_group=6)
    for number, values in zip(range(4), VALUES, strict=False):
        images, whole = _batch(plain.encoder, images=6, group=6, step=number % 2)
        elements = _elements(whole, plain.encoder)
        losses: dict[Any, list[Any]] = {}
        for step in (plain, captured):
            losses[step] = []
            for start in (0, 2, 4):
                masks = sample_masks(
                    config,
                    grid=plain.encoder.grid,
                    seed=0,
                    step=number % 2,
                    positions=np.arange(start, start + 2),
                )
                part = images[start : start + 2]
                losses[step].append(step.accumulate(part, step.prepare(masks), elements)[0])
            step.update(values)
        for mine, true in zip(losses[captured], losses[plain], strict=True):
            assert mine.item() == pytest.approx(true.item(), rel=1e-6)
    _assert_equal(plain, captured, exactly=False)


def test_loaded_weights_are_captured_anew():
    """Saved, loaded into a step that has captured already, and trained: as never captured."""
    plain, captured = _pair()
    images, masks = _batch(plain.encoder, group=4)
    for values in VALUES[:4]:
        _run(plain, images, masks, values)
        others = _batch(plain.encoder, group=4, step=1)
        _run(captured, others[0], others[1], values)
    assert len(captured._graphs) == 2
    state = checkpoint.Snapshot(plain, keep=True).take(plain, step=4, meta={})
    checkpoint.restore(captured, state)
    assert len(captured._graphs) == 0
    for values in VALUES[4:8]:
        expected, actual = (_run(step, images, masks, values)[0] for step in (plain, captured))
        assert torch.equal(actual, expected)
    _assert_equal(plain, captured)


def test_a_capture_that_fails_is_one_line(monkeypatch, caplog):
    def fails(body, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(capture, "_record", fails)
    plain, captured = _pair()
    images, masks = _batch(plain.encoder, group=4)
    with caplog.at_level(logging.WARNING, logger="ijepa_fast"):
        for values in VALUES[:4]:
            expected, actual = (_run(step, images, masks, values)[0] for step in (plain, captured))
            assert torch.equal(actual, expected)
    _assert_equal(plain, captured)
    assert [record.getMessage() for record in caplog.records] == [
        "graphs are off for this run, a capture failed: operation not permitted when stream is "
        "capturing"
    ]


def test_the_least_used_graphs_go(monkeypatch):
    monkeypatch.setattr(capture, "MOST", 2)
    ran: list[str] = []
    graphs = capture._Graphs(torch.device("cpu"))
    for key in ("a", "a", "b", "b", "a", "c", "c"):
        graphs.run(key, functools.partial(ran.append, key))
    assert ran == ["a", "a", "b", "b", "a", "c", "c"]
    assert list(graphs._replays) == ["a", "c"]


def test_graphs_are_for_steps_that_the_host_holds_up():
    """By predicted GPU time, at batch 128 and an H200's peak."""
    peak = 989e12
    found = {
        name: graphs_would_pay(128 * estimate(preset(name)).flops, peak)
        for name in ("vitb16_in1k", "vitl16_in1k", "vith14_in1k")
    }
    assert found == {"vitb16_in1k": True, "vitl16_in1k": False, "vith14_in1k": False}
    assert not graphs_would_pay(1.0, None)
