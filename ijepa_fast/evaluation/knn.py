"""k-nearest-neighbour accuracy: how well frozen features tell classes apart, nothing to tune."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_finite", "class_index", "knn_accuracy"]

# Similarities held at once: 2**24 float32 are 64 MiB.
_CHUNK_ELEMENTS = 2**24


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    center: bool = True,
) -> float:
    """Share of test rows whose class is the majority among their k nearest training rows.

    Nearest is by cosine similarity, in float32, on the device of `train_features`. Each neighbour
    has one vote; of the classes with the most votes, the one with the largest sum of similarities
    wins (then the smallest label). A row of zeros has similarity 0 to every row. Which of several
    equally similar rows counts as k-th is left to `torch.topk`.

    Args:
        train_features: (n, d), any float dtype, finite.
        train_labels: (n,) integers.
        test_features: (m, d), finite.
        test_labels: (m,) integers; a class that no training row has counts as wrong.
        k: neighbours, 1 <= k <= n.
        center: subtract the mean of the training rows from all rows first. Features share a large
            common direction more often than not, and cosines about it are all close to 1.

    Returns:
        Accuracy in 0..1.

    Raises:
        ValueError: k is out of range, or a value is not finite.
    """
    check_finite(train_features, test_features)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must be in 1..{len(train_features)} (training rows), got {k}")

    device = train_features.device
    mean = train_features.mean(dim=0, dtype=torch.float64).float()
    shift = mean if center else torch.zeros_like(mean)
    train_rows = F.normalize(train_features.float() - shift, dim=1)
    classes, train_index = torch.unique(train_labels.to(device), return_inverse=True)

    correct = 0
    chunk = max(1, _CHUNK_ELEMENTS // len(train_features))
    for rows, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        test_rows = F.normalize(rows.to(device).float() - shift, dim=1)
        similarity, neighbour = (test_rows @ train_rows.T).topk(k, dim=1)
        label = train_index[neighbour]
        empty = similarity.new_zeros(len(rows), len(classes))
        votes = empty.scatter_add(1, label, torch.ones_like(similarity))
        support = empty.scatter_add(1, label, similarity)
        leads = votes == votes.amax(dim=1, keepdim=True)
        winner = support.masked_fill(~leads, -torch.inf).argmax(dim=1)
        correct += int((classes[winner] == labels.to(device)).sum())
    return correct / len(test_features)


def check_finite(train_features: Tensor, test_features: Tensor) -> None:
    """Raises ValueError where a row of features is not finite."""
    for part, features in (("train", train_features), ("test", test_features)):
        bad = int((~features.isfinite().all(dim=1)).sum())
        if bad:
            raise ValueError(
                f"{part}_features must be finite, got {bad} of {len(features)} rows that are not"
            )


def class_index(classes: Tensor, labels: Tensor) -> Tensor:
    """Position of each label among the sorted classes; -1 where it is none of them.

    Args:
        classes: (C,) integers on the CPU, ascending.
        labels: (n,) integers.

    Returns:
        int64 (n,) on the CPU.
    """
    labels = labels.cpu().to(classes.dtype)
    index = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1)
    return torch.where(classes[index] == labels, index, -1)
