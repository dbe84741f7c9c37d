"""NaN and infinity in a run, on both paths and on one rank of two: skipped, and after the third in
a row the end, with the samples by name.
"""

import json
import math
import re

import numpy as np
import pytest
import torch

from ijepa_fast.config import MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.data import build_index, epoch_order
from ijepa_fast.data.order import replacement_id
from ijepa_fast.fast import FastStep
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep, count_skip
from ijepa_fast.schedules import StepValues
from tests.trainer import tiny

STEPS = {"fast": FastStep, "reference": ReferenceStep}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def _nan_images(steps, rank=0):
    """Every pixel of these steps (counted from 1) is NaN on one rank."""
    return {"IJEPA_FAST_FAULT": ",".join(f"{rank}:{step}:nan-image" for step in steps)}


@pytest.fixture
def planted(monkeypatch):
    return lambda *steps: monkeypatch.setenv(*_nan_images(steps).popitem())


def _expected(data, step, seed=3):
    """Sample ids of a step: 5 steps an epoch."""
    epoch, place = divmod(step - 1, 5)
    return epoch_order(len(build_index(data)), seed=seed, epoch=epoch)[8 * place : 8 * place + 8]


@pytest.mark.parametrize("path", STEPS)
def test_three_in_a_row_name_their_samples(data, out, capsys, path, planted):
    settings = {"path": path, "log__interval": 5, "checkpoint__keep_every": 1}
    planted(2, 4, 5, 6)
    assert tiny.run(data, out, **settings) == 4
    # weights, moments and target encoder, of the last checkpoint before the end (step 5)
    assert all(v.isfinite().all() for v in tiny.final_state(out).values())
    error = capsys.readouterr().err
    report = json.loads((out / "nonfinite.json").read_text())
    assert report["seed"] == 3
    index = build_index(data)
    assert [s["step"] for s in report["steps"]] == [4, 5, 6]
    assert [s["epoch"] for s in report["steps"]] == [0, 0, 1]
    for s in report["steps"]:
        assert s["ids"] == _expected(data, s["step"]).tolist()
        assert s["files"] == [index.name(row) for row in s["ids"]]
        assert all((data / name).is_file() for name in s["files"])
    assert len({s["lr"] for s in report["steps"]}) == 3
    assert error.count("\n") == 1
    assert error.startswith("error: loss and gradients must be finite, got 3 steps in a row")
    assert "steps 4 to 6" in error
    assert str(out / "nonfinite.json") in error
    assert ", ".join(repr(name) for name in report["steps"][0]["files"][:3]) in error
    assert not list(out.glob("*.tmp"))
    # the learning rate is that of the log
    rows = {row["step"]: row["lr"] for row in tiny.rows(out)}
    assert report["steps"][1]["lr"] == rows[5]


@pytest.mark.parametrize("path", STEPS)
def test_two_in_a_row_go_on(data, out, path, planted):
    planted(3, 4, 6, 7, 15)
    assert tiny.run(data, out, path=path) == 0
    state = tiny.final_state(out)
    assert (int(state["step"]), int(state["adam_step"])) == (15, 10)
    assert all(v.isfinite().all() for v in state.values())
    assert not (out / "nonfinite.json").exists()


@pytest.mark.parametrize("path", STEPS)
def test_nan_on_the_second_rank_alone(data, out, path):
    """Both skip, both leave, and the report names the samples of both."""
    settings = {"path": path, "batch__device": 4, "log__interval": 5, "checkpoint__keep_every": 1}
    argv, output = tiny.arguments(data, out, **settings), out.parent / "output.txt"
    faults = _nan_images((6, 7, 8), rank=1)
    children = [tiny.start(argv, output, {**e, **faults}) for e in tiny.rank_environments(2)]
    for child in children:
        child.join(60)
        child.kill()
        child.join()
    text = output.read_text()
    assert [child.exitcode for child in children] == [4, 4], text
    report = json.loads((out / "nonfinite.json").read_text())
    assert [s["step"] for s in report["steps"]] == [6, 7, 8]
    for s in report["steps"]:
        assert s["ids"] == _expected(data, s["step"]).tolist()
    assert len(re.findall(r"^error: .*nonfinite.json", text, re.MULTILINE)) == 1
    assert "error on rank 1: loss and gradients must be finite" in text
    assert tiny.rows(out)[-1]["skipped"] == 3
    state = tiny.final_state(out)
    assert (int(state["step"]), int(state["adam_step"])) == (5, 5)


@pytest.mark.parametrize("path", STEPS)
def test_what_stands_in_for_a_bad_file_is_named(tmp_path, out, path, planted):
    data = tiny.write_images(tmp_path / "data", count=39)
    tiny.bad_png(data / "class0" / "bad.png")
    index = build_index(data)
    (bad,) = (row for row in range(40) if index.name(row).endswith("bad.png"))
    order = epoch_order(40, seed=3, epoch=0).tolist()
    position = order.index(bad)
    step = position // 8 + 1
    first = min(max(1, step - 1), 3)
    planted(*range(first, first + 3))
    assert tiny.run(data, out, path=path) == 4
    report = {s["step"]: s for s in json.loads((out / "nonfinite.json").read_text())["steps"]}
    used = report[step]["ids"][position % 8]
    assert used == replacement_id(40, seed=3, epoch=0, position=position, attempt=0)
    assert "class0/bad.png" not in report[step]["files"]


# --- the step ------------------------------------------------------------------------------------


def _step(path):
    model = ModelConfig(
        name="vit_tiny", patch_size=8, width=32, depth=2, heads=2, predictor_width=16
    )
    masks = sample_masks(
        MaskConfig(min_keep=1, truncation_group=1),
        grid=(6, 6),
        seed=0,
        step=0,
        positions=np.arange(4),
    )
    networks = build_models(model, (48, 48), torch.Generator().manual_seed(0))
    config = OptimConfig(precision="float32")
    step = STEPS[path](*networks, config, mean=[0.5] * 3, std=[0.25] * 3)
    images = torch.randint(
        0, 256, (4, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    elements = masks.target_index.numel() * 32
    return step, lambda: step.accumulate(images, step.prepare(masks), elements)


VALUES = StepValues(lr=1e-3, weight_decay=0.1, momentum=0.9)


@pytest.mark.parametrize("path", STEPS)
def test_an_infinite_loss_with_finite_gradients_is_skipped(path):
    step, accumulate = _step(path)
    accumulate()
    step.update(VALUES)
    bias = step.predictor.predictor_proj.bias
    with torch.no_grad():
        bias[3] = math.inf
    before = {name: value.clone() for name, value in step.masters().items()}
    loss, _ = accumulate()
    assert loss.isposinf()
    assert all(p.grad.isfinite().all() for p in step.parameters)
    step.update(VALUES)
    assert step.skipped.tolist() == [1, 1, 1, 0]
    assert all(torch.equal(before[name], value) for name, value in step.masters().items())
    # the loss of the next step starts anew
    with torch.no_grad():
        bias[3] = 0
    accumulate()
    step.update(VALUES)
    assert step.skipped.tolist() == [0, 1, 1, 1]
    assert not torch.equal(before["encoder.norm.weight"], step.encoder.norm.weight)


def test_counts_say_where_the_longest_run_ended():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        bad = rng.random(60) < share
        skipped = torch.zeros(4, dtype=torch.int64)
        for done in range(1, 61):
            skipped = count_skip(skipped, torch.tensor(float(bad[done - 1])))
            text = "".join("x" if b else "." for b in bad[:done])
            runs = [(m.end(), len(m.group())) for m in re.finditer("x+", text)]
            current = runs[-1][1] if runs and runs[-1][0] == done else 0
            longest = max((length for _, length in runs), default=0)
            assert skipped[:3].tolist() == [current, longest, text.count("x")]
            if longest:
                assert done - int(skipped[3]) == next(e for e, n in runs if n == longest)
