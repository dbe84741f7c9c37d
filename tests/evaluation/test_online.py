"""Evaluation while a run trains: what it computes, when, and what it changes: nothing."""

import errno
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa_fast import evaluation
from ijepa_fast.config import EvalConfig
from ijepa_fast.config.cli import parse
from ijepa_fast.config.presets import PRESETS, preset
from ijepa_fast.data import open_index
from ijepa_fast.errors import UsageError
from ijepa_fast.evaluation import monitors, online
from ijepa_fast.evaluation.online import OnlineEvaluation, evaluation_interval
from ijepa_fast.masks import sample_masks
from ijepa_fast.reference import normalise
from ijepa_fast.schedules import Schedules
from ijepa_fast.state.checkpoint import load_latest
from tests.trainer import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """15 steps, evaluated after every fourth."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = {"eval__data": data, "eval__every": 4}
    assert tiny.run(data, out, **settings) == 0
    return out


def _evaluations(run):
    return [row for row in tiny.rows(run) if "monitors" in row]


def test_rows(run):
    rows = _evaluations(run)
    assert [row["step"] for row in rows] == [0, 4, 8, 12, 15]
    names = {
        "feature_std",
        "rankme",
        "lidar",
        "prediction_cosine",
        "mean_target_cosine",
        "shuffled_cosine",
    }
    for row in rows:
        assert row["monitors"].keys() == names
        assert all(np.isfinite(value) for value in row["monitors"].values())
        # the set is smaller than a part is at the most
        assert "images" not in row
    assert rows[0]["knn"].keys() == {"raw pixels", "untrained network"}
    assert [set(row["knn"]) for row in rows[1:]] == [
        {f"target encoder, step {step}"} for step in (4, 8, 12, 15)
    ]
    # the weights change in between
    assert len({row["monitors"]["prediction_cosine"] for row in rows}) == 5


def test_the_last_evaluation_is_of_the_saved_weights(run, data):
    """Recomputed one image at a time, from the definition."""
    state = load_latest(run / "checkpoints")
    assert state is not None
    config = parse(["--config", str(run / "config.yaml")]).config
    index = open_index(str(data))[0]
    of = OnlineEvaluation(config, index, CPU, steps=15, world=1)
    context, target, predictor = of.networks(state.tensors)
    images, _ = of._images
    assert len(images) == 40
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    cosines, patches = [], []
    with torch.no_grad():
        for number in range(len(images)):
            x = normalise(images[number : number + 1], mean, std)
            mask = sample_masks(
                replace(config.masks, truncation_group=1),
                grid=config.grid,
                seed=config.seed,
                step=0,
                positions=np.array([number]),
            )
            features = target(x)
            patches.append(features[0])
            goal = torch.nn.functional.layer_norm(features, features.shape[-1:], eps=1e-5)[0]
            kept = mask.context_index.long()[None]
            z = context.encode(context.embed(x)[:, kept[0]])
            for block in mask.target_index[0].long():
                guess = predictor(z, kept, block[None])[0]
                cosines.append(torch.nn.functional.cosine_similarity(guess, goal[block]))
    numbers = _evaluations(run)[-1]["monitors"]
    assert numbers["prediction_cosine"] == pytest.approx(float(torch.cat(cosines).mean()), abs=2e-5)
    rows = torch.cat(patches)
    assert numbers["feature_std"] == pytest.approx(float(rows.std(dim=0).mean()), rel=1e-4)
    s = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert numbers["rankme"] == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-3)


def test_an_evaluation_changes_nothing(run, data, tmp_path):
    assert tiny.run(data, tmp_path / "plain") == 0
    first, second = tiny.final_state(run), tiny.final_state(tmp_path / "plain")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    trained = [row for row in tiny.rows(run) if "loss" in row]
    assert trained == tiny.rows(tmp_path / "plain")


def test_a_resumed_run_is_evaluated_as_the_whole_one(run, data, tmp_path):
    settings = {"eval__data": data, "eval__every": 4}
    out = tmp_path / "parts"
    assert tiny.run(data, out, max_steps=8, **settings) == 0
    assert tiny.run(data, out, **settings) == 0
    numbers = {row["step"]: (row["monitors"], row["knn"]) for row in _evaluations(run)}
    again = {row["step"]: (row["monitors"], row["knn"]) for row in _evaluations(out)}
    assert again.keys() == numbers.keys()
    assert all(again[step] == numbers[step] for step in (0, 4, 12, 15))
    assert again[8][0] == numbers[8][0]


def test_without_labels(data, tmp_path, capsys):
    assert tiny.run(data, tmp_path / "run", eval__every=5, max_steps=5) == 0
    rows = _evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 5]
    assert all("knn" not in row and "data" not in row for row in rows)
    assert "evaluation at step 5  std" in capsys.readouterr().out


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_evaluations_cost_less_than_half_a_percent(name, world):
    """In images through one encoder; docs/log/performance.md has the time."""
    config = preset(name)
    images = {"demo": 8_000, "fashion_mnist": 60_000, "fashion_mnist_published": 60_000}
    schedules = Schedules.of(
        config.optim,
        global_batch=config.batch.global_,
        steps_per_epoch=images.get(name, 1_281_167) // config.batch.global_,
    )
    steps = schedules.run_steps
    every = evaluation_interval(config, steps, world)
    if not every:
        pytest.skip("this recipe has no evaluation")
    if config.eval.whole:
        assert name == "demo"
        return
    of_one = online.IMAGES * (1 + online.VIEWS)
    if config.eval.data:
        of_one += online.TRAIN_ROWS + online.TEST_ROWS
    number = 2 + math.ceil(steps / every) - 1
    # both encoders and the predictor, forward; backward twice as much for two of them
    share = number * of_one * world / (4 * config.batch.global_ * steps)
    # the first and the last are always there
    assert share <= 0.004 or number == 2
    if world == 1:
        assert number > 2


@pytest.mark.parametrize("whole", [False, True])
def test_all_labelled_images_only_where_asked_for(whole, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(online, "TRAIN_ROWS", 16)
    monkeypatch.setattr(online, "TEST_ROWS", 4)
    # the recipe is over the preset `demo`, which asks for it
    flag = "eval__whole" if whole else "eval__no_whole"
    settings = {"eval__data": data, "eval__every": 2, flag: True}
    assert tiny.run(data, tmp_path / "run", max_steps=4, **settings) == 0
    rows = _evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 4]
    part = [16, 4]
    assert [row.get("images") for row in rows] == [part, part, None if whole else part]
    text = capsys.readouterr().out
    printed = text[text.index("accuracy on ") :].splitlines()
    assert printed[0].endswith(str(data) if whole else "16 training and 4 test images")
    assert printed[1].split() == (["kNN", "ridge"] if whole else ["kNN"])
    subjects = ["raw pixels", "untrained network", "target encoder, step 4"]
    assert [line.split("  ")[0] for line in printed[2:5]] == subjects
    assert ("table" in rows[-1]) == whole
    if whole:
        # as the command has it
        assert list(rows[-1]["table"]) == subjects
        argv = [str(tmp_path / "run"), "--methods", "knn", "ridge", "--json"]
        assert evaluation.main(argv) == 0
        for subject, of in json.loads(capsys.readouterr().out)["accuracy"].items():
            ridge = of["ridge" if subject == "raw pixels" else "ridge, last 4"]
            assert rows[-1]["table"][subject] == {"kNN": of["kNN"], "ridge": ridge}
    assert tiny.run(data, tmp_path / "run", max_steps=4, **settings) == 0
    assert _evaluations(tmp_path / "run") == rows


def test_views_are_crops_where_the_recipe_has_none(data):
    """LiDAR compares views of an image, which must differ."""
    index = open_index(str(data))[0]
    arguments = ["--data", str(data), "--data.crop", "32", "--model.patch-size", "8"]
    crops = ["--data.scale", "1", "1", "--data.ratio", "1", "1"]
    _, views = OnlineEvaluation(
        parse([*arguments, *crops]).config, index, CPU, steps=1, world=1
    )._images
    assert len(views) == 4
    assert not any(torch.equal(views[0], view) for view in views[1:])
    _, same = OnlineEvaluation(parse(arguments).config, index, CPU, steps=1, world=1)._images
    assert all(torch.equal(a, b) for a, b in zip(views, same, strict=True))


def test_a_collapse_is_said_where_there_was_no_evaluation_at_first(
    data, tmp_path, run, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        "ijepa_fast.evaluation.scheduled.collapse_warning", lambda now, first: seen.append(first)
    )
    out = tmp_path / "run"
    assert tiny.run(data, out, max_steps=2) == 0
    assert tiny.run(data, out, max_steps=4, eval__every=1) == 0
    assert seen == [_evaluations(run)[0]["monitors"]] * 2


def test_no_evaluation_unless_asked_for():
    config = parse(["--data", "x", "--eval.data", "None"]).config
    # the preset `demo` has `whole`
    assert replace(config.eval, whole=False) == EvalConfig()
    assert evaluation_interval(config, 1000) == 0
    with pytest.raises(UsageError, match=r"eval.every must be at least 1, got 0"):
        parse(["--data", "x", "--eval.every", "0"])


def test_a_collapse_is_said(data, tmp_path, monkeypatch):
    """Whatever `collapse_warning` says of the first and this one."""
    seen = []

    def judge(now, first):
        seen.append((now, first))
        return "features collapse: advice" if len(seen) == 2 else None

    monkeypatch.setattr("ijepa_fast.evaluation.scheduled.collapse_warning", judge)
    assert tiny.run(data, tmp_path / "run", eval__every=2, max_steps=6) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("features collapse: advice") == 1
    assert "step 4: features collapse: advice" in log
    rows = _evaluations(tmp_path / "run")
    assert [first for _, first in seen] == [rows[0]["monitors"]] * 3
    assert [now for now, _ in seen] == [row["monitors"] for row in rows[1:]]


@pytest.mark.parametrize("settings", [{}, {"eval__every": 4}], ids=["planned", "asked for"])
def test_evaluations_that_take_too_long_are_left_out_unless_asked_for(
    settings, data, tmp_path, monkeypatch
):
    """Those of 15 short steps take far more than 1 % of the run."""
    monkeypatch.setattr("ijepa_fast.evaluation.scheduled.evaluation_interval", lambda *_: 4)
    out = tmp_path / "run"
    assert tiny.run(data, out, eval__data=data, **settings) == 0
    left_out = [int(n) for n in re.findall(r"no evaluation at step (\d+): saves,", _log(out))]
    assert left_out == ([] if settings else [4, 8, 12])
    assert [row["step"] for row in _evaluations(out)] == sorted({0, 4, 8, 12, 15} - set(left_out))


@pytest.mark.parametrize(("limit", "part"), [(1e-4, (16, 4)), (0.0, None), (1e4, "none")])
def test_an_evaluation_has_a_limit_in_seconds(limit, part, data, tmp_path, monkeypatch):
    """A tenth of a millisecond pays for the fewest images; ten thousand seconds are more than the
    steps of the run take.
    """
    monkeypatch.setattr(online, "TRAIN_ROWS", 32)
    monkeypatch.setattr(online, "TEST_ROWS", 8)
    monkeypatch.setattr(online, "_FEWEST", 4)
    settings = {"eval__data": data, "eval__no_whole": True, "eval__seconds": limit}
    for steps in (2, 4):
        assert tiny.run(data, tmp_path / "run", max_steps=steps, **settings) == 0
    rows = _evaluations(tmp_path / "run")
    if part == "none":
        assert not rows
        assert "no evaluation: the steps of this run take less than" in _log(tmp_path / "run")
    else:
        taken = list(part or (32, 7))
        assert [(row["step"], row["images"]) for row in rows] == [(n, taken) for n in (0, 2, 4)]


def _log(run):
    return (run / "train.log").read_text()


@pytest.mark.parametrize(
    ("step", "error"),
    [(0, OSError(errno.EIO, "Input/output error")), (2, ValueError("features must be finite"))],
)
def test_an_evaluation_that_fails_does_not_end_the_run(step, error, data, tmp_path, monkeypatch):
    real, calls = monitors.lidar, []

    def sometimes(views):
        calls.append(0)
        if len(calls) == 1 + step // 2:
            raise error
        return real(views)

    monkeypatch.setattr(monitors, "lidar", sometimes)
    assert tiny.run(data, tmp_path / "run", eval__every=2, max_steps=6) == 0
    rows = _evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [n for n in (0, 2, 4, 6) if n != step]
    assert f"no evaluation at step {step}: {error}" in _log(tmp_path / "run")


def test_labelled_data_that_is_not_there_ends_a_run_before_it_trains(data, tmp_path, capsys):
    assert tiny.run(data, tmp_path / "run", eval__data=tmp_path / "none") == 2
    assert "error: eval.data must be an existing folder" in capsys.readouterr().err
