"""The benchmarks' own machinery: verification before timing, baselines, tables."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import baselines, predict
from benchmarks.discover import benches
from benchmarks.gpu_check import tune
from benchmarks.harness import Bench, Result
from benchmarks.shapes import MODELS, SMALL
from benchmarks.tune import TUNINGS
from ijepa_fast.config.presets import preset
from ijepa_fast.estimate import estimate

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


def test_ten_percent_slower_is_named(tmp_path):
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


@pytest.mark.parametrize("name", ["B/16", "H/14"])
def test_predicted_products_are_the_estimate_s(name, monkeypatch):
    """Of the work that the fast step does: counted in another way, and the same within 1.5 %, for
    attention's backward pass has five products here, and four there.
    """
    monkeypatch.setattr(predict, "BANDWIDTH", 1e30)
    parts = predict.of_step(MODELS[name]).values()
    flops = sum(work.products + work.attention for work in parts) * predict.FLOPS / 1e3
    presets = {"B/16": "vitb16_in1k", "H/14": "vith14_in1k"}
    expected = estimate(preset(presets[name])).executed_flops * MODELS[name].batch
    assert flops == pytest.approx(expected, rel=0.015)


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
    "scatter_tokens": "scatter_tokens",
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


PLANTED = """
import pytest
from benchmarks import harness

harness.machine = lambda: {machine!r}
harness.RESULTS += [harness.Result(**fields) for fields in {results!r}]

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    # not before: the benchmarks' cases are this machine's
    harness.device = lambda: __import__("torch").device({device!r})
    harness.copy_bandwidth = lambda: 4230.0
"""


@pytest.mark.parametrize(("device", "code"), [("cuda", 1), ("cpu", 0)])
def test_a_slower_time_fails_against_the_committed_baseline(device, code, tmp_path):
    """The H200's own times pass; 10 % slower `pytest benchmarks` fails."""
    committed = json.loads(baselines.path_of("NVIDIA H200").read_text())
    measured = [Result(**fields) for fields in committed["results"].values()]
    ours = [r for r in measured if r.provider == "ours"]
    assert len(ours) == 12
    assert baselines.compare(committed["machine"], measured) == (
        "12 cases held against nvidia-h200.json",
        [],
    )
    slower = [asdict(r) | {"median_us": 1.1 * r.median_us} for r in measured]
    planted = PLANTED.format(machine=committed["machine"], results=slower, device=device)
    (tmp_path / "planted.py").write_text(planted)
    result = _pytest(tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert result.stdout.count("SLOWER ") == len(ours) * code
    if device == "cpu":
        # without a GPU times are no baseline and are held against none
        assert "no GPU: nothing is held against a baseline" in result.stdout


def test_without_a_gpu_no_baseline_is_written(tmp_path):
    (tmp_path / "planted.py").write_text("")
    before = sorted(baselines.FOLDER.iterdir())
    result = _pytest(tmp_path, "--accept-baseline", benchmark=True)
    assert result.returncode == 1
    assert "none is written" in result.stdout
    assert sorted(baselines.FOLDER.iterdir()) == before


def _pytest(folder, *options, benchmark=False):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "planted", "-p", "no:cacheprovider"]
    command += [] if benchmark else ["--benchmark-disable"]
    return subprocess.run(
        [*command, "benchmarks/bench_column_sums.py", "-k", "ours and forward", *options],
        cwd=Path(__file__).parents[1],
        env=_env(str(folder)),
        capture_output=True,
        text=True,
        check=False,
    )


def _env(*extra):
    root = Path(__file__).parents[1]
    paths = [*extra, str(root), str(root / "kernels")]
    # a worker's child is no worker, which would not measure
    mine = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return {**mine, "PYTHONPATH": os.pathsep.join(paths)}
