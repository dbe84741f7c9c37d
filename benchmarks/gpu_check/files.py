"""What all parts share: their options, a time limit, commands with a log, files written whole."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

__all__ = ["ROOT", "OutOfTime", "left", "logged", "options", "start", "stopped_after", "write_json"]

ROOT = Path(__file__).parents[2]
GRACE = 15  # seconds


def options(part: str, text: str, seconds: float) -> argparse.ArgumentParser:
    """The options that every part has."""
    parser = argparse.ArgumentParser(prog=f"gpu_check {part}", description=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", type=torch.device, default="cuda", help="cpu: a tiny trial")
    parser.add_argument("--seconds", type=float, default=seconds, help="budget of the whole part")
    return parser


def start(args: argparse.Namespace) -> None:
    """Makes the folder; from now on the budget counts.

    Raises:
        SystemExit: 2, the device is not there.
    """
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA device, torch sees none", file=sys.stderr)
        raise SystemExit(2)
    harness.use(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    args.end = time.monotonic() + args.seconds


def left(args: argparse.Namespace) -> float:
    """Seconds that a command may take: when they are over it is interrupted, and has ended before
    the budget has.
    """
    return float(max(1.0, args.end - time.monotonic() - GRACE))


class OutOfTime(BaseException):
    """Not an error of what is being measured, so none of what catches those catches it."""


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` within it after so many seconds."""

    def stop(*_: object) -> None:
        raise OutOfTime

    if seconds == float("inf"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def logged(
    command: Sequence[str],
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a command in the repository's root, its output going to `log` as it comes. One that runs
    too long is interrupted, so that pytest says what failed so far and a training run saves, and
    15 s later killed with all its children.

    Returns:
        The exit code, whether it was stopped, and the last line that it printed.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # one compiler cache, also for the processes of a parallel test run
    cache = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "/tmp/ijepa-triton")}
    hidden = {} if harness.device().type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, "PYTHONPATH": paths, **cache, **hidden, **(environment or {})}
    stopped = False
    with log.open("a", encoding="utf-8") as stream:
        stream.write("$ " + " ".join(command) + "\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    end = f"stopped after {seconds:.0f} s, " if stopped else ""
    print(f"{log.name}: {end}exit {code}: {lines[-1]}", file=sys.stderr, flush=True)
    return {"exit_code": code, "stopped": stopped, "last_line": lines[-1]}
