"""Checkpoints in the background: full and failing disks, no stacking, room tried at the start."""

import logging
import os
import resource
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ijepa_fast.fast import FastStep
from ijepa_fast.state import checkpoint, saves
from ijepa_fast.state.allowance import Allowance
from ijepa_fast.state.checkpoint import State
from ijepa_fast.state.saves import Saver
from ijepa_fast.visualize import run_pictures as pictures
from tests.trainer import tiny


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(saves, "BACKOFF", (0.0, 0.0))


@pytest.fixture
def at_epochs(monkeypatch):
    """Settings of a run that saves at each epoch's end exactly, however slow the disk is."""
    monkeypatch.setattr(Saver, "busy", False)
    return {"checkpoint__keep_every": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


def _state(step, value=None):
    tensors = {
        "encoder.w": torch.full((2, 3), float(step if value is None else value)),
        "encoder.empty": torch.empty(0),
        "exp_avg.w": torch.arange(5.0),
    }
    return State(tensors=tensors, step=step, adam_step=step, meta={"data": "x"})


class _Failing:
    """Makes the n-th operation on the disk fail, once or from then on."""

    def __init__(self, patch, n, code, *, always):
        self.left, self.code, self.always, self.failed = n, code, always, 0
        for owner, name in (
            (os, "write"),
            (os, "fsync"),
            (os, "open"),
            (Path, "rename"),
            (Path, "mkdir"),
        ):
            patch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, original):
        def call(*arguments, **options):
            if threading.current_thread().name != "ijepa-save":
                return original(*arguments, **options)
            self.left -= 1
            if self.left == -1 or (self.left < 0 and self.always):
                self.failed += 1
                raise OSError(self.code, os.strerror(self.code))
            return original(*arguments, **options)

        return call


@pytest.mark.parametrize("code", [28, 5], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("always", [False, True])
def test_the_disk_fails_at_the_nth_operation(tmp_path, monkeypatch, at_once, code, always):
    """For every n: once, and the next try succeeds; always, and the last good one stays."""
    for n in range(100):
        folder, saver = tmp_path / str(n), Saver()
        checkpoint.write(folder, _state(3))
        with monkeypatch.context() as patch:
            failing = _Failing(patch, n, code, always=always)
            saver.start(5, partial(checkpoint.write, folder, _state(5)))
            error = saver.wait()
        good = checkpoint.load_latest(folder)
        assert good is not None
        assert torch.equal(good.tensors["encoder.w"], torch.full((2, 3), float(good.step)))
        if not failing.failed:
            break
        if always:
            assert error is not None
            assert error.errno == code
            # the name may be there already: the last operation flushes the folder
            assert good.step in (3, 5)
        else:
            assert (error, good.step, saver.saved) == (None, 5, 5)
        # and the disk is back
        saver.start(7, partial(checkpoint.write, folder, _state(7)))
        assert saver.wait() is None
        assert not [p for p in folder.iterdir() if not p.name.startswith("step-")]
    else:
        pytest.fail("the write never came to its end")
    assert n >= 12


def test_saves_never_stack():
    saver, running, most, order = Saver(), 0, 0, []
    go = threading.Event()

    def job(step):
        nonlocal running, most
        running += 1
        most = max(most, running)
        go.wait(5)
        time.sleep(0.01)
        order.append(step)
        running -= 1

    assert not saver.busy
    saver.start(1, partial(job, 1))
    assert saver.busy
    threading.Timer(0.1, go.set).start()
    for step in (2, 3):
        saver.start(step, partial(job, step))
    assert saver.wait() is None
    assert (most, order, saver.saved) == (1, [1, 2, 3], 3)


def test_what_is_not_the_disks_fault_is_raised():
    saver = Saver()

    def job():
        raise AssertionError("a mistake")

    saver.start(1, job)
    with pytest.raises(AssertionError, match="a mistake"):
        saver.wait()
    assert saver.wait() is None


@pytest.fixture
def slow_until(monkeypatch):
    """A disk on which a write lasts until the update of a step (counted from 1) has come."""
    write, update, written = checkpoint.write, FastStep.update, []
    until, free = [0], threading.Event()

    def slow(folder, state):
        written.append(state.step)
        # steps that waited for the disk would wait in vain
        assert free.wait(20)
        return write(folder, state)

    def counted(self, values):
        update(self, values)
        until[0] -= 1
        if until[0] == 0:
            free.set()
            for thread in threading.enumerate():
                if thread.name == "ijepa-save":
                    thread.join()

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(FastStep, "update", counted)

    def start(step):
        until[0] = step
        return written

    return start


def test_a_save_that_is_due_waits_for_the_writer_and_no_step_does(data, tmp_path, slow_until):
    """Every step is due, a write lasts for eight: fewer checkpoints, all whole, the same result."""
    out, written = tmp_path / "run", slow_until(9)
    assert tiny.run(data, out, checkpoint__minutes=1e-9, checkpoint__keep=50) == 0
    assert written[:2] == [1, 9]
    assert written[-1] == 15
    assert written == sorted(set(written))
    assert tiny.run(data, tmp_path / "whole") == 0
    tiny.assert_same_state(out, tmp_path / "whole")


def test_a_kept_checkpoint_that_waits_is_kept_too(data, tmp_path, slow_until):
    """Of epochs that end at 5, 10, 15 the second ends while the first is written, until step 12."""
    out, written = tmp_path / "run", slow_until(12)
    assert tiny.run(data, out, checkpoint__keep=1, checkpoint__keep_every=1) == 0
    assert written == [5, 12, 15]
    kept = sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())
    assert kept == written


def test_curves_are_drawn_while_training_goes_on(data, tmp_path, monkeypatch):
    """By the thread that writes, every few minutes; once more at the end."""
    drawn = []

    def draw(self, name, _):
        if name in ("masks.png", "curves.png"):
            drawn.append((name, threading.current_thread().name))

    settings = {"checkpoint__minutes": 1e-9, "max_steps": 8}
    for minutes, share, between in ((0.0, 1.0, True), (0.0, 0.0, False), (60.0, 1.0, False)):
        drawn.clear()
        monkeypatch.setattr(pictures, "_MINUTES", minutes)
        monkeypatch.setattr(Allowance.__init__, "__defaults__", (share, str))
        with monkeypatch.context() as patch:
            patch.setattr(Saver, "busy", False)
            patch.setattr(pictures.Pictures, "_draw", draw)
            out = tmp_path / f"{minutes}-{share}"
            assert tiny.run(data, out, pictures=True, **settings) == 0
        main = threading.main_thread().name
        assert drawn[0] == ("masks.png", main)
        assert drawn[-1] == ("curves.png", main)
        # after each save but the last
        assert drawn[1:-1] == [("curves.png", "ijepa-save")] * (7 if between else 0)


def test_what_an_allowance_covers(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr("ijepa_fast.state.allowance.time", clock)
    allowance = Allowance(0.01)

    def work(kind, seconds):
        with allowance.spend(kind):
            now[0] += seconds

    work("look", 2.0)
    assert not allowance.covers("look")
    assert not allowance.covers("picture")
    now[0] = 201.0
    # the time is earned back, but not that of another look
    assert allowance.covers("picture")
    assert not allowance.covers("look")
    now[0] = 401.0
    assert allowance.covers("look")
    work("save", 1.0)
    assert (allowance.spent, allowance.last) == (3.0, {"look": 2.0, "save": 1.0})
    assert not allowance.covers("look")


def test_training_outlives_a_full_disk(data, tmp_path, monkeypatch, at_once, at_epochs, caplog):
    """Full at step 5, free again at 10: one checkpoint less, the same weights."""
    write = checkpoint.write

    def full(folder, state):
        if state.step == 5:
            raise OSError(28, "No space left on device")
        return write(folder, state)

    monkeypatch.setattr(checkpoint, "write", full)
    out = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "ijepa_fast"):
        assert tiny.run(data, out, **at_epochs) == 0
    steps = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert steps == ["step-00000010", "step-00000015"]
    log = (out / "train.log").read_text()
    assert log.count("cannot be written ([Errno 28] No space left on device): tried again") == 2
    assert "the checkpoint at step 5 is given up" in log
    assert "training goes on, none so far" in log


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    data, tmp_path, monkeypatch, at_once, at_epochs, capsys
):
    write = checkpoint.write

    def full(folder, state):
        if state.step == 15:
            raise OSError(28, "No space left on device")
        return write(folder, state)

    monkeypatch.setattr(checkpoint, "write", full)
    out = tmp_path / "run"
    assert tiny.run(data, out, **at_epochs) == 5
    error = capsys.readouterr().err
    assert error == (
        "error: cannot write the checkpoint at step 15: [Errno 28] No space left on device; "
        "the last good one is step 10\n"
    )
    monkeypatch.undo()
    assert tiny.run(data, out) == 0
    assert int(tiny.final_state(out)["step"]) == 15


def test_a_state_that_is_not_finite_is_not_written(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert tiny.run(data, out, max_steps=10) == 0
    # the last two steps only: too few to end the run as three in a row do
    monkeypatch.setenv("IJEPA_FAST_FAULT", "0:14:nan-weight")
    assert tiny.run(data, out) == 4
    error = capsys.readouterr().err
    assert "weights must be finite to be saved, got encoder." in error
    assert int(tiny.final_state(out)["step"]) == 10
    monkeypatch.delenv("IJEPA_FAST_FAULT")
    assert tiny.run(data, out) == 0
    assert tiny.run(data, tmp_path / "whole") == 0
    tiny.assert_same_state(out, tmp_path / "whole")


def _limited(argv, output):
    """A process whose files may have 64 kB, as a quota would have it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    tiny._in_child(argv, output, {})


def test_too_little_room_is_said_at_the_start(data, tmp_path):
    output, out = tmp_path / "output.txt", tmp_path / "run"
    process = tiny._FORKS.Process(target=_limited, args=(tiny.arguments(data, out), output))
    process.start()
    process.join(60)
    text = output.read_text()
    assert process.exitcode == 2, text
    assert "error: out must have room for a checkpoint of 0.00 GiB" in text
    assert "File too large" in text
    assert "step 2/" not in text
    assert not list((out / "checkpoints").glob("*"))


MOUNT = 'mount -t tmpfs -o size={size}{options} none "{folder}" && exec {command}'


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [("100k", "", "No space left"), ("10m", ",ro", "Read-only file system")],
)
def test_full_and_read_only_file_systems(data, tmp_path, size, options, words):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces cannot be made here")
    argv = tiny.arguments(data, folder, device="cpu")
    argv[argv.index("--out") + 1] = str(folder / "run")
    python = f"{sys.executable} -m ijepa_fast.train {' '.join(argv)}"
    script = MOUNT.format(size=size, options=options, folder=folder, command=python)
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script],
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.startswith("error: out must ")
