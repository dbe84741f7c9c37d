"""What the benchmarks would do on a GPU and can be tried without one: compiled providers, wrong
results that must not pass, targets.
"""

import dataclasses
import importlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from pytest_benchmark.stats import Stats

from benchmarks import harness, targets
from benchmarks.discover import benches
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
