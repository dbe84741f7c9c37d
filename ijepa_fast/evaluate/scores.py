"""What frozen features are worth, beside raw pixels and the untrained network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.evaluate.features import LAST, LAST_FOUR, PIXELS, SMALL, Features, extract
from ijepa_fast.evaluate.finetune import FinetuneSettings, finetune
from ijepa_fast.evaluate.knn import knn_accuracy
from ijepa_fast.evaluate.labelled import Images, Split
from ijepa_fast.evaluate.linear import linear_probe
from ijepa_fast.evaluate.ridge import ridge_accuracy
from ijepa_fast.evaluate.subsets import low_shot_rows
from ijepa_fast.model import VisionTransformer
from ijepa_fast.weights import Encoder

__all__ = [
    "Scores",
    "finetune_scores",
    "knn_scores",
    "knn_table",
    "linear_scores",
    "score_knn",
    "score_ridge",
]

Scores = dict[str, dict[str, float]]


def score_knn(train: Features, test: Features, *, k: int, both: bool = True) -> Scores:
    """Subject -> `kNN` and, if both are wanted, `kNN, not centred` -> accuracy in 0..1."""
    scores: Scores = {}
    for name in train.sets:
        rows = train.sets[name][LAST], train.labels, test.sets[name][LAST], test.labels
        scores[name] = {"kNN": knn_accuracy(*rows, k=k)}
        if both:
            scores[name]["kNN, not centred"] = knn_accuracy(*rows, k=k, center=False)
    return scores


def _probed(sets: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What regressions get: smaller pixels."""
    return {LAST: sets[SMALL]} if SMALL in sets else sets


def score_ridge(train: Features, test: Features, *, seed: int = 0) -> Scores:
    """Subject -> `ridge` (and `ridge, last 4`) -> accuracy in 0..1."""
    return {
        name: {
            "ridge" if key == LAST else f"ridge, {key}": ridge_accuracy(
                values, train.labels, _probed(test.sets[name])[key], test.labels, seed=seed
            ).accuracy
            for key, values in _probed(sets).items()
        }
        for name, sets in train.sets.items()
    }


def linear_scores(
    train: Features, test: Features, *, seed: int, device: torch.device, epochs: int | None
) -> tuple[Scores, dict[str, Any]]:
    """Linear probes of every subject: one pass for all its heads.

    Returns:
        Subject -> `linear`, `linear+BN`, and both for the last four layers -> accuracy; and every
        head of the sweep, with how the reported one was chosen.
    """
    scores: Scores = {}
    details: dict[str, Any] = {}
    for name, sets in train.sets.items():
        result = linear_probe(
            _probed(sets),
            train.labels,
            _probed(test.sets[name]),
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


def knn_scores(
    encoders: Mapping[str, VisionTransformer],
    splits: tuple[Split, Split],
    config: Config,
    *,
    k: int = 20,
    with_pixels: bool = True,
) -> dict[str, float]:
    """kNN accuracy (cosine, centred) of raw pixels and of each encoder of a run.

    Args:
        encoders: name -> encoder.
        splits: training and test images.
        config: data settings and precision.
        k: neighbours; all training images where there are fewer.
        with_pixels: also score raw pixels.

    Returns:
        name -> accuracy in 0..1, `raw pixels` first.
    """
    wrapped = {
        name: Encoder(
            network,
            patch_size=config.model.patch_size,
            mean=config.data.mean,
            std=config.data.std,
        ).to(next(network.parameters()).device)
        for name, network in encoders.items()
    }
    train, test = (
        extract(
            wrapped,
            split,
            training_images=len(splits[0].rows),
            precision=config.optim.precision,
            with_pixels=with_pixels,
        )
        for split in splits
    )
    k = min(k, len(train.labels))
    scores = score_knn(train, test, k=k, both=False)
    return {name: of["kNN"] for name, of in scores.items()}


def knn_table(scores: Mapping[str, float], images: Sequence[int] | None = None) -> str:
    """kNN scores for a person; `images` of the training and test part, if not all were taken."""
    width = max(len(name) for name in scores)
    lines = [f"  {name:<{width}}  {100 * value:5.1f} %" for name, value in scores.items()]
    part = f", of {images[0]} training and {images[1]} test images" if images else ""
    return "\n".join([f"kNN accuracy (cosine, centred{part})", *lines])
