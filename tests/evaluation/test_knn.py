"""kNN accuracy against plain loops, degenerate features, errors."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ijepa_fast.evaluation.knn
from ijepa_fast.evaluation.knn import knn_accuracy


def plain_knn(
    train: NDArray[np.float64],
    train_labels: list[int],
    test: NDArray[np.float64],
    test_labels: list[int],
    k: int,
    center: bool,
) -> float:
    if center:
        mean = train.mean(axis=0)
        train, test = train - mean, test - mean
    correct = 0
    for row, wanted in zip(test, test_labels, strict=True):
        near = []
        for other, label in zip(train, train_labels, strict=True):
            lengths = float(np.linalg.norm(row) * np.linalg.norm(other))
            near.append((float(row @ other) / lengths, label))
        near.sort(key=lambda pair: -pair[0])
        votes = Counter(label for _, label in near[:k])
        support: dict[int, float] = defaultdict(float)
        for similarity, label in near[:k]:
            support[label] += similarity
        best = max(votes, key=lambda label: (votes[label], support[label]))
        correct += best == wanted
    return correct / len(test)


def clusters(seed: int, count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    # Labels that are neither dense nor sorted; a large common offset, so that centring matters.
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(99))
    features = 5 + centres[labels] + torch.randn(count, 6, generator=generator)
    return features, labels * 7 - 10


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 30),
    classes=st.integers(1, 5),
    center=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_plain_loops(seed: int, k: int, classes: int, center: bool) -> None:
    train, train_labels = clusters(seed, 30, classes)
    test, test_labels = clusters(seed + 1, 25, classes)
    expected = plain_knn(
        train.double().numpy(),
        train_labels.tolist(),
        test.double().numpy(),
        test_labels.tolist(),
        k,
        center,
    )
    assert knn_accuracy(train, train_labels, test, test_labels, k=k, center=center) == expected


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(1, 50, 4), clusters(2, 37, 4)
    whole = knn_accuracy(*train, *test, k=5)
    monkeypatch.setattr(ijepa_fast.evaluation.knn, "_CHUNK_ELEMENTS", 200)
    assert knn_accuracy(*train, *test, k=5) == whole


def test_ties_go_to_the_larger_similarity() -> None:
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.9, 0.1]])
    test = torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    assert knn_accuracy(train, labels, test, torch.tensor([0]), k=4, center=False) == 1
    # Alone the nearest is class 0; of all four the votes are equal and 1.0 + 0.99 > 0.8 + 0.6.
    three = torch.tensor([0, 1, 1, 2])
    assert knn_accuracy(train, three, test, torch.tensor([1]), k=4, center=False) == 1
    assert knn_accuracy(train, three, test, torch.tensor([0]), k=1, center=False) == 1


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_collapsed_features_give_a_number(center: bool, value: float) -> None:
    features, labels = torch.full((40, 8), value), torch.arange(40) % 4
    accuracy = knn_accuracy(features, labels, features, labels, k=20, center=center)
    # Every test row gets the same answer.
    assert accuracy == 0.25


def test_unseen_class_is_wrong() -> None:
    features = torch.eye(4)
    labels = torch.zeros(4, dtype=torch.long)
    assert knn_accuracy(features, labels, features, labels + 1, k=2) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, r"k must be in 1\.\.6 .*got 0"),
        ({"k": 7}, r"k must be in 1\.\.6 .*got 7"),
        ({"train_features": torch.full((6, 3), torch.nan)}, "train_features .* finite, got 6 of 6"),
        ({"test_features": -torch.full((6, 3), torch.inf)}, "test_features must be finite"),
    ],
)
def test_errors(changes: dict[str, object], message: str) -> None:
    labels = torch.zeros(6, dtype=torch.long)
    arguments: dict[str, object] = {
        "train_features": torch.ones(6, 3),
        "train_labels": labels,
        "test_features": torch.ones(6, 3),
        "test_labels": labels,
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **changes})
