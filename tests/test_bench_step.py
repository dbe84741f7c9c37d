"""The benchmark of the training step: what it refuses, what it reports, how it tells parts."""

import copy
import dataclasses
import json
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import step_contest, step_providers, step_report, targets
from benchmarks.bench_step import main
from benchmarks.gpu_check import step as part
from benchmarks.released_style import ExplicitAttention
from benchmarks.step_contest import measure, names_on
from benchmarks.step_parts import PARTS, SavedBytes, Timeline, attribute, kernel_table, profiled
from benchmarks.step_providers import (
    COMPILE,
    FAST,
    MODES,
    PROVIDERS,
    REFERENCE,
    RELEASED,
    SELECTIVE,
    Contestant,
    Workload,
    check_losses,
    check_weights,
    make_case,
)
from ijepa_fast import parity

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
    for name in (FAST, RELEASED, SELECTIVE):
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
        assert row["repeats"] == len(row["turns_ms"]) == 2
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
    flushed = []
    rows = measure(_case(), ALL, device=CPU, repeats=1, flush=lambda r: flushed.append(len(r)))
    assert flushed == [3, 3]
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert [row["held_against"] for row in rows[1:]] == [FAST, FAST]
    table = step_report.table(rows).splitlines()
    assert "| reference | not measured: OutOfMemoryError: CUDA out of memory |" in table[2]
    assert len({line.count("|") for line in table}) == 1


def test_nothing_is_begun_after_the_deadline():
    rows = measure(_case(), ALL, device=CPU, repeats=1, deadline=time.monotonic() - 1)
    assert [row["error"] for row in rows] == ["out of time"] * 3


def test_providers_that_do_not_fit_at_once_take_turns_with_the_fast_step(monkeypatch):
    case, names = _case(), names_on(torch.device("cuda"))
    memory = SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert step_contest._groups(case, names, torch.device("cuda")) == [ALL, names]
    memory.total_memory = 2**20
    pairs = step_contest._groups(case, names, torch.device("cuda"))
    assert pairs == [[REFERENCE, FAST], [RELEASED, FAST], [COMPILE, FAST], [SELECTIVE, FAST]]

    groups = [[REFERENCE, FAST], [RELEASED, FAST]]
    monkeypatch.setattr(step_contest, "_groups", lambda *args: groups)
    alive = []
    verify = step_contest._Contest._verify

    def noting(contest, name):
        verify(contest, name)
        alive.append(set(contest.alive))

    monkeypatch.setattr(step_contest._Contest, "_verify", noting)
    rows = {row["provider"]: row for row in measure(case, ALL, device=CPU, repeats=2)}
    assert alive == [{REFERENCE}, {REFERENCE, FAST}, {FAST, RELEASED}]
    assert rows[FAST]["repeats"] == 4
    speed = rows[RELEASED]["speed"]
    by_way = speed[FAST] * rows[FAST]["speed"][REFERENCE]
    assert speed[REFERENCE] == pytest.approx(by_way)


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
        _row(FAST, 190.0, 44.0, **good),
        _row(SELECTIVE, 198.0, 34.0, fast=0.96),
        {"model": "B/16", "provider": FAST, "error": "out of time"},
    ]
    assert targets.missed_steps(fine) == []
    bad = {"released-style": 1.9, "reference": 1.4, "reference+compile": 0.99}
    missed = [
        _row(REFERENCE, 300.0, 50.0, mode="whole"),
        _row(FAST, 250.0, 46.0, mode="whole", **bad),
        _row(SELECTIVE, 280.0, 36.0, mode="whole", fast=0.9),
        _row(FAST, 250.0, 1.0, model="B/16", **good),
    ]
    name = "H/14, 128, bfloat16, whole, fast: 250.0 ms"
    lean = "H/14, 128, bfloat16, whole, fast, memory selective: 280.0 ms"
    assert targets.missed_steps(missed) == [
        f"{name}, 1.90 x released-style, target 2 x",
        f"{name}, 1.40 x reference, target 1.5 x",
        f"{name}, 0.99 x reference+compile, target 1 x",
        f"{name}, 0.92 x the reference's memory, target 0.9 x",
        f"{lean}, 0.72 x the reference's memory, target 0.7 x",
        f"{lean}, 1.11 x the time without recomputation, target 1.05 x",
        "B/16, 128, bfloat16, published, fast: 250.0 ms, 512 images/s, target 4200",
    ]
    # on a CPU not slower than the reference, whatever the others do
    slow = [_row(FAST, 2.0, reference=0.98), _row(FAST, 2.0, model="S/16", reference=1.0)]
    (line,) = targets.missed_steps(slow)
    assert line.endswith("0.98 x reference, target 1 x")


# --- gpu-check -----------------------------------------------------------------------------------


def _parity(device):
    return [{"path": "fast", "dtype": "float32", "ok": True}]


def test_the_part_flushes_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(part, "check_parity", _parity)
    monkeypatch.setattr(part, "make_case", lambda *a, mode, **kw: _case(mode))
    monkeypatch.setattr(step_report, "matrix_rate", lambda device, precision: 1e9)
    assert part.run(tmp_path, CPU, ["tiny"], 2, MODES, [REFERENCE, FAST])
    found = json.loads((tmp_path / "step.json").read_text())
    assert len(found["rows"]) == 4
    assert found["left_out"] == []
    assert found["graphs"] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"step.json", "step.md"}
    text = (tmp_path / "step.md").read_text()
    assert text.startswith("Parity: fast float32 holds\n")
    assert "Graphs compiled by the whole run: 0." in text

    # stopped in the middle of the second case
    real = measure

    def slow(case, *args, flush, **kwargs):
        if case.mode == "whole":
            flush([{**step_report.new_row(case, FAST), "error": "half way"}])
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            time.sleep(30)
        return real(case, *args, flush=flush, **kwargs)

    monkeypatch.setattr(part, "measure", slow)
    assert not part.run(tmp_path, CPU, ["tiny"], 2, MODES, [REFERENCE, FAST])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    found = json.loads((tmp_path / "step.json").read_text())
    assert [r.get("error") for r in found["rows"]] == [None, None, "half way"]
    assert found["left_out"] == ["tiny, batch 2, float32, whole"]
    assert "out of time: tiny, batch 2" in (tmp_path / "step.md").read_text()


def test_a_replay_that_fails_leaves_the_other_path(monkeypatch):
    def replay(file, *, path, dtype, device):
        if path == "fast":
            raise RuntimeError("no such kernel\nlong text")
        row = SimpleNamespace(kind="loss", error=1e-7)
        return SimpleNamespace(ok=True, rows=[row], table=lambda: "PASS")

    monkeypatch.setattr(parity, "replay", replay)
    results = part.check_parity(CPU)
    assert [(r["path"], r["dtype"], r["ok"]) for r in results] == [
        ("reference", "float32", True),
        ("reference", "bfloat16", True),
        ("fast", "float32", False),
        ("fast", "bfloat16", False),
    ]
    assert results[0]["worst"] == {"loss": 1e-7}
    assert results[3]["error"] == "RuntimeError: no such kernel"
