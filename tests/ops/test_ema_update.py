"""ema_update_ against float64, in every lane."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels.optim import _table
from ijepa_kernels.optim.ema_update import BLOCK, ema_update_, ema_update_bytes, ema_update_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# empty, one element, primes, around a block, and the widths of the other ops' tests
SIZES = [(0,), (1,), (), (7, 13), (BLOCK,), (BLOCK - 1,), (BLOCK + 5,), (3, 0, 2), (1408,), (1023,)]


def _draw(shapes, dtype, device, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(device, dtype) for s in shapes]


def _clone(tensors):
    return [t.clone() for t in tensors]


def _assert_rounded(copies, tensors):
    for copy, tensor in zip(copies, tensors, strict=True):
        expected = tensor.to(copy.dtype)
        if INTERPRETED and copy.dtype == BF16:  # the interpreter cuts float32 off; GPUs round
            expected = (tensor.view(torch.int32) & -65536).view(F32).to(BF16)
        assert torch.equal(copy, expected)


def _check(targets, sources, momentum, copies=None, slack=1.0):
    """Ours against the same in float64, and the reference in the same dtypes."""
    value = float(momentum)
    truth = [
        value * t.double() + (1 - value) * s.double() for t, s in zip(targets, sources, strict=True)
    ]
    ours, theirs = _clone(targets), _clone(targets)
    our_copies = their_copies = None
    if copies is not None:
        our_copies, their_copies = _clone(copies), _clone(copies)
    before = _clone(sources)
    ema_update_(ours, sources, momentum, copies=our_copies)
    ema_update_ref(theirs, sources, momentum, copies=their_copies)
    for number, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_not_worse(f"target {number}", a, b, c, slack=slack)
        # on the CPU the reference is what runs, so it is held against the truth as well
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)
    if copies is not None:
        _assert_rounded(our_copies, ours)
    assert all(torch.equal(a, b) for a, b in zip(before, sources, strict=True))


@pytest.mark.parametrize("momentum", [0.996, 0.3, 0.0, 1.0])
@pytest.mark.parametrize("source", [F32, BF16, F16])
@pytest.mark.parametrize("copy", [None, BF16, F16])
def test_any_sizes_in_one_list(source, copy, momentum, device):
    targets, sources = _draw(SIZES, F32, device, 0), _draw(SIZES, source, device, 1)
    copies = None if copy is None else _draw(SIZES, copy, device, 2)
    _check(targets, sources, momentum, copies)


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=6),
    source=st.sampled_from([F32, BF16, F16]),
    with_copies=st.booleans(),
    momentum=st.floats(0, 1),
    dtype=st.sampled_from([None, F32, F64]),
    seed=st.integers(0, 2**31),
)
def test_any_list(shapes, source, with_copies, momentum, dtype, seed, device):
    if dtype is not None:
        momentum = torch.tensor(momentum, dtype=dtype, device=device)
    targets, sources = _draw(shapes, F32, device, seed), _draw(shapes, source, device, seed + 1)
    copies = _draw(shapes, BF16, device, 0) if with_copies else None
    _check(targets, sources, momentum, copies, slack=4)


def test_momentum_0_copies_and_1_keeps(device):
    targets, sources = _draw(SIZES, F32, device, 0, 1e3), _draw(SIZES, F32, device, 1)
    kept = _clone(targets)
    ema_update_(targets, sources, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(targets, kept, strict=True))
    ema_update_(targets, sources, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))


@pytest.mark.parametrize("momentum", [0.996, 0.9999, 0.99996, 0.999999])
def test_1000_steps_no_worse_than_lerp(momentum, device, record_property):
    """Error of every element against float64 after 1,000 steps towards a moving source."""
    # a launch takes 8 ms in the interpreter
    steps, size = 150 if INTERPRETED else 1000, 4096
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(size, generator=generator)
    truth = source.double()
    lerp, plain = source.clone(), source.clone()
    ours, at_device = (source.clone().to(device) for _ in range(2))
    for _ in range(steps):
        source += 0.02 * torch.randn(size, generator=generator)
        truth = momentum * truth + (1 - momentum) * source.double()
        lerp.lerp_(source, 1 - momentum)
        plain.mul_(momentum).add_(source, alpha=1 - momentum)
        at_device.copy_(source)
        ema_update_([ours], [at_device], momentum)

    def errors(tensor):
        error = (tensor.cpu().double() - truth).abs()
        return error.median().item(), error.quantile(0.99).item()

    results = {"ours": errors(ours), "lerp": errors(lerp), "mul_/add_": errors(plain)}
    for name, (median, high) in results.items():
        record_property(f"ema error at {momentum}, {name}", f"{median:.2e} {high:.2e}")
        print(f"momentum {momentum} {name}: median {median:.2e}, 99th percentile {high:.2e}")
    for mine, theirs, worse in zip(*results.values(), strict=True):
        # same formula, but with or without fused multiply-add: equal up to the draw
        assert mine <= 1.02 * theirs
        assert mine < worse / (1 if INTERPRETED else 2)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_momentum_on_the_device(dtype, device):
    targets, sources = _draw(SIZES, F32, device, 0), _draw(SIZES, F32, device, 1)
    by_number = _clone(targets)
    momentum = torch.tensor([0.999999], dtype=dtype, device=device)
    ema_update_(targets, sources, momentum)
    ema_update_(by_number, sources, float(momentum))
    for a, b in zip(targets, by_number, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * 1e-5)


def test_mixed_sources(device):
    targets = _draw(SIZES, F32, device, 0)
    kinds = [F32, BF16, F16, F32, BF16]
    sources = [t.to(kinds[n % 5]) for n, t in enumerate(_draw(SIZES, F32, device, 1))]
    copies = [t.to([BF16, F16][n % 2]) for n, t in enumerate(targets)]
    _check(targets, sources, 0.9, copies)


def test_views_at_odd_addresses_and_neighbours(device):
    """Elements beside a view stay as they are, and its alignment does not matter."""
    size = BLOCK + 9
    for shift in (0, 1, 2, 3):
        buffers = [torch.randn(size + 8, device=device) for _ in range(2)]
        copies = torch.zeros(size + 8, dtype=BF16, device=device)
        before = buffers[0].clone()
        target, source = (b[shift : shift + size] for b in buffers)
        copy = copies[2 * shift : 2 * shift + size]
        truth = 0.25 * target.double() + 0.75 * source.double()
        ema_update_([target], [source], 0.25, copies=[copy])
        torch.testing.assert_close(target.double(), truth, rtol=1e-6, atol=1e-6)
        _assert_rounded([copy], [target])
        assert torch.equal(buffers[0][:shift], before[:shift])
        assert torch.equal(buffers[0][shift + size :], before[shift + size :])
        assert (
            copies[: 2 * shift].count_nonzero() == copies[2 * shift + size :].count_nonzero() == 0
        )


def test_dense_strides(device):
    target = torch.randn(4, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    source = torch.randn(4, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    truth = 0.5 * target.double() + 0.5 * source.double()
    ema_update_([target], [source], 0.5)
    torch.testing.assert_close(target.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy in the interpreter
def test_nan_stays_in_its_element(device):
    targets, sources = (
        _draw([(BLOCK + 3,), (9,)], F32, device, 0),
        _draw([(BLOCK + 3,), (9,)], F32, device, 1),
    )
    clean = _clone(targets)
    ema_update_(clean, sources, 0.9)
    sources[0][BLOCK + 1] = float("nan")
    sources[1][4] = float("inf")
    ema_update_(targets, sources, 0.9)
    assert targets[0][BLOCK + 1].isnan()
    assert targets[1][4].isinf()
    for dirty, other, at in ((targets[0], clean[0], BLOCK + 1), (targets[1], clean[1], 4)):
        dirty[at] = other[at]
        assert torch.equal(dirty, other)


def test_tables_are_reused_and_never_stale(device, kernels):
    """The same tensors give the same table; others at other addresses another one."""
    _table._cache.clear()
    targets, sources = _draw([(5,), (70,)], F32, device, 0), _draw([(5,), (70,)], F32, device, 1)
    for _ in range(3):
        _check_in_place(targets, sources)
    if kernels:
        assert len(_table._cache) == 1
    for number in range(40):
        moved = _clone(sources)
        _check_in_place(targets, moved)
        sources[number % 2] = moved[number % 2]
        _check_in_place(targets, sources)
    assert len(_table._cache) <= 16


def _check_in_place(targets, sources):
    truth = [(t.double() + s.double()) / 2 for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, 0.5)
    for a, b in zip(targets, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_empty_lists(device):
    ema_update_([], [], 0.5)
    ema_update_([], [], 0.5, copies=[])
    empty, one = torch.empty(0, device=device), torch.ones(1, device=device)
    ema_update_([empty, one], [empty.clone(), torch.zeros(1, device=device)], 0.5)
    assert empty.shape == (0,)
    assert one.item() == 0.5


def test_parameters_and_their_versions(device):
    """Updates a leaf that requires a gradient, and autograd notices."""
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    x = torch.ones(3, device=device, requires_grad=True)
    y = (weight * x).sum()
    ema_update_([weight], [torch.zeros(3, device=device)], 0.5)
    assert torch.equal(weight.detach(), torch.full((3,), 0.5, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
def test_compiles_whole_and_passes_opcheck(copy, on_device, device):
    shapes = [(5,), (3, 4)]
    targets, sources = _draw(shapes, F32, device, 0), _draw(shapes, BF16, device, 1)
    copies = _draw(shapes, BF16, device, 2) if copy else None
    momentum = torch.tensor(0.9, dtype=F64, device=device) if on_device else 0.9
    args = (targets, sources, copies or [], 0.9, momentum if on_device else None)
    torch.library.opcheck(torch.ops.ijepa_kernels.ema_update_.default, args)

    def twice(targets, sources, copies):
        ema_update_(targets, sources, momentum, copies=copies)
        ema_update_(targets, sources, momentum, copies=copies)
        return [t + 1 for t in targets]

    runs = []
    for function in (twice, torch.compile(twice, fullgraph=True, backend="aot_eager")):
        mine, mine_copies = _clone(targets), _clone(copies) if copy else None
        results = function(mine, sources, mine_copies)
        runs.append([*results, *mine, *(mine_copies or [])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64_on_the_cpu():
    targets, sources = _draw([(50,)], F64, "cpu", 0), _draw([(50,)], F64, "cpu", 1)
    truth = 0.9 * targets[0] + 0.1 * sources[0]
    ema_update_(targets, sources, 0.9)
    torch.testing.assert_close(targets[0], truth, rtol=1e-14, atol=1e-14)


def _bad(change):
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    return {"targets": [a], "sources": [b], "momentum": 0.5, **change}


SHARED = torch.zeros(40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources must have 1 tensors, got 0"),
        ({"copies": []}, "copies must have 1 tensors, got 0"),
        ({"sources": [torch.zeros(4, 3)]}, r"sources\[0\] must have shape \(3, 4\), got \(4, 3\)"),
        (
            {"targets": [torch.zeros(3, 4).half()]},
            r"targets\[0\] must be float32.*got torch.float16",
        ),
        (
            {"sources": [torch.zeros(3, 4).to(torch.complex64)]},
            r"sources\[0\] must.*complex64",
        ),
        ({"sources": [torch.zeros(3, 4).int()]}, r"sources\[0\] must be float32.*int32"),
        ({"sources": [torch.zeros(3, 4).to_sparse()]}, r"sources\[0\] must be dense.*sparse_coo"),
        (
            {"copies": [torch.zeros(3, 4)]},
            r"copies\[0\] must be bfloat16, float16.*got torch.float32",
        ),
        ({"sources": [torch.zeros(3, 4, device="meta")]}, r"sources\[0\] must be on cpu, got meta"),
        ({"sources": [torch.zeros(4, 3).T]}, r"sources\[0\] must be dense and have the strides"),
        ({"targets": [torch.zeros(3, 8)[:, ::2]]}, r"targets\[0\] must be dense and have"),
        ({"targets": [torch.zeros(4).expand(3, 4)]}, r"targets\[0\] must be dense and have"),
        ({"momentum": 1.5}, r"momentum must lie in 0 .. 1, got 1.5"),
        ({"momentum": float("nan")}, r"momentum must lie in 0 .. 1, got nan"),
        ({"momentum": torch.zeros(2)}, r"momentum must be a number or one .* shape \(2,\)"),
        ({"momentum": torch.tensor(1)}, "momentum must be a number or one .* torch.int64"),
        ({"momentum": torch.zeros((), device="meta")}, "momentum must be on cpu, got meta"),
        (
            {"targets": [SHARED[:12].view(3, 4)], "sources": [SHARED[:12].view(3, 4)]},
            "written and read",
        ),
        (
            {"targets": [SHARED[:12].view(3, 4)], "sources": [SHARED[4:16].view(3, 4)]},
            "written and read",
        ),
        (
            {"targets": [SHARED[:12], SHARED[11:23]], "sources": [torch.zeros(12)] * 2},
            "no tensor may be written twice",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        ema_update_(**_bad(change))


def test_one_source_for_two_targets(device):
    source = torch.ones(6, device=device)
    targets = [torch.zeros(6, device=device) for _ in range(2)]
    ema_update_(targets, [source, source], 0.5)
    assert all(torch.equal(t, source / 2) for t in targets)


def test_bytes():
    assert ema_update_bytes(100, F32) == 1200
    assert ema_update_bytes(100, BF16) == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 42 GiB on a GPU")
def test_past_2_to_the_31_elements():
    size = 2**31 + 2 * BLOCK + 3
    target, source = torch.ones(size, device="cuda"), torch.zeros(size, device="cuda")
    copy = torch.zeros(size, dtype=BF16, device="cuda")
    edge = 2**31 - 5
    source[edge : edge + 10] = torch.arange(10.0, device="cuda")
    source[-1] = 7.0
    ema_update_([target], [source], 0.5, copies=[copy])
    expected = 0.5 + 0.5 * torch.arange(10.0, device="cuda")
    assert torch.equal(target[edge : edge + 10], expected)
    assert torch.equal(copy[edge : edge + 10].float(), expected)
    assert target[-1] == 4.0
    assert target[0] == target[edge - 1] == target[-2] == 0.5
