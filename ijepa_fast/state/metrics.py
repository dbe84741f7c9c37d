"""What a run reports: `metrics.jsonl` always, a progress bar or plain lines, TensorBoard on
request.

A row's top level is deterministic: a resumed run writes the same bytes. Whatever depends on the
clock or the machine sits under `timing`.
"""

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
    """Rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                break
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
        looks = ("knn", "monitors")
        rows = [
            row
            for row in read_rows(path)
            if row["step"] <= (step if any(key in row for key in looks) else last)
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._waiting = b""
        self._failed = False
        self._lock = threading.Lock()
        self.rows = rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one row and hands it to the system; what a full disk refuses waits for the next
        row, or the next checkpoint.
        """
        self.rows.append(dict(row))
        with self._lock:
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
        """Forces the rows to the disk; called before a checkpoint counts as written.

        Raises:
            OSError: it cannot.
        """
        with self._lock:
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


def line(row: Mapping[str, Any], last_step: int) -> str:
    """One row of training metrics for a person."""
    timing = row["timing"]
    parts = [
        f"step {row['step']}/{last_step}",
        f"loss {row['loss']:.5f}",
        f"lr {row['lr']:.2e}",
        f"wd {row['weight_decay']:.3f}",
        f"momentum {row['momentum']:.5f}",
        f"feature std {row['feature_std']:.3f}",
        f"{timing['images_per_second']:.0f} img/s",
        f"{timing['step_ms']:.0f} ms/step",
        f"data wait {timing['data_wait_ms']:.1f} ms",
        f"{timing['memory_gib']:.2f} GiB",
    ]
    if timing["mfu"] is not None:
        parts.append(f"MFU {100 * timing['mfu']:.1f} %")
    if row["skipped"]:
        parts.append(f"SKIPPED {row['skipped']} (gradient not finite)")
    parts.append(f"ETA {_clock(timing['eta_seconds'])}")
    return "  ".join(parts)


def look_line(row: Mapping[str, Any]) -> str:
    """One look at the features for a person."""
    numbers = row["monitors"]
    parts = [
        f"look at step {row['step']}",
        f"feature std {numbers['feature_std']:.3f}",
        f"RankMe {numbers['rankme']:.1f}",
        *([f"LiDAR {numbers['lidar']:.1f}"] if "lidar" in numbers else []),
        f"cosine {numbers['prediction_cosine']:.3f} "
        f"(a constant: {numbers['mean_target_cosine']:.3f})",
    ]
    parts += [f"kNN {100 * value:.1f} % ({name})" for name, value in row.get("knn", {}).items()]
    if "images" in row:
        parts.append(f"of {row['images'][0]} and {row['images'][1]} images")
    return "  ".join(parts)


class Reporter:
    """Shows rows: a progress bar on a terminal, plain lines elsewhere, TensorBoard on request.

    Args:
        last_step: step at which this run ends.
        tensorboard: folder of the events, or None.
        step: steps done before; events past it are dropped.
    """

    def __init__(self, *, last_step: int, tensorboard: Path | None, step: int = 0) -> None:
        self.last_step = last_step
        self.progress: Any = None
        if sys.stdout.isatty():
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self.progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self.task = self.progress.add_task("train", total=last_step, completed=step, status="")
            self.progress.start()
        self.writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self.progress:
            self.progress.update(self.task, completed=step)

    def show(self, row: Mapping[str, Any]) -> None:
        """One row of training metrics."""
        _logger.info("%s", line(row, self.last_step))
        if self.progress:
            status = f"loss {row['loss']:.4f}  {row['timing']['images_per_second']:.0f} img/s"
            self.progress.update(self.task, status=status)
        if self.writer:
            flat = {**row, **row["timing"]}
            for key, value in flat.items():
                if isinstance(value, int | float) and key not in ("step", "ids_hash"):
                    self.writer.add_scalar(f"train/{key}", value, row["step"])

    def show_look(self, row: Mapping[str, Any]) -> None:
        """One row of monitors and, where there are labels, kNN."""
        _logger.info("%s", look_line(row))
        if self.writer:
            knn = {key.partition(",")[0]: value for key, value in row.get("knn", {}).items()}
            for group, numbers in (("monitors", row["monitors"]), ("knn", knn)):
                for key, value in numbers.items():
                    self.writer.add_scalar(f"{group}/{key}", value, row["step"])

    def close(self) -> None:
        """Ends the bar and flushes TensorBoard."""
        if self.progress:
            self.progress.stop()
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
        self._pending: tuple[dict[str, Any], _Arrival] | None = None

    def queue(self, row: dict[str, Any], numbers: Tensor, skipped: Tensor) -> None:
        """Takes a row over and writes the one before.

        Args:
            row: all but what follows.
            numbers: (2,) loss and feature std, on the device.
            skipped: int64 (4,), see `reference.count_skip`, on the device.
        """
        self.flush()
        self._pending = row, _Arrival(numbers, skipped)

    def poll(self, step: int) -> None:
        """After every step: moves the progress bar, and writes the queued row if its numbers are
        here; does not wait.
        """
        if self.reporter:
            self.reporter.advance(step)
        if self._pending and self._pending[1].here:
            self.flush()

    def flush(self) -> None:
        """Writes the queued row, if there is one, when its numbers are here."""
        if self._pending is None:
            return
        (row, arrival), self._pending = self._pending, None
        numbers, skipped = arrival.wait()
        loss, feature_std = numbers.tolist()
        row = {**row, "loss": loss, "feature_std": feature_std, "skipped": int(skipped[2])}
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
