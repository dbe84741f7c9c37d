"""What callbacks are told over whole runs, and what they cannot do to one."""

import os
import signal
import time
from unittest import mock

import pytest
import torch

from ijepa_fast import train
from ijepa_fast.callbacks import Callback, Callbacks, MetricsFile
from ijepa_fast.errors import MainRankError, UsageError
from ijepa_fast.state import checkpoint
from tests.trainer import tiny

METHODS = ("on_start", "on_step", "on_checkpoint", "on_evaluation", "on_end")


class Recorder(Callback):
    """Every call, in a list that several may share."""

    def __init__(self, calls=None, name=""):
        self.calls = [] if calls is None else calls
        self.name = name

    def __getattribute__(self, name):
        if name not in METHODS:
            return super().__getattribute__(name)
        return lambda *values: self.calls.append((self.name + name, *values))

    def of(self, name):
        return [call[1] if len(call) == 2 else call[1:] for call in self.calls if call[0] == name]


def _run(data, out, *callbacks, **settings):
    """Exit code of the command, which itself takes no callbacks."""
    command = train._command

    def given(argv, _, **options):
        return command(argv, callbacks, **options)

    with mock.patch.object(train, "_command", given):
        return tiny.run(data, out, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """5 steps without anybody's callbacks."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert tiny.run(data, out, max_steps=5) == 0
    return out


def test_calls_over_a_run_and_its_resume(data, tmp_path):
    out, settings = tmp_path / "run", {"eval__data": data, "eval__every": 4}
    first = Recorder()
    assert _run(data, out, first, max_steps=7, checkpoint__minutes=1e-9, **settings) == 0
    second = Recorder()
    assert _run(data, out, second, max_steps=9, **settings) == 0
    for recorder, step, last_step in ((first, 0, 7), (second, 7, 9)):
        names = [call[0] for call in recorder.calls]
        assert (names[0], names[-1]) == ("on_start", "on_end")
        assert names.count("on_start") == names.count("on_end") == 1
        (info,) = recorder.of("on_start")
        assert (info.step, info.last_step, info.images, info.out) == (step, last_step, 40, out)
        assert info.config.optim.epochs == info.settings["optim"]["epochs"] == 3
        assert recorder.of("on_end") == [("done", last_step)]
    assert [row["step"] for row in first.of("on_step")] == [2, 4, 6, 7]
    assert [row["step"] for row in second.of("on_step")] == [8, 9]
    assert [row["step"] for row in first.of("on_evaluation")] == [0, 4, 7]
    assert [row["step"] for row in second.of("on_evaluation")] == [8, 9]
    # of the row at step 7 a resume knows nothing: no log line falls on it
    calls = [*first.calls, *second.calls]
    told = [call[1] for call in calls if call[0] in ("on_step", "on_evaluation")]
    told = [row for row in told if row["step"] != 7 or "monitors" in row]
    assert told == tiny.rows(out, timing=True)
    # a checkpoint comes behind the rows before it, once
    saved = first.of("on_checkpoint")
    assert saved == sorted(set(saved))
    assert saved[-1] == (7, out / "checkpoints" / "step-00000007")
    assert len(saved) > 1
    for number, call in enumerate(first.calls):
        if call[0] == "on_checkpoint":
            rows = [c[1]["step"] for c in first.calls[:number] if c[0] == "on_step"]
            assert {2, 4, 6, 7} - {*rows} <= set(range(call[1] + 1, 8))
    assert checkpoint.read(second.of("on_checkpoint")[-1][1]).step == 9


def test_callbacks_that_raise_are_named_and_taken_out(data, plain, tmp_path, capsys):
    """All five at once, and the run is the same to the bit."""

    def failing(method):
        def fail(self, *values):
            calls.append((method, *values))
            raise ValueError(f"no {method} for you")

        return type(f"Bad_{method}", (Callback,), {method: fail})()

    calls: list[tuple] = []
    after = Recorder()
    callbacks = [*(failing(method) for method in METHODS), after]
    settings = {"eval__data": data, "eval__every": 4, "max_steps": 5}
    assert _run(data, tmp_path / "run", *callbacks, **settings) == 0
    assert sorted(call[0] for call in calls) == sorted(METHODS)
    assert {call[0] for call in after.calls} == set(METHODS)
    printed = capsys.readouterr().out
    log = (tmp_path / "run" / "train.log").read_text()
    for method in METHODS:
        text = f"callback Bad_{method} raised ValueError in {method} and is taken out"
        assert printed.count(text) == log.count(text) == 1
        assert (
            log.count(f'raise ValueError(f"no {{method}} for you")\nValueError: no {method}') == 1
        )
    assert "Traceback" not in printed
    rows = [row for row in tiny.rows(tmp_path / "run") if "loss" in row]
    assert rows == tiny.rows(plain)
    state, same = tiny.final_state(tmp_path / "run"), tiny.final_state(plain)
    assert all(torch.equal(state[name], same[name]) for name in same)


def test_a_callback_changes_no_number(data, plain, tmp_path):
    """One that is slow, draws random numbers and spoils what it is handed."""

    class Rude(Callback):
        def on_step(self, row):
            time.sleep(0.1)
            torch.manual_seed(row["step"])
            torch.rand(3)
            row["timing"].clear()
            row.clear()

    after = Recorder()
    assert _run(data, tmp_path / "run", Rude(), after, max_steps=5) == 0
    tiny.assert_same_state(tmp_path / "run", plain)
    assert after.of("on_step") == tiny.rows(tmp_path / "run", timing=True)


def test_the_end_after_a_signal_and_after_an_error(data, tmp_path, monkeypatch):
    calls: list[tuple] = []
    with monkeypatch.context() as patch:
        tiny.stop_at(signal.SIGTERM, 3, patch)
        recorders = Recorder(calls, "a "), Recorder(calls, "b ")
        assert _run(data, tmp_path / "run", *recorders) == 128 + signal.SIGTERM
    names = [call[0] for call in calls if call[0].endswith(("_start", "_end"))]
    assert names == ["a on_start", "b on_start", "b on_end", "a on_end"]
    assert calls[-1] == ("a on_end", "stopped", 3)
    assert calls[-3][:2] == ("b on_checkpoint", 3)
    # what is no Exception ends the run, and its callbacks hear of it
    pressed = mock.patch.object(Callback, "on_step", side_effect=KeyboardInterrupt)
    after = Recorder()
    with pressed, pytest.raises(KeyboardInterrupt):
        _run(data, tmp_path / "run", after, Callback())
    assert after.calls[-1][:2] == ("on_end", "failed")


def test_what_the_metrics_file_raises_ends_the_run(tmp_path):
    callbacks = Callbacks(MetricsFile(tmp_path / "metrics.jsonl", step=0))
    with pytest.raises(TypeError):
        callbacks.step({"step": 1, "loss": object()})
    callbacks.end("failed", 1)


def test_what_is_no_callback_is_refused(data, tmp_path, capsys):
    assert _run(data, tmp_path / "run", Recorder) == 2
    assert (
        "error: callbacks must be a list of objects of Callback, got (<class"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def _rank(argv, folder, environment):
    os.environ.update(environment)
    is_main = environment["RANK"] == "0"
    wrong: list = [Recorder]
    try:
        train._command(argv, wrong if is_main else [], ends_process=False)
    except (UsageError, MainRankError) as error:
        (folder / environment["RANK"]).write_text(type(error).__name__)
        # a program that goes on
        time.sleep(120.0 if is_main else 0.0)


def test_the_other_ranks_are_told_of_it(data, tmp_path):
    argv = tiny.arguments(data, tmp_path / "run", batch__device=4)
    children = [
        tiny._FORKS.Process(target=_rank, args=(argv, tmp_path, environment))
        for environment in tiny.rank_environments(2)
    ]
    for child in children:
        child.start()
    children[1].join(100)
    for child in children:
        child.kill()
        child.join()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["UsageError", "MainRankError"]
