"""Low-shot subsets and held-out folds: counts, nesting, where rows come from."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ijepa_fast.evaluation.subsets import class_ranks, held_out_folds, low_shot_rows, selection_text
from ijepa_fast.keyed_random import Stream, integers

LABELS = np.repeat([3, -1, 40], [200, 30, 4])[np.random.default_rng(0).permutation(234)]


def counts(rows):
    values, count = np.unique(LABELS[rows], return_counts=True)
    return dict(zip(values.tolist(), count.tolist(), strict=True))


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (0.01, {3: 2, -1: 1, 40: 1}),
        (0.1, {3: 20, -1: 3, 40: 1}),
        (0.5, {3: 100, -1: 15, 40: 2}),
        (1, {3: 200, -1: 30, 40: 4}),
    ],
)
def test_a_share_of_every_class(share, wanted):
    assert counts(low_shot_rows(LABELS, share=share)) == wanted


def test_so_many_of_every_class():
    assert counts(low_shot_rows(LABELS, per_class=1)) == {3: 1, -1: 1, 40: 1}
    assert counts(low_shot_rows(LABELS, per_class=10)) == {3: 10, -1: 10, 40: 4}


def test_rows_are_those_with_the_smallest_keyed_words():
    """By a plain loop over classes."""
    words = integers(7, Stream.SPLIT, 2, np.arange(len(LABELS)), 1)[:, 0].tolist()
    expected = []
    for label in (3, -1, 40):
        rows = [row for row in range(len(LABELS)) if LABELS[row] == label]
        expected += sorted(rows, key=lambda row: words[row])[:5]
    assert low_shot_rows(LABELS, per_class=5, seed=7).tolist() == sorted(expected)


def test_subsets_are_nested_fixed_and_keyed():
    sizes = [low_shot_rows(LABELS, per_class=k).tolist() for k in (20, 1, 5, 2)]
    again = [low_shot_rows(LABELS, per_class=k).tolist() for k in (1, 2, 5, 20)]
    assert [sizes[1], sizes[3], sizes[2], sizes[0]] == again
    for small, large in pairwise(again):
        assert set(small) < set(large)
    assert set(low_shot_rows(LABELS, share=0.01)) < set(low_shot_rows(LABELS, share=0.1))
    assert low_shot_rows(LABELS, per_class=5, seed=1).tolist() != again[2]


def test_every_row_is_as_likely():
    labels = np.zeros(8, np.int64)
    chosen = np.concatenate([low_shot_rows(labels, per_class=2, seed=s) for s in range(2000)])
    # 500 expected, standard deviation 19.4
    assert np.abs(np.bincount(chosen, minlength=8) - 500).max() < 5 * 19.4


@given(st.lists(st.integers(-2, 4), min_size=1, max_size=80), st.integers(0, 50))
def test_folds(labels, seed):
    array = np.array(labels)
    folds = held_out_folds(array, seed=seed)
    value, count = np.unique(array, return_counts=True)
    for fold in folds:
        assert fold.shape == array.shape
        assert fold.any()
        # no class is held out as a whole
        assert set(array[~fold]) == set(array)
    large = len(array) >= 10 * len(value)
    held_out = np.sum(folds, axis=0)
    if large:
        assert len(folds) <= 1
    elif folds:
        assert len(folds) <= 5
        alone = np.isin(array, value[count == 1])
        assert held_out.tolist() == (~alone).astype(int).tolist()
    if count.max() == 1:
        assert folds == []


def test_a_tenth_of_each_large_class():
    labels = np.repeat(np.arange(3), 100)
    (fold,) = held_out_folds(labels)
    assert np.bincount(labels[fold]).tolist() == [10, 10, 10]
    assert selection_text([fold]) == "on 30 of 300 training images, held out"
    small = held_out_folds(labels[::25])
    assert selection_text(small) == "by 5-fold cross-validation on 12 training images"
    assert "none can be held out" in selection_text(held_out_folds(np.arange(3)))


def test_folds_and_low_shot_draw_different_words():
    labels = np.zeros(50, np.int64)
    ranks = [class_ranks(labels, seed=0, step=step).tolist() for step in (1, 2)]
    assert ranks[0] != ranks[1]
    assert sorted(ranks[0]) == list(range(50))
