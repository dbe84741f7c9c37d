"""Which sample stands at which place: pure functions of (seed, epoch, position).

A position counts from 0 within an epoch: ``step_in_epoch * global_batch + position in the global
batch``. Nothing here knows how many ranks there are except `positions`, which says who owns what.
"""

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.errors import UsageError
from ijepa_fast.keyed_random import Stream, integers

__all__ = ["epoch_order", "positions", "replacement_id", "steps_per_epoch", "usable_ids"]

# Philox needs about 200 bytes for each item while it runs; so many at a time stay below 256 MiB.
_CHUNK = 1 << 20


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Whole global batches in one pass over the data; the remainder sits out that epoch.

    Raises:
        UsageError: there are fewer images than one global batch holds.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    if num_images < global_batch:
        raise UsageError(
            f"batch.global must be at most the number of usable images ({num_images}), "
            f"got {global_batch}"
        )
    return num_images // global_batch


def epoch_order(num_images: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch: images sorted by a keyed 64-bit word each.

    Args:
        num_images: images N of the index, below 2**32.
        seed: seed of the run.
        epoch: epoch, from 0.

    Returns:
        int64 (N,): the sample id at each position of the epoch.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 1 <= num_images < 2**32:
        raise ValueError(f"num_images must be in 1..2**32-1, got {num_images}")
    words = np.empty(num_images, dtype=np.uint64)
    for start in range(0, num_images, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, num_images))
        words[start : start + ids.size] = integers(seed, Stream.ORDER, epoch, ids, 1)[:, 0]
    # Stable: two equal words (a chance of N**2 / 2**65) must not depend on the sorting algorithm.
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def positions(rank: int, world: int, micro_step: int, device_batch: int) -> NDArray[np.int64]:
    """Positions of the global batch that a rank owns in one micro-step.

    Args:
        rank: rank r of `world` ranks n.
        world: number of ranks n.
        micro_step: accumulation step a, from 0.
        device_batch: images b of one forward pass on one rank.

    Returns:
        int64 (b,): (a * n + r) * b ... + b - 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in 0..world-1 ({world - 1}), got {rank}")
    if micro_step < 0:
        raise ValueError(f"micro_step must be at least 0, got {micro_step}")
    if device_batch < 1:
        raise ValueError(f"device_batch must be at least 1, got {device_batch}")
    return (micro_step * world + rank) * device_batch + np.arange(device_batch, dtype=np.int64)


def replacement_id(num_images: int, *, seed: int, epoch: int, position: int, attempt: int) -> int:
    """The sample that stands in for an unusable one.

    Args:
        num_images: images N of the index.
        seed: seed of the run.
        epoch: epoch, from 0.
        position: position in the epoch.
        attempt: 0, then 1 if that one is unusable too, ...

    Returns:
        A sample id in 0..N-1.
    """
    words = integers(seed, Stream.REPLACEMENT, epoch, np.array([position]), attempt + 1)
    # The bias of a remainder of 64 bits is below 2**-32 for any N that the index can hold.
    return int(words[0, attempt] % np.uint64(num_images))


def usable_ids(
    drawn: NDArray[np.int64],
    bad: NDArray[np.bool_],
    *,
    seed: int,
    epoch: int,
    places: NDArray[np.int64],
) -> NDArray[np.int64]:
    """The samples at positions of an epoch, the first usable one in place of each bad one.

    Args:
        drawn: (b,) what `epoch_order` gives there.
        bad: (N,) samples that cannot be used; one at least must be usable, or the search never
            ends.
        seed: seed of the run.
        epoch: epoch, from 0.
        places: (b,) positions in the epoch.
    """
    ids = drawn.copy()
    for row in np.flatnonzero(bad[ids]).tolist():
        position, attempt = int(places[row]), 0
        while bad[ids[row]]:
            ids[row] = replacement_id(
                len(bad), seed=seed, epoch=epoch, position=position, attempt=attempt
            )
            attempt += 1
    return ids
