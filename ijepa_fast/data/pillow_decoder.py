"""What decoders have in common, and the one that decodes with Pillow."""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.data.pixels import decode_window, describe

__all__ = [
    "DecodeError",
    "ImageDecoder",
    "PillowDecoder",
    "TooSlow",
    "default_threads",
    "empty_batch",
    "resize",
    "resize_all",
]


# the time of an image is measured in so many parts
_WAITS = 10


class DecodeError(Exception):
    """Files of a batch cannot be decoded.

    Attributes:
        failures: row of the batch -> reason.
    """

    def __init__(self, failures: Mapping[int, str]) -> None:
        """Takes row of the batch -> reason."""
        self.failures = dict(sorted(failures.items()))
        listed = "; ".join(f"row {row}: {reason}" for row, reason in self.failures.items())
        super().__init__(f"{len(self.failures)} files of the batch cannot be decoded: {listed}")


class ImageDecoder(Protocol):
    """Decodes, crops and resizes a batch."""

    def decode(
        self,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        plain: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Decodes a batch.

        Args:
            encoded: B files.
            windows: int32 (B, 4): top, left, height, width, pixels.
            plain: bool (B,), the index's column; None = all False, so Pillow for every row.

        Returns:
            uint8 (B, H, W, 3) on the decoder's device, ordered on the current stream.

        Raises:
            DecodeError: files cannot be decoded; the decoder stays usable.
        """
        ...

    def close(self) -> None:
        """Ends the threads."""
        ...


def default_threads(processes: int = 1) -> int:
    """Half of the cores that this process may use, shared with others, at least 1 and at most 8.

    Args:
        processes: how many share them.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(max(cores // 2 // processes, 1), 8)


def empty_batch(count: int, crop_size: tuple[int, int], device: torch.device) -> Tensor:
    """Host memory for a batch: uint8 (count, H, W, 3), pinned for a CUDA device."""
    pinned = device.type == "cuda"
    return torch.empty((count, *crop_size, 3), dtype=torch.uint8, pin_memory=pinned)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear and antialiased: uint8 (h, w, 3) to (H, W, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    # channels last throughout: nothing is copied on the way in
    nchw = pixels.permute(2, 0, 1)[None]
    return F.interpolate(nchw, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


class TooSlow(Exception):
    """Images of a batch are not decoded within their time; threads are still at them.

    Attributes:
        places: where they stand in the batch.
    """

    def __init__(self, places: set[int]) -> None:
        super().__init__()
        self.places = places


def resize_all(
    pool: ThreadPoolExecutor,
    threads: int,
    window: Callable[[int], Tensor],
    images: Tensor,
    limit: float = math.inf,
) -> dict[int, str]:
    """Fills a batch on the CPU, a share of it in each thread.

    Args:
        pool: at least `threads` threads.
        threads: how many to use.
        window: uint8 (h, w, 3) pixels of a place in the batch.
        images: uint8 (B, H, W, 3), overwritten.
        limit: time for one image, seconds.

    Returns:
        Place -> reason, where `window` has failed.

    Raises:
        TooSlow: an image has had its time.
    """
    begun: set[int] = set()
    ended: set[int] = set()

    def fill(places: range) -> dict[int, str]:
        reasons = {}
        for place in places:
            begun.add(place)
            try:
                pixels = window(place)
            except MemoryError:
                raise
            # Pillow raises nearly anything on a hostile file; all of it is the file's fault.
            except Exception as error:  # noqa: BLE001
                reasons[place] = describe(error)
                continue
            finally:
                ended.add(place)
            images[place].copy_(resize(pixels, (images.shape[1], images.shape[2])))
        return reasons

    count = len(images)
    # two shares a thread, so that one with large images does not keep the others waiting
    shares = min(2 * threads, count)
    bounds = [count * share // shares for share in range(shares + 1)] if shares else [0]
    tasks = [pool.submit(fill, places) for places in map(range, bounds[:-1], bounds[1:])]
    # Counted in waits, not by a clock, which goes on while the process is stopped.
    waits: Counter[int] = Counter()
    pause = limit / _WAITS if limit < math.inf else None
    while wait(tasks, pause).not_done:
        waits = Counter({place: waits[place] + 1 for place in begun.copy() - ended})
        if late := {place for place, count in waits.items() if count > _WAITS}:
            for task in tasks:
                task.cancel()
            raise TooSlow(late)
    found: dict[int, str] = {}
    for task in tasks:
        found |= task.result()
    return found


class PillowDecoder:
    """Decodes with Pillow in a pool of threads (its codecs release the interpreter lock)."""

    def __init__(
        self,
        crop_size: tuple[int, int],
        threads: int | None = None,
        device: torch.device | str = "cpu",
        limit: float = math.inf,
    ) -> None:
        """Starts the pool.

        Args:
            crop_size: height and width of the output, pixels.
            threads: decoder threads; None = `default_threads()`.
            device: where the images go.
            limit: time to decode one image, seconds.
        """
        self.crop_size = crop_size
        self.device = torch.device(device)
        self.threads = threads or default_threads()
        self.limit = limit
        self.pool = ThreadPoolExecutor(self.threads, "ijepa-pillow")

    def decode(
        self,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        plain: NDArray[np.bool_] | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """See `ImageDecoder.decode`; `plain` makes no difference."""
        return self.decode_rows(encoded, windows, range(len(encoded)))

    def decode_rows(
        self, encoded: Sequence[bytes], windows: NDArray[np.int32], rows: Sequence[int]
    ) -> torch.Tensor:
        """Decodes only some rows of a batch: uint8 (len(rows), H, W, 3).

        Raises:
            DecodeError: with the rows' numbers in the batch.
        """

        def decode_one(place: int) -> Tensor:
            # a copy: Pillow's pixels are read-only, which torch does not know
            row = rows[place]
            return torch.from_numpy(np.array(decode_window(encoded[row], windows[row])))

        images = empty_batch(len(rows), self.crop_size, self.device)
        try:
            reasons = resize_all(self.pool, self.threads, decode_one, images, self.limit)
        except TooSlow as slow:
            # a thread cannot be stopped: it is left to itself, with its pool
            self.pool.shutdown(wait=False)
            self.pool = ThreadPoolExecutor(self.threads, "ijepa-pillow")
            reason = f"decoding takes longer than {self.limit:g} s (data.timeout)"
            reasons = dict.fromkeys(slow.places, reason)
        failures = {rows[place]: reason for place, reason in reasons.items()}
        if failures:
            raise DecodeError(failures)
        return images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Ends the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)
