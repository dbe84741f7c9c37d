"""How much of the classes of `shapes` can be had without learning: kNN of simple features.

``python benchmarks/evidence_shapes.py`` writes the data set if need be, decodes it as the preset
`demo` does (64 x 64) and prints one row a feature. The set was designed before the first training
run; this table is the evidence that colour and raw pixels do not give the class away.
"""

import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.data.sets.scenes import CLASSES, SIZES, Split, pose, silhouette
from ijepa_fast.evaluate.knn import knn_accuracy

SEEDS = (0, 1, 2)


def colour_histograms(images: Tensor, bins: int = 8) -> Tensor:
    """Joint RGB histograms, (n, bins**3), of uint8 images (n, height, width, 3)."""
    level = (images.long() * bins) // 256
    index = (level[..., 0] * bins + level[..., 1]) * bins + level[..., 2]
    flat = index.flatten(1)
    counts = torch.zeros(len(images), bins**3)
    return counts.scatter_add(1, flat, torch.ones(1).expand_as(flat)) / flat.shape[1]


def grey_levels(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of uint8 images (n, height, width, 3), flattened."""
    return (images.float() @ torch.tensor([0.299, 0.587, 0.114])).flatten(1)


def silhouettes(split: Split) -> tuple[Tensor, Tensor]:
    """True outlines of a split, which no network is given: (n, 32 * 32), and labels (n,)."""
    numbers = range(SIZES[split])
    labels = [number % len(CLASSES) for number in numbers]
    masks = [silhouette(CLASSES[c], pose(split, n)) for n, c in zip(numbers, labels, strict=True)]
    stack = torch.from_numpy(np.stack(masks)).float()
    return F.avg_pool2d(stack[:, None], 3).flatten(1), torch.tensor(labels)


def main() -> int:
    """Prints the table; returns the exit code."""
    # Imported late: the functions above need none of it.
    from ijepa_fast import evaluate
    from ijepa_fast.config.presets import PRESETS

    config = PRESETS["demo"]()
    data = replace(config.data, decoder="pillow")
    parts = evaluate.labelled_data("shapes", data, torch.device("cpu"))
    train, test = (part.load() for part in parts)

    def row(name: str, accuracies: list[float]) -> None:
        print(f"{name:<48}{100 * sum(accuracies) / len(accuracies):6.1f} %", flush=True)

    def score(parts: list[Tensor]) -> float:
        return knn_accuracy(parts[0], train.labels, parts[1], test.labels, k=20)

    images = [train.images, test.images]
    print(f"kNN-20, cosine, centred; {len(images[0])} training and {len(images[1])} test images")
    row("chance", [1 / len(CLASSES)])
    row("colour histogram, 8 x 8 x 8", [score([colour_histograms(part) for part in images])])
    row("raw pixels", [score([evaluate.pixels(part) for part in images])])
    row("grey pixels", [score([grey_levels(part) for part in images])])
    untrained = []
    for seed in SEEDS:
        encoder = evaluate.untrained(replace(config, seed=seed)).eval()
        pooled = [
            evaluate.encoder_features(encoder, part, data, precision="float32") for part in images
        ]
        untrained.append(score(pooled))
    row(f"untrained network of preset demo ({len(SEEDS)} seeds)", untrained)
    rows, labels = zip(silhouettes("train"), silhouettes("test"), strict=True)
    row("true silhouettes (for scale)", [knn_accuracy(rows[0], labels[0], rows[1], labels[1])])
    return 0


if __name__ == "__main__":
    sys.exit(main())
