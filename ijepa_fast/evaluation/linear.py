"""Linear probes: how well a linear classifier on frozen features tells classes apart.

`linear_probe` is the usual protocol: softmax regression by SGD, with and without a BatchNorm in
front, over a grid of learning rates and over several feature sets (the paper, appendix A, reports
the better of the last layer and the last four). All heads learn from the same minibatches in one
pass over the cached features: those on the same input are one matrix product. The
hyper-parameters are chosen on training images held out for that, never on test images.

`ridge.py` has a second probe, without schedule or learning rate.

Shape letters: b rows of a minibatch, D feature width, H heads on the same input, C classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_fast.data import epoch_order
from ijepa_fast.evaluation.knn import check_finite, class_index
from ijepa_fast.evaluation.subsets import held_out_folds, selection_text

__all__ = ["LEARNING_RATES", "LinearHead", "LinearResult", "linear_probe"]

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Half a decade apart. Averaged features of an encoder have far less than unit variance, so that
without BatchNorm rates above 1 are of use; with it, those below."""

EPOCHS, LEAST_STEPS = 50, 1000
MOMENTUM = 0.9
BATCHNORM_EPS = 1e-6
# rows times heads times classes of logits at once, when nothing is learned: 64 MiB
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """One linear classifier.

    Attributes:
        features: name of the feature set.
        batchnorm: whether a BatchNorm stands in front.
        lr: learning rate at the start.
        accuracy: share of the test rows, trained on all training rows.
        validation: share of the held-out training rows, trained on the others; None where nothing
            could be held out.
        loss: cross-entropy over the training rows at the end, None where diverged.
        diverged: its numbers overflowed; its accuracies count as 0.
    """

    features: str
    batchnorm: bool
    lr: float
    accuracy: float
    validation: float | None
    loss: float | None
    diverged: bool


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """All heads, and the one to report.

    Attributes:
        heads: in the order of features, batchnorm, learning rate.
        best: highest validation accuracy (of equals, the first); `best.accuracy` is the result.
        selection: how it was chosen, in words.
    """

    heads: tuple[LinearHead, ...]
    best: LinearHead
    selection: str

    def best_of(self, features: str, batchnorm: bool) -> LinearHead:
        """The head to report for one feature set, with or without BatchNorm."""
        return _best([h for h in self.heads if (h.features, h.batchnorm) == (features, batchnorm)])


class _Heads:
    """Linear classifiers on the same input, one for each learning rate: weight (D, H, C), bias
    (H, C).
    """

    def __init__(
        self, features: str, norm: nn.BatchNorm1d | None, lr: Tensor, width: int, classes: int
    ) -> None:
        self.features, self.norm, self.lr = features, norm, lr[:, None]
        # convex: no need to break a symmetry
        self.weight = torch.zeros(width, len(lr), classes, device=lr.device)
        self.bias = torch.zeros(len(lr), classes, device=lr.device)
        self.weight_step, self.bias_step = (
            torch.zeros_like(self.weight),
            torch.zeros_like(self.bias),
        )

    def logits(self, x: Tensor) -> Tensor:
        """(b, D) to (b, H, C)."""
        width, heads, classes = self.weight.shape
        return (x @ self.weight.view(width, heads * classes)).view(-1, heads, classes) + self.bias

    def learn(self, x: Tensor, labels: Tensor, share: float) -> None:
        """One step of SGD as in `torch.optim.SGD`, at a share of each learning rate.

        The gradient of a mean cross-entropy with respect to the logits is (softmax - one-hot) / b.
        """
        x = x if self.norm is None else self.norm(x)
        error = self.logits(x).softmax(dim=-1)
        error[torch.arange(len(x), device=x.device), :, labels] -= 1
        error /= len(x)
        self.weight_step.mul_(MOMENTUM).add_((x.T @ error.flatten(1)).view_as(self.weight))
        self.bias_step.mul_(MOMENTUM).add_(error.sum(dim=0))
        self.weight -= share * self.lr * self.weight_step
        self.bias -= share * self.lr * self.bias_step

    def score(self, features: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
        """Accuracy and mean cross-entropy of each head; labels of -1 are wrong and have none."""
        device, heads, classes = self.weight.device, *self.weight.shape[1:]
        correct = torch.zeros(heads, dtype=torch.float64, device=device)
        loss = torch.zeros(heads, dtype=torch.float64, device=device)
        if self.norm is not None:
            self.norm.eval()
        rows = max(1, _CHUNK_ELEMENTS // (heads * classes))
        for part, label in zip(features.split(rows), labels.split(rows), strict=True):
            x = part.to(device).float()
            logits = self.logits(x if self.norm is None else self.norm(x))
            expected = label.to(device)[:, None].expand(-1, heads)
            correct += (logits.argmax(dim=-1) == expected).sum(dim=0)
            entropy = F.cross_entropy(
                logits.transpose(1, 2), expected, reduction="none", ignore_index=-1
            )
            loss += entropy.sum(dim=0, dtype=torch.float64)
        return (correct / len(features)).tolist(), (loss / len(features)).tolist()

    def finite(self) -> list[bool]:
        """Whether all weights of each head are finite."""
        weights = torch.cat([self.weight, self.bias[None]]).isfinite()
        return weights.all(dim=-1).all(dim=0).tolist()


def linear_probe(
    train: Mapping[str, Tensor],
    train_labels: Tensor,
    test: Mapping[str, Tensor],
    test_labels: Tensor,
    *,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int = 256,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batchnorm: Sequence[bool] = (False, True),
    device: torch.device | str = "cpu",
) -> LinearResult:
    """Softmax regression on frozen features by SGD, all heads at once.

    SGD with momentum 0.9; the learning rate falls to 0 along a cosine, step by step; weights start
    at zero. Rows are in a new keyed order in each epoch, cut into whole minibatches; the rest sits
    out that epoch. BatchNorm has no affine part: statistics of the minibatch in training, running
    ones (momentum 0.1) for what is scored. Computed in float32.

    Everything is trained on part of the training rows and scored on the held-out rest
    (`subsets.held_out_folds`: a tenth of each class, or five folds in turn where there are fewer
    than 10 rows a class), then trained anew on all training rows and scored on the test rows.
    Where nothing can be held out, the head in the middle of the list of learning rates is taken.

    Args:
        train: name -> features (n, d), d may differ; any float dtype, on any device.
        train_labels: (n,) integers.
        test: the same names -> (m, d).
        test_labels: (m,) integers; a class that no training row has counts as wrong.
        seed: of the held-out rows and the order.
        epochs: passes over the training rows; None is 50, or as many as make 1,000 minibatches.
        batch_size: rows of a minibatch; all rows where there are fewer.
        learning_rates: each is a head; not scaled to the batch size.
        batchnorm: with, without, or both.
        device: where to compute; minibatches are moved there.

    Raises:
        ValueError: features are not finite, or there are fewer than 3 training rows.
    """
    if len(train_labels) < 3:
        raise ValueError(f"train must hold at least 3 rows, got {len(train_labels)}")
    for name in train:
        check_finite(train[name], test[name])
    if epochs is None:
        steps = max(1, len(train_labels) // batch_size)
        epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps))
    classes, labels = torch.unique(train_labels.cpu(), return_inverse=True)
    expected = class_index(classes, test_labels)
    lr = torch.tensor(learning_rates, device=device)

    def trained(rows: NDArray[np.int64]) -> list[_Heads]:
        groups = []
        for name, x in train.items():
            width = x.shape[1]
            for norm in batchnorm:
                # affine-free, so that it has no parameters of its own
                before = nn.BatchNorm1d(width, eps=BATCHNORM_EPS, affine=False, device=device)
                groups.append(_Heads(name, before if norm else None, lr, width, len(classes)))
        _train(groups, train, labels, rows, seed=seed, epochs=epochs, batch_size=batch_size)
        return groups

    with torch.no_grad():
        folds = held_out_folds(labels.numpy(), seed=seed)
        correct = np.zeros((len(train) * len(batchnorm), len(learning_rates)))
        for mask in folds:
            held = torch.from_numpy(np.flatnonzero(mask))
            for group, heads in enumerate(trained(np.flatnonzero(~mask))):
                accuracy, _ = heads.score(_take(train[heads.features], held), labels[held])
                correct[group] += len(held) * np.where(heads.finite(), accuracy, 0.0)
        found = []
        for group, heads in enumerate(trained(np.arange(len(labels)))):
            _, losses = heads.score(train[heads.features], labels)
            accuracies, _ = heads.score(test[heads.features], expected)
            for head, rate in enumerate(learning_rates):
                fine = heads.finite()[head] and math.isfinite(losses[head])
                held_out = sum(int(mask.sum()) for mask in folds)
                found.append(
                    LinearHead(
                        features=heads.features,
                        batchnorm=heads.norm is not None,
                        lr=rate,
                        accuracy=accuracies[head] if fine else 0.0,
                        validation=float(correct[group, head]) / held_out if folds else None,
                        loss=losses[head] if fine else None,
                        diverged=not fine,
                    )
                )
    return LinearResult(heads=tuple(found), best=_best(found), selection=selection_text(folds))


def _best(heads: Sequence[LinearHead]) -> LinearHead:
    """Highest validation accuracy, of equals the first; without one, the middle of the first
    input's heads.
    """
    if heads[0].validation is None:
        one = heads[0].features, heads[0].batchnorm
        first = [h for h in heads if (h.features, h.batchnorm) == one]
        return first[(len(first) - 1) // 2]
    return max(heads, key=lambda h: (not h.diverged, h.validation))


def _train(
    groups: Sequence[_Heads],
    features: Mapping[str, Tensor],
    labels: Tensor,
    rows: NDArray[np.int64],
    *,
    seed: int,
    epochs: int,
    batch_size: int,
) -> None:
    """Trains all heads on these rows, minibatch by minibatch."""
    device = groups[0].weight.device
    batch = min(batch_size, len(rows))
    steps = len(rows) // batch
    for epoch in range(epochs):
        order = torch.from_numpy(rows[epoch_order(len(rows), seed=seed, epoch=epoch)])
        for step, chosen in enumerate(order.split(batch)[:steps]):
            share = (1 + math.cos(math.pi * (epoch + step / steps) / epochs)) / 2
            inputs = {name: _take(x, chosen).to(device).float() for name, x in features.items()}
            label = labels[chosen].to(device)
            for heads in groups:
                heads.learn(inputs[heads.features], label, share)


def _take(features: Tensor, rows: Tensor) -> Tensor:
    return features[rows.to(features.device)]
