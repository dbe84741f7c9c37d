"""join_heads against plain torch, in every lane."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import join_heads
from ijepa_kernels.join_heads import join_heads_bytes, join_heads_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# how attention's backward passes leave their results, of a dense (R, H, E)
LAYOUTS = {
    "rows": lambda t: t.contiguous(),
    "heads first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "of one tensor": lambda t: torch.stack([t, t], 1)[:, 1],
    "padded head": lambda t: torch.nn.functional.pad(t, (0, 8))[..., : t.shape[2]],
    "padded by one": lambda t: torch.nn.functional.pad(t, (0, 1))[..., : t.shape[2]],
    "odd start": lambda t: torch.nn.functional.pad(t, (1, 0))[..., 1:],
    "one row for all": lambda t: t[:1].expand(t.shape),
}


def _parts(count, shape, dtype, device, layouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn((count, *shape), generator=generator) + 1.0).to(device, dtype)
    return tuple(LAYOUTS[name](part) for name, part in zip(layouts, drawn, strict=False))


def _check(parts, slack=1.0):
    joined, sums = join_heads(parts)
    expected, same_dtype = join_heads_ref(parts)
    assert torch.equal(joined, expected)
    assert joined.is_contiguous()
    assert_not_worse("sums", sums, same_dtype, expected.double().sum(0), slack=slack)


@pytest.mark.parametrize("heads", [(16, 80), (12, 64), (12, 32), (16, 24), (16, 88), (3, 5)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(heads, count, dtype, device):
    _check(_parts(count, (5, *heads), dtype, device, ["rows"] * 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_layouts(layout, rows, device):
    for others in (layout, "rows"):
        names = [layout, others, "heads first"]
        _check(_parts(3, (rows, 4, 24), torch.bfloat16, device, names))


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 40)),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, layouts, dtype, seed, device):
    _check(_parts(len(layouts), shape, dtype, device, layouts, seed), slack=4)


def test_no_rows(device):
    joined, sums = join_heads((torch.zeros((0, 2, 8), device=device),) * 3)
    assert joined.shape == (0, 48)
    assert torch.equal(sums.cpu(), torch.zeros(48))


def test_twice_the_same_bits(device):
    parts = _parts(3, (200, 2, 24), torch.bfloat16, device, ["rows"] * 3)
    pairs = zip(join_heads(parts), join_heads(parts), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64():
    parts = tuple(torch.randn(3, 6, 2, 4, dtype=torch.float64))
    joined, sums = join_heads(parts)
    assert torch.equal(joined, torch.cat([part.flatten(1) for part in parts], 1))
    assert torch.equal(sums, joined.sum(0))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "parts must be 1 to 3 tensors, got 0"),
        ((torch.zeros(2, 2, 4),) * 4, "parts must be 1 to 3 tensors, got 4"),
        ((torch.zeros(2, 4),), r"parts must have shape \(R, H, E\), got \(2, 4\)"),
        ((torch.zeros(2, 0, 4),), r"parts must have shape \(R, H, E\), got \(2, 0, 4\)"),
        (
            (torch.zeros(2, 2, 4), torch.zeros(2, 2, 5)),
            r"parts\[1\] must have shape \(2, 2, 4\), got \(2, 2, 5\)",
        ),
        (
            (torch.zeros(2, 2, 4), torch.zeros(2, 2, 4).half()),
            "parts must have one dtype, got torch.float32 and torch.float16",
        ),
        ((torch.zeros(2, 2, 4).long(),), r"parts\[0\] must be float32.*got torch.int64"),
        (
            (torch.zeros(2, 2, 4), torch.zeros(2, 4, 2).transpose(1, 2)),
            r"a head's elements must be neighbours, got strides \(8, 4, 1\) and \(8, 1, 2\)",
        ),
    ],
)
def test_bad_input(parts, message):
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            join_heads(parts)


def test_bytes():
    assert join_heads_bytes(10, 100, 3, torch.bfloat16) == 12000 + 1200
