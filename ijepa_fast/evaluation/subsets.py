"""Fixed subsets of labelled rows: low-shot training sets and held-out folds.

Every row draws a 64-bit word keyed by (seed, its number). Within a class, rows are ranked by it. A
subset is a rule on ranks, so it is the same on every machine and whatever was asked for before,
and the smaller of two low-shot sets of one seed lies inside the larger.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.keyed_random import Stream, integers

__all__ = ["class_ranks", "held_out_folds", "low_shot_rows", "selection_text"]

# `step` of the draws; 0 is the split into training and test images
_FOLDS, _LOW_SHOT = 1, 2


def class_ranks(labels: NDArray[np.int64], *, seed: int, step: int) -> NDArray[np.int64]:
    """The keyed rank of each row among those of its class, from 0.

    Args:
        labels: int64 (n,).
        seed: 0 <= seed < 2**64.
        step: tells apart rankings for different purposes.

    Returns:
        int64 (n,).
    """
    words = integers(seed, Stream.SPLIT, step, np.arange(len(labels)), 1)[:, 0]
    order = np.lexsort((words, labels))
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(start, count)
    return ranks


def low_shot_rows(
    labels: NDArray[np.int64], *, share: float = 1.0, per_class: int | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """The training rows of a low-shot evaluation (paper, section 5: 1 % of ImageNet).

    Stratified: a share is taken of every class, rounded to whole images (half goes to the even
    number), and never fewer than one. A class with fewer than `per_class` rows gives all it has.
    The rows depend on the labels of the table and their order, so on the data set alone.

    Args:
        labels: int64 (n,), of all training rows.
        share: 0 < share <= 1.
        per_class: instead of a share: rows of each class, at least 1.
        seed: another seed, another subset.

    Returns:
        int64 (m,), ascending.
    """
    _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    wanted = np.maximum(1, np.rint(share * count))
    if per_class is not None:
        wanted = np.full_like(wanted, per_class)
    return np.flatnonzero(class_ranks(labels, seed=seed, step=_LOW_SHOT) < wanted[index])


def held_out_folds(labels: NDArray[np.int64], *, seed: int = 0) -> list[NDArray[np.bool_]]:
    """Which training rows to hold out for choosing a hyper-parameter.

    With at least 10 rows a class on average: one fold, a tenth of each class. With fewer: five
    folds, each row in one of them, to be held out in turn. The only row of a class is never held
    out. Where nothing can be held out (one row in every class) there is no fold.

    Args:
        labels: int64 (n,).
        seed: 0 <= seed < 2**64.

    Returns:
        bool (n,) each, True on rows held out; none is all True or all False.
    """
    _, index, count = np.unique(labels, return_inverse=True, return_counts=True)
    folds, used = (10, 1) if len(labels) >= 10 * len(count) else (5, 5)
    # shifted from class to class, so that folds are equally large where classes are small
    fold = (class_ranks(labels, seed=seed, step=_FOLDS) + index) % folds
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
