"""Every part of gpu-check on the CPU, at tiny shapes, and where something is missing."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, step_report
from benchmarks.gpu_check import __main__, bundle, data, files, first, ops, sanitize, step, train
from benchmarks.photographs import write_photographs
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
    tests = "tests/ops/test_scatter_tokens.py -k strides"
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
    assert 0 < found["steps"][1]["loss_error"] < 1e-5
    # ten, with parity on two paths in two precisions
    assert len(lines) + 3 == 10


def test_first_says_what_fails(tmp_path, monkeypatch):
    def replay(*args, **kwargs):
        raise RuntimeError("no such kernel\nlong text")

    monkeypatch.setattr(parity, "replay", replay)
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
    assert ops.main([*CPU, "--out", str(tmp_path), "--ops", "scatter_tokens"])
    found = json.loads((tmp_path / "ops_results.json").read_text())
    assert "scatter_tokens/small/forward/ours" in found["results"]
    assert "scatter_tokens | small | backward | ours" in (tmp_path / "ops_results.md").read_text()


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


def test_data_without_dali_measures_pillow(photographs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    options = ["--photographs", str(photographs), "--turn", "0.05"]
    assert not data.main([*CPU, "--out", str(tmp_path), *options])
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["loader"][1]["images_per_second"] > 0
    assert all("nvidia.dali" in row["error"] for row in found["pipeline"])


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


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
case "$2" in racecheck) echo "ERROR SUMMARY: 1 error"; exit 9;; esac
"""


def test_sanitize_exercises_the_ops_and_a_tools_errors_count(tmp_path, monkeypatch):
    assert sanitize.main([*CPU, "--out", str(tmp_path)])
    assert "exercised" in (tmp_path / "sanitize_exercise.txt").read_text()

    script = tmp_path / "compute-sanitizer"
    script.write_text(SANITIZER.format(log=tmp_path / "calls"))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(files, "start", lambda args: setattr(args, "end", time.monotonic() + 60))
    real = files.logged

    def logged(command, log, **kwargs):
        if command[0] != str(script):
            return {"exit_code": 0, "stopped": False}
        return real(command, log, **kwargs)

    monkeypatch.setattr(sanitize, "logged", logged)
    assert sanitize.main(["--out", str(tmp_path)])
    assert not sanitize.main(["--out", str(tmp_path), "--tool", "racecheck"])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck"]
    assert all(call.endswith("-m benchmarks.gpu_check.exercise") for call in calls)


# --- what all parts share ------------------------------------------------------------------------

SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("2 failed so far", flush=True)
    {then}
"""


@pytest.mark.parametrize(("then", "code"), [("sys.exit(2)", 2), ("time.sleep(60)", -9)])
def test_what_runs_too_long_says_what_it_knows_and_leaves_no_children(
    then, code, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "GRACE", 0.5)
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", SLOW.format(then=then)]
    result = files.logged(command, log, seconds=1.5)
    assert result == {"exit_code": code, "stopped": True, "last_line": "2 failed so far"}
    child = Path(f"/proc/{next(line for line in log.read_text().split() if line.isdigit())}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child is still there")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["everything", "--out", "o"], "invalid choice: 'everything'"),
        (["tune", "--op", "nosuch", "--out", "o"], "invalid choice: 'nosuch'"),
        (["step", *CPU, "--presets", "nosuch", "--out", "o"], "invalid choice: 'nosuch'"),
        (["ops", *CPU, "--ops", "nosuch", "--out", "o"], "--ops must be among"),
        (["tune", *CPU, "--out", "o"], "part tune measures, it needs a CUDA device"),
    ],
)
def test_a_wrong_option_is_one_line(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", __main__.PARTS)
def test_without_a_gpu_no_part_begins(part, tmp_path, capsys):
    module = importlib.import_module(f"benchmarks.gpu_check.{part}")
    with pytest.raises(SystemExit, match="2"):
        module.main(["--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "error: gpu-check needs a CUDA device, torch sees none\n"
    assert not (tmp_path / "out").exists()


# --- the bundle ----------------------------------------------------------------------------------


def test_the_archive_comes_back_from_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "PIECE", 1000)
    tree = tmp_path / "tree"
    (tree / "nvidia" / "dali").mkdir(parents=True)
    content = os.urandom(5000)
    (tree / "nvidia" / "dali" / "libdali.so").write_bytes(content)
    bundle.pack(tree, tmp_path / "pieces")
    pieces = sorted((tmp_path / "pieces").iterdir())
    assert len(pieces) > 5
    bundle.unpack(tmp_path / "pieces", tmp_path / "back")
    assert (tmp_path / "back" / "nvidia" / "dali" / "libdali.so").read_bytes() == content
    pieces[1].unlink()
    with pytest.raises(ValueError, match="must hold all pieces"):
        bundle.unpack(tmp_path / "pieces", tmp_path / "again")
