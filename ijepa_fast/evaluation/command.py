"""The command line of the evaluation."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ijepa_fast import __version__
from ijepa_fast.config import run_command
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
    Pretrained,
    ReadOptions,
    load_encoder,
    network_of,
)

__all__ = ["EvaluateArgs", "main"]

Method = Literal["knn", "ridge", "linear", "finetune"]


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(ReadOptions):
    """Accuracy of features on a labelled folder, beside raw pixels and the untrained network."""

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A run's folder, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str | None = None
    """Folder with one sub-folder a class, or the name of a set; by default the run's own
    eval.data."""
    methods: tuple[Method, ...] = ("knn",)
    """Any of knn, ridge (closed form), linear (SGD: last layer and last four, with and without
    BatchNorm, sweep of learning rates) and finetune."""
    k: int = 20
    """Nearest training images that vote on an image's class."""
    linear_epochs: int | None = None
    """Passes of the linear probe; by default as many as its size asks for."""
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    seed: int = 0
    """Of held-out rows, orders, crops and heads."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """As data.decoder."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder's products; `auto` is the run's, and float32 for weights without a run."""
    json: bool = False
    """Print JSON instead of the table."""
    out: Path | None = None
    """Also write the JSON into this file."""


def _untrained(weights: Pretrained, seed: int) -> Encoder:
    """The run's first encoder, or one of the same dimensions."""
    if weights.config is not None:
        return untrained(weights.config)
    network = network_of(weights.shape)
    initialise(network, torch_generator(seed, Stream.INIT))
    shape = weights.shape
    return Encoder(network, patch_size=shape.patch_size, mean=weights.mean, std=weights.std)


def _check(args: EvaluateArgs) -> None:
    require(0 <= args.seed < 2**64, "seed", "in 0..2**64-1", args.seed)
    if not args.methods:
        raise UsageError("methods must name at least one of knn, ridge, linear, finetune, got none")
    if args.out is not None and args.out.exists():
        raise UsageError(f"out must be a new file, got {args.out}, which is there")
    if args.out is not None and not args.out.parent.is_dir():
        raise UsageError(f"out must lie in a folder that exists, got {args.out}")
    for name, value in (("k", args.k), ("linear-epochs", args.linear_epochs)):
        require(value is None or value >= 1, name, "at least 1", value)
    args.finetune.check()


def _evaluate(args: EvaluateArgs) -> dict[str, Any]:
    _check(args)
    weights = args.read(args.weights)
    config = weights.config
    root = args.data or (config.eval.data if config else None)
    if root is None:
        raise UsageError("data must be given (--data DIR): the run has no eval.data")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = replace(data_of(weights), decoder=args.decoder)
    splits = labelled_data(root, data, device)
    if "knn" in args.methods and args.k > len(splits[0].rows):
        raise UsageError(
            f"k must be at most the number of training images ({len(splits[0].rows)}), got {args.k}"
        )
    step = "" if weights.step is None else f", step {weights.step}"
    trained = load_encoder(weights, encoder=args.encoder)
    encoders = {
        "untrained network": _untrained(weights, args.seed).to(device),
        f"{weights.title(args.encoder)}{step}": trained.to(device),
    }
    precision = precision_of(weights, args.precision)
    scores, details = _scores(args, encoders, splits, precision, device)
    return {
        "weights": weights.source,
        "encoder": weights.kind(args.encoder),
        "step": weights.step,
        "data": root,
        "classes": len(splits[0].index.classes),
        "images": [len(split.rows) for split in splits],
        "k": args.k,
        "precision": precision,
        "device": str(device),
        "versions": {"ijepa_fast": __version__, "torch": torch.__version__},
        "accuracy": scores,
        **details,
    }


def _scores(
    args: EvaluateArgs,
    encoders: Mapping[str, Encoder],
    splits: tuple[Split, Split],
    precision: str,
    device: torch.device,
) -> tuple[Scores, dict[str, Any]]:
    parts: list[Scores] = []
    details: dict[str, Any] = {}
    if {"knn", "ridge", "linear"} & set(args.methods):
        _say(f"features of {sum(len(split.rows) for split in splits)} images")
        train, test = (
            extract(
                encoders,
                split,
                training_images=len(splits[0].rows),
                precision=precision,
                four=bool({"ridge", "linear"} & set(args.methods)),
                bar=True,
            )
            for split in splits
        )
        # without what cannot be used
        details["images"] = [len(train.labels), len(test.labels)]
        if "knn" in args.methods:
            parts.append(score_knn(train, test, k=args.k))
        if "ridge" in args.methods:
            parts.append(score_ridge(train, test, seed=args.seed))
        if "linear" in args.methods:
            scores, details["linear"] = linear_scores(
                train, test, seed=args.seed, device=device, epochs=args.linear_epochs, say=_say
            )
            parts.append(scores)
    if "finetune" in args.methods:
        scores, details["finetune"] = finetune_scores(
            encoders, splits, args.finetune, seed=args.seed, precision=precision, say=_say
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


def _report(args: EvaluateArgs) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = _evaluate(args)
    text = json.dumps(result, indent=1)
    # first what cannot fail
    print(text if args.json else _printed(result), flush=True)
    if args.out is not None:
        with args.out.open("x", encoding="utf-8") as file:
            file.write(text + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(EvaluateArgs, _report, argv, "evaluate")
