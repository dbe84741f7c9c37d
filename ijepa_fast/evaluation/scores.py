"""What frozen features are worth, beside raw pixels and the untrained network."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.evaluation.features import LAST, LAST_FOUR, PIXELS, SMALL, Features, extract
from ijepa_fast.evaluation.finetune import FinetuneSettings, finetune
from ijepa_fast.evaluation.knn import knn_accuracy
from ijepa_fast.evaluation.labelled import Images, Split
from ijepa_fast.evaluation.linear import linear_probe
from ijepa_fast.evaluation.ridge import ridge_accuracy
from ijepa_fast.evaluation.subsets import low_shot_rows
from ijepa_fast.weights import Encoder

__all__ = [
    "Scores",
    "final_table",
    "finetune_scores",
    "knn_scores",
    "linear_scores",
    "score_knn",
    "score_ridge",
    "table",
]

Scores = dict[str, dict[str, float]]


def score_knn(train: Features, test: Features, *, k: int, both: bool = True) -> Scores:
    """Subject -> `kNN` and, if both are wanted, `kNN, not centred` -> accuracy in 0..1; of all
    training images where there are fewer than `k`.
    """
    scores: Scores = {}
    k = min(k, len(train.labels))
    for name in train.sets:
        rows = train.sets[name][LAST], train.labels, test.sets[name][LAST], test.labels
        scores[name] = {"kNN": knn_accuracy(*rows, k=k)}
        if both:
            scores[name]["kNN, not centred"] = knn_accuracy(*rows, k=k, center=False)
    return scores


def _for_regression(
    train: Features, test: Features, name: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and test rows that regressions get of one subject: of pixels the smaller ones, and
    of grey ones a single channel, as equal columns make the equations large and say nothing.
    """
    parts = train.sets[name], test.sets[name]
    if SMALL not in train.sets[name]:
        return dict(parts[0]), dict(parts[1])
    small = [part[SMALL] for part in parts]
    channels = [part.chunk(3, dim=1) for part in small]
    if all(torch.equal(one[0], other) for one in channels for other in one[1:]):
        small = [one[0] for one in channels]
    return {LAST: small[0]}, {LAST: small[1]}


def score_ridge(train: Features, test: Features, *, seed: int = 0) -> Scores:
    """Subject -> `ridge` (and `ridge, last 4`) -> accuracy in 0..1."""
    scores: Scores = {}
    for name in train.sets:
        given, held_out = _for_regression(train, test, name)
        scores[name] = {
            "ridge" if key == LAST else f"ridge, {key}": ridge_accuracy(
                values, train.labels, held_out[key], test.labels, seed=seed
            ).accuracy
            for key, values in given.items()
        }
    return scores


def final_table(
    encoders: Mapping[str, Encoder], splits: tuple[Split, Split], *, precision: str
) -> Scores:
    """What training has brought: raw pixels beside the given encoders.

    Args:
        encoders: name -> encoder on its device, such as the untrained and the trained network.
        splits: training and test images.
        precision: `bfloat16` autocasts matrix products.

    Returns:
        Subject, `raw pixels` first -> `kNN` (20 neighbours by cosine, centred) and `ridge` (on the
        last four layers, or on pixels) -> accuracy in 0..1; as `ijepa-fast evaluate` has
        them.
    """
    train, test = _features(encoders, splits, precision=precision, four=True)
    table: Scores = {}
    for name, knn in score_knn(train, test, k=20, both=False).items():
        given, held_out = _for_regression(train, test, name)
        key = list(given)[-1]
        ridge = ridge_accuracy(given[key], train.labels, held_out[key], test.labels)
        table[name] = {**knn, "ridge": ridge.accuracy}
    return table


def linear_scores(
    train: Features,
    test: Features,
    *,
    seed: int,
    device: torch.device,
    epochs: int | None,
    say: Callable[[str], None],
) -> tuple[Scores, dict[str, Any]]:
    """Linear probes of every subject: one pass for all its heads.

    Returns:
        Subject -> `linear`, `linear+BN`, and both for the last four layers -> accuracy; and every
        head of the sweep, with how the reported one was chosen.
    """
    scores: Scores = {}
    details: dict[str, Any] = {}
    for name, sets in train.sets.items():
        say(f"linear probes of {name}")
        given, held_out = _for_regression(train, test, name)
        result = linear_probe(
            given,
            train.labels,
            held_out,
            test.labels,
            seed=seed,
            device=device,
            epochs=epochs,
        )
        scores[name] = {}
        for key in (LAST, LAST_FOUR):
            for norm in (False, True) if key in sets else ():
                title = f"linear{'+BN' if norm else ''}{'' if key == LAST else ', last 4'}"
                scores[name][title] = result.best_of(key, norm).accuracy
        details[name] = {
            "chosen": result.selection,
            "best": vars(result.best),
            "heads": [vars(head) for head in result.heads],
        }
    return scores, details


def finetune_scores(
    encoders: Mapping[str, Encoder],
    splits: tuple[Split, Split],
    settings: FinetuneSettings,
    *,
    seed: int,
    precision: str,
    say: Callable[[str], None],
) -> tuple[Scores, dict[str, Any]]:
    """Fine-tunes each encoder on the same labelled images; raw pixels get a ridge regression on
    them.

    Args:
        encoders: name -> encoder.
        splits: training and test images.
        settings: see `finetune`.
        seed: of subset, order, crops and head.
        precision: `bfloat16` autocasts matrix products.
        say: gets a line after each epoch.

    Returns:
        Subject -> the settings' title -> accuracy; and what was trained.
    """
    train, test = splits
    rows = low_shot_rows(
        train.labels, share=settings.share, per_class=settings.per_class, seed=seed
    )
    subset = replace(train, rows=train.rows[rows])
    known = np.unique(subset.labels)
    number = {int(label): place for place, label in enumerate(known)}
    batch = min(settings.batch, len(rows))
    steps = len(rows) // batch
    title = settings.title
    say(f"{title}: {len(rows)} images, {settings.epochs} epochs of {steps} steps")

    def renumbered(images: Images) -> tuple[Tensor, Tensor]:
        places = [number.get(int(label), len(known)) for label in images.labels]
        return images.images, torch.tensor(places)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return map(renumbered, subset.random_batches(epoch, batch=batch, seed=seed))

    train_pixels, test_pixels = (
        extract({}, part, training_images=len(rows), precision=precision, four=True)
        for part in (subset, test)
    )
    scores = {PIXELS: {title: score_ridge(train_pixels, test_pixels)[PIXELS]["ridge"]}}
    details: dict[str, Any] = {
        "images": len(rows),
        **vars(settings),
        "share": None if settings.per_class else settings.share,
        "seed": seed,
    }
    for name, encoder in encoders.items():
        result = finetune(
            encoder,
            len(known),
            batches,
            map(renumbered, test.batches()),
            settings,
            steps_per_epoch=steps,
            seed=seed,
            half=precision == "bfloat16",
            progress=lambda line, name=name: say(f"{name}: {line}"),  # type: ignore[misc]
        )
        scores[name] = {title: result.accuracy}
        details[name] = {"losses": result.losses, "steps": result.steps}
    return scores, details


def _features(
    encoders: Mapping[str, Encoder], splits: tuple[Split, Split], **settings: Any
) -> tuple[Features, Features]:
    train, test = (
        extract(encoders, split, training_images=len(splits[0].rows), **settings)
        for split in splits
    )
    return train, test


def knn_scores(
    encoders: Mapping[str, Encoder],
    splits: tuple[Split, Split],
    *,
    precision: str,
    with_pixels: bool = True,
) -> dict[str, float]:
    """kNN accuracy (20 neighbours by cosine, centred) of raw pixels and of each encoder.

    Args:
        encoders: name -> encoder on its device.
        splits: training and test images.
        precision: `bfloat16` autocasts matrix products.
        with_pixels: also score raw pixels.

    Returns:
        name -> accuracy in 0..1, `raw pixels` first.
    """
    train, test = _features(encoders, splits, precision=precision, with_pixels=with_pixels)
    return {name: of["kNN"] for name, of in score_knn(train, test, k=20, both=False).items()}


def table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Accuracies for a person: a row a subject; a column a method, of as many lines as its title
    has parts.
    """
    titles = list(dict.fromkeys(title for of in scores.values() for title in of))
    heads = [title.split(", ") for title in titles]
    lines = max(len(head) for head in heads)
    columns = [[*([""] * (lines - len(head))), *head] for head in heads]
    widths = [max(8, *(len(word) for word in column)) for column in columns]
    first = max(len(name) for name in scores)
    rows = []
    for line in range(lines):
        words = [column[line].rjust(w) for column, w in zip(columns, widths, strict=True)]
        rows.append("  ".join([" " * first, *words]))
    for name, of in scores.items():
        cells = [
            (f"{100 * of[t]:.1f} %" if t in of else "-").rjust(w)
            for t, w in zip(titles, widths, strict=True)
        ]
        rows.append("  ".join([name.ljust(first), *cells]))
    return "\n".join(rows)
