"""adamw_ema_ against float64, in every lane."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ijepa_kernels.optim.adamw_ema import BLOCK, adamw_ema_, adamw_ema_bytes, adamw_ema_ref
from ijepa_kernels.testing import assert_not_worse
from tests.ops.conftest import INTERPRETED

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SIZES = [(0,), (1,), (), (7, 13), (BLOCK,), (BLOCK - 1,), (2 * BLOCK + 5,), (3, 0, 2), (1023,)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.75}
LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "emas")


def _draw(shapes, device, seed=0, grad=F32, done=4):
    """All lists of the op, after `done` steps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(dtype=F32):
        return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]

    return {
        "params": normal(),
        "grads": normal(grad),
        "exp_avgs": [0.1 * t for t in normal()],
        "exp_avg_sqs": [0.1 * t.square() for t in normal()],
        "steps": [torch.full((), float(done + n), device=device) for n in range(len(shapes))],
        "emas": normal(),
    }


def _clone(lists):
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def _truth(lists, options):
    """All lists after one step, in float64 and by closed formulas."""
    beta1, beta2 = options["betas"]
    lr, momentum = float(options["lr"]), float(options["momentum"])
    after: dict[str, list[torch.Tensor]] = {name: [] for name in LISTS}
    for tensors in zip(*[lists[name] for name in LISTS], strict=True):
        p, g, m, v, step, ema = (t.double() for t in tensors)
        t = float(step) + 1
        new_m = beta1 * m + (1 - beta1) * g
        new_v = beta2 * v + (1 - beta2) * g**2
        hat_m, hat_v = new_m / (1 - beta1**t), new_v / (1 - beta2**t)
        decayed = p - lr * float(options["weight_decay"]) * p
        new_p = decayed - lr * hat_m / (hat_v.sqrt() + options["eps"])
        new_ema = momentum * ema + (1 - momentum) * new_p
        for name, value in zip(LISTS, (new_p, g, new_m, new_v, step + 1, new_ema), strict=True):
            after[name].append(value)
    return after


def _assert_rounded(copies, tensors):
    for copy, tensor in zip(copies, tensors, strict=True):
        expected = tensor.to(copy.dtype)
        if INTERPRETED and copy.dtype == BF16:  # the interpreter cuts float32 off; GPUs round
            expected = (tensor.view(torch.int32) & -65536).view(F32).to(BF16)
        assert torch.equal(copy, expected)


def _check(lists, options, slack=1.0, ema=True, param_copy=None, ema_copy=None):
    ours, theirs, truth = _clone(lists), _clone(lists), _truth(lists, options)
    copies = {}
    for name, dtype in (("param_copies", param_copy), ("ema_copies", ema_copy)):
        if dtype is not None:
            copies[name] = [torch.empty_like(p, dtype=dtype) for p in ours["params"]]
    emas = ours.pop("emas")
    adamw_ema_(**ours, emas=emas if ema else None, **copies, **options)
    adamw_ema_ref(
        **theirs,
        **{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )
    ours["emas"] = emas
    for name in LISTS[: 6 if ema else 5]:
        for a, b, c in zip(ours[name], theirs[name], truth[name], strict=True):
            if name == "grads":
                assert torch.equal(a, b)
            else:
                # a single random element may cancel to nothing, and its error with it
                if slack == 1 or a.numel() >= 16:
                    assert_not_worse(name, a, b, c, slack=slack)
                # the reference may be as wrong as ours, so both are held against the truth
                torch.testing.assert_close(a.double(), c.double(), rtol=1e-4, atol=1e-5 * slack)
    if not ema:
        assert all(torch.equal(a, b) for a, b in zip(emas, lists["emas"], strict=True))
    _assert_rounded(copies.get("param_copies", []), ours["params"] if param_copy else [])
    _assert_rounded(copies.get("ema_copies", []), emas if ema_copy else [])


@pytest.mark.parametrize("form", ["lerp", "sum"])
@pytest.mark.parametrize("grad", [F32, BF16, F16])
@pytest.mark.parametrize(
    ("ema", "param_copy", "ema_copy"),
    [
        (True, None, BF16),
        (True, BF16, F16),
        (True, F16, None),
        (False, None, None),
        (False, BF16, None),
    ],
)
def test_any_sizes_in_one_list(grad, ema, param_copy, ema_copy, form, device):
    options = {**OPTIONS, "ema_form": form}
    _check(_draw(SIZES, device, 0, grad), options, 1.0, ema, param_copy, ema_copy)


@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=2).map(tuple), max_size=3),
    grad=st.sampled_from([F32, BF16, F16]),
    kinds=st.sampled_from([(True, None, BF16), (True, BF16, BF16), (False, BF16, None)]),
    lr=st.floats(0, 0.1),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.9, 0.0), (0.5, 0.99999)]),
    weight_decay=st.floats(0, 1),
    momentum=st.floats(0, 1),
    form=st.sampled_from(["lerp", "sum"]),
    on_device=st.sampled_from([None, F32, F64]),
    done=st.sampled_from([0, 1, 1000, 100000]),
    seed=st.integers(0, 2**31),
)
def test_any_list(
    shapes, grad, kinds, lr, betas, weight_decay, momentum, form, on_device, done, seed, device
):
    options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
    if on_device is not None:
        options = {k: torch.tensor(v, dtype=on_device, device=device) for k, v in options.items()}
    options |= {"betas": betas, "eps": 1e-8, "ema_form": form}
    _check(_draw(shapes, device, seed, grad, done), options, 4.0, *kinds)


def _published(ema, p, momentum):
    """The average as the published trainer rounds it."""
    return ema.clone().mul_(momentum).add_((1 - momentum) * p)


@pytest.mark.parametrize("on_device", [None, F32, F64])
@pytest.mark.parametrize("flag", [None, 0.0])
@pytest.mark.parametrize("value", [0.996, 0.99873, 0.3, 0.0, 1.0])
def test_the_sum_has_the_published_bits(value, flag, on_device, device):
    """Of the updated weights, at the size at which rounding matters: averages near 1."""
    lists = _draw(SIZES, device)
    lists["emas"] = [1 + 0.01 * t for t in lists["emas"]]
    lists["params"] = [1 + 0.01 * t for t in lists["params"]]
    momentum = value
    if on_device is not None:
        momentum = torch.tensor(value, dtype=on_device, device=device)
    options = {**OPTIONS, "lr": 1e-3, "momentum": momentum, "ema_form": "sum"}
    if flag is not None:
        options["found_inf"] = torch.full((1,), flag, device=device)
    # a float64 value on the device is rounded to float32 like a number
    rounded = float(momentum) if on_device != F32 else momentum
    expected = [t.clone() for t in lists["emas"]]
    for _ in range(4):
        adamw_ema_(**lists, **options)
        expected = [
            _published(a, p, rounded) for a, p in zip(expected, lists["params"], strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(lists["emas"], expected, strict=True))


def _bits(tensors):
    return [t.view(torch.int16 if t.dtype == BF16 else torch.int32).clone() for t in tensors]


@pytest.mark.parametrize("form", ["lerp", "sum"])
@pytest.mark.parametrize("on_device", [False, True])
def test_skipped_steps_leave_odd_values(form, on_device, device):
    """Zeroes keep their sign, infinities and NaN their bits, and none of them spreads."""
    odd = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, -3e38, 1.0], device=device)
    size = len(odd)
    lists = {
        "params": [odd.repeat_interleave(size)],
        "grads": [torch.full((size * size,), math.nan, device=device)],
        "exp_avgs": [odd.repeat(size)],
        "exp_avg_sqs": [odd.repeat(size)],
        "steps": [torch.full((), 3.0, device=device)],
        "emas": [odd.repeat(size)],
        "param_copies": [odd.repeat(size).to(BF16)],
        "ema_copies": [odd.repeat(size).to(BF16)],
    }
    options = {**OPTIONS, "ema_form": form, "found_inf": torch.full((1,), math.nan, device=device)}
    if on_device:
        for name in ("lr", "weight_decay", "momentum"):
            options[name] = torch.tensor([options[name]], device=device)
    before = {name: _bits(tensors) for name, tensors in lists.items()}
    adamw_ema_(**lists, **options)
    for name, tensors in lists.items():
        assert torch.equal(_bits(tensors)[0], before[name][0]), name


class _Reads(TorchDispatchMode):
    """Counts the values that are read to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["lerp", "sum"])
def test_the_cpu_implementation_reads_nothing(form, kernels, device):
    if kernels:
        pytest.skip("not what runs")
    names = ("lr", "weight_decay", "momentum")
    options = {**OPTIONS, **{name: torch.tensor(OPTIONS[name]) for name in names}}
    flags = {"grad_scale": torch.ones(1), "found_inf": torch.zeros(1)}
    lists = _draw(SIZES, device)
    lists["ema_copies"] = [torch.empty_like(t, dtype=BF16) for t in lists["emas"]]
    with _Reads() as reads:
        adamw_ema_(**lists, **options, **flags, ema_form=form)
        assert reads.count == 0
        float(flags["found_inf"])
        assert reads.count == 1


@pytest.mark.parametrize("form", ["lerp", "sum"])
@pytest.mark.parametrize("on_device", [False, True])
def test_found_inf_leaves_every_bit(form, on_device, device):
    options = {**OPTIONS, "ema_form": form}
    if on_device:
        for name in ("lr", "weight_decay", "momentum"):
            options[name] = torch.tensor(options[name], dtype=F64, device=device)
    lists = _draw(SIZES, device)
    copies = {
        name: [torch.full_like(p, 7, dtype=BF16) for p in lists["params"]]
        for name in ("param_copies", "ema_copies")
    }
    lists |= copies
    before = _clone(lists)
    lists["grads"][5][3] = float("inf")
    before["grads"][5][3] = float("inf")
    for flag in (1.0, 3.0):
        adamw_ema_(**lists, **options, found_inf=torch.tensor(flag, device=device))
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(lists[name], tensors, strict=True)), name
    lists["grads"][5][3] = before["grads"][5][3] = 0.5
    adamw_ema_(**lists, **options, found_inf=torch.zeros(1, device=device))
    adamw_ema_(**before, **options)
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(lists[name], tensors, strict=True)), name


@pytest.mark.parametrize("scale", [65536.0, 3.0])
def test_grad_scale_divides(scale, device):
    plain = _draw(SIZES, device)
    scaled = _clone(plain)
    scaled["grads"] = [g * scale for g in plain["grads"]]
    kept = [g.clone() for g in scaled["grads"]]
    adamw_ema_(**plain, **OPTIONS)
    adamw_ema_(**scaled, **OPTIONS, grad_scale=torch.tensor([scale], device=device))
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
        for a, b in zip(scaled[name], plain[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(scaled["grads"], kept, strict=True))


def test_nan_stays_in_its_element(device):
    lists = _draw([(BLOCK + 3,), (9,)], device)
    clean = _clone(lists)
    adamw_ema_(**clean, **OPTIONS)
    lists["grads"][0][BLOCK + 1] = float("nan")
    adamw_ema_(**lists, **OPTIONS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
        assert lists[name][0][BLOCK + 1].isnan()
        lists[name][0][BLOCK + 1] = clean[name][0][BLOCK + 1]
        assert all(torch.equal(a, b) for a, b in zip(lists[name], clean[name], strict=True))


def test_views_at_odd_addresses_and_neighbours(device):
    size = BLOCK + 9
    for shift in (0, 1, 2):
        buffers = _draw([(size + 8,)], device, shift)
        views = {
            name: [t[shift : shift + size] for t in tensors] if name != "steps" else tensors
            for name, tensors in buffers.items()
        }
        before = _clone(buffers)
        truth = _truth(_clone(views), OPTIONS)
        adamw_ema_(**views, **OPTIONS)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
            torch.testing.assert_close(
                views[name][0].double(), truth[name][0], rtol=1e-5, atol=1e-6
            )
            for at in (slice(None, shift), slice(shift + size, None)):
                assert torch.equal(buffers[name][0][at], before[name][0][at])


def test_channels_last(device):
    lists = _draw([(4, 3, 5, 6)], device)
    for name in LISTS:
        if name != "steps":
            lists[name] = [t.to(memory_format=torch.channels_last) for t in lists[name]]
    _check(lists, OPTIONS)


def test_mixed_gradients_and_copies(device):
    lists = _draw(SIZES, device)
    lists["grads"] = [g.to([F32, BF16, F16][n % 3]) for n, g in enumerate(lists["grads"])]
    copies = [torch.empty_like(p, dtype=[BF16, F16][n % 2]) for n, p in enumerate(lists["params"])]
    truth = _truth(_clone(lists), OPTIONS)
    adamw_ema_(**lists, **OPTIONS, ema_copies=copies)
    for name in ("params", "emas", "steps"):
        for a, b in zip(lists[name], truth[name], strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    _assert_rounded(copies, lists["emas"])


@pytest.mark.parametrize(("full", "on_device"), [(False, False), (True, True)])
def test_compiles_whole_and_passes_opcheck(full, on_device, device):
    lists = _draw([(5,), (3, 4)], device)
    options = dict(OPTIONS)
    if not full:
        lists.pop("emas")
    else:
        lists["ema_copies"] = [torch.zeros_like(p, dtype=BF16) for p in lists["params"]]
        options |= {"found_inf": torch.zeros((), device=device)}
    scalars: list[torch.Tensor | None] = [None] * 3
    if on_device:
        scalars = [
            torch.tensor(options[k], device=device) for k in ("lr", "weight_decay", "momentum")
        ]
        options |= dict(zip(("lr", "weight_decay", "momentum"), scalars, strict=True))
    args = [lists[n] for n in LISTS[:5]]
    args += [lists.get("emas", []), [], lists.get("ema_copies", [])]
    args += [[1e-2, 0.9, 0.999, 1e-8, 0.1, 0.75], *scalars, None, options.get("found_inf")]
    args += [options.setdefault("ema_form", "sum" if full else "lerp")]
    torch.library.opcheck(torch.ops.ijepa_kernels.adamw_ema_.default, tuple(args))

    def step(lists):
        adamw_ema_(**lists, **options)
        return [p + 1 for p in lists["params"]]

    runs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mine = _clone(lists)
        results = function(mine)
        runs.append([*results, *(t for tensors in mine.values() for t in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
def test_float64_on_the_cpu():
    lists = {k: [t.double() for t in v] for k, v in _draw([(50,)], "cpu").items()}
    lists["steps"] = [s.float() for s in lists["steps"]]
    truth = _truth(lists, OPTIONS)
    adamw_ema_(**lists, **OPTIONS)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "emas"):
        torch.testing.assert_close(lists[name], truth[name], rtol=1e-12, atol=1e-12)


def test_empty_list_and_versions(device):
    adamw_ema_([], [], [], [], [], lr=0.1)
    lists = _draw([(3,)], device)
    weight = lists["params"][0].requires_grad_()
    y = (weight * torch.ones(3, device=device, requires_grad=True)).sum()
    adamw_ema_(**lists, **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


ZERO = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads must have 1 tensors, got 0"),
        ({"grads": [torch.zeros(4, 3)]}, r"grads\[0\] must have shape \(3, 4\), got \(4, 3\)"),
        ({"params": [ZERO.bfloat16()]}, r"params\[0\] must be float32.*got torch.bfloat16"),
        (
            {"params": [ZERO.to(torch.complex64)]},
            r"params\[0\] must be float32.*complex64",
        ),
        ({"grads": [ZERO.to_sparse()]}, r"grads\[0\] must be dense, got layout torch.sparse_coo"),
        ({"exp_avgs": [ZERO.half()]}, r"exp_avgs\[0\] must be float32.*got torch.float16"),
        (
            {"exp_avg_sqs": [torch.zeros(4, 3).T]},
            r"exp_avg_sqs\[0\] must be dense and have the str",
        ),
        ({"steps": [torch.zeros(2)]}, r"steps\[0\] must have shape \(\), got \(2,\)"),
        ({"steps": [torch.zeros((), dtype=torch.int64)]}, r"steps\[0\] must be float32.*int64"),
        ({"emas": [torch.zeros(3, 4, device="meta")]}, r"emas\[0\] must be on cpu, got meta"),
        ({"param_copies": [ZERO]}, r"param_copies\[0\] must be bfloat16, float16.*float32"),
        ({"ema_copies": [ZERO.half()]}, "ema_copies must come with emas, got emas None"),
        ({"lr": -1.0}, "lr must lie in 0 .. inf, got -1.0"),
        ({"lr": torch.zeros(2)}, r"lr must be a number or one .* shape \(2,\)"),
        ({"weight_decay": math.nan}, "weight_decay must lie in 0 .. inf, got nan"),
        ({"momentum": 1.5}, "momentum must lie in 0 .. 1, got 1.5"),
        ({"ema_form": "mean"}, "ema_form must be lerp or sum, got 'mean'"),
        ({"ema_form": None}, "ema_form must be lerp or sum, got None"),
        ({"eps": -1e-8}, "eps must lie in 0 .. inf, got -1e-08"),
        (
            {"betas": (0.9, 1.0)},
            r"betas must be two numbers in 0 .. 1, 1 excluded, got \(0.9, 1.0\)",
        ),
        ({"found_inf": torch.tensor(1)}, "found_inf must be a number or one .* torch.int64"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale must be on cpu, got meta"),
        ({"emas": [SAME := torch.zeros(3, 4)], "exp_avgs": [SAME]}, "may be written twice"),
        ({"grads": [SAME], "params": [SAME]}, "written and read under another name"),
    ],
)
def test_bad_input(change, message):
    good: dict[str, object] = {name: [torch.zeros(3, 4)] for name in LISTS[:4]}
    good |= {"steps": [torch.zeros(())], "lr": 0.1}
    with pytest.raises(ValueError, match=message):
        adamw_ema_(**{**good, **change})


def test_steps_may_not_be_shared():
    lists = _draw([(3,), (4,)], "cpu")
    lists["steps"] = [lists["steps"][0]] * 2
    with pytest.raises(ValueError, match="may be written twice"):
        adamw_ema_(**lists, **OPTIONS)


def test_bytes():
    assert adamw_ema_bytes(100, F32) == 3600
    assert adamw_ema_bytes(100, F32, param_copy=BF16, ema_copy=BF16) == 4000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 49 GiB on a GPU")
def test_past_2_to_the_31_elements():
    size, edge = 2**31 + 2 * BLOCK + 3, 2**31 - 5
    params, emas, grads, m, v = (
        torch.zeros(size, device="cuda", dtype=d) for d in (F32, F32, BF16, F32, F32)
    )
    grads[edge : edge + 10] = 1.0
    grads[-1] = -2.0
    step = torch.zeros((), device="cuda")
    options = {**OPTIONS, "weight_decay": 0.0, "momentum": 0.5, "lr": 1.0}
    adamw_ema_([params], [grads], [m], [v], [step], emas=[emas], **options)
    # a first step is lr times the sign of the gradient
    for tensor, value in ((params, 1.0), (emas, 0.5)):
        assert torch.allclose(tensor[edge : edge + 10], torch.full((10,), -value, device="cuda"))
        assert math.isclose(float(tensor[-1]), value, rel_tol=1e-5)
        assert tensor[0] == tensor[edge - 1] == tensor[edge + 10] == tensor[-2] == 0
