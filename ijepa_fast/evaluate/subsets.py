"""Fixed subsets of labelled rows: low-shot training sets and held-out folds.

Every row draws a 64-bit word keyed by (seed, its number). Within a class, rows are ranked by it. A
subset is a rule on ranks, so it is the same on every machine and whatever was asked for before,
and the smaller of two low-shot sets of one seed lies inside the larger.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ijepa_fast.keyed_random import Stream, integers

__all__ = ["class_ranks", "held_out_folds", "low_shot_rows", "selection_text"]

# `step` of the draws; 0 is the split into training and test images
_FOLDS, _LOW_SHOT = 1, 2


def _labels(labels: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers of shape (n,), n at least 1, got {array.dtype} {array.shape}"
        )
    return array.astype(np.int64)


def class_ranks(labels: ArrayLike, *, seed: int, step: int) -> NDArray[np.int64]:
    """The keyed rank of each row among those of its class, from 0.

    Args:
        labels: (n,) integers.
        seed: 0 <= seed < 2**64.
        step: tells apart rankings for different purposes.

    Returns:
        int64 (n,).

    Raises:
        ValueError: labels are not a row of integers, or an argument is out of range.
    """
    array = _labels(labels)
    words = integers(seed, Stream.SPLIT, step, np.arange(len(array)), 1)[:, 0]
    order = np.lexsort((words, array))
    _, start, count = np.unique(array[order], return_index=True, return_counts=True)
    ranks = np.empty(len(array), np.int64)
    ranks[order] = np.arange(len(array)) - np.repeat(start, count)
    return ranks


def low_shot_rows(
    labels: ArrayLike, *, share: float | None = None, per_class: int | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """The training rows of a low-shot evaluation (paper, section 5: 1 % of ImageNet).

    Stratified: a share is taken of every class, rounded to whole images (half goes to the even
    number), and never fewer than one. A class with fewer than `per_class` rows gives all it has.
    The rows depend on the labels of the table and their order, so on the data set alone.

    Args:
        labels: (n,) integers, of all training rows.
        share: 0 < share <= 1; or
        per_class: rows of each class, at least 1.
        seed: another seed, another subset.

    Returns:
        int64 (m,), ascending.

    Raises:
        ValueError: not exactly one of share and per_class, one out of range, or labels are not a
            row of integers.
    """
    if (share is None) == (per_class is None):
        raise ValueError(
            f"exactly one of share and per_class must be given, got {share} and {per_class}"
        )
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    if per_class is not None and per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")
    array = _labels(labels)
    _, index, count = np.unique(array, return_inverse=True, return_counts=True)
    wanted = (
        np.full(len(count), per_class)
        if share is None
        else np.maximum(1, np.rint(share * count)).astype(np.int64)
    )
    return np.flatnonzero(class_ranks(array, seed=seed, step=_LOW_SHOT) < wanted[index])


def held_out_folds(labels: ArrayLike, *, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Which training rows to hold out for choosing a hyper-parameter.

    With at least 10 rows a class on average: one fold, a tenth of each class. With fewer: five
    folds, each row in one of them, to be held out in turn. The only row of a class is never held
    out. Where nothing can be held out (one row in every class) there is no fold.

    Args:
        labels: (n,) integers.
        seed: 0 <= seed < 2**64.

    Returns:
        bool (n,) each, True on rows held out; none is all True or all False.

    Raises:
        ValueError: labels are not a row of integers.
    """
    array = _labels(labels)
    _, index, count = np.unique(array, return_inverse=True, return_counts=True)
    folds, used = (10, 1) if len(array) >= 10 * len(count) else (5, 5)
    # shifted from class to class, so that folds are equally large where classes are small
    fold = (class_ranks(array, seed=seed, step=_FOLDS) + index) % folds
    alone = count[index] == 1
    masks = [(fold == number) & ~alone for number in range(used)]
    return [mask for mask in masks if mask.any()]


def selection_text(folds: Sequence[NDArray[np.bool_]]) -> str:
    """How a hyper-parameter is chosen with these folds, in words."""
    if not folds:
        return "fixed: there is one training image a class, none can be held out"
    held = sum(int(mask.sum()) for mask in folds)
    if len(folds) == 1:
        return f"on {held} of {folds[0].size} training images, held out"
    return f"by {len(folds)}-fold cross-validation on {folds[0].size} training images"
