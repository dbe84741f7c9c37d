"""patchify against F.unfold in float64, in every lane."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels import debug_checks
from ijepa_kernels.patchify import (
    _patchify_fwd,
    _run,
    _vector,
    patchify,
    patchify_bytes,
    patchify_ref,
)
from ijepa_kernels.testing import assert_not_worse, relative_error
from tests.ops.conftest import INTERPRETED

# the op has the module's name
patchify_module = importlib.import_module("ijepa_kernels.patchify")
U8, F32, BF16, F16 = torch.uint8, torch.float32, torch.bfloat16, torch.float16
F64 = torch.float64
DTYPES = [(U8, F32), (U8, BF16), (U8, F16), (F32, F32), (F32, BF16), (BF16, BF16), (F16, F32)]
# K = 588, 768, 192, 384, 1024, 1280, 1408, 1, 7, 100, 1023, 35, 12; the last has more positions
# than a program has lanes
SHAPES = [
    *[(3, 14, 14), (3, 16, 16), (3, 8, 8), (6, 8, 8), (4, 16, 16), (5, 16, 16), (11, 8, 16)],
    *[(1, 1, 1), (7, 1, 1), (4, 5, 5), (3, 11, 31), (1, 7, 5), (3, 2, 2), (2, 48, 56)],
]
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def _images(batch, channels, height, width, dtype, layout, device, seed=0):
    """All byte values, or what normalised images look like; contiguous in the layout."""
    generator = torch.Generator().manual_seed(seed)
    shape = (
        (batch, channels, height, width) if layout == "BCHW" else (batch, height, width, channels)
    )
    if dtype == U8:
        images = torch.randint(0, 256, shape, generator=generator, dtype=dtype)
    else:
        images = torch.randn(shape, generator=generator, dtype=torch.promote_types(dtype, F32))
    return images.to(device, dtype)


def _statistics(channels, device, seed=0):
    mean, std = torch.rand((2, channels), generator=torch.Generator().manual_seed(seed)) / 2 + 0.1
    return mean.to(device), std.to(device)


def _truth(images, patch_size, index=None, mean=None, std=None, *, layout="BCHW"):
    """In float64, by torch's own unfold."""
    x = images.double() / (255 if images.dtype == U8 else 1)
    if layout == "BHWC":
        x = x.movedim(3, 1)
    if mean is not None:
        x = (x - mean.double()[:, None, None]) / std.double()[:, None, None]
    rows = F.unfold(x, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
    if index is not None:
        rows = torch.stack([rows[int(i)] for i in index]) if len(index) else rows[:0]
    padded = rows.new_zeros(rows.shape[0], -(-rows.shape[1] // 16) * 16)
    padded[:, : rows.shape[1]] = rows
    return padded


def _check(images, patch_size, index, statistics, out_dtype, layout, slack=1.0):
    mean, std = statistics
    ours = patchify(images, patch_size, index, mean, std, out_dtype, layout=layout)
    same_dtype = patchify_ref(images, patch_size, index, mean, std, out_dtype, layout=layout)
    truth = _truth(images, patch_size, index, mean, std, layout=layout)
    assert_not_worse("rows", ours, same_dtype, truth, slack=slack)
    # on the CPU the op is its reference
    assert relative_error(same_dtype, truth) < slack * max(torch.finfo(out_dtype).eps, 1e-6)
    assert ours.is_contiguous()
    k = images.shape[1 if layout == "BCHW" else 3] * patch_size[0] * patch_size[1]
    assert torch.equal(ours[:, k:], torch.zeros_like(ours[:, k:]))
    return ours


@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        *itertools.product(SHAPES[:2], DTYPES),
        *itertools.product(SHAPES[2:], [(U8, BF16), (F32, F32)]),
    ],
    ids=str,
)
def test_not_worse_than_torch(shape, dtypes, layout, device):
    channels, ph, pw = shape
    images = _images(2, channels, 2 * ph, 3 * pw, dtypes[0], layout, device)
    index = torch.tensor([11, 0, 4, 7, 4], device=device)
    _check(images, (ph, pw), index, _statistics(channels, device), dtypes[1], layout)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_all_patches(dtypes, layout, normalised, device):
    images = _images(3, 3, 42, 28, dtypes[0], layout, device)
    statistics = _statistics(3, device) if normalised else (None, None)
    _check(images, (14, 14), None, statistics, dtypes[1], layout)


@pytest.mark.parametrize("rows", [1, 2, 31])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows(rows, dtype, device):
    images = _images(2, 3, 32, 48, U8, "BHWC", device)
    index = (torch.arange(rows, device=device) * 7 % 12).to(dtype)
    strided = index.repeat_interleave(2)[::2]
    mean, std = _statistics(3, device)
    ours = _check(images, (16, 16), index, (mean, std), BF16, "BHWC")
    again = patchify(images, 16, strided, mean, std, BF16)
    assert torch.equal(ours, again)


@given(
    channels=st.integers(1, 6),
    patch=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtypes=st.sampled_from(DTYPES),
    layout=st.sampled_from(["BHWC", "BCHW"]),
    listed=st.one_of(st.none(), st.lists(st.integers(0, 10**6), max_size=9)),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    normalised=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    channels, patch, grid, dtypes, layout, listed, index_dtype, normalised, seed, device
):
    size = patch[0] * grid[0], patch[1] * grid[1]
    images = _images(2, channels, *size, dtypes[0], layout, device, seed)
    index = None
    if listed is not None:
        rows = [i % (2 * grid[0] * grid[1]) for i in listed]
        index = torch.tensor(rows, dtype=index_dtype, device=device)
    statistics = _statistics(channels, device, seed) if normalised else (None, None)
    _check(images, patch, index, statistics, dtypes[1], layout, slack=4)


def test_patches_do_not_mix(device):
    """Every element of two images has a number of its own; so has every place in the rows."""
    images = torch.arange(2 * 4 * 6 * 3, device=device, dtype=F32).view(2, 4, 6, 3)
    rows = patchify(images, (2, 3), layout="BHWC")
    assert rows.shape == (8, 32)
    for image in range(2):
        for y in range(4):
            for x in range(6):
                for c in range(3):
                    row = image * 4 + y // 2 * 2 + x // 3
                    column = c * 6 + y % 2 * 3 + x % 3
                    assert rows[row, column] == images[image, y, x, c]
    assert torch.equal(rows[:, 18:], torch.zeros_like(rows[:, 18:]))


@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
@pytest.mark.parametrize("patch", [14, 16, 6])
def test_strides_and_offsets(patch, layout, device):
    """Views of all sorts; bytes that start at an odd address, which cannot be read as words."""
    images = _images(2, 3, 2 * patch, 3 * patch, U8, layout, device)
    mean, std = _statistics(3, device)

    def run(images, layout):
        return patchify(images, patch, None, mean, std, BF16, layout=layout)

    expected = run(images, layout)
    for offset in (1, 2, 3):
        shifted = torch.empty(images.numel() + 8, dtype=U8, device=device)
        shifted = shifted[offset : offset + images.numel()].view(images.shape)
        shifted.copy_(images)
        assert torch.equal(run(shifted, layout), expected)
    wider = F.pad(images, (0, 2, 3, 1, 1, 2))[:, 1:-2, 3:-1, :-2]
    other = "BCHW" if layout == "BHWC" else "BHWC"
    permuted = images.movedim(3, 1) if layout == "BHWC" else images.movedim(1, 3)
    twice = images.repeat_interleave(2, 0)[::2]
    for view, its_layout in ((wider, layout), (permuted, other), (twice, layout)):
        assert not view.is_contiguous()
        assert torch.equal(run(view, its_layout), expected)
    one = images[:1].expand(2, -1, -1, -1)
    ours = run(one, layout)
    assert torch.equal(ours, expected[:6].repeat(2, 1))


@pytest.mark.parametrize("dtype", [U8, F32])
def test_empty(dtype, device):
    assert patchify(_images(0, 3, 28, 28, dtype, "BHWC", device), 14).shape == (0, 592)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    assert patchify(_images(2, 3, 28, 28, dtype, "BHWC", device), 14, none).shape == (0, 592)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_layout_is_told_by_the_channels(channels, device):
    images = _images(1, channels, 16, 24, U8, "BHWC", device)
    given = patchify(images, 8, layout="BHWC")
    assert torch.equal(patchify(images.movedim(3, 1).contiguous(), 8, layout="BCHW"), given)
    if channels <= 4:
        assert torch.equal(patchify(images, 8), given)
        assert torch.equal(patchify(images.movedim(3, 1), 8), given)
    else:
        with pytest.raises(ValueError, match=r"layout must be given.*neither of dimensions"):
            patchify(images, 8)
    with pytest.raises(ValueError, match=r"layout must be given.*both of dimensions"):
        patchify(torch.zeros(1, 3, 8, 4, device=device), 4)


@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
def test_floats_are_copied_exactly(layout, device):
    """Negative zero and infinities included; the default dtype is the images'."""
    images = _images(2, 3, 16, 16, BF16, layout, device)
    images.view(-1)[:3] = torch.tensor([-0.0, torch.inf, -torch.inf])
    rows = patchify(images, 8, layout=layout)
    truth = _truth(images, (8, 8), layout=layout).to(BF16)
    assert torch.equal(rows.view(torch.int16), truth.view(torch.int16))
    assert patchify(_images(1, 3, 16, 16, U8, layout, device), 8, layout=layout).dtype == F32


def test_sequences_are_as_good_as_tensors(device):
    images = _images(2, 3, 28, 28, U8, "BHWC", device)
    tensors = [torch.tensor(values, device=device) for values in IMAGENET]
    assert torch.equal(patchify(images, 14, None, *IMAGENET), patchify(images, 14, None, *tensors))
    half = [t.bfloat16() for t in tensors]
    wide = [t.float() for t in half]
    assert torch.equal(patchify(images, 14, None, *half), patchify(images, 14, None, *wide))


def test_nan_stays_in_its_row(device):
    images = _images(2, 3, 28, 28, F32, "BCHW", device)
    images[1, 2, 3, 20] = float("nan")
    rows = patchify(images, 14, None, *IMAGENET)
    bad = torch.zeros_like(rows, dtype=torch.bool)
    bad[4 + 1, 2 * 196 + 3 * 14 + 6] = True
    assert torch.equal(rows.isnan(), bad)


@pytest.mark.parametrize("dtype", [U8, F32])
@pytest.mark.parametrize("patch", [8, 14])
def test_index_out_of_range(patch, dtype, kernels, device):
    images = _images(2, 3, 2 * patch, 2 * patch, dtype, "BHWC", device)
    rows = [0, 8, 7, -1, 2**31 - 1, -(2**31), 3]
    for wide in (False, True):
        values = [*rows, 2**32 + 1, -(2**33)] if wide else rows
        index = torch.tensor(values, dtype=torch.int64 if wide else torch.int32, device=device)
        for statistics in (IMAGENET, (None, None)):
            with (
                debug_checks(),
                pytest.raises(ValueError, match=r"index must lie in 0 .. 7, got 8 at position 1"),
            ):
                patchify(images, patch, index, *statistics)
            if not kernels:
                with pytest.raises(ValueError, match=r"index must lie in 0 .. 7, got 8"):
                    patchify(images, patch, index, *statistics)
                continue
            ours = patchify(images, patch, index, *statistics)
            inside = (index >= 0) & (index < 8)
            good = patchify(images, patch, index[inside], *statistics)
            assert torch.equal(ours[inside], good)
            assert ours[~inside].isnan().all()


def test_index_into_no_images(kernels, device):
    images = torch.zeros(0, 3, 28, 28, dtype=U8, device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    if kernels:
        assert patchify(images, 14, index).isnan().all()
    else:
        with pytest.raises(ValueError, match="index must lie in"):
            patchify(images, 14, index)


def test_twice_the_same_bits(device):
    images = _images(3, 3, 28, 42, U8, "BHWC", device)
    index = torch.tensor([5, 5, 17, 0], device=device)
    first, second = (patchify(images, 14, index, *IMAGENET, out_dtype=BF16) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])


def test_output_is_not_the_input(device):
    """One patch of 16 elements is its row already."""
    images = torch.zeros(2, 1, 4, 4, device=device)
    rows = patchify(images, 4, layout="BCHW")
    rows += 1
    assert images.eq(0).all()


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64_on_the_cpu():
    for dtype, layout in ((F64, "BCHW"), (U8, "BHWC")):
        images = _images(2, 3, 16, 24, dtype, layout, "cpu")
        mean, std = (t.double() for t in _statistics(3, "cpu"))
        rows = patchify(images, 8, None, mean, std, F64, layout=layout)
        truth = _truth(images, (8, 8), None, mean, std, layout=layout)
        torch.testing.assert_close(rows, truth, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [U8, F32])
@pytest.mark.parametrize("listed", [True, False])
def test_compiles_whole_and_passes_opcheck(dtype, listed, device):
    images = _images(2, 3, 16, 24, dtype, "BHWC", device)
    mean, std = _statistics(3, device)
    index = torch.tensor([3, 3, 11], device=device) if listed else None
    op = torch.ops.ijepa_kernels.patchify.default
    torch.library.opcheck(op, (images.permute(0, 3, 1, 2), index, mean, std, 8, 8, BF16))
    torch.library.opcheck(op, (images.movedim(3, 1).contiguous(), index, None, None, 8, 4, F32))
    compiled = torch.compile(patchify, fullgraph=True, backend="aot_eager")
    for m, s in ((mean, std), IMAGENET):
        eager, graph = (f(images, 8, index, m, s, BF16) for f in (patchify, compiled))
        assert torch.equal(eager, graph)


def test_no_gradient_is_an_error(device):
    images = torch.zeros(1, 3, 8, 8, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="images must not require a gradient"):
        patchify(images, 8)
    with torch.no_grad():
        assert not patchify(images, 8).requires_grad
    mean, std = _statistics(3, device)
    with pytest.raises(ValueError, match="std must not require a gradient"):
        patchify(images.detach(), 8, None, mean, std.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8).long()}, "images must be float32.*uint8.*torch.int64"),
        ({"images": torch.zeros(3, 8, 8)}, r"images must have 4 dimensions, got \(3, 8, 8\)"),
        ({"images": torch.zeros(2, 3, 8, 7)}, "multiples of 4 and 4, got 3 channels of 8 x 7"),
        ({"images": torch.zeros(2, 3, 6, 8)}, "multiples of 4 and 4, got 3 channels of 6 x 8"),
        ({"images": torch.zeros(2, 3, 0, 8)}, "got 3 channels of 0 x 8"),
        ({"images": torch.zeros(2, 0, 8, 8)}, "got 0 channels of 8 x 8"),
        ({"patch_size": 0}, "patch_size must be positive whole numbers, got 0"),
        ({"patch_size": (4, -4)}, r"patch_size must be positive whole numbers, got \(4, -4\)"),
        ({"layout": "NCHW"}, "layout must be 'BCHW', 'BHWC' or None, got 'NCHW'"),
        ({"index": torch.zeros(3)}, "index must be int32 or int64, got torch.float32"),
        ({"index": torch.zeros(1, 3).int()}, r"index must have shape \(R,\), got \(1, 3\)"),
        ({"index": torch.zeros(3, device="meta").int()}, "index must be on cpu, got meta"),
        ({"mean": None}, "mean and std must be given together"),
        ({"std": None}, "mean and std must be given together"),
        ({"mean": [0.5, 0.5]}, r"mean must have shape \(3,\), got \(2,\)"),
        ({"std": torch.ones(3, 1)}, r"std must have shape \(3,\), got \(3, 1\)"),
        ({"std": torch.ones(3).int()}, "std must be float32.*got torch.int32"),
        ({"out_dtype": torch.int8}, "out_dtype must be float32.*got torch.int8"),
        (
            {"images": torch.zeros(1, 1, 1, 1).expand(2**16, 1, 2**10, 2**10), "patch_size": 1},
            "images must have fewer than .*65536 x 1 x 1024 x 1024",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"images": torch.zeros(2, 3, 8, 8), "patch_size": 4, "index": torch.tensor([0])}
    good |= {"mean": [0.5] * 3, "std": torch.ones(3), "layout": "BCHW"}
    if "wide" in message or "65536" in message:
        good |= {"mean": None, "std": None}
    with pytest.raises(ValueError, match=message):
        patchify(**{**good, **change})


def test_launch_table():
    """Widest aligned stores and loads of the published patches; bytes one by one where needed."""
    assert [_vector((16, 16), 2), _vector((14, 14), 2), _vector((16, 16), 4)] == [8, 4, 4]
    assert [_vector((14, 14), 4), _vector((7, 7), 2), _vector((8, 2), 2)] == [4, 1, 2]
    line = 224 * 3
    assert _run(16, 8, line, 512) == 4
    assert _run(14, 4, line, 512) == 2
    assert _run(16, 8, line, 513) == 0
    # two runs have to make the vector
    assert _run(16, 8, line, 514) == 0
    assert _run(16, 4, line, 514) == 2


@pytest.mark.parametrize(("offset", "run"), [(0, 4), (1, 0), (2, 0), (3, 0), (4, 4)])
def test_words_start_at_multiples_of_their_size(offset, run, device, monkeypatch):
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append(constants)

    monkeypatch.setattr(patchify_module, "_patchify_fwd_kernel", Kernel())
    images = torch.zeros(2 * 32 * 32 * 3 + 8, dtype=U8, device=device)
    assert images.data_ptr() % 16 == 0
    images = images[offset : offset + 2 * 32 * 32 * 3].view(2, 32, 32, 3).permute(0, 3, 1, 2)
    _patchify_fwd(images, None, None, None, 16, 16, BF16)
    assert launches[0]["RUN"] == run


def test_bytes():
    # 588 bytes read, 592 x 2 written, 4 of index a row; 3 means and deviations
    assert patchify_bytes(10, 3, (14, 14), U8, BF16) == 5880 + 11840 + 24
    with_index = patchify_bytes(10, 3, (14, 14), U8, BF16, index_dtype=torch.int32)
    assert with_index == 5880 + 11840 + 40 + 24


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_and_images_past_2_to_the_31_elements():
    side, patches = 224, 196
    batch = 2**31 // (side * side * 3) + 2
    images = torch.zeros((batch, side, side, 3), dtype=U8, device="cuda")
    images[-1] = 255
    images[0] = 51
    # the last rows lie beyond 2^31 elements of output, and read beyond 2^31 of input
    index = torch.zeros(2**31 // 768 + 9, dtype=torch.int32, device="cuda")
    index[-5:] = batch * patches - 1 - torch.arange(5, dtype=torch.int32, device="cuda")
    rows = patchify(images, 16, index, out_dtype=BF16)
    assert rows[-5:].eq(1).all()
    assert rows[-9:-5].float().sub(0.2).abs().max() < 1e-3
    assert rows[:5].float().sub(0.2).abs().max() < 1e-3
