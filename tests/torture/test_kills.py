"""kill -9 at random moments, again and again; ranks killed, stopped and raising under torchrun."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ijepa_fast.data import Index
from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
KILLS = 20
"""In one run at most, which is over by then or soon."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


def _settings(path):
    return {
        "path": path,
        "optim__epochs": 80,
        "checkpoint__minutes": 1e-9,
        "log__samples": True,
        "batch__device": 4,
    }


def _steps(out):
    return [int(p.name[5:]) for p in (out / "checkpoints").glob("step-*")]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("path", ["fast", "reference"])
def test_killed_at_random_moments(data, tmp_path, pytestconfig, path, world):
    """Also inside a save; the result is the uninterrupted run's, bit for bit. A quarter of --kills,
    in as many runs as it takes.
    """
    wanted, settings = pytestconfig.getoption("--kills") // 4, _settings(path)
    codes, text = tiny.run_ranks(data, tmp_path / "whole", world=world, **settings)
    assert codes == [0] * world, text
    moments, kills, in_a_save, runs = random.Random(world), 0, 0, 0
    while kills < wanted:
        out = tmp_path / f"run{runs}"
        done, saving = _kill_again_and_again(
            data, out, moments, min(KILLS, wanted - kills), path, world
        )
        codes, text = tiny.run_ranks(data, out, world=world, **settings)
        assert codes == [0] * world, text
        tiny.assert_same_state(out, tmp_path / "whole")
        shutil.rmtree(out)
        kills, in_a_save, runs = kills + done, in_a_save + saving, runs + 1
    print(
        f"TORTURE kills: {path}, {world} ranks: {kills} kills of {runs} runs, {in_a_save} with a "
        "save under way"
    )
    assert in_a_save


def _kill_again_and_again(data, out, moments, most, path, world):
    """Kills a run so many times, or until it is over: how often, and how often inside a save."""
    argv, output = tiny.arguments(data, out, **_settings(path)), out.parent / "output.txt"
    in_a_save = kills = 0
    while kills < most and max(_steps(out), default=0) < 400:
        before = max(_steps(out), default=0)
        environments = tiny.rank_environments(world) if world > 1 else [{}]
        children = [tiny.start(argv, output, e) for e in environments]
        # every other one is let come a step further, so that there is something to lose
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and children[0].is_alive():
            if kills % 2 == 0 or max(_steps(out), default=0) > before:
                break
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.25 if kills % 2 else 3.0))
        if kills % 4 == 3:
            while children[0].is_alive() and not any((out / "checkpoints").glob(".tmp-*")):
                pass
        victim = children[moments.randrange(world)]
        alive = victim.is_alive()
        victim.kill()
        victim.join()
        in_a_save += any((out / "checkpoints").glob(".tmp-*")) if out.exists() else 0
        for child in children:
            child.kill()
            child.join()
        kills += alive
    return kills, in_a_save


@pytest.mark.parametrize("kind", ["kill", "raise", "stop", "term"])
def test_a_lost_rank_under_torchrun(data, tmp_path, kind):
    out = tmp_path / "run"
    settings = {"batch__device": 4, "log__interval": 1, "rank_timeout": 20}
    settings["checkpoint__keep_every"] = 1
    argv = tiny.arguments(data, out, **settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "--max-restarts=3", "-m", "ijepa_fast.train", *argv]
    started = time.monotonic()
    result = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "IJEPA_FAST_FAULT": f"1:8:{kind}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    took = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    # a signal is saved at once, the others go back to the epoch's end
    resumed = re.search(r"resumed from the checkpoint at step (\d+)", result.stdout)
    assert resumed is not None
    assert int(resumed.group(1)) >= (5 if kind != "term" else 8)
    codes, output = tiny.run_ranks(data, tmp_path / "whole", **settings)
    assert codes == [0, 0], output
    tiny.assert_same_state(out, tmp_path / "whole")
    if kind == "stop":
        assert "rank 1 has given no sign of life for 20 s" in result.stderr
    print(f"TORTURE torchrun: {kind} survived in {took:.0f} s, from step {resumed.group(1)}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_at_random_moments(data, tmp_path, number):
    """To any one of two ranks; both leave within 30 s with a checkpoint of one step."""
    out, settings = tmp_path / "run", _settings("fast")
    argv, output = tiny.arguments(data, out, **settings), tmp_path / "output.txt"
    moments, longest = random.Random(0), 0.0
    for _ in range(6):
        before = max(_steps(out), default=0)
        children = [tiny.start(argv, output, e) for e in tiny.rank_environments(2)]
        while max(_steps(out), default=0) <= before and children[0].is_alive():
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if not children[0].is_alive():
            break
        sent = time.monotonic()
        os.kill(children[moments.randrange(2)].pid, number)
        for child in children:
            child.join(30)
        longest = max(longest, time.monotonic() - sent)
        assert {child.exitcode for child in children} <= {128 + number, 0}, output.read_text()
    for folder in (out, tmp_path / "whole"):
        codes, text = tiny.run_ranks(data, folder, **settings)
        assert codes == [0, 0], text[-5000:]
    tiny.assert_same_state(out, tmp_path / "whole")
    print(f"TORTURE signals: {number.name} left within {longest:.1f} s")


def _with_slow_reads(argv, output, environment):
    read = Index.read

    def slow(self, row):
        time.sleep(1.0)
        return read(self, row)

    Index.read = slow  # type: ignore[method-assign]
    tiny._in_child(argv, output, environment)


def test_two_ranks_stopped_while_they_wait_for_data(data, tmp_path):
    """Longer than `data.timeout`: that was no time without data."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    settings = {"batch__device": 4, "data__timeout": 3.0, "rank_timeout": 60}
    argv = tiny.arguments(data, out, **settings)
    children = [
        tiny._FORKS.Process(target=_with_slow_reads, args=(argv, output, environment))
        for environment in tiny.rank_environments(2)
    ]
    for child in children:
        child.start()
    for seconds, stopped in ((4, children[:1]), (4, children[1:]), (5, children)):
        time.sleep(1)
        for number, pause in ((signal.SIGSTOP, seconds), (signal.SIGCONT, 0)):
            for child in stopped:
                os.kill(child.pid, number)
            time.sleep(pause)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0], output.read_text()
    codes, text = tiny.run_ranks(data, tmp_path / "whole", **settings)
    assert codes == [0, 0], text
    tiny.assert_same_state(out, tmp_path / "whole")
    print("TORTURE stopped: both ranks, one after the other and together, same result")


def test_two_ranks_with_out_inside_data(data, tmp_path):
    """What a run writes does not become data of the same run, nor of the next one."""
    shutil.copytree(data, tmp_path / "data")
    settings = {"batch__device": 4, "checkpoint__keep_every": 1}
    for stop in (7, 15):
        codes, text = tiny.run_ranks(
            tmp_path / "data", tmp_path / "data" / "run", max_steps=stop, **settings
        )
        assert codes == [0, 0], text
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / "run" / "masks.png")
    codes, text = tiny.run_ranks(data, tmp_path / "whole", **settings)
    assert codes == [0, 0], text
    tiny.assert_same_state(tmp_path / "data" / "run", tmp_path / "whole")


def test_two_ranks_with_another_runs_checkpoint(data, tmp_path):
    """It is refused by both ranks, and the folder stays as it is."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    settings = {"batch__device": 4}
    for out, stop, seed in ((ours, 5, 3), (other, 9, 4)):
        codes, text = tiny.run_ranks(data, out, max_steps=stop, seed=seed, **settings)
        assert codes == [0, 0], text
    shutil.copytree(other / "checkpoints", ours / "checkpoints", dirs_exist_ok=True)
    before = tiny.snapshot(ours)
    codes, text = tiny.run_ranks(data, ours, seed=3, **settings)
    assert codes[0] == 2, text
    assert 0 not in codes, text
    assert "the recipe differs from the one in" in text
    assert "seed: 4 -> 3" in text
    assert tiny.snapshot(ours) == before
