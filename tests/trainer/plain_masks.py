"""The multi-block sampler as plain loops over patches: slow, and meant to be obviously right.

It shares nothing with `ijepa_fast.masks` but the keyed random numbers.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.config import MaskConfig
from ijepa_fast.keyed_random import Stream, uniform
from ijepa_fast.masks import Masks

__all__ = ["PlainImage", "assert_equal_to_plain", "plain_image", "plain_masks", "plain_size"]


@dataclass(frozen=True)
class PlainImage:
    """Targets and uncut contexts of one image as sorted patch indices.

    Attributes:
        targets: one list for each target block.
        contexts: one list for each context block.
        tries: how often each context block was placed.
    """

    targets: list[list[int]]
    contexts: list[list[int]]
    tries: list[int]


def _draw(seed: int, stream: Stream, step: int, item: int, number: int) -> float:
    return float(uniform(seed, stream, step, [item], number + 1)[0, number])


def plain_size(
    config: MaskConfig, grid: tuple[int, int], seed: int, step: int, block: str
) -> tuple[int, int]:
    """Height and width of the step's target or context block."""
    rows, columns = grid
    item, (a, b), (c, d) = {
        "target": (0, config.target_scale, config.target_aspect),
        "context": (1, config.context_scale, config.context_aspect),
    }[block]
    u = v = _draw(seed, Stream.MASK_SIZE, step, item, 0)
    if config.geometry == "unbiased":
        v = _draw(seed, Stream.MASK_SIZE, step, item, 1)
    k = math.floor(rows * columns * (a + u * (b - a)))
    aspect = c + v * (d - c)
    h, w = round(math.sqrt(k * aspect)), round(math.sqrt(k / aspect))
    if config.geometry == "published":
        while h >= rows:
            h -= 1
        while w >= columns:
            w -= 1
    else:
        while h > rows:
            h -= 1
        while w > columns:
            w -= 1
    return h, w


def plain_image(
    config: MaskConfig, grid: tuple[int, int], seed: int, step: int, position: int
) -> PlainImage:
    """Masks of the image at one position of the global batch, before truncation."""

    def place(size: tuple[int, int], block: int) -> set[int]:
        places = [g - s + (config.geometry == "unbiased") for g, s in zip(grid, size, strict=True)]
        draws = [
            _draw(seed, Stream.MASK_POSITION, step, position, 2 * block + side) for side in (0, 1)
        ]
        top, left = (int(u * n) for u, n in zip(draws, places, strict=True))
        return {
            row * grid[1] + column
            for row in range(top, top + size[0])
            for column in range(left, left + size[1])
        }

    target_size = plain_size(config, grid, seed, step, "target")
    context_size = plain_size(config, grid, seed, step, "context")
    targets = [place(target_size, m) for m in range(config.num_targets)]
    contexts, tries = [], []
    for c in range(config.num_contexts):
        failures, subtracted = 0, list(targets)
        while True:
            drawn = config.num_targets + failures * config.num_contexts + c
            context = place(context_size, drawn)
            for target in subtracted:
                context = context - target
            if len(context) > config.min_keep:
                break
            failures += 1
            if failures % 20 == 0:
                subtracted = subtracted[:-1]
        contexts.append(sorted(context))
        tries.append(failures + 1)
    return PlainImage([sorted(t) for t in targets], contexts, tries)


def plain_masks(
    config: MaskConfig,
    grid: tuple[int, int],
    seed: int,
    step: int,
    positions: NDArray[np.int64],
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Masks that `sample_masks` must return, as lists.

    Returns:
        contexts[c][b] and targets[b][m], sorted patch indices.
    """
    group = config.truncation_group
    images: dict[int, PlainImage] = {}
    contexts: list[list[list[int]]] = [[] for _ in range(config.num_contexts)]
    targets = []
    for position in positions.tolist():
        first = position // group * group
        for member in range(first, first + group):
            if member not in images:
                images[member] = plain_image(config, grid, seed, step, member)
        together = [images[member] for member in range(first, first + group)]
        shortest = min(len(context) for image in together for context in image.contexts)
        for c, context in enumerate(images[position].contexts):
            contexts[c].append(context if group == 1 else context[:shortest])
        targets.append(images[position].targets)
    return contexts, targets


def assert_equal_to_plain(
    masks: Masks,
    config: MaskConfig,
    grid: tuple[int, int],
    seed: int,
    step: int,
    positions: NDArray[np.int64],
) -> None:
    """Hold every tensor of `masks` against `plain_masks`."""
    contexts, targets = plain_masks(config, grid, seed, step, positions)
    patches = grid[0] * grid[1]
    index, cu = [], [0]
    for sequences in contexts:
        for image, context in enumerate(sequences):
            index += [image * patches + patch for patch in context]
            cu.append(len(index))
    assert masks.context_index.tolist() == index
    assert masks.context_cu.tolist() == cu
    assert masks.max_context == max(np.diff(cu))
    assert masks.target_index.tolist() == targets
