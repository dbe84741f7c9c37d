"""gather_tokens against float64, in every lane."""

from typing import Any

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
from ijepa_kernels.testing import assert_not_worse, relative_error
from tests.ops.conftest import INTERPRETED

WIDTHS = [192, 384, 768, 1024, 1280, 1408, 1, 7, 100, 1023]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
I32, I64 = torch.int32, torch.int64
DTYPES = [(F32, F32), (BF16, F32), (BF16, BF16), (F16, F32), (F32, BF16)]
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
    """x, table, index, and a gradient of the output."""
    index = torch.as_tensor(index).to(device)
    return (
        _draw((images, patches, width), dtypes[0], device, seed),
        _draw((patches, width), dtypes[1], device, seed + 1),
        index,
        _draw((*index.shape, width), dtypes[0], device, seed + 2),
    )


def _run(function, inputs, *, with_table=True, **options):
    """Output and gradients."""
    x, table, index, grad = inputs
    leaves = [t.detach().requires_grad_() for t in (x, table)[: 1 + with_table]]
    out = function(leaves[0], index, *leaves[1:], **options)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "x", "table"), (out.detach(), *grads), strict=False))


def _truth(inputs, *, with_table=True):
    """Row by row, in float64."""
    x, table, index, grad = (t.cpu().double() if t.is_floating_point() else t for t in inputs)
    patches, width = table.shape
    rows = x.reshape(-1, width)
    grads = grad.reshape(-1, width)
    out = torch.empty_like(grads)
    grad_rows, grad_table = torch.zeros_like(rows), torch.zeros_like(table)
    for position, value in enumerate(index.flatten().tolist()):
        image = position // index.shape[1] if index.ndim == 2 else 0
        row = image * x.shape[1] + value
        out[position] = rows[row] + (table[row % patches] if with_table else 0)
        grad_rows[row] += grads[position]
        grad_table[row % patches] += grads[position]
    result = {"out": out.view(grad.shape), "x": grad_rows.view(x.shape), "table": grad_table}
    return {k: v.to(inputs[0].device) for k, v in result.items() if with_table or k != "table"}


def _check(inputs, *, with_table=True, slack=1.0, **options):
    ours = _run(gather_tokens, inputs, with_table=with_table, **options)
    same_dtype = _run(gather_tokens_ref, inputs, with_table=with_table)
    truth = _truth(inputs, with_table=with_table)
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
def test_index_dtypes_without_a_table(form, unique, dtype, device):
    index = torch.tensor((UNIQUE if unique else REPEATED)[form], dtype=dtype)
    _check(_inputs(40, (BF16, F32), index, device), with_table=False, unique=unique)


@pytest.mark.parametrize(("images", "patches", "picked"), [(1, 1, 1), (37, 3, 2), (2, 67, 53)])
def test_more_rows_than_a_tile(images, patches, picked, device):
    """16 rows, or images of a patch, a tile at this width."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand((images, patches), generator=generator).argsort(1)[:, :picked]
    packed = (order + torch.arange(images)[:, None] * patches).flatten()
    for index, unique in ((order, False), (packed, True)):
        _check(_inputs(256, (F32, F32), index, device, images, patches), unique=unique)


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
    _check(inputs, with_table=data.draw(st.booleans()), unique=unique, slack=4)


def test_flat_rows_are_the_same(device):
    x, table, index, _ = _inputs(24, (F32, F32), REPEATED["packed"], device)
    flat = gather_tokens(x.flatten(0, 1), index, table)
    assert torch.equal(flat, gather_tokens(x, index, table))


def test_strides(device):
    x, table, _, grad = _inputs(64, (F32, F32), REPEATED["rectangular"], device)
    inputs = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        table.repeat(1, 2)[:, ::2],
        torch.tensor(REPEATED["rectangular"], device=device).t().contiguous().t(),
        grad[:1, :1].expand(3, 4, 64),
    )
    assert not any(t.is_contiguous() for t in inputs)
    for unique_index in (inputs[2], inputs[2][:, ::4].expand(3, 1)):
        _check((*inputs[:2], unique_index, inputs[3][:, : unique_index.shape[1]]))


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(
    ("images", "index"),
    [(2, torch.zeros(0)), (2, torch.zeros(2, 0)), (0, torch.zeros(0)), (0, torch.zeros(0, 3))],
)
def test_empty(images, index, unique, device):
    result = _run(
        gather_tokens, _inputs(16, (BF16, F32), index.int(), device, images), unique=unique
    )
    assert result["out"].shape == (*index.shape, 16)
    assert torch.equal(result["x"], torch.zeros((images, N, 16), dtype=BF16, device=device))
    assert torch.equal(result["table"], torch.zeros((N, 16), device=device))


@pytest.mark.parametrize("unique", [False, True])
def test_rows_never_named_have_no_gradient(unique, device):
    index = (UNIQUE if unique else REPEATED)["packed"]
    grad = _run(gather_tokens, _inputs(8, (F32, F32), index, device), unique=unique)["x"]
    unnamed = sorted(set(range(B * N)) - set(index))
    assert torch.equal(grad.view(-1, 8)[unnamed], torch.zeros(len(unnamed), 8, device=device))


def test_sums_are_float32_and_rounded_once(device):
    """500 gradients of one row: added in bfloat16 they would stop growing at 256."""
    index = [3] * 500
    x, table, index, _ = _inputs(8, (BF16, BF16), index, device)
    inputs = (x, table, index, torch.full((500, 8), 1.0, dtype=BF16, device=device))
    result, truth = _run(gather_tokens, inputs), _truth(inputs)
    for name in ("x", "table"):
        assert relative_error(result[name], truth[name]) <= torch.finfo(BF16).eps, name
    # a little over half way from 1 to the next float16; the table rounded first is exactly half
    # way, and the sum 1
    x, table = torch.full((1, 8), 1.0), torch.full((1, 8), 2**-11 + 2**-22)
    out = gather_tokens(x.to(device, F16), torch.tensor([0], device=device), table.to(device))
    assert torch.equal(out.float().cpu(), torch.full((1, 8), 1 + 2**-10))


@pytest.mark.parametrize("unique", [False, True])
def test_nan_stays_in_its_row(unique, device):
    index = (UNIQUE if unique else REPEATED)["packed"]
    x, table, index, grad = _inputs(96, (F32, F32), index, device)
    clean = _run(gather_tokens, (x, table, index, grad), unique=unique)
    # position 1 names row 4, the only one of its image in both lists
    x[0, 4, 7] = grad[1, 9] = float("nan")
    dirty = _run(gather_tokens, (x, table, index, grad), unique=unique)
    hit = index == 4
    assert torch.equal(dirty["out"][~hit], clean["out"][~hit])
    assert dirty["out"][hit][:, 7].isnan().all()
    for name, row in (("x", 4), ("table", 4)):
        others = torch.arange(len(clean[name].view(-1, 96)), device=device) != row
        assert torch.equal(dirty[name].view(-1, 96)[others], clean[name].view(-1, 96)[others]), name
        assert dirty[name].view(-1, 96)[row].isnan().sum() == 1


def test_twice_the_same_bits(device):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(20, (400,), generator=generator)
    inputs = _inputs(128, (F32, F32), index, device, images=4)
    first, second = (_run(gather_tokens, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_wanted_gradients(device):
    x, table, index, grad = _inputs(12, (F32, F32), REPEATED["packed"], device)
    both = _run(gather_tokens, (x, table, index, grad))
    (alone,) = torch.autograd.grad(gather_tokens(x.requires_grad_(), index, table), x, grad)
    assert torch.equal(alone, both["x"])
    out = gather_tokens(x.detach(), index, table.requires_grad_())
    (alone,) = torch.autograd.grad(out, table, grad)
    assert_not_worse("table", alone, both["table"], both["table"].double())


def test_differentiable_once(device):
    x, _, index, grad = _inputs(4, (F32, F32), REPEATED["packed"], device)
    out = gather_tokens(x.requires_grad_(), index)
    (first,) = torch.autograd.grad(out, x, grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="gather_tokens_bwd has no derivative"):
        first.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unique", [False, True])
def test_compiles_whole(form, unique, device):
    inputs = _inputs(40, (BF16, F32), (UNIQUE if unique else REPEATED)[form], device)
    compiled = torch.compile(gather_tokens, fullgraph=True, backend="aot_eager")
    eager, graph = (_run(f, inputs, unique=unique) for f in (gather_tokens, compiled))
    assert all(torch.equal(eager[name], graph[name]) for name in eager)


def test_opcheck(device):
    x, table, index, grad = _inputs(40, (BF16, F32), UNIQUE["packed"], device)
    ops = torch.ops.ijepa_kernels
    torch.library.opcheck(
        ops.gather_tokens.default, (x.requires_grad_(), index, table.requires_grad_(), True)
    )
    rectangular = torch.tensor(REPEATED["rectangular"], device=device)
    torch.library.opcheck(ops.gather_tokens.default, (x, rectangular, None, False))
    shape = list(x.shape)
    for table_rows, need_x in ((N, True), (0, True), (N, False)):
        arguments = (grad, index, shape, table_rows, F32, table_rows == 0, need_x)
        torch.library.opcheck(ops.gather_tokens_bwd.default, arguments)


@pytest.mark.skipif(INTERPRETED, reason="kernels compute in float32")
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x, table, index, _ = _inputs(4, (F64, F64), REPEATED[form], "cpu")
    torch.autograd.gradcheck(
        lambda x, table: gather_tokens(x, index, table),
        (x.requires_grad_(), table.requires_grad_()),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(15, 4).long()}, "x must be float32.*got torch.int64"),
        ({"x": torch.zeros(4)}, r"x must have shape \(rows, D\) or \(B, N, D\), got \(4,\)"),
        ({"x": torch.zeros(15, 0)}, r"x must have shape .*, got \(15, 0\)"),
        ({"index": torch.zeros(3)}, "index must be int32 or int64, got torch.float32"),
        ({"index": torch.tensor(3)}, r"index must have shape \(R,\) or \(B, K\), got \(\)"),
        ({"index": torch.zeros(2, 1).int()}, r"x must have shape \(B, N, D\) for an index \(B, K"),
        ({"index": torch.zeros(3).int().to("meta")}, "index must be on cpu, got meta"),
        ({"table": torch.zeros(4, 4)}, "table must have shape .N, D. with N dividing the 15 rows"),
        ({"table": torch.zeros(0, 4)}, r"table must have shape .*, got \(0, 4\)"),
        ({"table": torch.zeros(5, 3)}, r"table must have shape \(5, 4\), got \(5, 3\)"),
        ({"table": torch.zeros(5, 4).int()}, "table must be float32"),
        (
            {"index": torch.zeros(3, 1).int(), "table": torch.zeros(15, 4)},
            r"table must have shape \(5, 4\), got \(15, 4\)",
        ),
    ],
)
def test_bad_input(change, message):
    good = {"x": torch.zeros(3, 5, 4), "index": torch.zeros(2).int(), "table": None}
    with pytest.raises(ValueError, match=message):
        gather_tokens(**{**good, **change})


@pytest.mark.parametrize(("value", "form"), [(15, 0), (-1, 0), (5, 1), (-1, 1), (2**31 - 1, 0)])
@pytest.mark.parametrize("unique", [False, True])
def test_index_out_of_range(value, form, unique, device, kernels):
    inputs = list(_inputs(20, (F32, F32), UNIQUE[FORMS[form]], device))
    clean = _run(gather_tokens, inputs, unique=unique)
    good = inputs[2].flatten()[1].item()
    inputs[2].view(-1)[1] = value
    message = f"index must lie in 0 .. {4 if form else 14}, got {value} at position 1"
    with debug_checks(), pytest.raises(ValueError, match=message):
        _run(gather_tokens, inputs, unique=unique)
    if not kernels:
        with pytest.raises(ValueError, match=message):
            _run(gather_tokens, inputs, unique=unique)
        return
    dirty = _run(gather_tokens, inputs, unique=unique)
    is_bad = torch.arange(inputs[2].numel(), device=device) == 1
    out, clean_out = (r["out"].view(-1, 20) for r in (dirty, clean))
    assert out[is_bad].isnan().all()
    assert torch.equal(out[~is_bad], clean_out[~is_bad])
    grad_row = inputs[3].view(-1, 20)[1]
    expected = clean["x"].clone()
    expected.view(-1, 20)[good] = 0  # position 1 belongs to the first image in both forms
    assert torch.equal(dirty["x"], expected)
    table = clean["table"].clone()
    table[good % N] -= grad_row
    assert torch.allclose(dirty["table"], table, atol=1e-6)


def test_broken_promise(device, kernels):
    message = "index must not repeat with unique=True, got 4 at positions 1 and 5$"
    inputs = _inputs(8, (F32, F32), REPEATED["packed"], device)
    with debug_checks(), pytest.raises(ValueError, match=message):
        gather_tokens(inputs[0], inputs[2], unique=True)
    rectangular = torch.tensor([[0, 1, 2], [4, 3, 4], [0, 0, 0]], device=device)
    message = "got 4 at positions 0 and 2 of image 1"
    with debug_checks(), pytest.raises(ValueError, match=message):
        gather_tokens(inputs[0], rectangular, unique=True)
    with debug_checks():
        gather_tokens(inputs[0], rectangular)
    if kernels:  # one of the gradients arrives, nothing else happens
        grad = _run(gather_tokens, inputs, with_table=False, unique=True)["x"].view(-1, 8)
        candidates = inputs[3][inputs[2] == 13]
        assert any(torch.equal(grad[13], candidate) for candidate in candidates)
    else:
        with pytest.raises(ValueError, match=message):
            gather_tokens(inputs[0], rectangular, unique=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("unique", [False, True])
def test_past_two_to_the_31_elements(unique, device):
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


def test_bytes():
    # 7 rows of 100 bfloat16 read and written, 7 indices
    assert gather_tokens_bytes(50, 7, 100, BF16) == 1400 + 1400 + 28
    # 7 read, all 50 written
    assert gather_tokens_bytes(50, 7, 100, BF16, backward=True) == 1400 + 10000 + 28


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
