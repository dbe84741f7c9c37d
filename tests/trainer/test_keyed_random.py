"""Keyed random numbers: known answers, purity, range, uniformity, errors."""

import numpy as np
import pytest
import torch

from ijepa_fast.keyed_random import Stream, integers, philox4x32, torch_generator, uniform

# Known answers published with the generator: counter words, key words (low first), output words.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = _words(counter)
    low, high = _words(key)
    output = philox4x32((c0, c1, c2, c3), low | high << 32)
    assert [int(word) for word in output] == _words(expected)


def test_philox_broadcasts_and_agrees_with_single_counters() -> None:
    blocks, items = np.arange(3)[None, :], np.arange(5)[:, None]
    together = philox4x32((blocks, items, 7, 4), 2**64 - 3)
    assert all(word.shape == (5, 3) and word.dtype == np.uint64 for word in together)
    for i in range(5):
        for b in range(3):
            alone = philox4x32((b, i, 7, 4), 2**64 - 3)
            assert [int(w[i, b]) for w in together] == [int(w) for w in alone]


def test_integers_are_the_words_of_the_documented_counter() -> None:
    # (block, item, step, stream) under the seed as key: two 64-bit words a block, low word first.
    drawn = integers(12345678901234567890, Stream.CROP, 9, [77], 4)
    for block in (0, 1):
        r0, r1, r2, r3 = (int(w) for w in philox4x32((block, 77, 9, 2), 12345678901234567890))
        assert drawn[0, 2 * block : 2 * block + 2].tolist() == [r1 << 32 | r0, r3 << 32 | r2]


def test_stream_numbers_are_frozen() -> None:
    assert {stream.name: stream.value for stream in Stream} == {
        "INIT": 0,
        "ORDER": 1,
        "CROP": 2,
        "MASK_SIZE": 3,
        "MASK_POSITION": 4,
        "REPLACEMENT": 5,
        "SHAPES": 6,
        "SPLIT": 7,
        "PICTURE": 8,
        "DECODER": 9,
        "SAMPLE": 10,
        "PROOF": 11,
    }


def test_draw_does_not_depend_on_count() -> None:
    full = uniform(3, Stream.CROP, 5, np.arange(10), 9)
    for count in range(10):
        part = uniform(3, Stream.CROP, 5, np.arange(10), count)
        assert part.shape == (10, count)
        np.testing.assert_array_equal(part, full[:, :count])


def test_draw_does_not_depend_on_the_other_items() -> None:
    full = integers(3, Stream.ORDER, 5, np.arange(100), 3)
    chosen = np.array([42, 7, 99, 7, 0])
    np.testing.assert_array_equal(integers(3, Stream.ORDER, 5, chosen, 3), full[chosen])
    np.testing.assert_array_equal(integers(3, Stream.ORDER, 5, [42], 3), full[42:43])


def test_every_part_of_the_key_matters() -> None:
    base = integers(1, Stream.CROP, 2, [3], 4)
    others = [
        integers(2, Stream.CROP, 2, [3], 4),
        integers(1 + 2**32, Stream.CROP, 2, [3], 4),
        integers(1, Stream.ORDER, 2, [3], 4),
        integers(1, Stream.CROP, 3, [3], 4),
        integers(1, Stream.CROP, 2, [4], 4),
    ]
    drawn = np.concatenate([base, *others])
    assert len(np.unique(drawn)) == drawn.size


def test_uniform_is_the_top_53_bits_in_range() -> None:
    u = uniform(0, Stream.CROP, 0, np.arange(20_000), 4)
    assert u.dtype == np.float64
    assert u.min() >= 0.0
    assert u.max() < 1.0
    words = integers(0, Stream.CROP, 0, np.arange(20_000), 4)
    np.testing.assert_array_equal(u * 2.0**53, (words >> np.uint64(11)).astype(np.float64))


def test_uniform_is_uniform_and_uncorrelated() -> None:
    n, bins = 50_000, 64
    u = uniform(11, Stream.CROP, 1, np.arange(n), 4)
    for k in range(4):
        counts = np.bincount((u[:, k] * bins).astype(int), minlength=bins)
        # 63 degrees of freedom: chance exceeds 113 once in 10,000, and the numbers are fixed.
        assert ((counts - n / bins) ** 2 / (n / bins)).sum() < 113
    # Between draws of one item, and between neighbouring items: 4 standard deviations of 1/sqrt(n).
    columns = [u[:-1, k] for k in range(4)] + [u[1:, 0]]
    correlation = np.corrcoef(columns) - np.eye(5)
    assert np.abs(correlation).max() < 4 / np.sqrt(n)


def test_integers_use_all_bits() -> None:
    words = integers(5, Stream.SHAPES, 0, np.arange(10_000), 1)[:, 0]
    share = [float(((words >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(64)]
    assert min(share) > 0.48
    assert max(share) < 0.52


@pytest.mark.parametrize(
    ("seed", "step", "items", "message"),
    [
        (-1, 0, [0], "seed must be in"),
        (2**64, 0, [0], "seed must be in"),
        (0, -1, [0], "step must be in"),
        (0, 2**32, [0], "step must be in"),
        (0, 0, [-1], "items must be in"),
        (0, 0, [0, 2**32], "items must be in"),
    ],
)
def test_out_of_range_is_an_error(seed: int, step: int, items: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uniform(seed, Stream.CROP, step, items, 1)


def test_largest_values_are_accepted() -> None:
    drawn = integers(2**64 - 1, Stream.SPLIT, 2**32 - 1, [2**32 - 1], 2)
    words = [int(w) for w in philox4x32((0, 2**32 - 1, 2**32 - 1, 7), 2**64 - 1)]
    assert drawn.tolist() == [[words[1] << 32 | words[0], words[3] << 32 | words[2]]]


def test_torch_generator_is_a_function_of_seed_and_stream() -> None:
    def sample(seed: int, stream: Stream) -> torch.Tensor:
        return torch.randn(8, generator=torch_generator(seed, stream))

    torch.manual_seed(0)
    first = sample(1, Stream.INIT)
    torch.manual_seed(1)
    assert torch.equal(first, sample(1, Stream.INIT))
    assert not torch.equal(first, sample(2, Stream.INIT))
    assert not torch.equal(first, sample(1, Stream.SHAPES))
