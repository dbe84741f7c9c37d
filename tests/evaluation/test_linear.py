"""Linear probes against plain torch loops and scikit-learn."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from ijepa_fast.data import epoch_order
from ijepa_fast.evaluation.linear import linear_probe
from ijepa_fast.evaluation.ridge import PENALTIES, ridge_accuracy
from ijepa_fast.evaluation.subsets import held_out_folds


def clusters(seed, count, classes=4, width=6, spread=1.0):
    """Overlapping clouds off the origin, channels of unequal scale, labels with gaps."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    noise = spread * torch.randn(count, width, generator=generator)
    scale = torch.linspace(0.5, 2.0, width)
    return (centres[labels] + noise) * scale + 1, labels * 7 - 10


TRAIN, TRAIN_LABELS = clusters(1, 300)
TEST, TEST_LABELS = clusters(2, 400)


def probe(train=TRAIN, labels=TRAIN_LABELS, test=TEST, test_labels=TEST_LABELS, **settings):
    return linear_probe({"last": train}, labels, {"last": test}, test_labels, **settings)


def plain_loop(lr, batchnorm, epochs, batch, rows):
    """torch's own modules, optimiser and schedule: accuracy on test, and the training loss."""
    classes = TRAIN_LABELS.unique()
    labels = torch.searchsorted(classes, TRAIN_LABELS)
    linear = nn.Linear(TRAIN.shape[1], len(classes))
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(TRAIN.shape[1], eps=1e-6, affine=False)
    net = nn.Sequential(norm, linear) if batchnorm else linear
    optimizer = torch.optim.SGD(linear.parameters(), lr=lr, momentum=0.9)
    steps = len(rows) // batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps)
    for epoch in range(epochs):
        order = rows[epoch_order(len(rows), seed=5, epoch=epoch)]
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            F.cross_entropy(net(TRAIN[chosen]), labels[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval()
    with torch.no_grad():
        loss = F.cross_entropy(net(TRAIN), labels).item()
        correct = [
            (classes[net(x).argmax(dim=1)] == y).float()
            for x, y in ((TEST, TEST_LABELS), (TRAIN, TRAIN_LABELS))
        ]
    return loss, correct[0].mean().item(), correct[1]


def test_equals_a_plain_loop():
    result = probe(seed=5, epochs=4, batch_size=32, learning_rates=(0.02, 0.2))
    assert len(result.heads) == 4
    (mask,) = held_out_folds(TRAIN_LABELS, seed=5)
    assert result.selection == f"on {mask.sum()} of 300 training images, held out"
    for head in result.heads:
        setting = (head.lr, head.batchnorm, 4, 32)
        loss, accuracy, _ = plain_loop(*setting, np.arange(300))
        assert head.loss == pytest.approx(loss, rel=1e-5)
        # a row on the border may fall either way
        assert head.accuracy == pytest.approx(accuracy, abs=1 / 400 + 1e-6)
        _, _, correct = plain_loop(*setting, np.flatnonzero(~mask))
        held_out = correct[torch.from_numpy(mask)].mean().item()
        assert head.validation == pytest.approx(held_out, abs=1 / mask.sum() + 1e-6)
        assert not head.diverged
    order = [(h.batchnorm, h.lr) for h in result.heads]
    assert order == sorted(order)


def test_heads_together_equal_heads_alone():
    train = {"last": TRAIN, "last 4": torch.cat([TRAIN.flip(1), TRAIN.square()], dim=1)}
    test = {"last": TEST, "last 4": torch.cat([TEST.flip(1), TEST.square()], dim=1)}
    rates = (0.001, 0.01, 0.05)
    together = linear_probe(
        train, TRAIN_LABELS, test, TEST_LABELS, epochs=3, batch_size=50, learning_rates=rates
    )
    assert len(together.heads) == 2 * 2 * 3
    for head in together.heads:
        alone = linear_probe(
            {head.features: train[head.features]},
            TRAIN_LABELS,
            {head.features: test[head.features]},
            TEST_LABELS,
            epochs=3,
            batch_size=50,
            learning_rates=(head.lr,),
            batchnorm=(head.batchnorm,),
        ).heads[0]
        assert head.loss == pytest.approx(alone.loss, rel=1e-6)
        assert head.accuracy == alone.accuracy
        assert head.validation == alone.validation


def test_long_training_reaches_the_optimum_of_scikit_learn():
    n = len(TRAIN)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000)
    reference.fit(TRAIN.double().numpy(), TRAIN_LABELS.numpy())
    probability = reference.predict_proba(TRAIN.double().numpy())
    column = np.searchsorted(reference.classes_, TRAIN_LABELS.numpy())
    optimum = -np.log(probability[np.arange(n), column]).mean()
    score = reference.score(TEST.double().numpy(), TEST_LABELS.numpy())
    head = probe(epochs=1500, batch_size=n, learning_rates=(0.3,), batchnorm=(False,)).best
    assert head.loss == pytest.approx(optimum, rel=1e-4)
    assert head.accuracy == pytest.approx(score, abs=2 / len(TEST) + 1e-9)
    # far from where it started
    assert optimum < 0.9 * math.log(4)


def test_batchnorm_ends_as_standardised_features():
    """With all rows in a minibatch the running statistics converge to those of the rows."""
    scaler = StandardScaler().fit(TRAIN.double().numpy())
    train, test = (torch.from_numpy(scaler.transform(x.double().numpy())) for x in (TRAIN, TEST))
    settings = {"epochs": 300, "batch_size": 300, "learning_rates": (0.1,)}
    with_norm = probe(**settings, batchnorm=(True,)).best
    standardised = probe(train, test=test, **settings, batchnorm=(False,)).best
    # running variances are unbiased: n / (n - 1)
    assert with_norm.loss == pytest.approx(standardised.loss, rel=1e-3)
    assert with_norm.accuracy == pytest.approx(standardised.accuracy, abs=1 / 400 + 1e-9)
    plain = probe(**settings, batchnorm=(False,)).best
    assert abs(plain.loss - standardised.loss) > 3e-3 * standardised.loss


def test_the_choice_is_made_on_training_rows():
    """Test labels that fit nothing change what is reported, never what is chosen."""
    honest = probe(epochs=3)
    generator = torch.Generator().manual_seed(3)
    shuffled = TEST_LABELS[torch.randperm(len(TEST), generator=generator)]
    other = probe(test_labels=shuffled, epochs=3)
    assert [h.validation for h in other.heads] == [h.validation for h in honest.heads]
    chosen = [(r.best.batchnorm, r.best.lr) for r in (honest, other)]
    assert chosen[0] == chosen[1]
    assert honest.best.accuracy > 0.6
    assert other.best.accuracy < 0.4
    assert honest.best.validation == max(h.validation for h in honest.heads)
    # the test accuracies would have chosen another head
    assert other.best.accuracy < max(h.accuracy for h in other.heads)


def test_no_signal_gives_chance():
    generator = torch.Generator().manual_seed(4)
    shuffled = TRAIN_LABELS[torch.randperm(len(TRAIN), generator=generator)]
    # 4 classes, 400 rows: standard error 0.022
    assert abs(probe(labels=shuffled, epochs=3).best.accuracy - 0.25) < 0.1
    assert abs(ridge_accuracy(TRAIN, shuffled, TEST, TEST_LABELS).accuracy - 0.25) < 0.1


def test_best_of_one_input():
    result = probe(epochs=2)
    for norm in (False, True):
        heads = [h for h in result.heads if h.batchnorm == norm]
        best = result.best_of("last", norm)
        assert best in heads
        assert best.validation == max(h.validation for h in heads)


def test_a_head_that_diverges_is_named_and_harms_no_other():
    alone = probe(epochs=2, learning_rates=(0.1,), batchnorm=(False,))
    result = probe(epochs=2, learning_rates=(0.1, 1e38), batchnorm=(False,))
    good, bad = result.heads
    assert (bad.diverged, bad.accuracy, bad.validation, bad.loss) == (True, 0.0, 0.0, None)
    assert not good.diverged
    assert good.accuracy == alone.best.accuracy
    assert good.loss == pytest.approx(alone.best.loss, rel=1e-6)
    assert result.best == good
    assert probe(epochs=2, learning_rates=(1e38,)).best.diverged


def test_few_images_are_cross_validated():
    rows = torch.cat([torch.nonzero(y == TRAIN_LABELS)[:5, 0] for y in TRAIN_LABELS.unique()])
    result = probe(TRAIN[rows], TRAIN_LABELS[rows], epochs=60)
    assert result.selection == "by 5-fold cross-validation on 20 training images"
    # a whole number of the 20 rows
    assert all((20 * h.validation) % 1 == pytest.approx(0, abs=1e-9) for h in result.heads)
    assert result.best.accuracy > 0.5


def test_one_image_a_class():
    rows = torch.cat([torch.nonzero(y == TRAIN_LABELS)[:1, 0] for y in TRAIN_LABELS.unique()])
    result = probe(TRAIN[rows], TRAIN_LABELS[rows], epochs=50, learning_rates=(0.01, 0.1, 1.0))
    assert "none can be held out" in result.selection
    assert result.best.validation is None
    assert (result.best.lr, result.best.batchnorm) == (0.1, False)
    ridge = ridge_accuracy(TRAIN[rows], TRAIN_LABELS[rows], TEST, TEST_LABELS)
    assert ridge.validation is None
    assert ridge.accuracy > 0.3


def test_default_epochs_are_enough_for_few_rows():
    """48 rows are one minibatch an epoch; 50 steps at the lowest rate would hardly move."""
    rows = torch.arange(48)
    settings = {"learning_rates": (0.01,), "batchnorm": (False,)}
    short = probe(TRAIN[rows], TRAIN_LABELS[rows], epochs=50, **settings).best
    thousand = probe(TRAIN[rows], TRAIN_LABELS[rows], epochs=1000, **settings).best
    default = probe(TRAIN[rows], TRAIN_LABELS[rows], **settings).best
    assert astuple(default) == astuple(thousand)
    assert default.loss < short.loss


def test_unseen_classes_are_wrong():
    test_labels = torch.where(torch.arange(400) < 100, 1000, TEST_LABELS)
    all_seen, some = probe(epochs=3), probe(test_labels=test_labels, epochs=3)
    assert some.best.accuracy <= 0.75
    assert some.best.accuracy == pytest.approx(0.75 * all_seen.best.accuracy, abs=0.05)
    assert ridge_accuracy(TRAIN, TRAIN_LABELS, TEST, test_labels).accuracy <= 0.75


def test_collapsed_features_give_chance():
    labels = torch.arange(300) % 4
    result = probe(
        torch.full((300, 6), 3.0),
        labels,
        torch.full((400, 6), 3.0),
        torch.arange(400) % 4,
        epochs=2,
    )
    assert result.best.accuracy == 0.25
    flat = ridge_accuracy(
        torch.full((300, 6), 0.1), labels, torch.full((400, 6), 0.1), labels[:1].repeat(400)
    )
    assert flat.accuracy in (0.0, 1.0)


# --- ridge ---------------------------------------------------------------------------------------


def scikit_ridge(train, labels, test, test_labels, penalty):
    scaler = StandardScaler().fit(train)
    classes = np.unique(labels)
    one_hot = (labels[:, None] == classes).astype(float)
    model = Ridge(alpha=penalty).fit(scaler.transform(train), one_hot)
    outputs = model.predict(scaler.transform(test))
    return float((classes[outputs.argmax(axis=1)] == test_labels).mean()), model


@pytest.mark.parametrize("penalty", [1e-3, 10.0, 1e4])
def test_ridge_equals_scikit_learn(penalty):
    x, y = TRAIN.double().numpy(), TRAIN_LABELS.numpy()
    expected, _ = scikit_ridge(x, y, TEST.double().numpy(), TEST_LABELS.numpy(), penalty)
    ours = ridge_accuracy(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS, penalties=[penalty])
    assert ours.accuracy == expected
    assert ours.penalty == penalty
    (mask,) = held_out_folds(y)
    expected, _ = scikit_ridge(x[~mask], y[~mask], x[mask], y[mask], penalty)
    assert ours.validation == expected


@pytest.mark.parametrize(("rows", "penalty"), [(300, 1.0), (300, 300.0), (5, 2.0), (5, 1e-3)])
def test_ridge_solution_equals_scikit_learn(rows, penalty):
    """Weights and intercept, with more and with fewer rows than features."""
    from ijepa_fast.evaluation.ridge import _Ridge

    _, labels = torch.unique(TRAIN_LABELS, return_inverse=True)
    x, y = TRAIN[:rows].double(), labels[:rows]
    model = Ridge(alpha=penalty)
    scaler = StandardScaler().fit(x.numpy())
    model.fit(scaler.transform(x.numpy()), F.one_hot(y, 4).double().numpy())
    ours = _Ridge(TRAIN[:rows], y, 4)
    np.testing.assert_allclose(ours.weights(penalty).numpy(), model.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ours.intercept.numpy(), model.intercept_, rtol=1e-6, atol=1e-9)


def test_ridge_chooses_on_training_rows():
    """Many noisy features and few rows: a large penalty is best."""
    train, labels = clusters(5, 80, width=60, spread=4.0)
    test, test_labels = clusters(6, 400, width=60, spread=4.0)
    result = ridge_accuracy(train, labels, test, test_labels)
    each = [ridge_accuracy(train, labels, test, test_labels, penalties=[p]) for p in PENALTIES]
    best = max(r.validation or 0.0 for r in each)
    assert result.validation == best
    assert result.penalty == max(
        p for p, r in zip(PENALTIES, each, strict=True) if r.validation == best
    )
    assert result.accuracy == each[PENALTIES.index(result.penalty)].accuracy
    assert result.penalty > PENALTIES[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be in"),
        ({"train": TRAIN * math.nan}, "train_features must be finite, got 300 of 300 rows"),
        ({"train": TRAIN[:2], "labels": TRAIN_LABELS[:2]}, "at least 3 rows, got 2"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        probe(**settings)
