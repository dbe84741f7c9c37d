"""The benchmark of the training step: what it refuses, what it reports, how it tells parts."""

import copy
import dataclasses
import json
import signal
import time

import pytest
import torch

from benchmarks import step_providers, step_report
from benchmarks.bench_step import main
from benchmarks.step_contest import measure
from benchmarks.step_providers import (
    CAPTURED,
    COMPILE,
    FAST,
    MODES,
    PROVIDERS,
    REFERENCE,
    RELEASED,
    Contestant,
    Workload,
    check_losses,
    check_weights,
    make_case,
)

CPU = torch.device("cpu")
ALL = [REFERENCE, FAST, RELEASED]


def _case(mode="published", precision="float32", steps=3):
    """A few thousand weights on a grid of 8 x 8."""
    case = make_case("demo", batch=2, mode=mode, precision=precision, depth=2, predictor_depth=1)
    model = dataclasses.replace(case.config.model, width=32, heads=2, predictor_width=16)
    config = dataclasses.replace(case.config, model=model)
    return dataclasses.replace(case, name="tiny", config=config, steps=steps)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_all_providers_compute_the_same(mode, precision):
    """Over steps with updates in between."""
    work = Workload(_case(mode, precision), CPU)
    lengths = work.masks[0].context_cu.diff()
    assert (lengths.min() == lengths.max()) == (mode == "published")
    reference = Contestant(REFERENCE, work)
    expected = [float(loss) for loss in reference.run_all()]
    assert len(set(expected)) == 3
    for name in (FAST, RELEASED, CAPTURED):
        contestant = Contestant(name, work)
        losses = [float(loss) for loss in contestant.run_all()]
        check_losses(name, losses, expected, precision)
        assert check_weights(contestant, reference.weights()) > 0


def _with(name, **optim):
    """A provider with another configuration than it was asked for."""

    def build(work):
        changed = dataclasses.replace(
            work.case.config, optim=dataclasses.replace(work.case.config.optim, **optim)
        )
        other = Workload(dataclasses.replace(work.case, config=changed), work.device)
        return PROVIDERS[name](other)

    return build


def _without_positions(work):
    step = PROVIDERS[FAST](work)
    step.encoder.pos_embed.zero_()
    return step


def _without_average(work):
    step = PROVIDERS[RELEASED](work)
    step.target_encoder = copy.deepcopy(step.target_encoder)
    frozen = step.target_encoder.parameters
    step.target_encoder.parameters = lambda: [p.clone() for p in frozen()]
    return step


MISTAKES = {
    "beta1": _with(RELEASED, beta1=0.8),
    "beta2": _with(FAST, beta2=0.99),
    "eps": _with(FAST, eps=1e-5),
    "loss": _with(FAST, loss="l2"),
    "position": _without_positions,
    "average": _without_average,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_provider_with_a_mistake_is_not_timed(mistake, monkeypatch):
    wrong = MISTAKES[mistake]
    monkeypatch.setattr(step_providers, "PROVIDERS", {**PROVIDERS, FAST: wrong})
    rows = {r["provider"]: r for r in measure(_case(), [REFERENCE, FAST], device=CPU, repeats=1)}
    what = "losses" if mistake in ("eps", "loss", "position") else "weights"
    assert f"must have the reference's {what} in float32" in rows[FAST]["error"]
    assert rows[FAST]["error"].endswith("nothing is timed")
    assert "ms" not in rows[FAST]
    # the other one is
    assert rows[REFERENCE]["ms"] > 0


@pytest.mark.filterwarnings("default")  # what the compiler warns of
def test_compiled_blocks_compute_the_same(monkeypatch):
    """Dynamo and autograd's part of it, without a code generator."""
    compiling = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiling(m, backend="aot_eager"))
    case = _case(steps=2)
    (reference, compiled) = measure(case, [REFERENCE, COMPILE], device=CPU, repeats=0)
    assert "error" not in compiled
    assert compiled["graphs"] >= 3
    assert reference["graphs"] == 0
    torch._dynamo.reset()


def test_the_command_reports_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.bench_step.make_case", lambda *a, mode, **kw: _case(mode))
    monkeypatch.setattr(step_report, "matrix_rate", lambda device, precision: 1e9)
    assert main(["--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(r["mode"], r["provider"]) for r in found] == [(m, p) for m in MODES for p in ALL]
    text = (tmp_path / "step.md").read_text()
    for row in found:
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
        assert set(row["speed"]) == set(ALL) - {row["provider"]}
        assert row["skipped"] == 0
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert f"| {row['mode']} | {row['provider']} | {row['ms']:.1f} |" in text
    saved = {(r["mode"], r["provider"]): r["saved_mib"] for r in found}
    for mode in MODES:
        assert saved[mode, FAST] < saved[mode, REFERENCE] < saved[mode, RELEASED]


def test_a_provider_that_fails_does_not_end_the_others(monkeypatch):
    def build(work):
        raise torch.OutOfMemoryError("CUDA out of memory\nlong text")

    monkeypatch.setattr(step_providers, "PROVIDERS", {**PROVIDERS, REFERENCE: build})
    rows = measure(_case(), ALL, device=CPU, repeats=1)
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert [row["held_against"] for row in rows[1:]] == [FAST, FAST]


def test_a_command_that_runs_out_of_time_keeps_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.bench_step.make_case", lambda *a, mode, **kw: _case(mode))
    monkeypatch.setattr(step_report, "matrix_rate", lambda device, precision: 1e9)

    def stuck(work):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(30)

    monkeypatch.setattr(step_providers, "PROVIDERS", {**PROVIDERS, FAST: stuck})
    assert main(["--repeats", "1", "--seconds", "60", "--out", str(tmp_path)]) == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    errors = [(row["mode"], row["provider"], row.get("error")) for row in rows]
    assert errors[0] == ("published", REFERENCE, None)
    assert len(errors) == 6
    assert {error for _, _, error in errors[1:]} == {"out of time"}
    assert rows[0]["ms"] > 0
