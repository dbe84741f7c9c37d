"""What a run does beside its steps, at 5, 50 and 5,000 steps an epoch: the share of saves, pictures
and looks at features in a run of 13 minutes, and what masks, layout, loader and metrics add to the
bare step.

``python -m benchmarks.bench_loop``, on the CPU. A whole run through the entry point of 40 steps.
Its clock is put forward by 20 s after each, so that the run does what one of 13 minutes does; all
that is beside the steps takes its true time, on a disk that needs a second for a checkpoint. The
bare step is what networks and optimiser take inside this very run. Other processes lengthen little
of this: but for waits for the disk all times are processor time of one thread.
"""

import contextlib
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ijepa_fast import run, train
from ijepa_fast.data import Index, build_index
from ijepa_fast.data.index import COLUMNS
from ijepa_fast.evaluation import ScheduledEvaluation
from ijepa_fast.fast import FastStep
from ijepa_fast.state import allowance, checkpoint, saves
from ijepa_fast.visualize import run_pictures as pictures
from tests.trainer import tiny

STEPS_AN_EPOCH = (5, 50, 5000)
STEPS = 40
BATCH = 16
# how long a step is said to take, and how long the disk takes for a checkpoint, seconds
STEP_SECONDS = 20.0
DISK_SECONDS = 1.0
# what may be added to a run's time, and to the bare step
MOST_BESIDE, MOST_OVERHEAD = 0.01, 0.03


@dataclass
class Clock:
    """Seconds of one run.

    Attributes:
        ahead: by which its clock is put forward.
        beside: kind -> spent on saves, pictures and looks, by whichever thread.
        loop, inside, apart: processor time of the training thread after its first step: in all, in
            networks and optimiser, and of what `beside` counts.
        steps: updates so far.
    """

    ahead: float = 0.0
    beside: dict[str, float] = field(default_factory=dict)
    loop: float = 0.0
    inside: float = 0.0
    apart: float = 0.0
    steps: int = 0
    warm_at: float = 0.0

    def step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A part of the bare step, timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.thread_time()
            result = original(*arguments, **options)
            now = time.thread_time()
            if self.steps:
                self.inside += now - started
            if original.__name__ == "update":
                self.ahead += STEP_SECONDS
                self.steps += 1
                if self.steps == 1:
                    self.warm_at = now
                self.loop = now - self.warm_at
            return result

        return call

    def spent(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Work beside the steps, timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            started, processor, steps = time.perf_counter(), time.thread_time(), self.steps
            try:
                return original(*arguments, **options)
            finally:
                taken = time.thread_time() - processor
                if kind == "saves":
                    taken = time.perf_counter() - started
                self.beside[kind] = self.beside.get(kind, 0.0) + taken
                own = threading.current_thread() is threading.main_thread()
                if own and 0 < steps < STEPS:
                    self.apart += time.thread_time() - processor

        return call

    @contextlib.contextmanager
    def watching(self, index: Index) -> Iterator[None]:
        """Times a run on a table of images."""
        write = checkpoint.write
        pretended = SimpleNamespace(
            monotonic=lambda: time.monotonic() + self.ahead, perf_counter=time.perf_counter
        )

        def slow(*arguments: Any) -> Path:
            time.sleep(DISK_SECONDS)
            return write(*arguments)

        with contextlib.ExitStack() as stack:
            for module in (allowance, pictures, saves):
                stack.enter_context(mock.patch.object(module, "time", pretended))
            stack.enter_context(mock.patch.object(run, "load_index", return_value=index))
            stack.enter_context(mock.patch.object(checkpoint, "write", slow))
            for name in ("accumulate", "update"):
                timed = self.step(getattr(FastStep, name))
                stack.enter_context(mock.patch.object(FastStep, name, timed))
            for owner, names in (
                (saves.Saves, {"save": "saves", "finish": "saves"}),
                (ScheduledEvaluation, {"evaluate": "evaluations"}),
                (pictures.Pictures, {"masks": "pictures", "curves": "pictures"}),
            ):
                for name, kind in names.items():
                    counted = self.spent(kind, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, counted))
            yield


def measure(folder: Path, steps_an_epoch: int) -> dict[str, float]:
    """One run: milliseconds of the bare step, the overhead over it, and the shares of the rest."""
    data = tiny.write_images(folder / "data", count=32)
    few = build_index(data)
    rows = np.arange(steps_an_epoch * BATCH) % len(few)
    index = replace(few, **{name: getattr(few, name)[rows] for name in COLUMNS})
    argv = ["--preset", "fashion_mnist_published", "--data", str(data), "--out"]
    argv += [str(folder / "run"), "--data.crop", "64", "--model.patch-size", "8"]
    argv += ["--optim.precision", "float32", "--masks.min-keep", "4"]
    argv += ["--batch.global", str(BATCH), "--masks.truncation-group", str(BATCH)]
    argv += ["--optim.epochs", "100", "--max-steps", str(STEPS), "--device", "cpu"]
    argv += ["--eval.data", str(data), "--eval.seconds", "0", "--model.depth", "2"]
    argv += ["--data.decoder", "pillow", "--data.threads", "1"]
    clock, threads, started = Clock(), torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        with clock.watching(index):
            code = train.main(argv)
    finally:
        torch.set_num_threads(threads)
    assert code == 0, code
    assert clock.steps == STEPS
    # what is looked at is there
    assert clock.beside.keys() == {"saves", "pictures", "evaluations"}
    whole = clock.ahead + time.perf_counter() - started
    bare = clock.inside / (STEPS - 1)
    return {
        "bare_ms": 1e3 * bare,
        "overhead": (clock.loop - clock.apart - clock.inside) / clock.inside,
        "beside": sum(clock.beside.values()) / whole,
        **{kind: seconds / whole for kind, seconds in sorted(clock.beside.items())},
    }


def line(steps_an_epoch: int, found: dict[str, float]) -> str:
    """One run for a person."""
    kinds = ", ".join(f"{k} {100 * found[k]:.2f} %" for k in ("saves", "pictures", "evaluations"))
    return (
        f"{steps_an_epoch} steps an epoch: bare step {found['bare_ms']:.0f} ms of processor time, "
        f"{100 * found['overhead']:.2f} % more for masks, layout, loader and metrics; "
        f"{100 * found['beside']:.2f} % of the run beside the steps ({kinds})"
    )


def missed(found: dict[str, float]) -> list[str]:
    """What is above its limit."""
    limits = {"beside": MOST_BESIDE, "overhead": MOST_OVERHEAD}
    return [
        f"{name}: {100 * found[name]:.2f} %, at most {100 * most:.0f} %"
        for name, most in limits.items()
        if found[name] > most
    ]


@pytest.mark.parametrize("steps_an_epoch", STEPS_AN_EPOCH)
def bench_loop(tmp_path: Path, steps_an_epoch: int) -> None:
    """Both limits hold."""
    found = measure(tmp_path, steps_an_epoch)
    print("\n" + line(steps_an_epoch, found))
    assert not missed(found), found


def main() -> int:
    """Measures all; returns the exit code: 1 if a limit is missed."""
    failed = False
    for number in STEPS_AN_EPOCH:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            found = measure(Path(folder), number)
        print(line(number, found), flush=True)
        for text in missed(found):
            failed = True
            print(f"MISSED {text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
