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
from dataclasses import dataclass
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
        self.images, self.world, self.flops, self.peak, self.device = (
            images,
            world,
            flops,
            peak,
            device,
        )
        self.start, self.step, self.waited = time.perf_counter(), 0, 0.0

    def restart(self, step: int, waited: float) -> None:
        """Starts a new interval at `step`, with `waited` seconds of data wait so far."""
        self.start, self.step, self.waited = time.perf_counter(), step, waited

    def read(self, step: int, waited: float, last_step: int) -> dict[str, Any]:
        """Rates since the last call, and starts the next interval."""
        now = time.perf_counter()
        steps = max(1, step - self.step)
        seconds = (now - self.start) / steps
        rate = self.images / seconds
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result = {
            "images_per_second": round(rate, 2),
            "images_per_second_per_device": round(rate / self.world, 2),
            "step_ms": round(1e3 * seconds, 2),
            "data_wait_ms": round(1e3 * (waited - self.waited) / steps, 2),
            "memory_gib": round(memory / 2**30, 3),
            "mfu": round(rate * self.flops / (self.peak * self.world), 4) if self.peak else None,
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

    def show(self, row: Mapping[str, Any]) -> None:
        """One row of training metrics."""
        _logger.info("%s", line(row, self.last_step))
        if self.progress:
            status = f"loss {row['loss']:.4f}  {row['timing']['images_per_second']:.0f} img/s"
            self.progress.update(self.task, completed=row["step"], status=status)
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


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A row whose numbers are still on their way from the device."""

    row: dict[str, Any]
    numbers: Tensor
    skipped: Tensor
    ids_hash: Tensor
    timing: dict[str, Any]
    ready: torch.cuda.Event | None


class Journal:
    """Writes each row one interval late, when its numbers have arrived, so that no step waits
    for them.

    Args:
        file: where rows go, None on the ranks that write nothing.
        reporter: who shows them, likewise.
    """

    def __init__(self, file: MetricsFile | None, reporter: Reporter | None) -> None:
        self.file, self.reporter = file, reporter
        self._pending: _Pending | None = None

    def queue(
        self,
        row: dict[str, Any],
        numbers: Tensor,
        *,
        skipped: Tensor,
        ids_hash: Tensor,
        timing: dict[str, Any],
    ) -> None:
        """Takes a row over and writes the one before.

        Args:
            row: step, epoch, lr, weight_decay and momentum.
            numbers: (2,) loss and feature std, on the device.
            skipped: (4,) current, longest and total steps skipped, and steps since the longest run
                of them ended, on the device.
            ids_hash: scalar on the CPU.
            timing: rates since the row before.
        """
        self.flush()
        ready = None
        if numbers.is_cuda:
            numbers = numbers.to("cpu", non_blocking=True)
            skipped = skipped.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._pending = _Pending(
            row=row, numbers=numbers, skipped=skipped, ids_hash=ids_hash, timing=timing, ready=ready
        )

    def flush(self) -> None:
        """Writes the queued row, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.ready:
            pending.ready.synchronize()
        loss, feature_std = (float(v) for v in pending.numbers)
        total = int(pending.skipped[2])
        row = {
            **pending.row,
            "loss": loss,
            "feature_std": feature_std,
            "skipped": total,
            "ids_hash": f"{int(pending.ids_hash) & (2**64 - 1):016x}",
            "timing": pending.timing,
        }
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
        self._queue: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def check(self, step: int, skipped: Tensor, *, last: bool = False) -> NonFiniteError | None:
        """The error that ends the run, once three steps in a row were skipped.

        Args:
            step: optimiser steps done.
            skipped: (4,), see `Journal.queue`, on the device.
            last: whether the run ends here; then it waits for the device.
        """
        ready = None
        if skipped.is_cuda:
            skipped = skipped.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._queue.append((step, skipped, ready))
        if len(self._queue) <= self._late and not last:
            return None
        step, skipped, ready = self._queue.pop() if last else self._queue.popleft()
        if ready:
            ready.synchronize()
        _, longest, _, since = skipped.tolist()
        if longest < LONGEST_SKIP:
            return None
        end = step - since
        return NonFiniteError(range(end - longest + 1, end + 1))
