"""Whether completions show what the predictor knows: numbers, where pictures can deceive.

A decoder that ignores its condition paints objects too. So, on held-out blocks, a classifier that
was trained on real crops names the hidden class from the completions, and this is compared

- with the conditions permuted among the blocks, their places kept (the same decoder);
- with a decoder trained in the same way on the predictions of the untrained network.

Intervals are 95 % bootstrap intervals over blocks, each of another image; differences are paired.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.visualize.decoder.conditions import Conditions
from ijepa_fast.visualize.decoder.decoder import Decoder
from ijepa_fast.visualize.inputs import device

__all__ = [
    "Interval",
    "as_text",
    "bootstrap_mean",
    "classify",
    "prove",
    "shuffled",
    "train_classifier",
]

RESAMPLES = 10_000
CLASSIFIER_BATCH = 128

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """As a share, in words."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def bootstrap_mean(values: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of (n,) values and its percentile interval over resampled rows."""
    n, generator = len(values), torch_generator(seed, Stream.PROOF)
    rows = torch.randint(n, (resamples, n), generator=generator).numpy()
    low, high = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


class _Classifier(nn.Module):
    """Four convolutions on squares of any side that is a multiple of 4."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        sizes = ((3, 32, 2), (32, 64, 1), (64, 96, 2), (96, 96, 1))
        layers: list[nn.Module] = []
        for given, width, stride in sizes:
            layers += [nn.Conv2d(given, width, 3, stride=stride, padding=1), nn.GroupNorm(8, width)]
            layers += [nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(96 * (side // 4) ** 2, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (n, side, side, 3) to logits (n, classes)."""
        x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.head(self.body(x))


def train_classifier(
    pixels: Tensor, labels: Tensor, classes: int, *, epochs: int = 4, seed: int = 0
) -> nn.Module:
    """A small CNN that names the class of an image from a block of it.

    Args:
        pixels: uint8 (n, side, side, 3), real crops of training images.
        labels: int64 (n,).
        classes: how many there are.
        epochs: passes over the crops.
        seed: of initial weights, dropout and order.
    """
    where = device()
    generator = torch_generator(seed, Stream.PROOF)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        network = _Classifier(pixels.shape[1], classes).to(where)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        batch = min(CLASSIFIER_BATCH, len(pixels))
        steps = epochs * (len(pixels) // batch)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1)
        for _ in range(epochs):
            order = torch.randperm(len(pixels), generator=generator)
            for rows in order[: len(order) // batch * batch].split(batch):
                logits = network(pixels[rows].to(where))
                F.cross_entropy(logits, labels[rows].to(where)).backward()
                optimizer.step()
                rates.step()
                optimizer.zero_grad(set_to_none=True)
    return network.eval().requires_grad_(False)


def classify(network: nn.Module, pixels: Tensor) -> Tensor:
    """Classes (n,) that the classifier names."""
    where = next(network.parameters()).device
    return torch.cat([network(p.to(where)).argmax(dim=1).cpu() for p in pixels.split(512)])


def shuffled(given: Conditions, *, seed: int = 0) -> Conditions:
    """The same blocks, each with another one's condition vector: a random cycle."""
    order = torch.randperm(len(given), generator=torch_generator(seed, Stream.PROOF))
    vectors = torch.empty_like(given.pooled)
    vectors[order] = given.pooled[order.roll(1)]
    return Conditions(**{**vars(given), "pooled": vectors})


def prove(
    given: Conditions,
    labels: Tensor,
    decoder: Decoder,
    control: tuple[Conditions, Decoder],
    classifier: nn.Module,
    *,
    seeds: int = 3,
    steps: int = 30,
    guidance: float = 1.0,
) -> dict[str, Any]:
    """The comparisons, as plain values.

    Args:
        given: held-out blocks, each of another image.
        labels: int64 (n,), of their images.
        decoder: of the trained run.
        control: the same blocks' conditions under the untrained network, and its decoder.
        classifier: trained on real crops.
        seeds: completions of a block; the same noise in all comparisons.
        steps, guidance: of sampling.
    """
    variants = {
        "prediction": (decoder, given),
        "shuffled conditions": (decoder, shuffled(given)),
        "untrained network": (control[1], control[0]),
    }
    right: dict[str, Floats] = {}
    for name, (painter, told) in variants.items():
        completions = [
            painter.sample(told, seed=seed, steps=steps, guidance=guidance) for seed in range(seeds)
        ]
        named = torch.stack([classify(classifier, pixels) for pixels in completions])
        right[name] = (named == labels).double().mean(dim=0).numpy()
    real = (classify(classifier, given.pixels) == labels).double().numpy()
    return {
        "blocks": len(given),
        "seeds": seeds,
        "sampling_steps": steps,
        "guidance": guidance,
        "largest_class_share": float(torch.bincount(labels).max() / len(labels)),
        "accuracy": {
            "real blocks": bootstrap_mean(real)._asdict(),
            **{name: bootstrap_mean(values)._asdict() for name, values in right.items()},
        },
        "difference": {
            f"prediction - {name}": bootstrap_mean(right["prediction"] - values)._asdict()
            for name, values in right.items()
            if name != "prediction"
        },
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The result for a person."""
    lines = [
        f"{result['blocks']} held-out blocks, {result['seeds']} seeds each; 95 % intervals",
        f"hidden class named (largest class {100 * result['largest_class_share']:.1f} %)",
    ]
    for name, entry in result["accuracy"].items():
        lines.append(f"  {name:<35}  {Interval(**entry).percent()}")
    for name, entry in result["difference"].items():
        verdict = "holds" if entry["low"] > 0 else "NOT shown: the interval holds 0 or less"
        lines.append(f"  {name:<35}  {Interval(**entry).percent()}  {verdict}")
    return "\n".join(lines)
