"""Every part of gpu-check on the CPU, at tiny shapes, and where something is missing."""

import importlib
import json
import time

import pytest

from benchmarks import harness, step_report
from benchmarks.gpu_check import data, files, first, ops, sanitize, step, train, tune
from benchmarks.harness import Bench
from benchmarks.photographs import write_photographs
from benchmarks.shapes import MODELS
from ijepa_fast.verify import parity

CPU = ("--device", "cpu")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """`start` says where benchmarks run; the rate of a matrix product takes seconds to measure."""
    monkeypatch.setattr(harness, "_asked", [])
    monkeypatch.setattr(step_report, "matrix_rate", lambda device, precision: None)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"), 4)


def _first(out, monkeypatch, *options):
    monkeypatch.setattr(first, "RUNS", [("fast", "float32")])
    tests = "tests/ops/test_gelu.py -k tails"
    result = first.main([*CPU, "--out", str(out), "--tests", tests, "--workers", "0", *options])
    return result, (out / "first.txt").read_text().splitlines()


def test_first_ends_with_a_verdict(tmp_path, monkeypatch):
    green, lines = _first(tmp_path, monkeypatch)
    assert green
    assert [line[:4] for line in lines[1:-2]] == ["ok  "] * 4
    assert lines[-1] == "VERDICT: all holds"
    found = json.loads((tmp_path / "first.json").read_text())
    assert found["parity"][0]["said"].startswith("220 rows, worst ")
    assert found["tests"]["exit_code"] == 0
    assert "passed" in found["tests"]["last_line"]
    assert found["steps"][1]["held_against"] == "reference"
    assert found["steps"][1]["loss_error"] < 1e-5
    assert 0 < found["steps"][1]["weights_error"] < 1e-4


def test_first_says_what_fails(tmp_path, monkeypatch):
    def compare(*args, **kwargs):
        raise RuntimeError("no such kernel\nlong text")

    monkeypatch.setattr(parity, "compare", compare)
    monkeypatch.setattr(first, "measure", lambda *args, **kwargs: time.sleep(60))
    monkeypatch.setattr(files, "GRACE", 0.5)
    green, lines = _first(tmp_path, monkeypatch, "--seconds", "1")
    assert not green
    assert lines[1] == "FAIL  parity, fast, float32: RuntimeError: no such kernel"
    assert "out of time" in lines[3]
    assert lines[-1].endswith(" FAILED")


def test_step_times_one_preset(tmp_path):
    assert step.main([*CPU, "--out", str(tmp_path), "--providers", "reference", "fast"])
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["reference", "fast"]
    assert rows[1]["speed"]["reference"] > 0
    assert "| fast |" in (tmp_path / "step.md").read_text()


def test_ops_leave_a_baselines_form(tmp_path, monkeypatch):
    # a worker's child is no worker, which would not measure
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert ops.main([*CPU, "--out", str(tmp_path), "--ops", "gelu"])
    found = json.loads((tmp_path / "ops_results.json").read_text())
    assert "gelu/small/forward/ours" in found["results"]
    assert "gelu | small | backward | ours" in (tmp_path / "ops_results.md").read_text()


def test_data_measures_the_loader_and_the_pipelines_settings(photographs, tmp_path):
    options = ["--photographs", str(photographs), "--turn", "0.05"]
    assert data.main([*CPU, "--out", str(tmp_path), *options])
    found = json.loads((tmp_path / "data.json").read_text())
    assert [row["provider"] for row in found["loader"]] == ["dali", "pillow"]
    tried = [tuple(row[name] for name in data.SETTINGS) for row in found["pipeline"]]
    assert len(set(tried)) == len(tried) == 4
    assert {row["decode"] for row in found["pipeline"]} == {"roi", "whole"}
    rates = {row["images_per_second"] for row in found["pipeline"]}
    best = next(r for r in found["pipeline"] if r["images_per_second"] == max(rates))
    assert {name: best[name] for name in data.SETTINGS} == found["best"]


def test_train_runs_the_entry_point_and_a_sharded_rank(photographs, tmp_path):
    options = ["--photographs", str(photographs), "--decoder", "pillow"]
    options += ["--steps", "10"]
    assert train.main([*CPU, "--out", str(tmp_path), *options]), (tmp_path / "train.md").read_text()
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["bare"] > 0
    assert found["entry_point"]["exit_code"] == 0
    assert found["entry_point"]["images_per_second"] > 0
    assert len(found["sharded"]["losses"]) == 2
    assert found["sharded"]["error"] <= 1e-5
    assert "weights sharded over" in (tmp_path / "train_sharded.txt").read_text()


def test_tune_searches_and_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    """It needs a GPU, so its timer and its check are replaced: what computes wrong never wins."""
    module = importlib.import_module("ijepa_kernels._layer_norm")
    shipped = module._tile

    def timed(bench, model):
        return {"forward": 10.0 + module._tile(model.width)[2], "backward": 1.0}

    def check(bench, provider, shape):
        if module._tile(MODELS[shape].width)[2] < 4:
            raise AssertionError("wrong")

    monkeypatch.setattr(Bench, "median_us", timed)
    monkeypatch.setattr(Bench, "check", check)
    assert tune.run(tmp_path, "add_layer_norm")
    assert module._tile is shipped
    rows = (tmp_path / "tune.md").read_text().splitlines()
    (row,) = [row for row in rows if "| B/16 | forward |" in row]
    assert row.endswith(" 14.0 | {'_tile': (1, 1024, 4)} |")


def test_sanitize_exercises_the_ops(tmp_path):
    assert sanitize.main([*CPU, "--out", str(tmp_path)])
    assert "exercised" in (tmp_path / "sanitize_exercise.txt").read_text()
