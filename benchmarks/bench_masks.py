"""Speed of the mask sampler, images a second on one core; 14x14 grid, four target blocks.

Each case is first held against the plain loops of the tests: no timing of wrong masks.
"""

from itertools import count
from typing import Any, Literal

import numpy as np
import pytest
import torch

from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, sample_masks
from tests.trainer.plain_masks import assert_equal_to_plain

GRID = (14, 14)
SECONDS = 0.4


@pytest.mark.parametrize("batch", [128, 2048])
@pytest.mark.parametrize("group", [1, 128])
@pytest.mark.parametrize("geometry", ["published", "unbiased"])
def bench_masks(
    benchmark: Any, geometry: Literal["published", "unbiased"], group: int, batch: int
) -> None:
    config = MaskConfig(geometry=geometry, truncation_group=group)
    positions = np.arange(batch)
    steps = count()

    def sample() -> Masks:
        # A new step each time: sizes differ between steps, and nothing may be reused.
        return sample_masks(config, grid=GRID, seed=0, step=next(steps), positions=positions)

    # One whole group of 128, and with groups of one a part of the batch: the plain loops are slow.
    checked = positions[:128] if group > 1 else positions[:16]
    masks = sample_masks(config, grid=GRID, seed=0, step=0, positions=checked)
    assert_equal_to_plain(masks, config, GRID, 0, 0, checked)

    rounds = int(SECONDS * 300_000 / batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(sample, rounds=rounds, warmup_rounds=rounds // 10)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["images_per_second"] = round(batch / benchmark.stats.stats.median)
