"""Evaluation of weights on labelled images: the function, and the command over it."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro

from ijepa_fast import __version__
from ijepa_fast.config import AnyPath, call_of, require_choices, run_command
from ijepa_fast.errors import UsageError, require
from ijepa_fast.evaluation.features import extract, untrained
from ijepa_fast.evaluation.finetune import FinetuneSettings
from ijepa_fast.evaluation.labelled import Split, data_of, labelled_data, precision_of
from ijepa_fast.evaluation.scores import (
    Scores,
    finetune_scores,
    linear_scores,
    score_knn,
    score_ridge,
    table,
)
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import initialise
from ijepa_fast.weights import (
    Encoder,
    EncoderKind,
    Pretrained,
    Weights,
    as_pretrained,
    load_encoder,
    network_of,
)

__all__ = ["evaluate", "main"]

Method = Literal["knn", "ridge", "linear", "finetune"]


_FINETUNE = FinetuneSettings()


def evaluate(
    weights: Weights,
    /,
    data: AnyPath | None = None,
    *,
    methods: Sequence[Method] = ("knn",),
    k: int = 20,
    linear_epochs: int | None = None,
    finetune: FinetuneSettings = _FINETUNE,
    seed: int = 0,
    decoder: Literal["auto", "dali", "pillow"] = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    out: AnyPath | None = None,
    encoder: EncoderKind = "target",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> dict[str, Any]:
    """Accuracy of features on a labelled folder, beside raw pixels and the untrained network.

    Args:
        weights: A run's folder, a checkpoint, a Hugging Face folder, or a file of weights.
        data: Folder with one sub-folder a class, or the name of a set; by default the run's own
            eval.data.
        methods: Any of knn, ridge (closed form), linear (SGD: last layer and last four, with and
            without BatchNorm, sweep of learning rates) and finetune.
        k: Nearest training images that vote on an image's class.
        linear_epochs: Passes of the linear probe; by default as many as its size asks for.
        finetune: Fine-tuning: layer decay 0.75, label smoothing 0.1, AdamW.
        seed: Of held-out rows, orders, crops and heads.
        decoder: As data.decoder.
        precision: Of the encoder's products; `auto` is the run's, and float32 for weights without a
            run.
        out: Also write the result into this file, as JSON.
        encoder: Which of a run's two encoders; the target encoder has the better features.
        image_size: Height and width that the weights were trained at, where their file does not
            tell.
        heads: Attention heads, where the file does not tell.
        mean: Mean of the image channels in 0-1 units, instead of what the file tells.
        std: Their standard deviation, likewise.

    Returns:
        What `--json` prints: `accuracy` (subject -> method -> 0..1), of what, and the details of
        linear probes and fine-tuning.

    Raises:
        UsageError: the weights or the data are none, an argument is out of range, or a file is
            there.
        CheckpointError: a checkpoint is damaged.
        ValueError: less than half of the images can be used.

    Example:
        >>> result = ijepa_fast.evaluate("runs/mine", "images", methods=["knn"], k=5)
        >>> list(result["accuracy"])
        ['raw pixels', 'untrained network', 'target encoder, step 3']
    """
    methods = cast("tuple[Method, ...]", (methods,) if isinstance(methods, str) else tuple(methods))
    require_choices(evaluate, locals())
    _check(methods, k, linear_epochs, finetune, seed, out)
    read = as_pretrained(weights, image_size=image_size, heads=heads, mean=mean, std=std)
    root = data or (read.config.eval.data if read.config else None)
    if root is None:
        raise UsageError("data must be given (--data DIR): the run has no eval.data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = labelled_data(str(root), replace(data_of(read), decoder=decoder), device)
    if "knn" in methods and k > len(splits[0].rows):
        raise UsageError(
            f"k must be at most the number of training images ({len(splits[0].rows)}), got {k}"
        )
    step = "" if read.step is None else f", step {read.step}"
    trained = load_encoder(read, encoder=encoder)
    encoders = {
        "untrained network": _untrained(read, seed).to(device),
        f"{read.title(encoder)}{step}": trained.to(device),
    }
    products = precision_of(read, precision)
    scores, details = _scores(
        encoders,
        splits,
        methods=methods,
        k=k,
        linear_epochs=linear_epochs,
        finetune=finetune,
        seed=seed,
        precision=products,
    )
    result = {
        "weights": read.source,
        "encoder": read.kind(encoder),
        "step": read.step,
        "data": str(root),
        "classes": len(splits[0].index.classes),
        "images": [len(split.rows) for split in splits],
        "k": k,
        "precision": products,
        "device": str(device),
        "versions": {"ijepa_fast": __version__, "torch": torch.__version__},
        "accuracy": scores,
        **details,
    }
    if out is not None:
        text = json.dumps(result, indent=1) + "\n"
        try:
            with Path(out).open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            _say(text)  # it may have taken hours
            raise
    return result


def _untrained(weights: Pretrained, seed: int) -> Encoder:
    """The run's first encoder, or one of the same dimensions."""
    if weights.config is not None:
        return untrained(weights.config)
    network = network_of(weights.shape)
    initialise(network, torch_generator(seed, Stream.INIT))
    shape = weights.shape
    return Encoder(network, patch_size=shape.patch_size, mean=weights.mean, std=weights.std)


def _check(
    methods: Sequence[Method],
    k: int,
    linear_epochs: int | None,
    finetune: FinetuneSettings,
    seed: int,
    out: AnyPath | None,
) -> None:
    require(0 <= seed < 2**64, "seed", "in 0..2**64-1", seed)
    if not methods:
        raise UsageError("methods must name at least one of knn, ridge, linear, finetune, got none")
    if out is not None and Path(out).exists():
        raise UsageError(f"out must be a new file, got {out}, which is there")
    if out is not None and not Path(out).parent.is_dir():
        raise UsageError(f"out must lie in a folder that exists, got {out}")
    for name, value in (("k", k), ("linear-epochs", linear_epochs)):
        require(value is None or value >= 1, name, "at least 1", value)
    finetune.check()


def _scores(
    encoders: Mapping[str, Encoder],
    splits: tuple[Split, Split],
    *,
    methods: Sequence[Method],
    k: int,
    linear_epochs: int | None,
    finetune: FinetuneSettings,
    seed: int,
    precision: str,
) -> tuple[Scores, dict[str, Any]]:
    parts: list[Scores] = []
    details: dict[str, Any] = {}
    if {"knn", "ridge", "linear"} & set(methods):
        _say(f"features of {sum(len(split.rows) for split in splits)} images")
        train, test = (
            extract(
                encoders,
                split,
                training_images=len(splits[0].rows),
                precision=precision,
                four=bool({"ridge", "linear"} & set(methods)),
                bar=True,
            )
            for split in splits
        )
        # without what cannot be used
        details["images"] = [len(train.labels), len(test.labels)]
        if "knn" in methods:
            parts.append(score_knn(train, test, k=k))
        if "ridge" in methods:
            parts.append(score_ridge(train, test, seed=seed))
        if "linear" in methods:
            scores, details["linear"] = linear_scores(
                train, test, seed=seed, device=splits[0].device, epochs=linear_epochs, say=_say
            )
            parts.append(scores)
    if "finetune" in methods:
        scores, details["finetune"] = finetune_scores(
            encoders, splits, finetune, seed=seed, precision=precision, say=_say
        )
        parts.append(scores)
    merged: Scores = {}
    for part in parts:
        for subject, accuracies in part.items():
            merged.setdefault(subject, {}).update(accuracies)
    return merged, details


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _printed(result: Mapping[str, Any]) -> str:
    """For a person: the accuracies, and of what they are."""
    train, test = result["images"]
    neighbours = f"; k = {result['k']}" if "kNN" in next(iter(result["accuracy"].values())) else ""
    lines = [
        table(result["accuracy"]),
        f"{train} training and {test} test images in {result['classes']} classes of "
        f"{result['data']}{neighbours}",
    ]
    if "finetune" in result:
        lines.append("fine-tuned: of raw pixels a ridge regression on the same images")
    return "\n".join(lines)


def _report(call: tuple[Any, Any]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    positional, named = call
    as_json = named.pop("json")
    result = evaluate(*positional, **named)
    print(json.dumps(result, indent=1) if as_json else _printed(result), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    json_option = Annotated[
        tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help="Print JSON instead of the table.")
    ]
    return run_command(call_of(evaluate, json=json_option), _report, argv, "evaluate")
