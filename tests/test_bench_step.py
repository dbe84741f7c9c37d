"""The benchmark of the training step: what it refuses, what it reports, how it tells parts."""

import copy
import dataclasses
import json
import signal
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import step_contest, step_providers, step_report, targets
from benchmarks.bench_step import main
from benchmarks.released_style import ExplicitAttention
from benchmarks.step_contest import measure
from benchmarks.step_parts import PARTS, SavedBytes, Timeline, attribute, kernel_table, profiled
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


# --- what is compared ----------------------------------------------------------------------------


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
        assert check_losses(name, losses, expected, precision) > 0
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


@pytest.mark.parametrize("value", [float("nan"), 1.0 + 1e-4])
def test_losses_that_are_off_are_refused(value):
    with pytest.raises(ValueError, match="in step 1: nothing is timed"):
        check_losses("x", [1.0, value], [1.0, 1.0], "float32")
    with pytest.raises(ValueError, match="nothing is timed"):
        check_losses("x", [float("nan")], [float("nan")], "bfloat16")


def test_the_released_style_takes_its_own_way(monkeypatch):
    """Explicit attention in all networks, optimiser and average tensor by tensor, a host read."""
    work = Workload(_case("whole"), CPU)
    contestant = Contestant(RELEASED, work)
    step: Any = contestant.step
    networks = step.encoder, step.target_encoder, step.predictor
    kinds = {type(b.attn) for n in networks[:2] for b in n.blocks}
    assert kinds | {type(b.attn) for b in step.predictor.predictor_blocks} == {ExplicitAttention}
    assert not step.optimizer.defaults["fused"]
    assert not step.optimizer.defaults["foreach"]

    def forbidden(*args, **kwargs):
        raise AssertionError("not released style")

    softmax, seen = torch.Tensor.softmax, []

    def noted(scores, dim):
        seen.append(scores.shape)
        return softmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", noted)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", forbidden)
        for name in ("_foreach_mul_", "_foreach_add_", "_fused_adamw_"):
            patch.setattr(torch, name, forbidden)
        loss = contestant.run(0)
        assert step.loss == float(loss)
        with pytest.raises(AssertionError, match="not released style"):
            Contestant(REFERENCE, work).run(0)
    assert len(seen) == 2 + 2 + 1
    assert all(shape[-1] == shape[-2] for shape in seen)


def test_providers_share_no_weights():
    work = Workload(_case(), CPU)
    steps = [Contestant(name, work).step for name in ALL]
    places = [p.data_ptr() for s in steps for n in (s.encoder, s.predictor) for p in n.parameters()]
    assert len(set(places)) == len(places)


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


# --- what is reported ----------------------------------------------------------------------------


def test_the_command_reports_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.bench_step.make_case", lambda *a, mode, **kw: _case(mode))
    monkeypatch.setattr(step_report, "matrix_rate", lambda device, precision: 1e9)
    assert main(["--repeats", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [(r["mode"], r["provider"]) for r in found] == [(m, p) for m in MODES for p in ALL]
    text, printed = (tmp_path / "step.md").read_text(), capsys.readouterr().out
    for row in found:
        turns = {REFERENCE: 1 + 2, FAST: 2 + 2, RELEASED: 2}[row["provider"]]
        assert row["repeats"] == len(row["turns_ms"]) == turns
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
        assert set(row["speed"]) == set(ALL) - {row["provider"]}
        assert row["utilisation"] > 0
        assert row["saved_mib"] > 0
        assert row["skipped"] == 0
        assert set(row["parts"]) == set(PARTS)
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert all(row["parts"][name] > 0.01 for name in PARTS[:5])
        line = f"| tiny | 2 | float32 | {row['mode']} | {row['provider']} | {row['ms']:.1f} |"
        assert line in text
        assert line in printed
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
    table = step_report.table(rows).splitlines()
    assert "| reference | not measured: OutOfMemoryError: CUDA out of memory |" in table[2]
    assert len({line.count("|") for line in table}) == 1


def test_what_is_built_is_timed_before_the_next_one_is_built(monkeypatch):
    """Two at most are in memory, and the rows are flushed after every turn."""
    told = []
    verify, turn = step_contest._Contest._verify, step_contest._Contest._turn

    def verifying(contest, name):
        verify(contest, name)
        told.append(("built", *contest.alive))

    def turning(contest, name):
        turn(contest, name)
        told.append(name)

    def flush(rows):
        told.append(sum(row.get("repeats", 0) for row in rows))

    monkeypatch.setattr(step_contest._Contest, "_verify", verifying)
    monkeypatch.setattr(step_contest._Contest, "_turn", turning)
    found = measure(_case(), ALL, device=CPU, repeats=1, flush=flush)
    # zeros: a row begun, and verified; a number again: examined
    first = [0, ("built", REFERENCE), 0, REFERENCE, 1, 1]
    second = [1, ("built", REFERENCE, FAST), 1, REFERENCE, 2, FAST, 3, 3]
    third = [3, ("built", FAST, RELEASED), 3, FAST, 4, RELEASED, 5, 5]
    assert told == first + second + third
    rows = {row["provider"]: row for row in found}
    speed = rows[RELEASED]["speed"]
    by_way = speed[FAST] * rows[FAST]["speed"][REFERENCE]
    assert speed[REFERENCE] == pytest.approx(by_way)


def test_a_command_that_runs_out_of_time_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
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
    late = "out of time"
    assert errors[:3] == [
        ("published", REFERENCE, None),
        ("published", FAST, late),
        ("published", RELEASED, late),
    ]
    assert errors[3:] == [("whole", name, late) for name in ALL]
    assert rows[0]["ms"] > 0
    assert "stopped after 60 s" in capsys.readouterr().out


# --- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_parts_follow_each_other_as_the_step_does(name):
    contestant = Contestant(name, Workload(_case(), CPU))
    forward = type(contestant.step.predictor).forward
    timeline = Timeline(CPU)
    with timeline.watching(contestant.step):
        contestant.run(0)
    order = [part for part, _ in timeline._marks]
    kept = [p for n, p in enumerate(order) if n == 0 or p != order[n - 1]]
    forwards = ["rest", "target", *([] if name == FAST else ["loss"]), "context", "predictor"]
    # the loss with its own backward pass, then backward
    backwards = ["loss", "predictor", "context", "loss", "rest", "optimiser", "rest"]
    assert kept == [*forwards, *backwards]
    # everything is as it was
    assert "forward" not in vars(contestant.step.predictor)
    assert type(contestant.step.predictor).forward is forward
    assert "prepare" not in vars(contestant.step)
    assert torch.Tensor.backward.__qualname__ == "Tensor.backward"


def test_saved_bytes_count_every_storage_once_while_it_is_kept():
    weight = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(10, 100, requires_grad=True)
    saved = SavedBytes([weight])
    with saved.watching():
        y = (x @ weight).exp()
        assert saved.largest == 2 * 4 * 10 * 100  # x and the exponential
        z = y.sin() + y.view(-1).cos().view(10, 100)  # both keep y, which is counted
        assert saved.largest == saved._now == 8000
        z.sum().backward()
    assert saved._now == 0
    assert saved.largest == 8000


def test_device_time_belongs_to_the_part_that_launched_it():
    ms = 10**6
    marks = [(0, "rest"), (10, "target"), (20, "context")]
    launches = {1: 12, 2: 25, 3: 19, 5: 1}
    kernels = [
        (1, 100 * ms, 103 * ms, "a"),
        (3, 103 * ms, 105 * ms, "a"),  # launched by the target, of which it is the end
        (2, 106 * ms, 110 * ms, "b"),
        (9, 110 * ms, 111 * ms, "c"),  # launch unknown
        (5, 110 * ms, 114 * ms, "copy"),  # beside it
    ]
    times, busy = attribute(kernels, launches, marks)
    expected = {"target": 5.0, "context": 5.0, "rest": 4.0}
    assert times == {**dict.fromkeys(PARTS, 0.0), **expected}
    assert busy == pytest.approx(13.0)
    rows = kernel_table(kernels)[2:]
    assert rows[0] == "| `a` | 2 | 5.000 | 35.7% |"


def test_the_profiler_sees_the_switches(monkeypatch):
    """Its device part needs a GPU."""
    activity = torch.profiler.ProfilerActivity
    profile = torch.profiler.profile
    monkeypatch.setattr(
        torch.profiler, "profile", lambda **kw: profile(**{**kw, "activities": [activity.CPU]})
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    contestant = Contestant(FAST, Workload(_case(), CPU))
    timeline = Timeline(CPU)

    def body():
        with timeline.watching(contestant.step):
            contestant.run(0)

    kernels, launches, marks = profiled(body)
    assert not kernels
    assert not launches
    assert [part for _, part in marks] == [part for part, _ in timeline._marks]


# --- targets -------------------------------------------------------------------------------------


def _row(provider, ms, peak=None, mode="published", model="H/14", **speed):
    row = {"model": model, "batch": 128, "precision": "bfloat16", "mode": mode, "ms": ms}
    row |= {"provider": provider, "images_per_second": 128e3 / ms, "speed": speed}
    return row if peak is None else {**row, "peak_gib": peak}


def test_targets_of_the_step(monkeypatch):
    monkeypatch.setattr(targets, "machine", lambda: {"device": "NVIDIA H100 80GB HBM3"})
    good = {"released-style": 2.1, "reference": 1.6, "reference+compile": 1.01}
    fine = [
        _row(REFERENCE, 300.0, 50.0),
        _row(FAST, 180.0, 37.0, **good),
        {"model": "B/16", "provider": FAST, "error": "out of time"},
    ]
    assert targets.missed_steps(fine) == []
    bad = {"released-style": 1.9, "reference": 1.4, "reference+compile": 0.99}
    missed = [
        _row(REFERENCE, 300.0, 50.0, mode="whole"),
        _row(FAST, 250.0, 46.0, mode="whole", **bad),
        _row(FAST, 250.0, 1.0, model="B/16", **good),
    ]
    name = "H/14, 128, bfloat16, whole, fast: 250.0 ms"
    assert targets.missed_steps(missed) == [
        f"{name}, 1.90 x released-style, target 2 x",
        f"{name}, 1.40 x reference, target 1.5 x",
        f"{name}, 0.99 x reference+compile, target 1 x",
        f"{name}, 0.92 x the reference's memory, target 0.75 x",
        "B/16, 128, bfloat16, published, fast: 250.0 ms, 512 images/s, target 2700",
    ]
    # on a CPU not slower than the reference, whatever the others do
    slow = [_row(FAST, 2.0, reference=0.98), _row(FAST, 2.0, model="S/16", reference=1.0)]
    (line,) = targets.missed_steps(slow)
    assert line.endswith("0.98 x reference, target 1 x")
