"""What the benchmarks would do on a GPU and can be tried without one: compiled providers, wrong
results that must not pass, targets, and the commands of gpu-check that run out of time or memory.
"""

import dataclasses
import importlib
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest_benchmark.stats import Stats

from benchmarks import harness, targets
from benchmarks.discover import benches
from benchmarks.gpu_check import files, sanitize
from benchmarks.harness import Bench, Result
from benchmarks.shapes import SMALL

BENCHES = {bench.name: bench for bench in benches()}


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile without a code generator: all of Dynamo and AOTAutograd."""
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: real(f, backend="aot_eager", fullgraph=True, **kw)
    )
    harness._compiled.cache_clear()
    with importlib.import_module("torch._functorch.config").patch(donated_buffer=True):
        yield
    harness._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("bench", [b for b in benches() if b.compile], ids=lambda b: b.name)
def test_the_compiled_reference_can_be_timed(bench, compiler):
    """In one graph, without warnings, and backward on a retained graph."""
    bench.check("compile", SMALL.name)
    for direction in ["forward", "backward"] if bench.differentiate else ["forward"]:
        (call,) = bench._calls(bench.function("compile", SMALL.name), SMALL, direction)
        call()
        call()


def _rows(ours):
    return Bench(
        name="rows",
        inputs=lambda model, device, generator: (
            torch.randn(5000, 8, generator=generator).bfloat16(),
        ),
        providers={"reference": torch.clone, "ours": ours},
        bytes=lambda model, backward: 1,
    )


@pytest.mark.parametrize("row", [0, 2500, 4999])
def test_one_wrong_row_of_thousands_is_seen(row):
    def ours(x):
        x = x.clone()
        x[row] = 0
        return x

    with pytest.raises(AssertionError, match=r"rows: ours differs .* a row: .* nothing is timed"):
        _rows(ours).verify("ours", SMALL.name)
    _rows(lambda x: x * 1.004).verify("ours", SMALL.name)


def test_results_of_the_other_sets_stay_in_memory():
    """Or every call would write to the same place, which the L2 cache holds."""
    results = []

    def ours(x):
        y = x.clone()
        results.append(weakref.ref(y))
        return y

    bench = _rows(ours)
    calls = [bench._call(ours, SMALL, "forward", seed) for seed in range(2)]
    for call in calls:
        call()
    assert [r() is not None for r in results] == [True, True]
    calls[0]()
    assert [r() is not None for r in results] == [False, True, True]


def _without_average(case):
    ours = BENCHES["adamw_ema_"].function("ours")
    before = [t.clone() for t in case.targets]
    ours(case)
    torch._foreach_copy_(case.targets, before)
    return case.results()


def _without_decay(case):
    from benchmarks.bench_adamw_ema import MOMENTUM, OPTIONS
    from ijepa_kernels.optim import AdamWEMA

    options = {**OPTIONS, "weight_decay": 0.0}
    case.optimizer = AdamWEMA(case.params, momentum=MOMENTUM, **options)
    case.optimizer.track(case.params, case.targets)
    case.optimizer.step()
    return case.results()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("adamw_ema_", _without_average),
        ("adamw_ema_", _without_decay),
        ("ema_update_", lambda targets, *_: targets),
    ],
)
def test_an_optimiser_that_leaves_something_out_is_not_timed(name, ours):
    bench = BENCHES[name]
    bench.check("ours", SMALL.name)
    wrong = dataclasses.replace(bench, providers={**bench.providers, "ours": ours})
    with pytest.raises(AssertionError, match="nothing is timed"):
        wrong.check("ours", SMALL.name)


def test_pytest_benchmark_reports_the_devices_times():
    stats = Stats()
    fixture = SimpleNamespace(
        stats=SimpleNamespace(stats=stats), pedantic=lambda call, rounds: stats.update(1.0)
    )
    harness._record(fixture, [3.0, 5.0, 40.0])
    assert stats.median == pytest.approx(5e-6)
    assert stats.max == pytest.approx(40e-6)
    assert stats.rounds == 3


def _result(op, provider, median, percent, direction="forward", shape="H/14", host=10.0):
    return Result(
        op=op,
        shape=shape,
        direction=direction,
        provider=provider,
        median_us=median,
        spread_us=1.0,
        calls=40,
        host_us=host,
        gb_per_s=1.0,
        percent_of_copy=percent,
    )


def test_what_misses_its_target_is_named():
    fine = [
        _result("latent_loss", "ours", 100.0, 85.0),
        _result("latent_loss", "reference", 300.0, 28.0),
        _result("ema_update_", "ours", 50.0, 50.0, shape="B/16"),
        _result("patchify", "ours", 9.0, 50.0),
        _result("patchify_all", "ours", 30.0, 50.0),
        # no GPU
        dataclasses.replace(_result("latent_loss", "ours", 900.0, 0.0), percent_of_copy=None),
    ]
    assert targets.missed(fine) == []
    name = "add_layer_norm/H/14/{}: 100.0 us"
    missed = [
        _result("add_layer_norm", "ours", 100.0, 84.0, "backward"),
        _result("add_layer_norm", "ours", 100.0, 90.0),
        _result("add_layer_norm", "compile", 99.0, 91.0),
        _result("ema_update_", "ours", 50.0, 89.0, host=26.0),
        _result("patchify", "ours", 30.0, 40.0),
    ]
    assert targets.missed(missed) == [
        f"{name.format('backward')}, 84.0 % of copy bandwidth, target 85 %",
        f"{name.format('forward')}, compile 99.0 us",
        "ema_update_/H/14/forward: 50.0 us, 89.0 % of copy bandwidth, target 90 %",
        "ema_update_/H/14/forward: 50.0 us, host 26.0 us, target 25 us",
        "patchify/H/14/forward: 30.0 us, byte floor 12.0 us, target max(2 x, + 5 us)",
    ]


# --- gpu-check -----------------------------------------------------------------------------------

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


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"])
def test_what_runs_too_long_says_what_it_knows_and_leaves_no_children(then, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GRACE", 0.5)
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", SLOW.format(then=then)]
    began = time.monotonic()
    result = files.logged(command, log, seconds=1.5)
    assert time.monotonic() - began < 10
    assert result["exit_code"] is None
    lines = [line for line in log.read_text().splitlines() if line]
    assert lines[-2:] == ["2 failed so far", "stopped after 2 s"]
    child = Path(f"/proc/{next(line for line in lines if line.isdigit())}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child is still there")


def test_the_sanitizer_stays_within_nine_minutes(tmp_path, monkeypatch):
    """However long each tool takes."""
    now = [0.0]

    def logged(command, log, *, seconds, environment=None):
        now[0] += seconds + files.GRACE
        return {"exit_code": None, "last_line": ""}

    monkeypatch.setattr(sanitize, "logged", logged)
    monkeypatch.setattr(sanitize, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: "sanitizer")
    assert not sanitize.run(tmp_path)
    assert 400 < now[0] <= 540


def test_ops_need_no_package_of_the_trainer():
    code = """
import sys
sys.modules["tyro"] = None
import torch
from benchmarks.gpu_check import __main__, ops
(result,) = ops._parity(torch.device("cpu"))
assert not result["ok"] and "tyro" in result["error"]
"""
    root = Path(__file__).parents[1]
    path = f"{root}:{root / 'kernels'}"
    subprocess.run([sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": path}, check=True)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ("benchmarks.static", ["--only", "nosuch"], "--only must be among"),
        ("benchmarks.gpu_check", ["tune", "--op", "nosuch", "--out", "o"], "invalid choice"),
        (
            "benchmarks.gpu_check",
            ["step", "--device", "cpu", "--presets", "nosuch", "--out", "o"],
            "--presets must be among",
        ),
        (
            "benchmarks.gpu_check",
            ["step", "--device", "cpu", "--providers", "nosuch", "--out", "o"],
            "--providers must be among",
        ),
    ],
)
def test_a_wrong_option_is_one_line(module, options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"{module}.__main__").main()
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert "nosuch" in lines[-1]


def test_tuning_without_a_gpu_is_refused(tmp_path):
    root = Path(__file__).parents[1]
    for device in ("cpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        options = ["--device", device, "--out", str(tmp_path / "out")]
        result = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_check", "tune", *options],
            cwd=root,
            env={"PYTHONPATH": f"{root}:{root / 'kernels'}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert "needs a CUDA device" in line
        assert not (tmp_path / "out").exists()
