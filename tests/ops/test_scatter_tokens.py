"""scatter_tokens against float64, in every lane."""

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ijepa_kernels._checks import debug_checks
from ijepa_kernels.gather_tokens import gather_tokens
from ijepa_kernels.scatter_tokens import scatter_tokens, scatter_tokens_bytes, scatter_tokens_ref
from ijepa_kernels.testing import assert_not_worse, relative_error
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I32, I64 = torch.int32, torch.int64
# of x, fill, table
DTYPES = [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, F32, BF16)]
NAMES = ("x", "fill", "table")
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


def _draw(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, F32)
    return (torch.randn(shape, generator=generator, dtype=wide) + 0.5).to(device, dtype)


def _inputs(width, dtypes, index, device, images=B, patches=N, seed=0):
    """x, fill, table, index, number of tokens, and a gradient of the output."""
    index = torch.as_tensor(index).to(device)
    leading = (images * patches,) if index.ndim == 1 else (images, patches)
    return (
        _draw((*index.shape, width), dtypes[0], device, seed),
        _draw((width,), dtypes[1], device, seed + 1),
        _draw((patches, width), dtypes[2], device, seed + 2),
        index,
        leading[-1],
        _draw((*leading, width), dtypes[0], device, seed + 3),
    )


def _run(function, inputs, *, optional=("fill", "table"), **options):
    """Output and gradients."""
    *tensors, index, num_tokens, grad = inputs
    leaves = {
        name: t.detach().requires_grad_()
        for name, t in zip(NAMES, tensors, strict=True)
        if name in ("x", *optional)
    }
    out = function(
        leaves["x"], index, num_tokens, leaves.get("fill"), leaves.get("table"), **options
    )
    grads = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def _truth(inputs, *, optional=("fill", "table")):
    """Row by row, in float64."""
    x, fill, table, index, num_tokens, grad = inputs
    x, fill, table, grad = (t.cpu().double() for t in (x, fill, table, grad))
    width = x.shape[-1]
    given, grads = x.reshape(-1, width), grad.reshape(-1, width)
    out, grad_given, grad_table = (torch.zeros_like(t) for t in (grads, given, table))
    named = set()
    for position, value in enumerate(index.flatten().tolist()):
        row = (position // index.shape[1] * num_tokens if index.ndim == 2 else 0) + value
        named.add(row)
        out[row] += given[position]
        grad_given[position] = grads[row]
    grad_fill = torch.zeros_like(fill)
    for row in range(len(out)):
        if row not in named:
            grad_fill += grads[row]
            out[row] += fill if "fill" in optional else 0
        grad_table[row % len(table)] += grads[row]
        out[row] += table[row % len(table)] if "table" in optional else 0
    results = {
        "out": out.view(grad.shape),
        "x": grad_given.view(x.shape),
        "fill": grad_fill,
        "table": grad_table,
    }
    device = inputs[0].device
    return {k: v.to(device) for k, v in results.items() if k in ("out", "x", *optional)}


def _check(inputs, *, optional=("fill", "table"), slack=1.0, **options):
    ours = _run(scatter_tokens, inputs, optional=optional, **options)
    same_dtype = _run(scatter_tokens_ref, inputs, optional=optional)
    truth = _truth(inputs, optional=optional)
    for name, value in ours.items():
        assert_not_worse(name, value, same_dtype[name], truth[name], slack=slack)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_not_worse_than_torch(width, dtypes, device):
    cases = [(form, unique) for form in FORMS for unique in (False, True)]
    if INTERPRETED:  # slow: each combination at another quarter of widths and dtypes
        cases = cases[(WIDTHS.index(width) + DTYPES.index(dtypes)) % 4 :][:1]
    for form, unique in cases:
        index = (UNIQUE if unique else REPEATED)[form]
        _check(_inputs(width, dtypes, index, device), unique=unique)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("dtype", [I32, I64])
@pytest.mark.parametrize("optional", [(), ("fill",), ("table",)], ids=str)
def test_index_dtypes_without_fill_or_table(form, unique, dtype, optional, device):
    index = torch.tensor((UNIQUE if unique else REPEATED)[form], dtype=dtype)
    inputs = _inputs(40, (BF16, F32, F32), index, device)
    _check(inputs, optional=optional, unique=unique)


@pytest.mark.parametrize(("images", "patches", "picked"), [(1, 1, 1), (37, 3, 2), (2, 67, 53)])
def test_more_rows_than_a_tile(images, patches, picked, device):
    """16 rows a tile at this width."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand((images, patches), generator=generator).argsort(1)[:, :picked]
    packed = (order + torch.arange(images)[:, None] * patches).flatten()
    for index, unique in ((order, True), (packed, False)):
        _check(_inputs(256, (F32,) * 3, index, device, images, patches), unique=unique)


def test_programs_of_the_fill_share_many_rows(device, monkeypatch):
    """Several tiles a program, the last ones cut."""
    module = importlib.import_module("ijepa_kernels.scatter_tokens")
    for programs in (1, 3):
        monkeypatch.setattr(module, "MAX_FILL_PROGRAMS", programs)
        index = torch.arange(0, 134, 3)
        _check(_inputs(256, (F32,) * 3, index, device, 2, 67), unique=True)


@given(data=st.data())
def test_any_shape(data, device):
    images, patches = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    width = data.draw(st.integers(1, 300))
    dtypes = data.draw(st.sampled_from(DTYPES))
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
    inputs = _inputs(width, dtypes, index, device, images, patches, seed=length)
    optional = data.draw(st.sampled_from([(), ("fill",), ("table",), ("fill", "table")]))
    _check(inputs, optional=optional, unique=unique, slack=4)


def test_strides(device):
    x, fill, table, index, num_tokens, grad = _inputs(
        64, (F32,) * 3, REPEATED["rectangular"], device
    )
    inputs = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        fill.repeat(2)[::2],
        table.repeat(1, 2)[:, ::2],
        index.t().contiguous().t(),
        num_tokens,
        grad[:1, :1].expand(3, 5, 64),
    )
    assert not any(t.is_contiguous() for t in inputs if isinstance(t, torch.Tensor) and t.ndim > 1)
    _check(inputs)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_nothing_given(shape, unique, device):
    images = 2 if shape == (0,) else shape[0]
    inputs = _inputs(16, (BF16, F32, F32), torch.zeros(shape, dtype=I32), device, images)
    result = _run(scatter_tokens, inputs, unique=unique)
    truth = _truth(inputs)
    assert result["x"].shape == (*shape, 16)
    for name in ("out", "fill", "table"):
        assert relative_error(result[name], truth[name]) < 1e-2, name
    without = scatter_tokens(inputs[0], inputs[3], inputs[4], unique=unique)
    assert torch.equal(without, torch.zeros_like(result["out"]))


def test_every_row_given(device):
    """Nothing is filled: the fill's gradient is exactly zero."""
    inputs = _inputs(16, (BF16, F32, F32), torch.arange(B * N).flip(0), device)
    result = _run(scatter_tokens, inputs, unique=True)
    assert torch.equal(result["fill"], torch.zeros(16, device=device))


@pytest.mark.parametrize("form", FORMS)
def test_inverse_of_gather(form, device):
    index = torch.tensor(UNIQUE[form], device=device)
    x = _inputs(16, (BF16, F32, F32), index, device)[0]
    tokens = scatter_tokens(x, index, B * N if form == "packed" else N, unique=True)
    assert torch.equal(gather_tokens(tokens, index, unique=True), x)


def test_sums_are_float32_and_rounded_once(device):
    """500 ones in one place, or 600 unnamed rows: in bfloat16 sums would stop growing at 256."""
    x = torch.ones((500, 8), dtype=BF16, device=device)
    index = torch.full((500,), 3, device=device)
    fill = torch.zeros(8, dtype=BF16, device=device)
    grad = torch.ones((601, 8), dtype=BF16, device=device)
    inputs = (x, fill, torch.zeros((1, 8), dtype=BF16, device=device), index, 601, grad)
    result, truth = _run(scatter_tokens, inputs), _truth(inputs)
    for name in ("out", "fill", "table"):
        assert relative_error(result[name], truth[name]) <= torch.finfo(BF16).eps, name
    # a little over half way from 1 to the next float16; the table rounded first is exactly half
    # way, and the sum 1
    x, table = torch.full((1, 8), 1.0), torch.full((1, 8), 2**-11 + 2**-22)
    index = torch.tensor([0], device=device)
    out = scatter_tokens(x.to(device, F16), index, 1, None, table.to(device))
    assert torch.equal(out.float().cpu(), torch.full((1, 8), 1 + 2**-10))


@pytest.mark.parametrize("unique", [False, True])
def test_nan_stays_in_its_row(unique, device):
    index = (UNIQUE if unique else REPEATED)["packed"]
    inputs = _inputs(96, (F32,) * 3, index, device)
    clean = _run(scatter_tokens, inputs, unique=unique)
    x, index, grad = inputs[0], inputs[3], inputs[5]
    x[1, 9] = grad[4, 7] = float("nan")  # position 1 and row 4, which it names
    dirty = _run(scatter_tokens, inputs, unique=unique)
    for name, hit in (
        ("out", torch.arange(B * N, device=device) == 4),
        ("x", index == 4),
        ("table", torch.arange(N, device=device) == 4),
    ):
        assert torch.equal(dirty[name][~hit], clean[name][~hit]), name
        assert (dirty[name][hit].isnan().sum(1) == 1).all(), name
    assert torch.equal(dirty["fill"], clean["fill"])


def test_twice_the_same_bits(device):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(60, (400,), generator=generator)
    inputs = _inputs(128, (F32,) * 3, index, device, images=12)
    first, second = (_run(scatter_tokens, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_wanted_gradients(device):
    *tensors, index, num_tokens, grad = _inputs(12, (F32,) * 3, REPEATED["packed"], device)
    every = _run(scatter_tokens, (*tensors, index, num_tokens, grad))
    for number, name in enumerate(NAMES):
        leaves = [t.detach().requires_grad_(n == number) for n, t in enumerate(tensors)]
        out = scatter_tokens(leaves[0], index, num_tokens, *leaves[1:])
        (alone,) = torch.autograd.grad(out, leaves[number], grad)
        assert torch.equal(alone, every[name]), name


def test_differentiable_once(device):
    x, _, _, index, num_tokens, grad = _inputs(4, (F32,) * 3, REPEATED["packed"], device)
    out = scatter_tokens(x.requires_grad_(), index, num_tokens)
    (first,) = torch.autograd.grad(out, x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="scatter_tokens_bwd has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unique", [False, True])
def test_compiles_whole(form, unique, device):
    inputs = _inputs(40, (BF16, F32, F32), (UNIQUE if unique else REPEATED)[form], device)
    compiled = torch.compile(scatter_tokens, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(f, inputs, unique=unique) for f in (scatter_tokens, compiled))
    assert all(torch.equal(eager[name], graph[name]) for name in eager)


def test_opcheck(device):
    ops = torch.ops.ijepa_kernels
    x, fill, table, index, num_tokens, grad = _inputs(
        40, (BF16, F32, F32), UNIQUE["packed"], device
    )
    leaves = [t.requires_grad_() for t in (x, fill, table)]
    arguments = (leaves[0], index, num_tokens, *leaves[1:], True)
    torch.library.opcheck(ops.scatter_tokens.default, arguments)
    for need_x, need_fill in ((True, True), (True, False), (False, True)):
        arguments = (grad, index, need_x, need_fill)
        torch.library.opcheck(ops.scatter_tokens_bwd.default, arguments)
    x, _, _, index, num_tokens, grad = _inputs(
        40, (BF16, F32, F32), REPEATED["rectangular"], device
    )
    arguments = (x, index, num_tokens, None, None, False)
    torch.library.opcheck(ops.scatter_tokens.default, arguments)
    torch.library.opcheck(ops.scatter_tokens_bwd.default, (grad, index, True, True))


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    *tensors, index, num_tokens, _ = _inputs(3, (F64,) * 3, REPEATED[form], "cpu")
    torch.autograd.gradcheck(
        lambda x, fill, table: scatter_tokens(x, index, num_tokens, fill, table),
        tuple(t.requires_grad_() for t in tensors),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4).long()}, "x must be float32.*got torch.int64"),
        ({"x": torch.zeros(3, 4)}, r"x must have the shape of index, \(2,\), .* got \(3, 4\)"),
        ({"x": torch.zeros(2, 0)}, r"x must have the shape of index, .* got \(2, 0\)"),
        ({"x": torch.zeros(2)}, r"x must have the shape of index, .* got \(2,\)"),
        ({"index": torch.zeros(2)}, "index must be int32 or int64, got torch.float32"),
        ({"index": torch.tensor(3)}, r"index must have shape \(R,\) or \(B, K\), got \(\)"),
        ({"index": torch.zeros(2).int().to("meta")}, "index must be on cpu, got meta"),
        ({"num_tokens": 0}, "num_tokens must be positive, got 0"),
        ({"num_tokens": 2**31}, "x and the output must have at most 2147483647 rows, got 2147"),
        ({"fill": torch.zeros(1, 4)}, r"fill must have shape \(4,\), got \(1, 4\)"),
        ({"fill": torch.zeros(4).int()}, "fill must be float32"),
        ({"table": torch.zeros(4, 4)}, "table must have shape .N, D. with N dividing num_tokens"),
        ({"table": torch.zeros(0, 4)}, r"table must have shape .* = 10, got \(0, 4\)"),
        ({"table": torch.zeros(5, 3)}, r"table must have shape \(5, 4\), got \(5, 3\)"),
        ({"table": torch.zeros(5, 4).int()}, "table must be float32"),
        (
            {
                "x": torch.zeros(2, 1, 4),
                "index": torch.zeros(2, 1).int(),
                "table": torch.zeros(5, 4),
            },
            r"table must have shape \(10, 4\), got \(5, 4\)",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(2, 4), "index": torch.zeros(2).int(), "num_tokens": 10}
    with pytest.raises(ValueError, match=message):
        scatter_tokens(**{**good, **change})


@pytest.mark.parametrize(("value", "form"), [(15, 0), (-1, 0), (5, 1), (-1, 1), (2**31 - 1, 0)])
@pytest.mark.parametrize("unique", [False, True])
def test_index_out_of_range(value, form, unique, device, kernels):
    inputs = list(_inputs(20, (F32,) * 3, UNIQUE[FORMS[form]], device))
    clean = _run(scatter_tokens, inputs, unique=unique)
    good = inputs[3].flatten()[1].item()
    inputs[3].view(-1)[1] = value
    message = f"index must lie in 0 .. {4 if form else 14}, got {value} at position 1"
    with debug_checks(), pytest.raises(ValueError, match=message):
        _run(scatter_tokens, inputs, unique=unique)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            _run(scatter_tokens, inputs, unique=unique)
        return
    dirty = _run(scatter_tokens, inputs, unique=unique)
    out = clean["out"].clone()
    # position 1 belongs to the first image in both forms; the row it named is filled now
    out.view(-1, 20)[good] = inputs[1] + inputs[2][good % N]
    assert torch.equal(dirty["out"], out)
    grad_x = clean["x"].clone()
    grad_x.view(-1, 20)[1] = 0
    assert torch.equal(dirty["x"], grad_x)
    fill = clean["fill"] + inputs[5].view(-1, 20)[good]
    assert torch.allclose(dirty["fill"], fill, atol=1e-5)
    assert torch.equal(dirty["table"], clean["table"])


def test_broken_promise(device, kernels):
    x, _, _, index, num_tokens, _ = _inputs(8, (F32,) * 3, REPEATED["packed"], device)
    message = "index must not repeat with unique=True, got 4 at positions 1 and 5$"
    with debug_checks(), pytest.raises(ValueError, match=message):
        scatter_tokens(x, index, num_tokens, unique=True)
    with debug_checks():
        scatter_tokens(x, index, num_tokens)
    if kernels:  # one of the rows arrives, nothing else happens
        out = scatter_tokens(x, index, num_tokens, unique=True)
        assert any(torch.equal(out[13], candidate) for candidate in x[index == 13])
    else:
        with pytest.raises(ValueError, match=message):
            scatter_tokens(x, index, num_tokens, unique=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unique", [False, True])
def test_past_two_to_the_31_elements(unique, device):
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
    # 7 rows of 100 bfloat16 read, 50 written, 7 indices
    assert scatter_tokens_bytes(50, 7, 100, BF16) == 1400 + 10000 + 28
    filled = scatter_tokens_bytes(50, 7, 100, BF16, fill_dtype=F32, table_rows=5)
    assert filled == 11400 + 28 + 400 + 2000
    # 7 of the gradient's rows read, 7 written; all 50 read for the fill
    assert scatter_tokens_bytes(50, 7, 100, BF16, backward=True) == 1400 + 1400 + 28
    filled = scatter_tokens_bytes(50, 7, 100, BF16, fill_dtype=F32, backward=True)
    assert filled == 10000 + 1400 + 28 + 400
