"""What a run reports: `metrics.jsonl` always, a progress bar or plain lines, TensorBoard on
request.

A row's top level is deterministic: a resumed run writes the same bytes. Whatever depends on the
clock or the machine sits under `timing`.
"""

import contextlib
import json
import logging
import os
import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.errors import NonFiniteError

__all__ = [
    "Journal",
    "Meter",
    "MetricsFile",
    "Reporter",
    "Watch",
    "id_hash",
    "peak_flops",
    "read_rows",
]

_logger = logging.getLogger(__name__)

# so many steps in a row without a finite gradient end the run
LONGEST_SKIP = 3

# dense bf16 matrix rates of the data sheets, FLOP/s
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense matrix rate of a known device in FLOP/s for bfloat16, else None."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAKS.items() if key in name), None)


def id_hash(ids: Tensor, positions: np.ndarray) -> Tensor:
    """Order-free hash of (position, sample id) pairs, int64 scalar on the CPU.

    Sums over micro-steps and ranks (modulo 2**64), so that the hash of the global batch is the same
    however it was divided.
    """
    x = ids.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    return torch.from_numpy(x.view(np.int64)).sum()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; lines that are none are left out, and named unless it is the last,
    which a kill may have torn.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, text in enumerate(lines, 1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif number < len(lines):
            _logger.warning("%s: line %d is left out, as it is no row of metrics", path, number)
    return rows


class MetricsFile:
    """`metrics.jsonl`, one JSON object a line.

    Args:
        path: the file.
        step: rows past this step are cut away, as they belong to work that a resume does again.
        interval: a row of this very step is cut away too if it lies between two log lines: a stop
            by `max_steps` wrote it, and a run without that stop has none.
    """

    def __init__(self, path: Path, *, step: int, interval: int = 1) -> None:
        last = step - 1 if step % interval else step
        evaluations = ("knn", "monitors")
        self.rows = [
            row
            for row in read_rows(path)
            if row["step"] <= (step if any(key in row for key in evaluations) else last)
        ]
        self._path, self._waiting, self._failed = path, b"", False
        self._lock = threading.Lock()
        self._file = self._begin()

    def _begin(self) -> int:
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        temporary.replace(self._path)
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row and hands it to the system; what a full disk refuses waits for the next
        row, or the next checkpoint.
        """
        with self._lock:
            self.rows.append(dict(row))
            self._waiting += json.dumps(row).encode() + b"\n"
            try:
                self._write()
            except OSError as error:
                if not self._failed:
                    _logger.warning("metrics.jsonl cannot be written for now: %s", error)
                self._failed = True

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        if self._failed:
            self._failed = False
            _logger.info("metrics.jsonl is written again, nothing is lost")

    def sync(self) -> None:
        """Forces the rows to the disk; called before a checkpoint counts as written. Where the file
        was moved or deleted, all rows go into a new one.

        Raises:
            OSError: it cannot.
        """
        with self._lock:
            if not self._path.exists():
                file = self._begin()
                os.close(self._file)
                self._file, self._waiting = file, b""
            self._write()
            os.fsync(self._file)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Meter:
    """Rates between two log lines.

    Args:
        images: images of one optimiser step over all ranks.
        world: number of ranks.
        flops: FLOPs of one image, forward and backward.
        peak: peak FLOP/s of one device, None where unknown.
        device: the training device.
    """

    def __init__(
        self, *, images: int, world: int, flops: float, peak: float | None, device: torch.device
    ) -> None:
        self._images, self._world, self._device = images, world, device
        self._flops, self._peak = flops, peak
        self.restart(0, 0.0)

    def restart(self, step: int, waited: float) -> None:
        """Starts a new interval at `step`, with `waited` seconds of data wait so far."""
        self._start, self._step, self._waited = time.perf_counter(), step, waited

    def read(self, step: int, waited: float, last_step: int) -> dict[str, Any]:
        """Rates since the last call, and starts the next interval."""
        now = time.perf_counter()
        steps = max(1, step - self._step)
        seconds = (now - self._start) / steps
        rate = self._images / seconds
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = {
            "images_per_second": round(rate, 2),
            "images_per_second_per_device": round(rate / self._world, 2),
            "step_ms": round(1e3 * seconds, 2),
            "data_wait_ms": round(1e3 * (waited - self._waited) / steps, 2),
            "memory_gib": round(memory / 2**30, 3),
            "mfu": round(rate * self._flops / (self._peak * self._world), 4)
            if self._peak
            else None,
            "eta_seconds": round(seconds * (last_step - step)),
        }
        self.restart(step, waited)
        return result


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


WIDTH = 100
"""Columns that a line for a person fits in."""


def line(row: Mapping[str, Any], last_step: int, epochs: int) -> str:
    """One row of training metrics for a person: what there is room for, the most wanted first."""
    timing, wait = row["timing"], row["timing"]["data_wait_ms"]
    parts = [
        f"step {row['step']}/{last_step}",
        f"epoch {row['epoch'] + 1}/{epochs}",
        f"loss {row['loss']:.5f}",
        f"lr {row['lr']:.2e}",
        f"{timing['images_per_second']:.0f} img/s",
        f"ETA {_clock(timing['eta_seconds'])}",
    ]
    # of these, what is out of order comes first
    more = {
        f"SKIPPED {row['skipped']} (not finite)": row["skipped"] > 0,
        f"data wait {wait:.0f} ms": wait > 0.1 * timing["step_ms"],
        f"MFU {100 * (timing['mfu'] or 0):.1f} %": timing["mfu"] is not None,
        f"std {row['feature_std']:.3f}": True,
        f"{timing['memory_gib']:.2f} GiB": True,
    }
    for part, wanted in more.items():
        if wanted and len("  ".join([*parts, part])) <= WIDTH:
            parts.append(part)
    return "  ".join(parts)


def evaluation_lines(row: Mapping[str, Any]) -> list[str]:
    """One evaluation of the features for a person."""
    numbers, title = row["monitors"], f"evaluation at step {row['step']}"
    parts = [
        title,
        f"std {numbers['feature_std']:.3f}",
        f"RankMe {numbers['rankme']:.1f}",
        *([f"LiDAR {numbers['lidar']:.1f}"] if "lidar" in numbers else []),
        f"cosine {numbers['prediction_cosine']:.3f} (constant {numbers['mean_target_cosine']:.3f})",
    ]
    lines = ["  ".join(parts)]
    if knn := row.get("knn"):
        scores = (f"kNN {100 * value:.1f} % ({name})" for name, value in knn.items())
        lines.append("  ".join([title, *scores]))
        if "images" in row:
            lines[-1] += f"  of {row['images'][0]} and {row['images'][1]} images"
    return lines


class Reporter:
    """Shows rows: a progress bar on a terminal, plain lines elsewhere, TensorBoard on request.

    Args:
        last_step: step at which this run ends.
        epochs: of the recipe.
        tensorboard: folder of the events, or None.
        step: steps done before; events past it are dropped.
    """

    def __init__(
        self, *, last_step: int, epochs: int, tensorboard: Path | None, step: int = 0
    ) -> None:
        self._ends = last_step, epochs
        self.progress: Any = None
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self.task = self.progress.add_task(
                "preparing", total=last_step, completed=step, status=""
            )
            self.progress.start()
        self.writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self.progress:
            self.progress.update(self.task, description="training", completed=step)

    def doing(self, what: str) -> None:
        """The bar names something else than training until the next step."""
        if self.progress:
            self.progress.update(self.task, description=what)

    def show(self, row: Mapping[str, Any]) -> None:
        """One row of training metrics."""
        _logger.info("%s", line(row, *self._ends))
        if self.progress:
            status = f"loss {row['loss']:.4f}  {row['timing']['images_per_second']:.0f} img/s"
            self.progress.update(self.task, status=status)
        if self.writer:
            flat = {**row, **row["timing"]}
            for key, value in flat.items():
                if isinstance(value, int | float) and key not in ("step", "ids_hash"):
                    self.writer.add_scalar(f"train/{key}", value, row["step"])

    def show_evaluation(self, row: Mapping[str, Any]) -> None:
        """One row of monitors and, where there are labels, kNN."""
        for text in evaluation_lines(row):
            _logger.info("%s", text)
        if self.writer:
            knn = {key.partition(",")[0]: value for key, value in row.get("knn", {}).items()}
            for group, numbers in (("monitors", row["monitors"]), ("knn", knn)):
                for key, value in numbers.items():
                    self.writer.add_scalar(f"{group}/{key}", value, row["step"])

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        # the terminal may be gone, or the disk full: no reason to lose a run's result
        with contextlib.suppress(OSError):
            if self.progress:
                self.progress.stop()
        with contextlib.suppress(OSError):
            if self.writer:
                self.writer.close()


class _Arrival:
    """Small tensors on their way to the host; nothing waits for the device before `wait`."""

    def __init__(self, *tensors: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
            self._ready = torch.cuda.Event()
            self._ready.record()
        self._tensors = tensors

    @property
    def here(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._ready is None or self._ready.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, on the CPU."""
        if self._ready:
            self._ready.synchronize()
        return self._tensors


class Journal:
    """Writes each row as soon as its numbers have arrived, so that no step waits for them: on a CPU
    at once.

    Args:
        file: where rows go, None on the ranks that write nothing.
        reporter: who shows them, likewise.
    """

    def __init__(self, file: MetricsFile | None, reporter: Reporter | None) -> None:
        self.file, self.reporter = file, reporter
        self._pending: tuple[Mapping[str, Any], Mapping[str, Any], _Arrival] | None = None

    def queue(
        self, row: Mapping[str, Any], numbers: Tensor, skipped: Tensor, **more: object
    ) -> None:
        """Takes a row over and writes the one before.

        Args:
            row: what stands before these numbers.
            numbers: (2,) loss and feature std, on the device.
            skipped: int64 (4,), see `reference.count_skip`, on the device.
            more: what stands behind them.
        """
        self.flush()
        self._pending = row, more, _Arrival(numbers, skipped)

    def poll(self, step: int) -> None:
        """After every step: moves the progress bar, and writes the queued row if its numbers are
        here; does not wait.
        """
        if self.reporter:
            self.reporter.advance(step)
        if self._pending and self._pending[-1].here:
            self.flush()

    def flush(self) -> None:
        """Writes the queued row, if there is one, when its numbers are here."""
        if self._pending is None:
            return
        (row, more, arrival), self._pending = self._pending, None
        numbers, skipped = arrival.wait()
        loss, feature_std = numbers.tolist()
        total = int(skipped[2])
        row = {**row, "loss": loss, "feature_std": feature_std, "skipped": total, **more}
        if self.file and self.reporter:
            self.file.append(row)
            self.reporter.show(row)


class Watch:
    """Looks after every step whether too many in a row were skipped, without waiting for a GPU:
    what it reads there is two steps old, on all ranks alike.

    Args:
        device: the training device.
    """

    def __init__(self, device: torch.device) -> None:
        self._late = 2 if device.type == "cuda" else 0
        self._queue: deque[tuple[int, _Arrival]] = deque()

    def check(self, step: int, skipped: Tensor, *, last: bool = False) -> NonFiniteError | None:
        """The error that ends the run, once three steps in a row were skipped.

        Args:
            step: optimiser steps done.
            skipped: int64 (4,), see `reference.count_skip`, on the device.
            last: whether the run ends here; then it waits for the device.
        """
        self._queue.append((step, _Arrival(skipped)))
        if len(self._queue) <= self._late and not last:
            return None
        step, arrival = self._queue.pop() if last else self._queue.popleft()
        (skipped,) = arrival.wait()
        _, longest, _, since = skipped.tolist()
        if longest < LONGEST_SKIP:
            return None
        end = step - since
        return NonFiniteError(range(end - longest + 1, end + 1))
