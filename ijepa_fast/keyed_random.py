"""Counter-based random numbers: the only source of randomness in a run.

Every number is a pure function of ``(seed, stream, step, item, draw)``. There is no generator state
to save, nothing depends on the order of the calls, and a rank computes only what it needs.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), written over NumPy arrays because ``numpy.random.Philox`` needs one Python object for each
counter. Key = the 64-bit seed; counter words = (block of draws, item, step or epoch, stream).
"""

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

__all__ = ["Stream", "integers", "philox4x32", "torch_generator", "uniform"]


class Stream(IntEnum):
    """What the numbers are for. Values are part of the recipe: never renumber, only append."""

    INIT = 0
    ORDER = 1
    CROP = 2
    MASK_SIZE = 3
    MASK_POSITION = 4
    REPLACEMENT = 5
    SHAPES = 6
    SPLIT = 7
    PICTURE = 8
    DECODER = 9
    SAMPLE = 10
    PROOF = 11


_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: int
) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32 over broadcast counters.

    Args:
        counter: four arrays (broadcast together) of values below 2**32.
        key: 64-bit key.

    Returns:
        Four uint64 arrays holding 32-bit values.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & 0xFFFFFFFF, (k1 + _WEYL_1) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _words(
    seed: int, stream: Stream, step: int, items: ArrayLike, count: int
) -> NDArray[np.uint64]:
    """Random 64-bit words (len(items), count), two from each Philox block."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
    if not 0 <= step < 2**32:
        raise ValueError(f"step must be in 0..2**32-1, got {step}")
    item = np.asarray(items)
    if item.size and (item.min() < 0 or item.max() >= 2**32):
        raise ValueError(f"items must be in 0..2**32-1, got {item.min()}..{item.max()}")
    blocks = np.arange((count + 1) // 2, dtype=np.uint64)
    r0, r1, r2, r3 = philox4x32((blocks[None, :], item[:, None], step, int(stream)), seed)
    words = np.empty((item.size, blocks.size, 2), dtype=np.uint64)
    words[..., 0] = (r1 << _SHIFT) | r0
    words[..., 1] = (r3 << _SHIFT) | r2
    return words.reshape(item.size, 2 * blocks.size)[:, :count]


def uniform(
    seed: int, stream: Stream, step: int, items: ArrayLike, count: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), 53 random bits each.

    Args:
        seed: seed of the run, 0 <= seed < 2**64.
        stream: what the numbers are for.
        step: step or epoch, 0 <= step < 2**32.
        items: (n,) sample ids or positions, each below 2**32.
        count: draws for each item; draw k does not depend on how many are asked for.

    Returns:
        float64 (n, count).

    Raises:
        ValueError: an argument is out of range.
    """
    words = _words(seed, stream, step, items, count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(
    seed: int, stream: Stream, step: int, items: ArrayLike, count: int
) -> NDArray[np.uint64]:
    """Like `uniform`, but the raw 64-bit words: uint64 (n, count)."""
    return _words(seed, stream, step, items, count)


def torch_generator(seed: int, stream: Stream) -> torch.Generator:
    """A CPU generator for weight initialisation, a function of (seed, stream) alone."""
    word = _words(seed, stream, 0, np.zeros(1, dtype=np.int64), 1)[0, 0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))
