"""One long run, watched from outside: memory, open files and threads do not grow."""

import os
import signal
import time
from pathlib import Path

from tests.trainer import tiny


def _held(pid):
    """Resident memory in MiB, open files, threads of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    memory = int(status["VmRSS"].split()[0]) / 1024
    return memory, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])


def test_a_long_run_holds_no_more_than_it_began_with(tmp_path, pytestconfig):
    """Contexts of every length, in bfloat16, with evaluations and saves: the most memory of the
    last three quarters is at most 2 % above that of the first; files and threads (pools start
    theirs when they first need them) are no more in the second half than in the first.
    """
    seconds = 60 * pytestconfig.getoption("--soak-minutes")
    data, out = tiny.write_images(tmp_path / "data", count=200, classes=4), tmp_path / "run"
    settings = {"data__crop": 64, "masks__truncation_group": 2, "optim__precision": "bfloat16"}
    settings |= {"optim__epochs": 10_000_000, "optim__warmup": 1, "log__interval": 10}
    settings |= {"eval__data": data, "eval__every": 200, "checkpoint__minutes": 0.1}
    output = tmp_path / "output.txt"
    child = tiny.start(tiny.arguments(data, out, **settings), output)
    samples, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends and child.is_alive():
        time.sleep(min(1.0, seconds / 400))
        samples.append(_held(child.pid))
    assert child.is_alive(), output.read_text()[-3000:]
    os.kill(child.pid, signal.SIGTERM)
    child.join(120)
    assert child.exitcode == 128 + signal.SIGTERM, output.read_text()[-3000:]
    steps = tiny.final_state(out)["step"]
    evaluations = sum("knn" in row for row in tiny.rows(out))
    memory, files, threads = zip(*samples, strict=True)
    quarter, half = len(samples) // 4, len(samples) // 2
    most = {
        "MiB": (max(memory[:quarter]), 1.02, max(memory[quarter:])),
        "open files": (max(files[:half]), 1, max(files[half:])),
        "threads": (max(threads[:half]), 1, max(threads[half:])),
    }
    print(
        f"TORTURE soak: {seconds / 60:g} minutes, {steps} steps, {evaluations} evaluations; "
        + ", ".join(
            f"{before:.0f} {name}, later {after:.0f}" for name, (before, _, after) in most.items()
        )
    )
    assert evaluations > 4
    assert all(after <= factor * before for before, factor, after in most.values()), most
