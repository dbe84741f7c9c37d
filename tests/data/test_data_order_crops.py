"""Sample order and crop windows: permutations, ownership, distributions, no batch dependence."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ijepa_fast.data import (
    central_windows,
    crop_windows,
    epoch_order,
    positions,
    steps_per_epoch,
)
from ijepa_fast.data.order import replacement_id
from ijepa_fast.keyed_random import Stream, uniform

RECIPE = {"scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3)}


def test_epoch_order_is_a_permutation_keyed_by_seed_and_epoch():
    orders = {
        (seed, epoch): epoch_order(1000, seed=seed, epoch=epoch)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    for order in orders.values():
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(1000))
        # Not the identity and not a rotation of it.
        assert np.mean(np.diff(order) == 1) < 0.02
    first, *others = orders.values()
    assert np.array_equal(first, epoch_order(1000, seed=0, epoch=0))
    # Two independent permutations agree at one place on average.
    assert all(np.mean(first == other) < 0.01 for other in others)


def test_epoch_order_is_the_same_whatever_the_chunk(monkeypatch):
    whole = epoch_order(1000, seed=3, epoch=2)
    monkeypatch.setattr("ijepa_fast.data.order._CHUNK", 7)
    assert np.array_equal(whole, epoch_order(1000, seed=3, epoch=2))


def test_epoch_order_is_frozen():
    # Changing these numbers changes every run: a seed then no longer names the same training.
    assert epoch_order(8, seed=0, epoch=0).tolist() == [4, 0, 3, 7, 5, 6, 2, 1]
    assert replacement_id(1000, seed=0, epoch=1, position=5, attempt=2) == 127
    window = crop_windows([500], [375], [7], seed=0, epoch=1, **RECIPE)
    assert window.tolist() == [[25, 86, 279, 219]]


@pytest.mark.parametrize(
    ("world", "device_batch"), [(1, 24), (1, 4), (2, 12), (2, 2), (4, 6), (4, 1)]
)
def test_positions_cover_the_global_batch_once(world, device_batch):
    accumulation = 24 // (world * device_batch)
    owned = [
        positions(rank, world, micro_step, device_batch)
        for micro_step in range(accumulation)
        for rank in range(world)
    ]
    # Micro-steps outermost, then ranks: exactly 0..23 in order.
    assert np.concatenate(owned).tolist() == list(range(24))


def test_replacements_are_keyed_by_position_and_attempt():
    draws = {
        (seed, epoch, position, attempt): replacement_id(
            10**6, seed=seed, epoch=epoch, position=position, attempt=attempt
        )
        for seed in (0, 1)
        for epoch in (0, 1)
        for position in (0, 77)
        for attempt in (0, 1, 2)
    }
    assert len(set(draws.values())) == len(draws)
    ids = [replacement_id(5, seed=0, epoch=0, position=p, attempt=0) for p in range(2000)]
    assert np.abs(np.bincount(ids, minlength=5) - 400).max() < 90  # 5 standard deviations


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: steps_per_epoch(10, 16), ["batch.global", "10", "16"]),
        (lambda: epoch_order(0, seed=0, epoch=0), ["num_images", "0"]),
        (lambda: positions(2, 2, 0, 4), ["rank", "2"]),
        (lambda: positions(0, 2, -1, 4), ["micro_step", "-1"]),
        (lambda: crop_windows([0], [5], [0], seed=0, epoch=0, **RECIPE), ["width", "0"]),
        (lambda: crop_windows([5], [5, 6], [0], seed=0, epoch=0, **RECIPE), ["one shape"]),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words[0]) as caught:
        call()
    assert all(word in str(caught.value) for word in words)


def _plain_window(width, height, sample, *, seed, epoch, scale, ratio):
    """The rule as a loop over one image's tries."""
    draws = uniform(seed, Stream.CROP, epoch, [sample], 40)[0].tolist()
    for k in range(10):
        u_area, u_ratio, u_top, u_left = draws[4 * k : 4 * k + 4]
        area = width * height * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + u_ratio * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@settings(max_examples=60, deadline=None)
@given(
    # thin ones get the central window
    sizes=st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 2000)), min_size=1, max_size=8),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
    scale=st.sampled_from([(0.3, 1.0), (0.08, 1.0), (1.0, 1.0)]),
    ratio=st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.6)]),
)
def test_windows_equal_the_plain_loop_and_lie_inside(sizes, seed, epoch, scale, ratio):
    width, height = np.array(sizes).T
    ids = np.arange(len(sizes)) * 1001
    kw = {"seed": seed, "epoch": epoch, "scale": scale, "ratio": ratio}
    windows = crop_windows(width, height, ids, **kw)
    assert windows.dtype == np.int32
    for row, (w, h) in enumerate(sizes):
        assert windows[row].tolist() == _plain_window(w, h, int(ids[row]), **kw)
        top, left, crop_h, crop_w = windows[row].tolist()
        assert 0 <= top <= top + crop_h <= h
        assert 0 <= left <= left + crop_w <= w
        assert min(crop_h, crop_w) >= 1


def test_distribution_of_area_ratio_and_corner():
    # Square images and areas up to 0.7: the first try always fits, so nothing is conditioned.
    count, side = 20_000, 1000
    full = np.full(count, side)
    windows = crop_windows(
        full, full, np.arange(count), seed=1, epoch=0, scale=(0.3, 0.7), ratio=(3 / 4, 4 / 3)
    ).astype(float)
    top, left, height, width = windows.T
    area, log_ratio = height * width / side**2, np.log(width / height)
    bound = math.log(4 / 3)
    # Uniform on [a, b]: mean (a+b)/2, deviation (b-a)/sqrt(12); limits are 5 standard errors.
    for values, low, high in ((area, 0.3, 0.7), (log_ratio, -bound, bound)):
        deviation = (high - low) / math.sqrt(12)
        assert abs(values.mean() - (low + high) / 2) < 5 * deviation / math.sqrt(count) + 1e-3
        assert abs(values.std() - deviation) < 0.02 * deviation
        assert low - 0.003 < values.min() < low + 0.01
        assert high - 0.01 < values.max() < high + 0.003
    for start, extent in ((top, height), (left, width)):
        place = start / (side - extent)
        assert abs(place.mean() - 0.5) < 5 * 0.289 / math.sqrt(count)
        assert place.min() == 0.0
        assert place.max() == 1.0  # ends included


@pytest.mark.parametrize("crop", [(32, 32), (32, 48), (64, 24), (16, 160)])
def test_central_windows_against_a_plain_search(crop):
    sizes = [(40, 30), (30, 40), (33, 33), (100, 7), (7, 100), (31, 64)]
    windows = central_windows(*zip(*sizes, strict=True), crop)
    assert windows.dtype == np.int32
    for size, (top, left, height, width) in zip(sizes, windows.tolist(), strict=True):
        image_w, image_h = size
        # a window of exactly the crop's shape grown until it touches a side, rounded down
        scale = min(Fraction(image_h, crop[0]), Fraction(image_w, crop[1]))
        exact = (crop[0] * scale, crop[1] * scale)
        assert (height, width) == tuple(max(1, int(side)) for side in exact)
        assert 0 <= top <= image_h - height
        assert 0 <= left <= image_w - width
        assert abs((image_h - height) - 2 * top) <= 1
        assert abs((image_w - width) - 2 * left) <= 1
