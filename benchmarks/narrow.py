"""What narrower numbers cost: runs on Fashion-MNIST with `--target-precision fp8` and with
`--optim.residual bfloat16` beside those without, on the CPU.

    python -m benchmarks.narrow --seeds 0 1 2 --steps 600

Trains every variant from every seed (a run that is there already goes on or is done), and prints:
the cosine of latent targets with those of the plain variant, from the same weights, before and
after the plain run; kNN accuracy of each run's target encoder.
"""

import argparse
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.config.presets import preset
from ijepa_fast.evaluation import Split, knn_scores, labelled_data, untrained
from ijepa_fast.fast import FastStep
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.state import checkpoint

PLAIN = "bfloat16"
VARIANTS: dict[str, dict[str, str]] = {
    PLAIN: {},
    "fp8 target": {"target-precision": "fp8"},
    "bfloat16 residual": {"optim.residual": "bfloat16"},
}
IMAGES = 256  # of the cosine


def recipe(steps: int, batch: int) -> dict[str, Any]:
    """Flags beside the preset's: schedules that end at the last step."""
    share = steps / (60_000 // batch)  # of an epoch
    return {
        "max-steps": steps,
        "batch.global": batch,
        "masks.truncation-group": batch,
        "optim.epochs": 1,
        "optim.ipe-scale": share,
        "optim.warmup": min(0.1, share / 2),
        "optim.momentum": 0.99,  # 600 steps are too few for 0.996
        "eval.data": None,
        "checkpoint.minutes": 60,
    }


def train(out: Path, seed: int, flags: dict[str, Any]) -> None:
    """One run; returns at once if it is done."""
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "ijepa_fast.train", "--preset", "fashion_mnist"]
    subprocess.run([*command, "--seed", str(seed), "--out", str(out), *given], check=True)


def variant(config: Config, name: str) -> FastStep:
    """The step of a variant, with any weights."""
    flags = VARIANTS[name]
    optim = replace(config.optim, residual=flags.get("optim.residual", "float32"))
    networks = build_models(config.model, config.data.crop_size)
    target: Any = flags.get("target-precision", "same")
    mean, std = config.data.mean, config.data.std
    return FastStep(*networks, optim, mean=mean, std=std, target_precision=target)


@torch.no_grad()
def cosine(config: Config, name: str, weights: dict[str, Tensor], images: Tensor) -> list[float]:
    """Mean and least cosine of a variant's latent targets with the plain variant's.

    Args:
        config: of the run.
        name: of the variant.
        weights: of the target encoder, named as in a checkpoint.
        images: uint8 (B, height, width, 3).
    """
    where = np.arange(len(images))
    one_group = replace(config.masks, truncation_group=len(images))
    masks = sample_masks(one_group, grid=config.grid, seed=0, step=0, positions=where)
    targets = []
    for kind in (PLAIN, name):
        step = variant(config, kind)
        checkpoint.load_weights(step, weights)
        targets.append(step.forward(images, step.prepare(masks))[1].double())
    found = F.cosine_similarity(targets[0], targets[1], dim=-1)
    return [found.mean().item(), found.min().item()]


def evenly(split: Split, most: int) -> Split:
    """Some of the rows, which are sorted by class."""
    rows = np.unique(np.linspace(0, len(split.rows) - 1, most).astype(np.int64))
    return replace(split, rows=split.rows[rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.narrow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--knn", type=int, nargs=2, default=[10_000, 5_000], help="images")
    parser.add_argument("--out", type=Path, default=Path("runs/narrow"))
    given = parser.parse_args()
    config = replace(preset("fashion_mnist"), device="cpu")
    parts = labelled_data("fashion_mnist", config.data, torch.device("cpu"))
    parts = evenly(parts[0], given.knn[0]), evenly(parts[1], given.knn[1])
    images = evenly(parts[1], IMAGES).load().images
    rows: dict[str, list[list[float]]] = {name: [] for name in given.variants}
    for seed in given.seeds:
        own = replace(config, seed=seed)
        plain: dict[str, Tensor] = {}
        for name in given.variants:
            out = given.out / f"{name.replace(' ', '-')}-{seed}"
            train(out, seed, {**recipe(given.steps, given.batch), **VARIANTS[name]})
            state = checkpoint.load_latest(out / "checkpoints")
            assert state is not None
            kept = {k: t for k, t in state.tensors.items() if k.startswith("target_encoder.")}
            plain = plain or kept
            encoder = untrained(own)
            start = {f"target_encoder.{k}": t for k, t in encoder.network.state_dict().items()}
            cosines = [
                value for weights in (start, plain) for value in cosine(own, name, weights, images)
            ]
            encoder.network.load_state_dict({k.partition(".")[2]: t for k, t in kept.items()})
            knn = knn_scores(
                {name: encoder}, parts, precision=own.optim.precision, with_pixels=False
            )[name]
            rows[name].append([*cosines, 100 * knn])
            print(f"seed {seed}, {name}: {' '.join(f'{v:.5f}' for v in rows[name][-1])}")
    print("| variant | cosine at the start, mean, least | after | kNN % by seed, mean |")
    print("|---|---|---|---|")
    for name, of in rows.items():
        first, least, last, least_last, accuracies = zip(*of, strict=True)
        scores = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        print(
            f"| {name} | {statistics.mean(first):.5f}, {min(least):.5f} | "
            f"{statistics.mean(last):.5f}, {min(least_last):.5f} | "
            f"{scores}; {statistics.mean(accuracies):.2f} |"
        )


if __name__ == "__main__":
    main()
