"""What ends ordinary runs: signals, lost ranks, slow disks, NaN; and which samples are consumed."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from ijepa_fast.data import Index, build_index, epoch_order
from ijepa_fast.ranks.faults import Faults
from ijepa_fast.ranks.heartbeat import Heartbeat
from ijepa_fast.ranks.rendezvous import agree_on_life
from ijepa_fast.ranks.signals import Signals
from ijepa_fast.verify.replay import main as replay_main
from ijepa_fast.verify.replay import read_replay
from tests.trainer import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert tiny.run(data, out) == 0
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


# --- signals -------------------------------------------------------------------------------------


def test_a_second_signal_ends_at_once(monkeypatch):
    """The first one's echo through torchrun does not count."""
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    now = [100.0]
    monkeypatch.setattr("ijepa_fast.ranks.signals.time.monotonic", lambda: now[0])
    with Signals() as signals:
        signals.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 0.5
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, ended) == (signal.SIGTERM, [])
        now[0] += 1.0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ended == [signal.SIGUSR1]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_there_is_anything_to_save_the_first_one_ends(monkeypatch):
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, ended) == (0, [signal.SIGTERM])


# --- ranks that watch each other -----------------------------------------------------------------


@pytest.fixture
def address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()


def _beats(address, rank, left, world=2, limit=1.0, **options):
    return Heartbeat(
        rank=rank,
        world=world,
        address=address,
        life="0",
        limit=limit,
        leave=left.append,
        **options,
    )


def _store(address):
    return dist.TCPStore(  # type: ignore[attr-defined]
        address[0], address[1], is_master=True, wait_for_workers=False
    )


def test_ranks_that_live_or_end_well_are_not_missed(address):
    left: list[str] = []
    store = _store(address)
    with _beats(address, 0, left), _beats(address, 1, left):
        time.sleep(1.5)
        with _beats(address, 2, left, world=3):
            pass
        time.sleep(0.5)
    assert left == []
    del store


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_without_a_sign_of_life_is_missed(address, lost, monkeypatch):
    left: list[str] = []
    other: list[str] = []
    store = _store(address)
    here, there = _beats(address, 1 - lost, left), _beats(address, lost, other)
    here.__enter__()
    there.__enter__()
    time.sleep(0.6)
    # as after SIGSTOP: the threads are there and do nothing
    monkeypatch.setattr(there, "_beat", lambda _count: time.sleep(30))
    deadline = time.monotonic() + 8
    while not left and time.monotonic() < deadline:
        time.sleep(0.05)
    here._stop.set()
    there._stop.set()
    assert left
    assert left[0] == f"rank {lost} has given no sign of life for 1 s"
    del store


@pytest.mark.parametrize(
    ("error", "expected"),
    [(KeyError, []), (RuntimeError, ["rank 1 has failed (RuntimeError)"])],
)
def test_a_rank_that_fails_says_so(address, error, expected):
    """The others need not wait for the limit; what all ranks meet together is not said."""
    left: list[str] = []
    store = _store(address)
    with _beats(address, 0, left, limit=20.0):
        failing = _beats(address, 1, [], limit=20.0, known=(KeyError,))
        failing.__enter__()
        time.sleep(0.5)
        failing.__exit__(error, error(), None)
        deadline = time.monotonic() + (8 if expected else 3)
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
    assert left[:1] == expected
    del store


def test_a_store_that_is_cut_off_is_noticed(address):
    left: list[str] = []
    beats = _beats(address, 1, left)
    with beats:
        deadline = time.monotonic() + 8
        while not left and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "the store of the ranks has not answered for 1 s" in left[0]


def test_torchrun_restarts_after_a_killed_rank(data, tmp_path):
    """And goes on to the same result; the pictures too."""
    out, settings = tmp_path / "run", {"batch__device": 4, "log__interval": 1}
    argv = tiny.arguments(data, out, **settings, checkpoint__keep_every=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--max-restarts=3", "-m", "ijepa_fast.train", *argv]
    result = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "IJEPA_FAST_FAULT": "1:8:kill"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks x 4 on the device" in result.stdout
    assert "resumed from the checkpoint at step 5" in result.stdout
    assert f"done: {out}" in result.stdout
    assert (out / "masks.png").exists()
    codes, output = tiny.run_ranks(data, tmp_path / "whole", **settings)
    assert codes == [0, 0], output
    tiny.assert_same_state(out, tmp_path / "whole")


@pytest.mark.parametrize("world", [2, 3])
def test_every_life_has_a_name_of_its_own(world):
    """In one store for all of them, as torchrun keeps it."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    # a process of an earlier life that left a token and a proposal, and was killed
    store.set("ijepa-life/token/1", "gone")
    store.set("ijepa-life/proposal", json.dumps(["old", ["x"] * world]))
    lives = []
    for _ in range(3):
        found: dict[int, str] = {}

        def join(rank, found=found):
            time.sleep(0.02 * ((rank * 7) % 5))
            found[rank] = agree_on_life(store, rank, world, timeout=timedelta(seconds=20))

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == world
        assert len(set(found.values())) == 1
        lives.append(found[0])
    assert len(set(lives)) == 3
    assert "old" not in lives


def test_ranks_that_do_not_come_are_not_waited_for_for_ever():
    store = dist.HashStore()  # type: ignore[attr-defined]
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match="the 3 ranks have not met"):
            agree_on_life(store, rank, 3, timeout=timedelta(seconds=0.2))


# --- faults --------------------------------------------------------------------------------------


def test_faults_are_read_for_one_rank():
    faults = Faults.of("1:3:kill, 0:4:raise,1:4:nan-image", 1)
    assert faults.planned == ((3, "kill"), (4, "nan-image"))
    assert Faults.of("", 0).planned == ()


@pytest.mark.parametrize("text", ["kill", "0:0:kill", "0:-1:kill", "0:1:burn", "a:1:kill", "0:1:"])
def test_a_wrong_fault_is_refused_before_work_begins(data, out, text, monkeypatch, capsys):
    monkeypatch.setenv("IJEPA_FAST_FAULT", text)
    assert tiny.run(data, out) == 2
    error = capsys.readouterr().err
    assert "IJEPA_FAST_FAULT must be rank:step:kind" in error
    assert repr(text) in error
    assert not out.exists()


def test_a_restarted_job_meets_no_fault(data, out, whole, monkeypatch):
    monkeypatch.setenv("IJEPA_FAST_FAULT", "0:3:raise")
    with pytest.raises(RuntimeError, match="asked for at step 3"):
        tiny.run(data, out)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


# --- NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("kind", ["nan-image", "nan-gradient", "nan-weight"])
def test_nan_poisons_nothing_and_can_be_replayed(data, out, path, kind, monkeypatch, capsys):
    steps = "6" if kind == "nan-weight" else "678"
    monkeypatch.setenv("IJEPA_FAST_FAULT", ",".join(f"0:{step}:{kind}" for step in steps))
    settings = {"path": path, "log__interval": 1, "checkpoint__keep_every": 1}
    assert tiny.run(data, out, **settings) == 4
    error = capsys.readouterr().err
    assert "steps 6 to 8" in error
    assert "ijepa-fast replay" in error
    # on the disk: only what was before
    state = tiny.final_state(out)
    assert int(state["step"]) == 5
    assert all(value.isfinite().all() for value in state.values())
    file = out / "replay-step-00000008.safetensors"
    recorded = read_replay(file)
    index = build_index(data)
    expected = epoch_order(len(index), seed=3, epoch=1)[16:24].tolist()
    assert recorded.ids.tolist() == expected
    assert recorded.files == [index.name(row) for row in expected]
    code = replay_main([str(file), "--device", "cpu"])
    text = capsys.readouterr().out
    if kind == "nan-weight":
        assert code == 1
        assert "reference: loss nan, NOT FINITE" in text
        assert "fast: loss nan, NOT FINITE" in text
        assert "samples (place, id, file): 8 of 8" in text
        # the plain EMA adds 0 * NaN of a skipped step: in memory only, as seen above
        assert f"weights: {1 if path == 'fast' else 2} of" in text
    else:
        # neither weights nor images were at fault
        assert code == 0
        assert "The step is finite here" in text
    # the run goes on from the last good checkpoint
    monkeypatch.delenv("IJEPA_FAST_FAULT")
    assert tiny.run(data, out, **settings) == 0


def test_a_replay_is_the_step_that_was(data, out, monkeypatch, capsys):
    """Its loss is the one that the run would have had."""
    settings = {"log__interval": 1, "batch__device": 4}
    monkeypatch.setenv("IJEPA_FAST_FAULT", ",".join(f"0:{s}:nan-gradient" for s in (6, 7, 8)))
    assert tiny.run(data, out, **settings) == 4
    logged = {row["step"]: row["loss"] for row in tiny.rows(out)}[8]
    file = out / "replay-step-00000008.safetensors"
    tensors = load_file(file)
    assert tensors["images"].shape == (8, 32, 32, 3)
    networks = {"encoder", "predictor", "target_encoder"}
    assert {name.partition(".")[0] for name in tensors} == {"images", "ids", *networks}
    assert replay_main([str(file), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for path in ("reference", "fast"):
        assert f"{path}: loss {logged:.6f}" in text


def test_wrong_replay_files_are_named(data, out, monkeypatch, capsys):
    monkeypatch.setenv("IJEPA_FAST_FAULT", ",".join(f"0:{s}:nan-gradient" for s in (1, 2, 3)))
    assert tiny.run(data, out) == 4
    file = out / "replay-step-00000003.safetensors"
    whole = file.read_bytes()
    for content, words in (
        (whole[:999], "whole replay file"),
        (b"", "whole replay file"),
        (whole.replace(b"ijepa-fast replay 1", b"ijepa-fast replay 9"), "format"),
        (None, "whole replay file"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        capsys.readouterr()
        assert replay_main([str(file)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(file) in error


# --- which samples -------------------------------------------------------------------------------


def _consumed(out, steps):
    """Sample ids by step and position; a later line counts."""
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    for path in out.glob("samples-rank*.jsonl"):
        begin = 0
        for line in path.read_text().splitlines():
            row = json.loads(line)
            begin = row.get("from_step", begin)
            for position, row_id in zip(row.get("positions", ()), row.get("ids", ()), strict=True):
                key = row["step"], position
                if key not in taken or taken[key][0] <= begin:
                    taken[key] = begin, row_id
    return [taken[step, position][1] for step in range(1, steps + 1) for position in range(8)]


def test_each_epoch_takes_its_permutation_once(tmp_path):
    """42 images, 5 steps of 8 an epoch; over changes of the number of ranks, and a restart."""
    data, out = tiny.write_images(tmp_path / "data", count=42), tmp_path / "run"
    settings = {"log__samples": True, "log__interval": 1, "batch__device": 2}
    assert tiny.run_ranks(data, out, world=4, max_steps=4, **settings)[0] == [0] * 4
    assert tiny.run(data, out, max_steps=8, **settings) == 0
    assert tiny.run_ranks(data, out, **settings)[0] == [0, 0]
    ids = _consumed(out, 15)
    for epoch in range(3):
        order = epoch_order(42, seed=3, epoch=epoch)[:40].tolist()
        assert ids[40 * epoch : 40 * (epoch + 1)] == order
        assert len(set(order)) == 40
    one = tmp_path / "one"
    assert tiny.run(data, one, **settings) == 0
    assert _consumed(one, 15) == ids
    # the same global batches: the same run
    tiny.assert_near(out, one, 15)


# --- slow disks ----------------------------------------------------------------------------------


def test_a_slow_disk_is_waited_for_and_said(data, out, whole, monkeypatch):
    read = Index.read

    def slow(self, row):
        time.sleep(0.3)
        return read(self, row)

    monkeypatch.setattr(Index, "read", slow)
    monkeypatch.setattr("ijepa_fast.data.loader._SAID_EVERY", 0.1)
    assert tiny.run(data, out, max_steps=2) == 0
    log = (out / "train.log").read_text()
    assert "the step waits for data for" in log
    assert "reading 'class" in log


def test_time_in_which_the_process_was_stopped_does_not_count(data, out, monkeypatch):
    """As after SIGSTOP: the clock has gone on by much more than `data.timeout`."""
    read, stopped = Index.read, [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + stopped[0], perf_counter=time.perf_counter
    )

    def slow(self, row):
        if not stopped[0] and threading.current_thread().name.startswith("ijepa-read"):
            # the step waits by then
            time.sleep(0.3)
            stopped[0] = 1000.0
            time.sleep(0.9)
        return read(self, row)

    monkeypatch.setattr(Index, "read", slow)
    monkeypatch.setattr("ijepa_fast.data.loader.time", clock)
    assert tiny.run(data, out, data__timeout=2.0, max_steps=1) == 0
    assert stopped == [1000.0]


def _hanging(argv, output):
    read, lock = Index.read, threading.Lock()
    count = 0

    def hang(self, row):
        nonlocal count
        with lock:
            count += 1
            hangs = count > 20
        if hangs:
            time.sleep(600)
        return read(self, row)

    Index.read = hang  # type: ignore[method-assign]
    tiny._in_child(argv, output, {})


def test_a_dead_disk_ends_the_run(data, out):
    """Not a hang: a message, exit code 5, although threads are stuck in a read."""
    output = out.parent / "output.txt"
    argv = tiny.arguments(data, out, data__timeout=2.0)
    process = tiny._FORKS.Process(target=_hanging, args=(argv, output))
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    text = output.read_text()
    assert not alive, text
    assert process.exitcode == 5, text
    assert "error: data.timeout must be longer than any time without data (2 s)" in text
    assert "class" in text.splitlines()[-1]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("ijepa_fast.data.reading._BACKOFF", (0.0, 0.0))


def _fails(times):
    """Reads that fail so often, whatever they read."""
    read, lock, left = Index.read, threading.Lock(), [times]

    def failing(self, row):
        with lock:
            left[0] -= 1
            fails = left[0] >= 0
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, row)

    return failing


def test_storage_that_fails_for_a_moment_costs_nothing(data, out, whole, at_once, monkeypatch):
    monkeypatch.setattr(Index, "read", _fails(2))
    assert tiny.run(data, out) == 0
    assert not (out / "quarantine.jsonl").exists()
    tiny.assert_same_state(out, whole)


def test_storage_that_is_gone_condemns_no_file(data, out, whole, at_once, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Index, "read", _fails(10**9))
        assert tiny.run(data, out) == 5
    assert "error: the storage of the data fails" in capsys.readouterr().err
    assert not (out / "quarantine.jsonl").exists()
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


def test_one_file_that_cannot_be_read_is_the_files_fault(data, out, at_once, monkeypatch):
    read = Index.read

    def failing(self, row):
        if row == 7:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(self, row)

    monkeypatch.setattr(Index, "read", failing)
    assert tiny.run(data, out, data__max_bad_share=0.1) == 0
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == 7
    assert "Input/output error" in json.loads(line)["reason"]


def test_an_unmounted_folder_condemns_no_file(tmp_path, out, at_once, capsys):
    data, done = tiny.write_images(tmp_path / "data"), threading.Event()
    read = Index.read

    def meddle(self, row):
        if not done.is_set():
            done.set()
            data.rename(tmp_path / "elsewhere")
            data.mkdir()
        return read(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Index, "read", meddle)
        assert tiny.run(data, out) == 5
    assert "the storage of the data fails" in capsys.readouterr().err
    assert not (out / "quarantine.jsonl").exists()


def test_files_that_change_under_the_run(tmp_path, out):
    """Deleted, cut, overwritten with noise: replaced, and the run goes on."""
    data = tiny.write_images(tmp_path / "data")
    index = build_index(data)
    order = epoch_order(40, seed=3, epoch=0)
    victims = [index.path(int(row)) for row in order[24:27]]
    read, done = Index.read, threading.Event()

    def meddle(self, row):
        if not done.is_set():
            done.set()
            os.unlink(victims[0])
            os.truncate(victims[1], 100)
            size = os.path.getsize(victims[2])
            Path(victims[2]).write_bytes(np.random.default_rng(0).bytes(size))
        return read(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Index, "read", meddle)
        assert tiny.run(data, out, data__max_bad_share=0.2) == 0
    entries = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(e["file"] for e in entries) == sorted(os.path.relpath(v, data) for v in victims)
    reasons = " ".join(e["reason"] for e in entries)
    assert "No such file" in reasons
    assert "has changed" in reasons
    state = tiny.final_state(out)
    assert int(state["step"]) == 15
