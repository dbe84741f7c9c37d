"""The benchmarks' own machinery: verification before timing, baselines, tables."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import baselines
from benchmarks.discover import benches
from benchmarks.gpu_check import sanitize, tune
from benchmarks.harness import Bench, Result
from benchmarks.shapes import MODELS, SMALL
from benchmarks.tune import TUNINGS
from ijepa_fast.presets import preset

layer_norm_module: Any = importlib.import_module("ijepa_kernels._layer_norm")
MACHINE = {"device": "NVIDIA H100 80GB HBM3", "driver": "580.1", "torch": "2.11", "triton": "3.6"}


def _result(median, provider="ours", op="gather"):
    return Result(
        op=op,
        shape="H/14",
        direction="forward",
        provider=provider,
        median_us=median,
        spread_us=1.0,
        calls=40,
    )


@pytest.mark.parametrize(
    ("name", "recipe"), [("B/16", "vitb16_in1k"), ("L/16", "vitl16_in1k"), ("H/14", "vith14_in1k")]
)
def test_shapes_are_those_of_the_presets(name, recipe):
    model, config = MODELS[name], preset(recipe)
    a = config.model.architecture
    assert (model.grid, model.grid) == config.grid
    assert model.patch == config.model.patch_size
    assert model.side == config.data.crop_size[0]
    assert (model.width, model.heads, model.depth) == (a.width, a.heads, a.depth)
    assert (model.predictor_width, model.predictor_depth) == (
        config.model.predictor_width,
        a.predictor_depth,
    )
    assert model.batch == config.masks.truncation_group == 128
    assert model.blocks == 4


def _bench(ours, differentiate=(0,)):
    def inputs(model, device, generator):
        return (torch.randn(4, model.width, generator=generator).to(device),)

    return Bench(
        name="square",
        inputs=inputs,
        providers={"reference": torch.square, "ours": ours, "missing": None},
        bytes=lambda model, backward: 8 * model.width,
        differentiate=differentiate,
        compile=False,
    )


class _Wrong(torch.autograd.Function):
    """Right result, wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    "ours",
    [lambda x: x * x * 1.01, _Wrong.apply, lambda x: x * float("nan")],
    ids=["one percent", "gradient", "nan"],
)
def test_nothing_wrong_is_timed(ours):
    with pytest.raises(
        AssertionError, match=r"square: ours differs from reference on small.*timed"
    ):
        _bench(ours).run(None, "ours", SMALL.name, "forward")


def test_what_is_right_passes_and_missing_packages_are_left_out():
    bench = _bench(lambda x: x * x)
    bench.verify("ours", SMALL.name)
    assert {provider for provider, _, _ in bench.cases()} == {"reference", "ours"}
    assert {direction for _, _, direction in bench.cases()} == {"forward", "backward"}
    assert {d for _, _, d in _bench(torch.square, ()).cases()} == {"forward"}


def test_more_than_ten_percent_slower_is_named(tmp_path):
    path = baselines.accept(MACHINE, [_result(100.0), _result(50.0, op="loss")], tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    text, slower = baselines.compare(MACHINE, [_result(109.9)], tmp_path)
    assert text == "1 cases held against nvidia-h100-80gb-hbm3.json"
    assert slower == []
    text, slower = baselines.compare({**MACHINE, "triton": "3.7"}, [_result(111.0)], tmp_path)
    assert "mind: triton was 3.6" in text
    assert slower == [
        "gather/H/14/forward/ours: 111.00 us, baseline 100.00 us (1.11 x, limit 1.10 x)"
    ]
    # other providers are for comparison, not guarded
    assert baselines.compare(MACHINE, [_result(900.0, "reference")], tmp_path)[1] == []


def test_accepting_drops_cases_of_other_versions(tmp_path):
    """Or the file's heading would be untrue of them."""
    baselines.accept(MACHINE, [_result(100.0), _result(50.0, op="loss")], tmp_path)
    path = baselines.accept({**MACHINE, "torch": "2.13"}, [_result(80.0)], tmp_path)
    assert list(json.loads(path.read_text())["results"]) == ["gather/H/14/forward/ours"]


def test_accepting_keeps_cases_that_were_not_run(tmp_path):
    baselines.accept(MACHINE, [_result(100.0), _result(50.0, op="loss")], tmp_path)
    path = baselines.accept(MACHINE, [_result(80.0)], tmp_path)
    content = json.loads(path.read_text())
    assert content["machine"] == MACHINE
    times = {key: fields["median_us"] for key, fields in content["results"].items()}
    assert times == {"gather/H/14/forward/ours": 80.0, "loss/H/14/forward/ours": 50.0}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_device_has_no_baseline(tmp_path):
    baselines.accept(MACHINE, [_result(1.0)], tmp_path)
    text, slower = baselines.compare({**MACHINE, "device": "A100"}, [_result(9.0)], tmp_path)
    assert text == "no baseline for A100 yet: `make bench-accept` writes it"
    assert slower == []


def test_the_table_gives_ratios():
    lines = baselines.table([_result(30.0, "reference"), _result(10.0)]).splitlines()
    assert lines[0].split("|")[7].strip() == "x reference"
    ratios = {line.split("|")[4].strip(): line.split("|")[7].strip() for line in lines[2:]}
    assert ratios == {"reference": "1.00", "ours": "3.00"}


def test_tuning_tries_every_candidate_and_restores_the_table(tmp_path, monkeypatch):
    """Without a GPU: the timer is replaced by one that gives times of our choice."""
    shipped = layer_norm_module._tile
    seen = []

    def timed(bench, model):
        tile = layer_norm_module._tile(model.width)
        seen.append(tile)
        if tile[2] == 16:
            raise RuntimeError("out of resources")
        return {"forward": 10.0 + tile[2], "backward": 30.0 - tile[2]}

    def check(bench, provider, shape):
        if layer_norm_module._tile(MODELS[shape].width)[2] == 8:
            raise AssertionError("wrong")

    monkeypatch.setattr(Bench, "median_us", timed)
    monkeypatch.setattr(Bench, "check", check)
    assert tune.run(tmp_path, "add_layer_norm")
    assert layer_norm_module._tile is shipped
    assert {tile[0] for tile in seen} == {1, 2, 4}
    tables = json.loads((tmp_path / "tune.json").read_text())["tables"]
    assert [t["shape"] for t in tables] == ["H/14", "L/16", "B/16"]
    assert "out of resources" in json.dumps(tables)
    rows = (tmp_path / "tune.md").read_text().splitlines()
    best = "| add_layer_norm | B/16 | {} | {} | {} | {{'_tile': (1, 1024, {})}} |"
    assert rows[6] == best.format("forward", 14.0, 12.0, 2)
    # 8 warps would be faster, but compute something wrong
    assert rows[7] == best.format("backward", 26.0, 26.0, 4)


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda tuning: tuning.bench)
def test_every_tuned_table_exists_and_is_used(tuning):
    """Every candidate changes what is launched; `tune` checks on the machine what it computes."""
    bench = {bench.name: bench for bench in benches()}[tuning.bench]
    assert set(TUNED) == {t.bench for t in TUNINGS}
    launched = TUNED[tuning.bench]
    module = importlib.import_module(f"benchmarks.bench_{launched}")
    before = _launches(module)
    assert before
    assert any(b.name == bench.name for b in benches())
    changed = 0
    for candidate in tuning.candidates(MODELS["H/14"]):
        with tuning.applied(candidate):
            changed += _launches(module) != before
    assert changed >= len(tuning.candidates(MODELS["H/14"])) - 1
    assert _launches(module) == before


# benchmark modules with the launches, by the name of the tuned benchmark
TUNED = {
    "adamw_ema_": "adamw_ema",
    "add_layer_norm": "add_layer_norm",
    "ema_update_": "ema_update",
    "gather_tokens": "gather_tokens",
    "latent_loss": "latent_loss",
    "patchify": "patchify",
    "predictor_tokens": "predictor_tokens",
    "scatter_tokens": "scatter_tokens",
    "take_targets": "take_targets",
}


def _launches(module):
    """Grids and options of all launches at H/14."""
    seen = []

    def note(self, *args, grid, warmup, **options):
        grid = grid(options) if callable(grid) else grid
        seen.append((self.__name__, tuple(grid), sorted((k, str(v)) for k, v in options.items())))

    run = JITFunction.run
    JITFunction.run = note
    try:
        for case in module.static_cases(MODELS["H/14"]).values():
            case()
    finally:
        JITFunction.run = run
    return seen


SANITIZER = """#!/bin/sh
echo "$@" >> {log}
case "$2" in {fails}) echo "ERROR SUMMARY: 1 error"; exit 9;; esac
"""


@pytest.mark.parametrize("fails", ["nothing", "racecheck"])
def test_the_sanitizer_runs_all_tools_and_its_errors_count(fails, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    script = tools / "compute-sanitizer"
    script.write_text(SANITIZER.format(log=tmp_path / "calls", fails=fails))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out"
    out.mkdir()
    assert sanitize.run(out) == (fails == "nothing")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [c.split()[1] for c in calls] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(c.endswith("-m benchmarks.gpu_check.exercise") for c in calls)
    result = json.loads((out / "sanitize.json").read_text())
    assert result["tools"]["racecheck"]["exit_code"] == (9 if fails == "racecheck" else 0)
    # the exercise itself did run, on the CPU
    assert result["exercise"]["exit_code"] == 0
    assert "exercised" in result["exercise"]["last_line"]
    assert len(list(out.iterdir())) <= 8


CONFTEST = """
import pytest, torch
from benchmarks import baselines, harness
baselines.FOLDER = __import__("pathlib").Path({folder!r})
baselines.compare.__defaults__ = (baselines.FOLDER,)
baselines.accept.__defaults__ = (baselines.FOLDER,)

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    harness.device = lambda: torch.device({device!r})
    harness.copy_bandwidth = lambda: 3000.0

harness.RESULTS.append(harness.Result(op="o", shape="s", direction="forward", provider="ours",
    median_us={time}, spread_us=0.0, calls=1))
"""


@pytest.mark.parametrize(("time", "code"), [(100.0, 0), (120.0, 1)])
def test_a_regression_fails_the_command(time, code, tmp_path):
    """`pytest benchmarks` with a result that is slower than the machine's baseline."""
    probe = "from benchmarks.harness import machine; print(machine()['device'])"
    root = Path(__file__).parents[1]
    run = [sys.executable, "-c", probe]
    named = subprocess.run(run, cwd=root, env=_env(), capture_output=True, text=True, check=True)
    machine = {"device": named.stdout.strip()}
    baseline = Result(
        op="o",
        shape="s",
        direction="forward",
        provider="ours",
        median_us=100.0,
        spread_us=0.0,
        calls=1,
    )
    baselines.accept(machine, [baseline], tmp_path)
    plugin = tmp_path / "planted.py"
    plugin.write_text(CONFTEST.format(folder=str(tmp_path), time=time, device="cuda"))
    result = _pytest(tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert ("SLOWER o/s/forward/ours: 120.00 us" in result.stdout) == bool(code)

    if code == 0:
        return
    # without a GPU times are no baseline and are held against none
    plugin.write_text(CONFTEST.format(folder=str(tmp_path), time=time, device="cpu"))
    before = baselines.path_of(machine["device"], tmp_path).read_text()
    result = _pytest(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no GPU: nothing is held against a baseline" in result.stdout
    assert "are no measurement of a kernel" in result.stdout
    assert _pytest(tmp_path, "--accept-baseline").returncode == 1
    assert baselines.path_of(machine["device"], tmp_path).read_text() == before


def _pytest(folder, *options):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "planted", "--benchmark-disable"]
    return subprocess.run(
        [*command, "benchmarks/bench_add_layer_norm.py", "-k", "forward", *options],
        cwd=Path(__file__).parents[1],
        env=_env(str(folder)),
        capture_output=True,
        text=True,
        check=False,
    )


def _env(*extra):
    root = Path(__file__).parents[1]
    paths = [*extra, str(root), str(root / "kernels")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
