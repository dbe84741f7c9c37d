"""kill -9 at random moments, again and again; ranks killed, stopped and raising under torchrun."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
KILLS = 20


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
def test_killed_at_twenty_moments(data, tmp_path, path, world):
    """Also inside a save; the result is the uninterrupted run's, bit for bit."""
    out, settings = tmp_path / "run", _settings(path)
    argv, output = tiny.arguments(data, out, **settings), tmp_path / "output.txt"
    moments, in_a_save, lives = random.Random(world), 0, 0
    for kill in range(KILLS):
        before = max(_steps(out), default=0)
        environments = tiny.rank_environments(world) if world > 1 else [{}]
        children = [tiny.start(argv, output, e) for e in environments]
        lives += 1
        # every other one is let come a step further, so that there is something to lose
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and children[0].is_alive():
            if kill % 2 == 0 or max(_steps(out), default=0) > before:
                break
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.25 if kill % 2 else 3.0))
        if kill % 4 == 3:
            while children[0].is_alive() and not any((out / "checkpoints").glob(".tmp-*")):
                pass
        victim = children[moments.randrange(world)]
        victim.kill()
        victim.join()
        in_a_save += any((out / "checkpoints").glob(".tmp-*")) if out.exists() else 0
        for child in children:
            child.kill()
            child.join()
        if max(_steps(out), default=0) >= 400:
            break
    if world > 1:
        codes, text = tiny.run_ranks(data, out, **settings)
        assert codes == [0] * world, text
        codes, text = tiny.run_ranks(data, tmp_path / "whole", **settings)
        assert codes == [0] * world, text
    else:
        assert tiny.run(data, out, **settings) == 0
        assert tiny.run(data, tmp_path / "whole", **settings) == 0
    tiny.assert_same_state(out, tmp_path / "whole")
    print(f"TORTURE kills: {path}, {world} ranks: {lives} kills, {in_a_save} with a save under way")
    assert in_a_save


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
