"""Multi-block masks: published distributions, rules, keys, and a plain second opinion."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ijepa_fast.config import MaskConfig
from ijepa_fast.masks import Masks, check_masks, mean_tokens, reachable_sizes, sample_masks
from tests.trainer.plain_masks import assert_equal_to_plain, plain_image, plain_size


def _sample(
    config: MaskConfig,
    grid: tuple[int, int],
    step: int,
    positions: NDArray[np.int64] | int,
    seed: int = 0,
) -> Masks:
    if isinstance(positions, int):
        positions = np.arange(positions)
    return sample_masks(config, grid=grid, seed=seed, step=step, positions=positions)


def _context_sets(masks: Masks, patches: int) -> list[list[set[int]]]:
    """Contexts [context block][image] as sets of patches; also checks that the packing is sound."""
    index, cu = masks.context_index.numpy(), masks.context_cu.numpy()
    images = len(masks.target_index)
    sequences = []
    for number, (start, end) in enumerate(pairwise(cu)):
        rows = index[start:end]
        assert (rows // patches == number % images).all()
        assert (np.diff(rows) > 0).all()
        sequences.append(set((rows % patches).tolist()))
    return [sequences[i : i + images] for i in range(0, len(sequences), images)]


def _lengths(masks: Masks) -> NDArray[np.int32]:
    return np.diff(masks.context_cu.numpy())


# --- distributions of the published sampler ------------------------------------------------------

PUBLISHED = [
    # Grid; batch; (mean, its standard deviation over 40 batches) of uncut context, of context cut
    # to the batch's shortest and of a target block; union of 4; uncut 5 % and 95 %; target sizes.
    ((14, 14), 128, (82, 0.5), (50.6, 0.8), (33.4, 0.3), 87, (59, 104), {30, 35, 36, 40}),
    ((16, 16), 128, (110, 1.0), (68.3, 1.1), (44.3, 0.7), 115, (80, 140), {35, 36, 42, 48, 54}),
    (
        (28, 28),
        16,
        (357, 5.0),
        (271, 5.8),
        (137, 1.7),
        356,
        (262, 450),
        {108, 120, 121, 132, 140, 143, 150, 154},
    ),
]


@pytest.mark.parametrize(
    ("grid", "batch", "uncut", "cut", "target", "union", "spread", "sizes"),
    PUBLISHED,
    ids=["14x14", "16x16", "28x28"],
)
def test_published_distributions(
    grid: tuple[int, int],
    batch: int,
    uncut: tuple[float, float],
    cut: tuple[float, float],
    target: tuple[float, float],
    union: float,
    spread: tuple[float, float],
    sizes: set[int],
) -> None:
    whole = MaskConfig(truncation_group=1)
    grouped = MaskConfig(truncation_group=batch)
    patches = grid[0] * grid[1]
    lengths, cuts, blocks, unions = [], [], [], []
    for step in range(40):
        masks = _sample(whole, grid, step, batch)
        lengths.append(_lengths(masks))
        blocks.append(masks.target_index.shape[2])
        image = np.arange(batch)[:, None] * patches
        covered = np.unique(image + masks.target_index.numpy().reshape(batch, -1))
        unions.append(len(covered) / batch)
        shortened = _lengths(_sample(grouped, grid, step, batch))
        assert (shortened == lengths[-1].min()).all()
        cuts.append(shortened[0])
    for measured, (mean, deviation) in ((lengths, uncut), (cuts, cut), (blocks, target)):
        assert np.mean(measured) == pytest.approx(mean, abs=3 * deviation)
    # The union varies as the uncut context does; percentiles vary more than means: 3 % of the grid.
    assert np.mean(unions) == pytest.approx(union, abs=3 * uncut[1])
    assert np.percentile(lengths, (5, 95)) == pytest.approx(spread, abs=0.03 * patches)
    assert set(blocks) <= sizes


@pytest.mark.parametrize(("grid", "sizes"), [(row[0], row[7]) for row in PUBLISHED])
def test_published_target_sizes_are_exactly_the_listed_ones(
    grid: tuple[int, int], sizes: set[int]
) -> None:
    reachable = reachable_sizes(MaskConfig(), grid, "target")
    assert {height * width for height, width in reachable} == sizes
    drawn = {_sample(MaskConfig(), grid, step, 1).target_index.shape[2] for step in range(400)}
    assert drawn == sizes


@pytest.mark.parametrize("geometry", ["published", "unbiased"])
@pytest.mark.parametrize("grid", [(14, 14), (6, 20), (9, 5)])
@pytest.mark.parametrize("block", ["target", "context"])
def test_reachable_sizes_are_those_drawn(geometry: Any, grid: tuple[int, int], block: Any) -> None:
    config = MaskConfig(geometry=geometry, context_scale=(0.5, 0.7), context_aspect=(0.5, 1.2))
    drawn = {plain_size(config, grid, 1, step, block) for step in range(1500)}
    reachable = reachable_sizes(config, grid, block)
    assert drawn <= reachable
    assert len(reachable - drawn) <= 1  # sizes with a probability below 1 in 1000


def test_sizes_change_with_the_step_only() -> None:
    config = MaskConfig(truncation_group=1)
    sizes = {_sample(config, (14, 14), step, 2).target_index.shape[2] for step in range(30)}
    assert len(sizes) > 1
    first = _sample(config, (14, 14), 7, np.array([0]))
    later = _sample(config, (14, 14), 7, np.array([2047]))
    assert first.target_index.shape == later.target_index.shape
    assert not torch.equal(first.target_index, later.target_index)


def _corners(
    config: MaskConfig, grid: tuple[int, int], step: int, images: int
) -> NDArray[np.int32]:
    """Top left patch of every target block, as (row, column)."""
    first = _sample(config, grid, step, images).target_index.numpy()[:, :, 0].ravel()
    return np.stack(np.divmod(first, grid[1]), axis=1)


def _same_size(config: MaskConfig, grid: tuple[int, int], seed: int = 0) -> list[int]:
    """Ten steps whose target block has the size of step 0."""
    size = plain_size(config, grid, seed, 0, "target")
    steps = (s for s in range(1000) if plain_size(config, grid, seed, s, "target") == size)
    return [next(steps) for _ in range(10)]


@pytest.mark.parametrize("geometry", ["published", "unbiased"])
@pytest.mark.parametrize("grid", [(14, 14), (10, 18)])
def test_corners_are_uniform_over_the_allowed_places(geometry: Any, grid: tuple[int, int]) -> None:
    config = MaskConfig(geometry=geometry, truncation_group=1)
    height, width = plain_size(config, grid, 0, 0, "target")
    extra = 1 if geometry == "unbiased" else 0
    places = (grid[0] - height + extra, grid[1] - width + extra)
    corners = np.concatenate([_corners(config, grid, s, 1000) for s in _same_size(config, grid)])
    assert corners.max(axis=0).tolist() == [places[0] - 1, places[1] - 1]
    counts = np.bincount(corners[:, 0] * places[1] + corners[:, 1], minlength=places[0] * places[1])
    expected = len(corners) / len(counts)
    freedom = len(counts) - 1
    # Four standard deviations above the mean of chi-square.
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


# --- rules ---------------------------------------------------------------------------------------


def test_truncation_cuts_the_bottom_rows_of_the_whole_group() -> None:
    grid, images = (14, 14), 64
    config = MaskConfig(
        geometry="unbiased", num_contexts=2, context_scale=(0.5, 0.7), truncation_group=1
    )
    whole = _sample(config, grid, 2, images)
    cut = _sample(replace(config, truncation_group=16), grid, 2, images)
    lengths = _lengths(whole).reshape(2, 4, 16)
    expected = np.broadcast_to(lengths.min(axis=(0, 2))[:, None], lengths.shape)
    np.testing.assert_array_equal(_lengths(cut).reshape(2, 4, 16), expected)
    # With several context blocks and groups of one, every context stays whole.
    assert (lengths[0] != lengths[1]).any()
    for before, after in zip(_context_sets(whole, 196), _context_sets(cut, 196), strict=True):
        for uncut, kept in zip(before, after, strict=True):
            assert sorted(kept) == sorted(uncut)[: len(kept)]
    assert torch.equal(whole.target_index, cut.target_index)
    assert cut.max_context == expected.max()
    assert whole.max_context == lengths.max()


def test_context_blocks_of_an_image_are_independent() -> None:
    config = MaskConfig(num_contexts=3, context_scale=(0.3, 0.4), truncation_group=1)
    one, two, three = _context_sets(_sample(config, (16, 16), 0, 50), 256)
    assert sum(a != b for a, b in zip(one, two, strict=True)) > 40
    assert sum(b != c for b, c in zip(two, three, strict=True)) > 40


def test_fallback_redraws_then_drops_the_last_target() -> None:
    # Four targets leave little of a context block that covers less than half of the grid.
    config = MaskConfig(
        geometry="unbiased",
        context_scale=(0.4, 0.5),
        min_keep=15,
        num_contexts=2,
        truncation_group=1,
    )
    grid, images = (8, 8), 50
    check_masks(config, grid)
    tries: set[int] = set()
    for step in range(2):
        masks = _sample(config, grid, step, images)
        contexts = _context_sets(masks, 64)
        for image in range(images):
            plain = plain_image(config, grid, 0, step, image)
            targets = masks.target_index[image].tolist()
            assert targets == plain.targets  # a target left out is still predicted
            for c in (0, 1):
                dropped = (plain.tries[c] - 1) // 20
                subtracted = {patch for t in targets[: 4 - dropped] for patch in t}
                assert contexts[c][image] == set(plain.contexts[c])
                assert contexts[c][image].isdisjoint(subtracted)
                assert len(contexts[c][image]) > 15
            tries |= set(plain.tries)
    # First try, redraw, one target dropped, and two or more: all were exercised.
    assert 1 in tries
    assert any(1 < t <= 20 for t in tries)
    assert any(20 < t <= 40 for t in tries)
    assert any(40 < t <= 60 for t in tries)


def test_fallback_may_drop_every_target() -> None:
    # The published context block of a 6x6 grid is always 5x5 in one place: every redraw is in vain.
    config = MaskConfig(min_keep=24, truncation_group=1)
    masks = _sample(config, (6, 6), 0, 8)
    (contexts,) = _context_sets(masks, 36)
    block = {row * 6 + column for row in range(5) for column in range(5)}
    assert contexts == [block] * 8
    assert plain_image(config, (6, 6), 0, 0, 0).tries == [81]


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (28, 28), (7, 7)])
def test_no_redraw_at_the_released_settings(grid: tuple[int, int]) -> None:
    config = MaskConfig(truncation_group=1, min_keep=0)
    lengths = [_lengths(_sample(config, grid, step, 256)).min() for step in range(20)]
    assert min(lengths) > (10 if grid[0] > 7 else 0)


def test_released_context_block_is_always_in_the_corner() -> None:
    assert reachable_sizes(MaskConfig(), (14, 14), "context") == {(13, 13)}
    assert reachable_sizes(MaskConfig(), (16, 16), "context") == {(15, 15)}
    assert (14, 14) in reachable_sizes(MaskConfig(geometry="unbiased"), (14, 14), "context")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings_", "grid", "message"),
    [
        ({"min_keep": 169}, (14, 14), r"masks\.min_keep .* got 169 and a block of 13x13"),
        ({}, (1, 40), r"target_scale .* at least 1x1 patch, got 0x\d+ on a grid of 1x40"),
        ({}, (40, 1), r"got \d+x0 on a grid of 40x1 patches with masks.geometry 'published'"),
        ({}, (2, 2), r"at least 1x1 patch, got 0x0 on a grid of 2x2"),
        ({}, (3, 4), r"masks\.min_keep .* got 10 and a block of 2x3"),
        ({"target_scale": (0.01, 0.02)}, (6, 6), r"masks\.target_scale .* got 0x0"),
        (
            {"target_scale": (0.05, 0.06), "target_aspect": (0.75, 90.0)},
            (14, 14),
            r"masks\.target_aspect .* got 13x0",
        ),
        ({"geometry": "unbiased", "context_scale": (0.01, 1.0)}, (14, 14), r"min_keep .* got 10"),
    ],
)
def test_impossible_requests_are_clear_errors(
    settings_: dict[str, Any], grid: tuple[int, int], message: str
) -> None:
    config = MaskConfig(**settings_)
    with pytest.raises(ValueError, match=message):
        check_masks(config, grid)
    # Sampling says the same at a step that draws such a size, and never loops for ever.
    with pytest.raises(ValueError, match=message.replace("0x0", r"\dx\d")):
        [_sample(config, grid, step, 1) for step in range(2000)]


@pytest.mark.parametrize("geometry", ["published", "unbiased"])
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (28, 28), (32, 32), (6, 6), (14, 28)])
def test_check_accepts_the_usual_grids(geometry: Any, grid: tuple[int, int]) -> None:
    check_masks(MaskConfig(geometry=geometry), grid)


def test_check_catches_a_rare_size() -> None:
    # 4x4 = 16 patches comes only with the smallest scales; most steps would train happily.
    config = MaskConfig(context_scale=(0.09, 1.0), min_keep=16, truncation_group=1)
    with pytest.raises(ValueError, match="got 16 and a block of 4x4"):
        check_masks(config, (14, 14))
    drawn = [plain_size(config, (14, 14), 0, step, "context") for step in range(500)]
    assert 0 < sum(size == (4, 4) for size in drawn) < 25


def test_unbiased_serves_a_grid_of_one_row() -> None:
    config = MaskConfig(
        geometry="unbiased",
        target_aspect=(0.05, 0.1),
        context_aspect=(0.02, 0.03),
        truncation_group=1,
    )
    check_masks(config, (1, 40))
    masks = _sample(config, (1, 40), 0, 16)
    assert masks.target_index.shape[2] >= 6
    assert_equal_to_plain(masks, config, (1, 40), 0, 0, np.arange(16))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.zeros((2, 2), dtype=np.int64), "positions must be one-dimensional"),
        (np.zeros(0, dtype=np.int64), "positions must be one-dimensional, not empty"),
        (np.array([-1]), "must be in 0"),
    ],
)
def test_bad_positions(positions: NDArray[np.int64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _sample(MaskConfig(), (14, 14), 0, positions)


# --- keys: ranks, accumulation, composition ------------------------------------------------------


def _per_image(masks: Masks, patches: int, contexts: int) -> list[tuple[Any, ...]]:
    images = len(masks.target_index)
    index, cu = masks.context_index.numpy() % patches, masks.context_cu.numpy()
    return [
        (
            masks.target_index[i].tolist(),
            *(index[cu[c * images + i] : cu[c * images + i + 1]].tolist() for c in range(contexts)),
        )
        for i in range(images)
    ]


@pytest.mark.parametrize("geometry", ["published", "unbiased"])
@pytest.mark.parametrize("group", [1, 4, 32, 64])
@pytest.mark.parametrize("contexts", [1, 2])
def test_ranks_and_accumulation_see_the_same_masks(
    geometry: Any, group: int, contexts: int
) -> None:
    config = MaskConfig(geometry=geometry, truncation_group=group, num_contexts=contexts)
    whole = _per_image(_sample(config, (14, 14), 5, 64), 196, contexts)
    for ranks, batch in ((1, 16), (2, 32), (2, 8), (4, 16), (4, 4), (1, 1)):
        for micro_step in range(64 // (ranks * batch)):
            for rank in range(ranks):
                first = (micro_step * ranks + rank) * batch
                part = _sample(config, (14, 14), 5, np.arange(first, first + batch))
                assert _per_image(part, 196, contexts) == whole[first : first + batch]


def test_torch_random_state_is_neither_read_nor_written() -> None:
    results = []
    for seed in (0, 1):
        before = torch.manual_seed(seed).get_state()
        masks = _sample(MaskConfig(), (14, 14), 3, 128)
        results.append((masks.context_index.tolist(), masks.target_index.tolist()))
        assert torch.equal(before, torch.get_rng_state())
    assert results[0] == results[1]


def test_every_step_and_seed_has_its_own_masks() -> None:
    drawn = [
        _sample(MaskConfig(), (14, 14), step, 8, seed=seed).context_index.tolist()
        for step in (0, 1, 2)
        for seed in (0, 1, 2**40)
    ]
    assert len({tuple(index) for index in drawn}) == 9


# --- a plain second opinion ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equal_to_plain_loops(data: st.DataObject) -> None:
    def interval(low: float, high: float) -> tuple[float, float]:
        ends = sorted(data.draw(st.tuples(st.floats(low, high), st.floats(low, high))))
        return ends[0], ends[1]

    grid = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)), label="grid")
    group = data.draw(st.sampled_from([1, 1, 2, 3, 8]), label="group")
    config = MaskConfig(
        geometry=data.draw(st.sampled_from(["published", "unbiased"])),
        num_targets=data.draw(st.integers(1, 5)),
        num_contexts=data.draw(st.integers(1, 3)),
        target_scale=interval(0.05, 0.5),
        target_aspect=interval(0.3, 3.0),
        context_scale=interval(0.3, 1.0),
        context_aspect=interval(0.3, 3.0),
        min_keep=data.draw(st.integers(0, 40)),
        truncation_group=group,
    )
    seed = data.draw(st.integers(0, 2**63 - 1), label="seed")
    step = data.draw(st.integers(0, 1_000_000), label="step")
    positions = np.array(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6)))
    sizes = {block: plain_size(config, grid, seed, step, block) for block in ("target", "context")}
    height, width = sizes["context"]
    if 0 in sizes["target"] or height * width <= config.min_keep:
        with pytest.raises(ValueError, match="must"):
            _sample(config, grid, step, positions, seed)
        with pytest.raises(ValueError, match="must"):
            check_masks(config, grid)
        return
    assert sizes["target"] in reachable_sizes(config, grid, "target")
    assert sizes["context"] in reachable_sizes(config, grid, "context")
    masks = _sample(config, grid, step, positions, seed)
    assert_equal_to_plain(masks, config, grid, seed, step, positions)


@pytest.mark.parametrize("geometry", ["published", "unbiased"])
@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("grid", [(14, 14), (10, 18)])
def test_equal_to_plain_loops_at_the_defaults(
    geometry: Any, group: int, grid: tuple[int, int]
) -> None:
    config = MaskConfig(geometry=geometry, truncation_group=group)
    positions = np.arange(32, 64)
    masks = _sample(config, grid, 11, positions, seed=3)
    assert_equal_to_plain(masks, config, grid, 3, 11, positions)


# --- the data structure --------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 8])
def test_types_and_shapes(group: int) -> None:
    masks = _sample(MaskConfig(num_contexts=2, truncation_group=group), (14, 14), 0, 16)
    for tensor in (masks.context_index, masks.context_cu, masks.target_index):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert masks.context_cu.shape == (2 * 16 + 1,)
    assert masks.context_cu[0] == 0
    assert masks.context_cu[-1] == len(masks.context_index)
    assert isinstance(masks.max_context, int)
    assert masks.max_context == _lengths(masks).max()


def test_to_moves_every_tensor() -> None:
    masks = _sample(MaskConfig(), (14, 14), 0, 4).to("meta", non_blocking=True)
    assert {t.device.type for t in (masks.context_index, masks.context_cu, masks.target_index)} == {
        "meta"
    }
    assert masks.max_context > 0


def test_mean_tokens() -> None:
    cut = mean_tokens(MaskConfig(), (14, 14))
    assert cut.context == pytest.approx(50.6, abs=2)
    assert cut.target == pytest.approx(33.4, abs=1)
    whole = mean_tokens(MaskConfig(truncation_group=1), (14, 14))
    assert whole.context == pytest.approx(82, abs=2)
    two = mean_tokens(MaskConfig(num_contexts=2, truncation_group=1), (14, 14))
    assert two == pytest.approx(whole)
    assert mean_tokens(MaskConfig(), (14, 14), seed=0) == cut
