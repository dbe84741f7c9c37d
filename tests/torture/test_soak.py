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
    """Contexts of every length, in bfloat16, with evaluations and saves: the most of the last three
    quarters is at most that of the first and 2 % of memory, 10 files (a save may meet an
    evaluation), 16 threads (a pool of readers starts them when it first needs them).
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
    quarter = len(samples) // 4
    more = {"MiB": 0.02 * max(memory[:quarter]), "open files": 10, "threads": 16}
    most = {
        name: (max(values[:quarter]), max(values[quarter:]))
        for name, values in zip(more, (memory, files, threads), strict=True)
    }
    print(
        f"TORTURE soak: {seconds / 60:g} minutes, {steps} steps, {evaluations} evaluations; "
        + ", ".join(
            f"{first:.0f} {name}, later {later:.0f}" for name, (first, later) in most.items()
        )
    )
    assert evaluations > 4
    assert all(later - first <= more[name] for name, (first, later) in most.items()), most
