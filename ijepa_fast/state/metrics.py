"""What a run reports: rows of numbers, on their way from the device to the callbacks.

A row's top level is deterministic: a resumed run writes the same bytes. Whatever depends on the
clock or the machine sits under `timing`.
"""

import resource
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.callbacks import Callbacks
from ijepa_fast.errors import NonFiniteError

__all__ = [
    "Journal",
    "Meter",
    "Watch",
    "id_hash",
    "peak_flops",
]

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
    """Hands each row on as soon as its numbers have arrived, so that no step waits for them: on a
    CPU at once.

    Args:
        callbacks: who gets them.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        self.callbacks = callbacks
        self._pending: tuple[Mapping[str, Any], Mapping[str, Any], _Arrival] | None = None

    def queue(
        self, row: Mapping[str, Any], numbers: Tensor, skipped: Tensor, **more: object
    ) -> None:
        """Takes a row over and hands on the one before.

        Args:
            row: what stands before these numbers.
            numbers: (2,) loss and feature std, on the device.
            skipped: int64 (4,), see `reference.count_skip`, on the device.
            more: what stands behind them.
        """
        self.flush()
        self._pending = row, more, _Arrival(numbers, skipped)

    def poll(self, step: int) -> None:
        """After every step: moves the progress bar, and hands on the queued row if its numbers are
        here; does not wait.
        """
        self.callbacks.advance(step)
        if self._pending and self._pending[-1].here:
            self.flush()

    def flush(self) -> None:
        """Hands on the queued row, if there is one, when its numbers are here."""
        if self._pending is None:
            return
        (row, more, arrival), self._pending = self._pending, None
        numbers, skipped = arrival.wait()
        loss, feature_std = numbers.tolist()
        total = int(skipped[2])
        row = {**row, "loss": loss, "feature_std": feature_std, "skipped": total, **more}
        self.callbacks.step(row)


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
