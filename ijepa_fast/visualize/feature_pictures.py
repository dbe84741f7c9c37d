"""What an encoder sees: principal components of patch features, and nearest images.

Both use the target encoder, as evaluation does (paper, section 4).
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.visualize.figure import Frame, Panel, draw_sheet
from ijepa_fast.visualize.inputs import OpenedWeights, ShownImages, choose, shown_images
from ijepa_fast.weights import Encoder

__all__ = [
    "Neighbours",
    "draw_neighbours",
    "draw_pca",
    "nearest",
    "neighbours",
    "patch_features",
    "pca",
    "pca_colours",
    "pooled_features",
]


def pca(
    path: Path,
    opened: OpenedWeights,
    root: str,
    *,
    images: int = 12,
    size: int | None = None,
    seed: int = 0,
) -> str:
    """Writes a PNG of images and the principal components of their patch features.

    Args:
        path: the PNG file.
        opened: whose features.
        root: a data set.
        images: how many are drawn, one PCA over all of them.
        size: their height in pixels, by default the crop's; the width follows.
        seed: chooses the images.

    Returns:
        What is shown, in words.

    Raises:
        ValueError: the size is no multiple of the patch, or the images cannot be used.
    """
    data, patch = opened.data, opened.encoder.patch_size
    height, width = data.crop_size
    if size:
        other = patch * max(1, round(size * width / height / patch))
        data = replace(data, crop=(size, other))
    shown = shown_images(root, data, images, seed=seed)
    found = patch_features(opened.encoder, shown.images)
    grid = (data.crop_size[0] // patch, data.crop_size[1] // patch)
    colours = pca_colours(found).reshape(len(found), *grid, 3)
    title = f"{opened.name}: principal components 1-3 of {grid[0]}x{grid[1]} patch features"
    draw_pca(path, shown, colours, title)
    return f"{len(found)} images of {root}, {opened.name}"


def neighbours(
    path: Path,
    opened: OpenedWeights,
    root: str,
    *,
    pool: int = 2000,
    queries: int = 6,
    k: int = 8,
    seed: int = 0,
) -> str:
    """Writes a PNG of images and those nearest to them.

    Args:
        path: the PNG file.
        opened: whose features.
        root: a data set.
        pool: images among which neighbours are looked for.
        queries: images whose neighbours are drawn.
        k: neighbours of each.
        seed: chooses the images.

    Returns:
        What is shown, in words.

    Raises:
        ValueError: k out of range, or the images cannot be used.
    """
    shown = shown_images(root, opened.data, pool, seed=seed)
    found = pooled_features(opened.encoder, shown.images)
    rows = choose(len(found), queries, seed=seed + 1)
    near = nearest(found, rows, k)
    same = [
        shown.labels[query] == shown.labels[row]
        for query, others in zip(rows.tolist(), near.rows.tolist(), strict=True)
        for row in others
        if shown.label(query)
    ]
    words = f"; {int(sum(same))} of {len(same)} have the query's class" if same else ""
    title = f"{opened.name}: nearest of {len(found)} images, cosine of centred pooled features"
    draw_neighbours(path, shown, rows, near, title + words)
    return f"{root}, {title}{words}"


@torch.no_grad()
def patch_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Features of the last layer, in float32.

    Args:
        encoder: on the device to compute on.
        images: uint8 (n, height, width, 3).

    Returns:
        float32 (n, N, D) on the CPU.
    """
    parts = images.split(32)
    return torch.cat([encoder.forward_features(encoder.normalise(part)).cpu() for part in parts])


@torch.no_grad()
def pooled_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Their mean over patches: float32 (n, D) on the CPU. Arguments as of `patch_features`."""
    return torch.cat([encoder(encoder.normalise(part)).cpu() for part in images.split(32)])


def pca_colours(features: Tensor) -> NDArray[np.float64]:
    """The first three principal components of all patches of all images, as colours.

    One PCA over everything, so that a colour means the same in every image. Each component is
    scaled so that its 2nd and 98th percentile become 0 and 1; the sign of a component, which is
    arbitrary, makes its largest loading positive.

    Args:
        features: (n, N, D).

    Returns:
        float64 (n, N, 3) in 0..1; components that do not exist (fewer dimensions or patches than
        three) are 0.5.

    Raises:
        ValueError: features are not finite.
    """
    rows = features.double().flatten(0, 1).numpy()
    if not np.isfinite(rows).all():
        raise ValueError("features must be finite, got NaN or infinity")
    centred = rows - rows.mean(axis=0)
    # the covariance is small where the rows are many
    values, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    seen = values[::-1][:3] > 1e-12 * max(float(values[-1]), 1e-300)
    scores = centred @ axes
    low, high = np.percentile(scores, [2, 98], axis=0)
    spread = np.where(high > low, high - low, 1.0)
    colours = np.full((len(rows), 3), 0.5)
    scaled = np.clip((scores - low) / spread, 0, 1)
    colours[:, : axes.shape[1]] = np.where(seen, scaled, 0.5)
    return colours.reshape(*features.shape[:2], 3)


def draw_pca(path: Path, pictures: ShownImages, colours: NDArray[np.float64], title: str) -> None:
    """Writes a PNG: each image, and right of it the colours of its patches.

    Args:
        path: the PNG file.
        pictures: n images.
        colours: (n, rows, columns, 3) in 0..1.
        title: above everything.
    """
    cells = [
        (Panel(image.numpy(), pictures.label(number)), Panel(colours[number]))
        for number, image in enumerate(pictures.images)
    ]
    columns = min(4, math.ceil(math.sqrt(len(cells) / 2)))
    rows: list[list[Panel | None]] = []
    for start in range(0, len(cells), columns):
        # an empty column between two pairs
        row = [part for pair in cells[start : start + columns] for part in (*pair, None)]
        rows.append(row[:-1])
    draw_sheet(path, rows, title, side=1.5)


class Neighbours(NamedTuple):
    """Nearest images of some queries: rows and cosines, (q, k) each, nearest first."""

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]


def nearest(features: Tensor, queries: NDArray[np.int64], k: int) -> Neighbours:
    """The images nearest to some of them, themselves left out.

    Args:
        features: (n, D), one row an image; their mean is subtracted, as in kNN evaluation.
        queries: (q,) rows.
        k: how many, 1 <= k < n.

    Raises:
        ValueError: k out of range.
    """
    if not 1 <= k < len(features):
        raise ValueError(f"k must be in 1..{len(features) - 1} (other images), got {k}")
    rows = F.normalize(features.float() - features.double().mean(dim=0).float(), dim=1)
    cosines = rows[torch.from_numpy(queries)] @ rows.T
    cosines[torch.arange(len(queries)), torch.from_numpy(queries)] = -math.inf
    best = cosines.topk(k, dim=1)
    return Neighbours(best.indices.numpy(), best.values.numpy())


def draw_neighbours(
    path: Path, pictures: ShownImages, queries: NDArray[np.int64], found: Neighbours, title: str
) -> None:
    """Writes a PNG: a query a row, then its neighbours with their cosines; where there are labels
    the frame is green around images of the query's class and red around others.

    Args:
        path: the PNG file.
        pictures: the images.
        queries: (q,) rows.
        found: of these queries.
        title: above everything.
    """
    rows: list[list[Panel | None]] = []
    for query, near, cosines in zip(queries, found.rows, found.cosines, strict=True):
        own = pictures.label(int(query))
        rows.append([Panel(pictures.images[query].numpy(), f"query\n{own}".strip()), None])
        for number, cosine in zip(near.tolist(), cosines, strict=True):
            image, label = pictures.images[number].numpy(), pictures.label(number)
            colour = "#1a9850" if label == own else "#d73027"
            frames = [Frame((0, 0, *image.shape[:2]), colour)] if own else []
            rows[-1].append(Panel(image, f"{cosine:.3f}\n{label}".strip(), frames))
    draw_sheet(path, rows, title, side=1.25)
