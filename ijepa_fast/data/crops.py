"""Windows of the random resized crop, computed on the host from the sizes in the image headers.

A window is a pure function of (seed, epoch, sample id): it depends neither on the batch that the
sample is in nor on the decoder.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ijepa_fast.keyed_random import Stream, uniform

__all__ = ["central_windows", "crop_windows"]

_TRIES = 10


def central_windows(
    width: ArrayLike, height: ArrayLike, crop: tuple[int, int]
) -> NDArray[np.int32]:
    """The largest central window of a crop's shape in each image.

    Args:
        width: (B,) widths of the images, pixels.
        height: (B,) heights of the images, pixels.
        crop: height and width of the crop.

    Returns:
        int32 (B, 4): top, left, height, width, in pixels.
    """
    image_w, image_h = np.asarray(width, dtype=np.int64), np.asarray(height, dtype=np.int64)
    inner_height = np.minimum(image_h, np.maximum(1, image_w * crop[0] // crop[1]))
    inner_width = np.minimum(image_w, np.maximum(1, image_h * crop[1] // crop[0]))
    top, left = (image_h - inner_height) // 2, (image_w - inner_width) // 2
    return np.stack([top, left, inner_height, inner_width], axis=1).astype(np.int32)


def crop_windows(
    width: ArrayLike,
    height: ArrayLike,
    ids: ArrayLike,
    *,
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int32]:
    """Random-resized-crop windows of a batch (paper, appendix A).

    Up to ten tries: an area uniform in `scale` times the image's, a ratio log-uniform in `ratio`;
    the first window that fits is taken, its corner uniform, ends included. If none fits: the
    largest central window whose ratio lies in `ratio`.

    Args:
        width: (B,) widths of the images, pixels.
        height: (B,) heights of the images, pixels.
        ids: (B,) sample ids.
        seed: seed of the run.
        epoch: epoch, from 0.
        scale: smallest and largest area, as a share of the image's.
        ratio: smallest and largest width over height.

    Returns:
        int32 (B, 4): top, left, height, width, in pixels.

    Raises:
        ValueError: an argument is out of range or the shapes differ.
    """
    image_w, image_h = np.asarray(width, dtype=np.int64), np.asarray(height, dtype=np.int64)
    sample = np.asarray(ids, dtype=np.int64)
    if not image_w.shape == image_h.shape == sample.shape == (sample.size,):
        shapes = (image_w.shape, image_h.shape, sample.shape)
        raise ValueError(f"width, height and ids must have one shape (B,), got {shapes}")
    if sample.size and min(image_w.min(), image_h.min()) < 1:
        raise ValueError(
            f"width and height must be at least 1, got {image_w.min()}, {image_h.min()}"
        )
    for name, bounds in (("scale", scale), ("ratio", ratio)):
        if not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"{name} must be two ascending positive numbers, got {bounds}")

    draws = uniform(seed, Stream.CROP, epoch, sample, 4 * _TRIES).reshape(-1, _TRIES, 4)
    area = (image_w * image_h)[:, None] * (scale[0] + draws[..., 0] * (scale[1] - scale[0]))
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + draws[..., 1] * (high - low))
    try_w, try_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (try_w > 0) & (try_w <= image_w[:, None]) & (try_h > 0) & (try_h <= image_h[:, None])
    chosen = fits.argmax(axis=1)
    rows = np.arange(sample.size)
    found = fits[rows, chosen]

    fall_h, fall_w = _central_size(image_h, image_w, ratio)
    crop_h = np.where(found, try_h[rows, chosen], fall_h).astype(np.int64)
    crop_w = np.where(found, try_w[rows, chosen], fall_w).astype(np.int64)
    room_h, room_w = image_h - crop_h, image_w - crop_w
    corner = draws[rows, chosen, 2:]
    top = np.where(found, np.floor(corner[:, 0] * (room_h + 1)), room_h // 2)
    left = np.where(found, np.floor(corner[:, 1] * (room_w + 1)), room_w // 2)
    return np.stack([top, left, crop_h, crop_w], axis=1).astype(np.int32)


def _central_size(
    image_h: NDArray[np.int64], image_w: NDArray[np.int64], ratio: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Height and width of the largest window with a ratio in `ratio`."""
    aspect = image_w / image_h
    height = np.where(aspect < ratio[0], np.rint(image_w / ratio[0]), image_h)
    width = np.where(aspect > ratio[1], np.rint(image_h * ratio[1]), image_w)
    return np.maximum(height, 1).astype(np.int64), np.maximum(width, 1).astype(np.int64)
