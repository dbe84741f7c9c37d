"""Whether completions show what the predictor knows: numbers, where pictures can deceive.

A decoder that ignores its condition paints objects too. So, on held-out blocks, a classifier that
was trained on real crops names the hidden class from the completions, and this is compared

- with the conditions permuted among the blocks, their places kept (the same decoder);
- with a decoder trained in the same way on the predictions of the untrained network.

And where an object's outline is known (the set `shapes`), the spread of a block's completions over
seeds should be larger where the context shows less of the object. Intervals are 95 % bootstrap
intervals over blocks, each of another image; differences are paired.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_fast.data import CLASSES, pose, silhouette
from ijepa_fast.data import Split as Part
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.visualize.decoder.conditions import Conditions
from ijepa_fast.visualize.decoder.decoder import Decoder
from ijepa_fast.visualize.decoder.predictor import spread
from ijepa_fast.visualize.inputs import device

__all__ = [
    "Interval",
    "as_text",
    "bootstrap_mean",
    "bootstrap_spearman",
    "classify",
    "object_share",
    "prove",
    "shuffled",
    "spearman",
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


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def _resamples(n: int, count: int, seed: int) -> NDArray[np.int64]:
    generator = torch_generator(seed, Stream.PROOF)
    return torch.randint(n, (count, n), generator=generator).numpy()


def bootstrap_mean(values: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of (n,) values and its percentile interval over resampled rows."""
    rows = _resamples(len(values), resamples, seed)
    return _interval(float(values.mean()), values[rows].mean(axis=1))


def _ranks(x: Floats) -> Floats:
    """Ranks 1..n of (n,) values; equal values share their mean rank."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = np.cumsum(counts)[place] - (counts[place] - 1) / 2
    return ranks


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's rank correlation of (n,) and (n,) values; NaN where one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def bootstrap_spearman(x: Floats, y: Floats, *, seed: int = 0, resamples: int = 2000) -> Interval:
    """Spearman's rank correlation and its percentile interval over resampled rows."""
    rows = _resamples(len(x), resamples, seed)
    found = np.array([spearman(x[r], y[r]) for r in rows])
    return _interval(spearman(x, y), found[np.isfinite(found)])


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


def object_share(
    names: tuple[str, ...], context: Tensor, grid: tuple[int, int], *, part: Part = "test"
) -> Floats:
    """Share of each scene's object (of its silhouette's area) that lies in the context.

    The few small pieces that may lie before an object are not taken off.

    Args:
        names: of files of the set `shapes`, `<class>/<number>.jpg`, whole images.
        context: bool (n, N), patches of the context.
        grid: rows and columns of patches, over the whole image.
        part: which part of the set.
    """
    shares = []
    for name, seen in zip(names, context, strict=True):
        where = PurePath(name)
        number, label = int(where.stem), where.parent.name
        assert label == CLASSES[number % len(CLASSES)], name
        outline = torch.from_numpy(silhouette(label, pose(part, number)))[None, None]
        area = F.interpolate(outline, size=(grid[0] * 8, grid[1] * 8), mode="area")
        patches = F.avg_pool2d(area, 8).flatten()
        shares.append(float(patches[seen].sum() / patches.sum()))
    return np.array(shares)


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
    visible: Floats | None = None,
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
        visible: (n,), share of the object in the context, where it is known.
    """
    variants = {
        "prediction": (decoder, given),
        "shuffled conditions": (decoder, shuffled(given)),
        "untrained network": (control[1], control[0]),
    }
    right: dict[str, Floats] = {}
    varied = None
    for name, (painter, told) in variants.items():
        completions = [
            painter.sample(told, seed=seed, steps=steps, guidance=guidance) for seed in range(seeds)
        ]
        named = torch.stack([classify(classifier, pixels) for pixels in completions])
        right[name] = (named == labels).double().mean(dim=0).numpy()
        if name == "prediction" and seeds > 1:
            varied = spread(completions).double().numpy()
    real = (classify(classifier, given.pixels) == labels).double().numpy()
    result: dict[str, Any] = {
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
        "spread_and_visible_share": None,
    }
    if visible is not None and varied is not None:
        found = bootstrap_spearman(visible, varied)
        result["spread_and_visible_share"] = {
            **found._asdict(),
            "mean_spread": float(varied.mean()),
            "mean_visible_share": float(visible.mean()),
        }
    return result


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
    entry = result["spread_and_visible_share"]
    if entry:
        verdict = "holds" if entry["high"] < 0 else "NOT shown: the interval holds 0 or more"
        lines.append("spread over seeds against the share of the object in the context")
        lines.append(
            f"  {'Spearman (expected below 0)':<35}  {entry['value']:+.3f} "
            f"[{entry['low']:+.3f}, {entry['high']:+.3f}]  {verdict}"
        )
    return "\n".join(lines)
