"""gather_tokens and scatter_tokens, transposes of each other, against float64, in every lane."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels._checks import debug_checks
from ijepa_kernels.gather_tokens import (
    Gather,
    gather_rows,
    gather_tokens,
    gather_tokens_bytes,
    gather_tokens_ref,
    sum_rows,
)
from ijepa_kernels.scatter_tokens import scatter_tokens, scatter_tokens_bytes, scatter_tokens_ref
from ijepa_kernels.testing import assert_not_worse, relative_error
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I32, I64 = torch.int32, torch.int64
B, N = 3, 5
# of B images with N patches; neither sorted
UNIQUE: dict[str, Any] = {
    "packed": [13, 4, 0, 7, 9, 14, 2],
    "rectangular": [[3, 0], [4, 2], [1, 4]],
}
REPEATED: dict[str, Any] = {
    "packed": [13, 4, 13, 0, 7, 4, 13, 13, 1],
    "rectangular": [[3, 3, 0, 3], [0, 1, 2, 3], [4, 4, 4, 4]],
}
FORMS = ["packed", "rectangular"]


class Op(NamedTuple):
    """What differs between the two: of all tensors of a case, the names of those that have a
    gradient, and dtypes of these.
    """

    name: str
    function: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    names: tuple[str, ...]
    dtypes: tuple[tuple[torch.dtype, ...], ...]

    def __str__(self):
        return self.name

    def call(self, function, leaves, case, **options):
        if self is GATHER:
            return function(leaves["x"], case["index"], leaves.get("table"), **options)
        rest = leaves.get("fill"), leaves.get("table")
        return function(leaves["x"], case["index"], case["size"], *rest, **options)


GATHER = Op(
    "gather_tokens",
    gather_tokens,
    gather_tokens_ref,
    ("x", "table"),
    ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F32, BF16)),
)
SCATTER = Op(
    "scatter_tokens",
    scatter_tokens,
    scatter_tokens_ref,
    ("x", "fill", "table"),
    ((F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, F32, BF16)),
)
OPS = (GATHER, SCATTER)


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def op(request):
    return request.param


def _draw(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, F32)
    return (torch.randn(shape, generator=generator, dtype=wide) + 0.5).to(device, dtype)


def _case(op, width, dtypes, index, device, images=B, patches=N, seed=0):
    """The op's tensors, the index, the rows it chooses from, and a gradient of the output."""
    index = torch.as_tensor(index).to(device)
    few, rows = [*index.shape, width], [images, patches, width]
    if op is SCATTER and index.ndim == 1:
        rows = [images * patches, width]
    x, grad = (rows, few) if op is GATHER else (few, rows)
    shapes = {"x": x, "fill": [width], "table": [patches, width], "grad": grad}
    dtype_of = {**dict(zip(op.names, dtypes, strict=True)), "grad": dtypes[0]}
    case = {
        name: _draw(shapes[name], dtype, device, seed + n)
        for n, (name, dtype) in enumerate(dtype_of.items())
    }
    size = patches if index.ndim == 2 else images * patches
    return {**case, "index": index, "size": size}


def _plain(op, device, *, unique=False, form="packed", width=8, dtype=F32):
    index = (UNIQUE if unique else REPEATED)[form]
    return _case(op, width, (dtype, *(F32,) * (len(op.names) - 1)), index, device)


def _run(op, case, function=None, *, optional=("fill", "table"), **options):
    """Output and gradients."""
    leaves = {n: case[n].detach().requires_grad_() for n in op.names if n in ("x", *optional)}
    out = op.call(function or op.function, leaves, case, **options)
    grads = torch.autograd.grad(out, list(leaves.values()), case["grad"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _truth(op, case, *, optional=("fill", "table")):
    """Row by row, in float64."""
    wide = {n: case[n].cpu().double() for n in (*op.names, "grad")}
    x, grad = (wide[n].reshape(-1, wide[n].shape[-1]) for n in ("x", "grad"))
    index, table = case["index"], wide["table"]
    table_of = table if "table" in optional else torch.zeros_like(table)
    rows = [
        (position // index.shape[1] * case["size"] if index.ndim == 2 else 0) + value
        for position, value in enumerate(index.flatten().tolist())
    ]
    out, grad_x, grad_table = (torch.zeros_like(t) for t in (grad, x, table))
    result = {"out": out.view_as(wide["grad"]), "x": grad_x.view_as(wide["x"])}
    result |= {"table": grad_table}
    for position, row in enumerate(rows):
        if op is GATHER:
            out[position] = x[row] + table_of[row % len(table)]
            grad_x[row] += grad[position]
            grad_table[row % len(table)] += grad[position]
        else:
            out[row] += x[position]
            grad_x[position] = grad[row]
    if op is SCATTER:
        result["fill"] = torch.zeros_like(wide["fill"])
        for row in range(len(out)):
            if row not in rows:
                result["fill"] += grad[row]
                out[row] += wide["fill"] if "fill" in optional else 0
            grad_table[row % len(table)] += grad[row]
            out[row] += table_of[row % len(table)]
    device = case["index"].device
    return {k: v.to(device) for k, v in result.items() if k in ("out", "x", *optional)}


def _check(op, case, *, optional=("fill", "table"), slack=1.0, **options):
    ours = _run(op, case, optional=optional, **options)
    same_dtype = _run(op, case, op.reference, optional=optional)
    truth = _truth(op, case, optional=optional)
    for name, value in ours.items():
        assert_not_worse(name, value, same_dtype[name], truth[name], slack=slack)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("op", "dtypes"), [(op, d) for op in OPS for d in op.dtypes])
def test_not_worse_than_torch(op, dtypes, width, device):
    cases = [(form, unique) for form in FORMS for unique in (False, True)]
    if INTERPRETED:  # slow: each combination at another quarter of widths and dtypes
        cases = cases[(WIDTHS.index(width) + op.dtypes.index(dtypes)) % 4 :][:1]
    for form, unique in cases:
        index = (UNIQUE if unique else REPEATED)[form]
        _check(op, _case(op, width, dtypes, index, device), unique=unique)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("optional", [(), ("fill",), ("table",)], ids=str)
def test_index_dtypes_without_fill_or_table(op, form, unique, dtype, optional, device):
    case = _plain(op, device, unique=unique, form=form, width=40, dtype=BF16)
    case["index"] = case["index"].to(dtype)
    _check(op, case, optional=optional, unique=unique)


@pytest.mark.parametrize(("images", "patches", "picked"), [(1, 1, 1), (37, 3, 2), (2, 67, 53)])
@pytest.mark.parametrize("unique", [False, True])
def test_more_rows_than_a_tile(op, images, patches, picked, unique, device):
    """16 rows, or images of a patch, a tile at this width."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand((images, patches), generator=generator).argsort(1)[:, :picked]
    packed = (order + torch.arange(images)[:, None] * patches).flatten()
    for index in (order, packed):
        case = _case(op, 256, (F32,) * len(op.names), index, device, images, patches)
        _check(op, case, unique=unique)


def test_programs_of_the_fill_share_many_rows(device, monkeypatch):
    """Several tiles a program, the last ones cut."""
    module = importlib.import_module("ijepa_kernels.scatter_tokens")
    for programs in (1, 3):
        monkeypatch.setattr(module, "MAX_FILL_PROGRAMS", programs)
        case = _case(SCATTER, 256, (F32,) * 3, torch.arange(0, 134, 3), device, 2, 67)
        _check(SCATTER, case, unique=True)


@given(data=st.data())
def test_any_shape(op, data, device):
    images, patches = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    width = data.draw(st.integers(1, 300))
    dtypes = data.draw(st.sampled_from(op.dtypes))
    unique, packed = data.draw(st.booleans()), data.draw(st.booleans())
    top = images * patches if packed else patches
    length = data.draw(st.integers(1, top if unique else 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (1 if packed else images, top if unique else length)
    if unique:
        index = torch.rand(shape, generator=generator).argsort(1)[:, :length]
    else:
        index = torch.randint(top, shape, generator=generator)
    index = (index[0] if packed else index).to(data.draw(st.sampled_from([I32, I64])))
    case = _case(op, width, dtypes, index, device, images, patches, seed=length)
    optional = data.draw(st.sampled_from([(), ("fill",), ("table",), ("fill", "table")]))
    _check(op, case, optional=optional, unique=unique, slack=4)


def test_flat_rows_are_the_same(device):
    case = _plain(GATHER, device, width=24)
    x, index, table = case["x"], case["index"], case["table"]
    flat = gather_tokens(x.flatten(0, 1), index, table)
    assert torch.equal(flat, gather_tokens(x, index, table))


def test_strides(op, device):
    case = _plain(op, device, form="rectangular", width=64)
    case["x"] = case["x"].transpose(0, 1).contiguous().transpose(0, 1)
    case["table"] = case["table"].repeat(1, 2)[:, ::2]
    case["index"] = case["index"].t().contiguous().t()
    case["grad"] = case["grad"][:1, :1].expand(case["grad"].shape)
    if op is SCATTER:
        case["fill"] = case["fill"].repeat(2)[::2]
    assert not any(case[name].is_contiguous() for name in ("x", "table", "index", "grad"))
    _check(op, case)
    if op is GATHER:
        case["index"] = case["index"][:, ::4].expand(3, 1)
        case["grad"] = case["grad"][:, :1]
        _check(op, case)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_named(op, shape, unique, device):
    images = 2 if shape == (0,) else shape[0]
    dtypes = (BF16, *(F32,) * (len(op.names) - 1))
    case = _case(op, 16, dtypes, torch.zeros(shape, dtype=I32), device, images)
    result, truth = _run(op, case, unique=unique), _truth(op, case)
    for name, value in result.items():
        assert value.shape == truth[name].shape
        assert relative_error(value, truth[name]) < 1e-2, name
    if op is SCATTER:
        without = scatter_tokens(case["x"], case["index"], case["size"], unique=unique)
        assert torch.equal(without, torch.zeros_like(result["out"]))


@pytest.mark.parametrize("unique", [False, True])
def test_rows_never_named_have_no_gradient(unique, device):
    case = _plain(GATHER, device, unique=unique)
    grad = _run(GATHER, case, unique=unique)["x"]
    unnamed = sorted(set(range(B * N)) - set(case["index"].tolist()))
    assert torch.equal(grad.view(-1, 8)[unnamed], torch.zeros(len(unnamed), 8, device=device))


def test_every_row_given(device):
    """Nothing is filled: the fill's gradient is exactly zero."""
    case = _case(SCATTER, 16, (BF16, F32, F32), torch.arange(B * N).flip(0), device)
    result = _run(SCATTER, case, unique=True)
    assert torch.equal(result["fill"], torch.zeros(16, device=device))


def test_sums_are_float32_and_rounded_once(op, device):
    """500 ones in one place, or 600 unnamed rows: in bfloat16 sums would stop growing at 256."""
    index = torch.full((500,), 3, device=device)
    case = _case(op, 8, (BF16,) * len(op.names), index, device, 601, 1)
    for name in ("x", "grad"):
        case[name] = torch.ones_like(case[name])
    for name in ("fill", "table"):
        if name in case:
            case[name] = torch.zeros_like(case[name])
    result, truth = _run(op, case), _truth(op, case)
    for name, value in result.items():
        assert relative_error(value, truth[name]) <= torch.finfo(BF16).eps, name
    # a little over half way from 1 to the next float16; the table rounded first is exactly half
    # way, and the sum 1
    x, table = torch.full((1, 8), 1.0), torch.full((1, 8), 2**-11 + 2**-22)
    leaves = {"x": x.to(device, F16), "table": table.to(device)}
    one = {"index": torch.tensor([0], device=device), "size": 1}
    out = op.call(op.function, leaves, one)
    assert torch.equal(out.float().cpu(), torch.full((1, 8), 1 + 2**-10))


@pytest.mark.parametrize("unique", [False, True])
def test_nan_stays_in_its_row(op, unique, device):
    case = _plain(op, device, unique=unique, width=96)
    clean = _run(op, case, unique=unique)
    # position 1 names row 4, the only one of its image in both lists
    few, rows = ("grad", "x") if op is GATHER else ("x", "grad")
    case[few].view(-1, 96)[1, 9] = case[rows].view(-1, 96)[4, 7] = float("nan")
    dirty = _run(op, case, unique=unique)
    named, row = case["index"] == 4, torch.arange(B * N, device=device) == 4
    hit = {"out": named, "x": row} if op is GATHER else {"out": row, "x": named}
    hit["table"] = torch.arange(N, device=device) == 4
    for name, where in hit.items():
        before, after = (r[name].view(-1, 96) for r in (clean, dirty))
        assert torch.equal(after[~where], before[~where]), name
        assert (after[where].isnan().sum(1) == 1).all(), name
    if op is SCATTER:
        assert torch.equal(dirty["fill"], clean["fill"])


def test_twice_the_same_bits(op, device):
    index = torch.randint(20, (400,), generator=torch.Generator().manual_seed(0))
    case = _case(op, 128, (F32,) * len(op.names), index, device, images=4)
    first, second = (_run(op, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inverse_of_gather(device):
    for form in FORMS:
        case = _plain(SCATTER, device, unique=True, form=form)
        tokens = scatter_tokens(case["x"], case["index"], case["size"], unique=True)
        assert torch.equal(gather_tokens(tokens, case["index"], unique=True), case["x"])


def test_only_wanted_gradients(op, device):
    case = _plain(op, device)
    every = _run(op, case)
    for name in op.names:
        leaves = {n: case[n].detach().requires_grad_(n == name) for n in op.names}
        out = op.call(op.function, leaves, case)
        (alone,) = torch.autograd.grad(out, leaves[name], case["grad"])
        # a table's gradient alone is added up in another order
        assert_not_worse(name, alone, every[name], every[name].double())


def test_differentiable_once(op, device):
    case = _plain(op, device)
    leaves = {"x": case["x"].requires_grad_()}
    out = op.call(op.function, leaves, case)
    grad = case["grad"].requires_grad_()
    (first,) = torch.autograd.grad(out, leaves["x"], grad, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name}_bwd has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unique", [False, True])
def test_compiles_whole(op, form, unique, device):
    case = _plain(op, device, unique=unique, form=form, width=40, dtype=BF16)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(op, case, f, unique=unique) for f in (op.function, compiled))
    assert all(torch.equal(eager[name], graph[name]) for name in eager)


def test_opcheck(op, device):
    ops = torch.ops.ijepa_kernels
    forward, backward = (getattr(ops, op.name + end).default for end in ("", "_bwd"))
    case = _plain(op, device, unique=True, width=40, dtype=BF16)
    size = () if op is GATHER else (case["size"],)
    leaves = [case[name].requires_grad_() for name in op.names]
    torch.library.opcheck(forward, (leaves[0], case["index"], *size, *leaves[1:], True))
    for need_x, other in ((True, True), (True, False), (False, True)):
        options: tuple[Any, ...] = (need_x, other)
        if op is GATHER:
            options = (list(case["x"].shape), N if other else 0, F32, not other, need_x)
        torch.library.opcheck(backward, (case["grad"], case["index"], *options))
    case = _plain(op, device, form="rectangular", width=40)
    size = () if op is GATHER else (case["size"],)
    nothing = [None] * (len(op.names) - 1)
    torch.library.opcheck(forward, (case["x"], case["index"], *size, *nothing, False))


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(op, form):
    case = _case(op, 3, (F64,) * len(op.names), REPEATED[form], "cpu")

    def function(*tensors):
        return op.call(op.function, dict(zip(op.names, tensors, strict=True)), case)

    torch.autograd.gradcheck(function, tuple(case[name].requires_grad_() for name in op.names))


GOOD: dict[Op, dict[str, Any]] = {
    GATHER: {"x": torch.zeros(3, 5, 4), "index": torch.zeros(2).int(), "table": None},
    SCATTER: {"x": torch.zeros(2, 4), "index": torch.zeros(2).int(), "num_tokens": 10},
}
ONE_EACH = torch.zeros(3, 1).int()
BAD_BOTH = [
    ({"x": torch.zeros(15, 4).long()}, "x must be float32.*got torch.int64"),
    ({"index": torch.zeros(3)}, "index must be int32 or int64, got torch.float32"),
    ({"index": torch.tensor(3)}, r"index must have shape \(R,\) or \(B, K\), got \(\)"),
    ({"index": torch.zeros(3).int().to("meta")}, "index must be on cpu, got meta"),
    ({"table": torch.zeros(4, 4)}, "table must have shape .N, D. with N dividing"),
    ({"table": torch.zeros(0, 4)}, r"table must have shape .*, got \(0, 4\)"),
    ({"table": torch.zeros(5, 3)}, r"table must have shape \(5, 4\), got \(5, 3\)"),
    ({"table": torch.zeros(5, 4).int()}, "table must be float32"),
]
BAD_GATHER = [
    ({"x": torch.zeros(4)}, r"x must have shape \(rows, D\) or \(B, N, D\), got \(4,\)"),
    ({"x": torch.zeros(15, 0)}, r"x must have shape .*, got \(15, 0\)"),
    ({"index": torch.zeros(2, 1).int()}, r"x must have shape \(B, N, D\) for an index \(B, K"),
    (
        {"index": ONE_EACH, "table": torch.zeros(15, 4)},
        r"table must have shape \(5, 4\), got \(15, 4\)",
    ),
]
BAD_SCATTER = [
    ({"x": torch.zeros(3, 4)}, r"x must have the shape of index, \(2,\), .* got \(3, 4\)"),
    ({"x": torch.zeros(2, 0)}, r"x must have the shape of index, .* got \(2, 0\)"),
    ({"x": torch.zeros(2)}, r"x must have the shape of index, .* got \(2,\)"),
    ({"num_tokens": 0}, "num_tokens must be positive, got 0"),
    ({"num_tokens": 2**31}, "x and the output must have at most 2147483647 rows, got 2147"),
    ({"fill": torch.zeros(1, 4)}, r"fill must have shape \(4,\), got \(1, 4\)"),
    ({"fill": torch.zeros(4).int()}, "fill must be float32"),
    (
        {"x": torch.zeros(3, 1, 4), "index": ONE_EACH, "table": torch.zeros(5, 4)},
        r"table must have shape \(10, 4\), got \(5, 4\)",
    ),
]


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        *((GATHER, *case) for case in BAD_BOTH + BAD_GATHER),
        *((SCATTER, *case) for case in BAD_BOTH + BAD_SCATTER),
    ],
)
def test_bad_input(op, change, message):
    with pytest.raises(ValueError, match=message):
        op.function(**{**GOOD[op], **change})


@pytest.mark.parametrize(("value", "form"), [(15, 0), (-1, 0), (5, 1), (-1, 1), (2**31 - 1, 0)])
@pytest.mark.parametrize("unique", [False, True])
def test_index_out_of_range(op, value, form, unique, device, kernels):
    case = _plain(op, device, unique=True, form=FORMS[form], width=20)
    clean = _run(op, case, unique=unique)
    good = case["index"].flatten()[1].item()
    case["index"].view(-1)[1] = value
    message = f"index must lie in 0 .. {4 if form else 14}, got {value} at position 1"
    with debug_checks(), pytest.raises(ValueError, match=message):
        _run(op, case, unique=unique)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            _run(op, case, unique=unique)
        return
    # position 1 belongs to the first image in both forms; nobody names its row any more
    dirty, expected = _run(op, case, unique=unique), {k: v.clone() for k, v in clean.items()}
    out, grad_x = (expected[name].view(-1, 20) for name in ("out", "x"))
    if op is GATHER:
        assert dirty["out"].view(-1, 20)[1].isnan().all()
        out[1] = dirty["out"].view(-1, 20)[1] = 0
        grad_x[good] = 0
        expected["table"][good % N] -= case["grad"].view(-1, 20)[1]
    else:
        out[good] = case["fill"] + case["table"][good % N]
        grad_x[1] = 0
        expected["fill"] += case["grad"].view(-1, 20)[good]
    for name, tensor in dirty.items():
        exact = name in ("out", "x")
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0 if exact else 1e-5)


def test_broken_promise(op, device, kernels):
    case = _plain(op, device)

    def run(index, **options):
        leaves, given = {"x": case["x"]}, {**case, "index": index}
        return op.call(op.function, leaves, given, **options)

    message = "index must not repeat with unique=True, got 4 at positions 1 and 5$"
    with debug_checks(), pytest.raises(ValueError, match=message):
        run(case["index"], unique=True)
    with debug_checks():
        run(case["index"])
    rectangular = torch.tensor([[0, 1, 2], [4, 3, 4], [0, 0, 0]], device=device)
    where = "got 4 at positions 0 and 2 of image 1"
    if op is GATHER:
        with debug_checks(), pytest.raises(ValueError, match=where):
            run(rectangular, unique=True)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            run(case["index"], unique=True)
        return
    # one of the rows arrives, nothing else happens
    result = _run(op, case, optional=(), unique=True)
    summed, rows = ("x", "grad") if op is GATHER else ("out", "x")
    candidates = case[rows][case["index"] == 13]
    assert any(torch.equal(result[summed].view(-1, 8)[13], row) for row in candidates)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unique", [False, True])
def test_gather_past_two_to_the_31_elements(unique, device):
    rows, width = 2**21 + 3, 1024
    x = torch.zeros((rows, width), dtype=BF16, device=device)
    x[-3:] = torch.arange(1, 4, device=device)[:, None]
    x.requires_grad_()
    index = torch.arange(rows - 1, -1, -1, dtype=I32, device=device)
    out = gather_tokens(x, index, unique=unique)  # the rows in reverse
    assert torch.equal(out[:4, 5].float().cpu(), torch.tensor([3.0, 2, 1, 0]))
    grad = torch.zeros_like(out)
    grad[-2:] = torch.tensor([[7.0], [8.0]], dtype=BF16, device=device)
    grad[0] = 9
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(grad_x[[0, 1, rows - 1], 3].float().cpu(), torch.tensor([8.0, 7, 9]))
    assert grad_x.count_nonzero() == 3 * width


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unique", [False, True])
def test_scatter_past_two_to_the_31_elements(unique, device):
    rows, width = 2**21 + 3, 1024
    x = torch.zeros((rows - 1, width), dtype=BF16, device=device)
    x[:2] = torch.tensor([[7.0], [8.0]], dtype=BF16, device=device)
    fill = torch.full((width,), 5.0, device=device)
    index = torch.arange(rows - 1, 0, -1, dtype=I32, device=device)
    leaves = [t.requires_grad_() for t in (x, fill)]
    out = scatter_tokens(x, index, rows, fill, unique=unique)  # in reverse; row 0 is filled
    expected = {rows - 1: 7.0, rows - 2: 8.0, rows - 3: 0.0, 1: 0.0, 0: 5.0}
    for row, value in expected.items():
        assert (out[row] == value).all(), row
    grad = torch.zeros_like(out)
    grad[-1], grad[1], grad[0] = 3, 4, 6
    grad_x, grad_fill = torch.autograd.grad(out, leaves, grad)
    assert (grad_x[0] == 3).all()
    assert (grad_x[-1] == 4).all()
    assert grad_x.count_nonzero() == 2 * width
    assert (grad_fill == 6).all()


def test_bytes():
    # 7 rows of 100 bfloat16 read and written, 7 indices; backward all 50 written
    assert gather_tokens_bytes(50, 7, 100, BF16) == 1400 + 1400 + 28
    assert gather_tokens_bytes(50, 7, 100, BF16, backward=True) == 1400 + 10000 + 28
    assert scatter_tokens_bytes(50, 7, 100, BF16) == 1400 + 10000 + 28
    filled = scatter_tokens_bytes(50, 7, 100, BF16, fill_dtype=F32, table_rows=5)
    assert filled == 11400 + 28 + 400 + 2000
    # 7 of the gradient's rows read, 7 written; all 50 read for the fill
    assert scatter_tokens_bytes(50, 7, 100, BF16, backward=True) == 1400 + 1400 + 28
    filled = scatter_tokens_bytes(50, 7, 100, BF16, fill_dtype=F32, backward=True)
    assert filled == 10000 + 1400 + 28 + 400


# --- for derivatives by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [7, 192, 1280])
@pytest.mark.parametrize("unique", [True, False])
def test_rows_and_their_sums(unique, width, dtype, device):
    """Copies of rows, and the sums of what comes back, by lists that the caller made."""
    rows, index = 15, (UNIQUE if unique else REPEATED)["packed"]
    picked = torch.tensor(index, dtype=I32)
    if unique:
        listed, starts = torch.full((rows,), -1, dtype=I32), None
        listed[picked.long()] = torch.arange(len(index), dtype=I32)
    else:
        listed = picked.argsort(stable=True).int()
        counts = torch.bincount(picked, minlength=rows).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=I64), counts]).to(device, I32)
    gather = Gather(picked.to(device), listed.to(device), starts)
    x = _draw((rows, width), dtype, device)
    assert torch.equal(gather_rows(x, gather.picked), x[gather.picked.long()])
    grad = _draw((len(index), width), dtype, device, 1)
    truth = torch.zeros(rows, width, dtype=F64)
    for place, row in enumerate(index):
        truth[row] += grad[place].cpu().double()
    plain = torch.zeros(rows, width, dtype=F32).index_add(0, picked.long(), grad.cpu().float())
    mine = sum_rows(grad, gather, rows)
    assert mine.dtype == dtype
    assert_not_worse("sums", mine.cpu(), plain.to(dtype), truth)
    # a view of columns, as of queries beside keys and values
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(gather_rows(wide[:, :width], gather.picked), x[gather.picked.long()])
