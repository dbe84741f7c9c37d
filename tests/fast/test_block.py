"""The block that differentiates itself, in float64 against autograd through a plain one."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.fast.attention import BACKENDS, Attention, Pair, Sequences
from ijepa_fast.fast.block import Branch, PackedBlock, Settings, attach_copies, close, linear
from ijepa_fast.model import Block
from ijepa_kernels.gather_tokens import Gather
from tests.trainer.flash_on_cpu import flash_on_cpu

WIDTH, HEADS, HIDDEN = 12, 3, 24


def _sequences(lengths):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    longest = max(lengths)
    equal = min(lengths) == longest
    pads: Any = (None, None)
    if not equal:
        column, each = np.arange(longest), np.array(lengths)[:, None]
        rows = starts[:-1, None] + np.minimum(column, each - 1)
        pads = (torch.from_numpy(rows.ravel()), torch.from_numpy(np.flatnonzero(column < each)))
    return Sequences(torch.from_numpy(starts), len(lengths), longest, equal, *pads)


def _gather(index, rows, *, unique):
    picked = torch.tensor(index, dtype=torch.int32)
    if unique:
        listed = torch.full((rows,), -1, dtype=torch.int32)
        listed[picked.long()] = torch.arange(len(index), dtype=torch.int32)
        return Gather(picked, listed, None)
    counts = torch.bincount(picked.long(), minlength=rows)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return Gather(picked, picked.long().argsort(stable=True).int(), starts.int())


def _plain(block, x, f, lengths, take, source):
    """The same in plain autograd, one sequence at a time."""

    def norm(layer, rows):
        return F.layer_norm(rows, (rows.shape[1],), layer.weight, layer.bias, layer.eps)

    x = x if f is None else x + f
    qkv = F.linear(norm(block.norm1, x), block.attn.qkv.weight, block.attn.qkv.bias)
    if source is not None:
        x, qkv = x[source.picked.long()], qkv[source.picked.long()]
    q, k, v = qkv.view(len(qkv), 3, HEADS, -1).unbind(1)
    outs, begin = [], 0
    for length in lengths:
        own = slice(begin, begin + length)
        scores = torch.einsum("qhe,khe->hqk", q[own], k[own]) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("hqk,khe->qhe", scores.softmax(-1), v[own]))
        begin += length
    mixed = torch.cat(outs).flatten(1)
    if take is not None:
        x, mixed = x[take.picked.long()], mixed[take.picked.long()]
    x = x + F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
    h = F.linear(norm(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias)
    return x, F.linear(F.gelu(h), block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.fixture(params=["sdpa", "varlen"])
def backend(request):
    if request.param == "sdpa":
        yield BACKENDS["sdpa"]
        return
    with flash_on_cpu():
        yield BACKENDS["varlen"]


def _packed(block, backend, *, memory="none", dtype=torch.float64, residual=torch.float64):
    attention = Attention(backend, backend, "here")
    return PackedBlock(block, Settings(attention, dtype, residual, memory, sharded=False))


def _module(kind, *sizes):
    module = kind(*sizes).double()
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module


OPTIONS = [
    (f, take, source)
    for f, take, source in itertools.product((False, True), repeat=3)
    if not (f and source)
]


@pytest.mark.parametrize("memory", ["none", "full"])
@pytest.mark.parametrize("lengths", [[5, 3, 4], [4, 4]], ids=["unequal", "equal"])
@pytest.mark.parametrize(("has_f", "has_take", "has_source"), OPTIONS)
def test_derivative(has_f, has_take, has_source, lengths, memory, backend):
    torch.manual_seed(1)
    rows = sum(lengths)
    block, final = _module(Block, WIDTH, HEADS, HIDDEN), _module(nn.LayerNorm, WIDTH)
    # whose bias was added to f last
    before = _module(nn.Linear, WIDTH, WIDTH)
    keys = _sequences(lengths)
    pair, take, source = Pair(keys, keys), None, None
    distinct = rows
    if has_source:
        distinct = 7
        source = _gather(torch.randint(0, 6, (rows,)).tolist(), distinct, unique=False)
    if has_take:
        wanted = [e - 2 + i for e in np.cumsum(lengths).tolist() for i in range(2)]
        take = _gather(wanted, rows, unique=True)
        pair = Pair(_sequences([2] * len(lengths)), keys)
    x = torch.randn(distinct, WIDTH, dtype=torch.float64, requires_grad=True)
    inner = torch.randn(distinct, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = {"x": x, **({"inner": inner} if has_f else {})}
    modules = nn.ModuleDict({"block": block, "final": final, **({"f": before} if has_f else {})})

    f = before(inner) if has_f else None
    end, branch = _plain(block, x, f, lengths, take, source)
    expected = F.layer_norm(end + branch, (WIDTH,), final.weight, final.bias, final.eps)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    true = {n: t.grad for n, t in [*leaves.items(), *modules.named_parameters()]}
    for tensor in (*leaves.values(), *modules.parameters()):
        tensor.grad = None

    packed = _packed(block, backend, memory=memory)
    f = Branch(linear(before, inner, own_bias=False), before) if has_f else None
    x, f = packed(x, f, pair, take, source)
    actual = close(final, x, f, torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    (actual * weight).sum().backward()
    for name, tensor in [*leaves.items(), *modules.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.allclose(tensor.grad, true[name], rtol=1e-10, atol=1e-11), name


@pytest.mark.parametrize("head_dim", [24, 32, 64, 80, 88])
def test_bfloat16_is_no_worse_than_autocast(head_dim):
    """Gradients, as far from float64's as those of the plain block under autocast, or twice that;
    weights are float32 with rounded copies.
    """
    heads, lengths = 2, [40, 40, 40]
    width = heads * head_dim
    torch.manual_seed(0)
    block = Block(width, heads, 2 * width)
    for p in block.parameters():
        nn.init.normal_(p, std=0.05)
    x, inner, weight = (torch.randn(120, width) for _ in range(3))
    true: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    for found, dtype in ((true, torch.float64), (theirs, torch.float32)):
        plain = Block(width, heads, 2 * width).to(dtype)
        plain.load_state_dict(block.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = plain((x + inner).to(dtype).view(3, 40, width), None)
        (out.flatten(0, 1) * weight).sum().backward()
        found |= {n: p.grad.double() for n, p in plain.named_parameters() if p.grad is not None}
    attach_copies(block, torch.bfloat16)
    packed = _packed(block, BACKENDS["sdpa"], dtype=torch.bfloat16, residual=torch.float32)
    keys = _sequences(lengths)
    f = Branch(inner.bfloat16().requires_grad_(), SimpleNamespace(bias=None))
    x2, branch = packed(x, f, Pair(keys, keys))
    # float32 gradients of the sum reach both
    (x2 + branch.rows.float()).backward(weight)
    ours = {n: p.grad.double() for n, p in block.named_parameters() if p.grad is not None}
    # whoever adds the branch gives the last bias its gradient
    assert set(true) - set(ours) == {"mlp.fc2.bias"}
    for name, grad in ours.items():
        exact = true[name]
        pick: Any = slice(None)
        if name == "attn.qkv.bias":  # of the keys it is zero
            pick = torch.arange(3 * width).view(3, -1)[[0, 2]].flatten()
        error, allowed = (
            (t[pick] - exact[pick]).norm() / exact[pick].norm() for t in (grad, theirs[name])
        )
        assert error <= max(2 * allowed, 2**-7), (name, error, allowed)


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_kept_for_the_backward_pass(residual):
    """24 D + 4 H + 16 bytes a row in bfloat16, with a float32 residual stream."""
    width, heads, rows, depth = 32, 2, 64, 3
    blocks = [_module(Block, width, heads, 4 * width).float() for _ in range(depth)]
    side = _sequences([16] * 4)
    x = torch.randn(rows, width).to(residual)
    inner = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    f = Branch(inner, blocks[0].mlp.fc2)
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with flash_on_cpu(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            attach_copies(block, torch.bfloat16)
            packed = _packed(block, BACKENDS["varlen"], dtype=torch.bfloat16, residual=residual)
            x, f = packed(x, f, Pair(side, side))
            held.append((x, f))
    kept.pop(side.cu.data_ptr(), None)
    each = sum(kept.values()) / rows / depth
    narrower = 2 * 2 * width if residual == torch.bfloat16 else 0
    assert each == pytest.approx(24 * width - narrower + 4 * heads + 16, abs=2)


def test_gradients_add_up():
    torch.manual_seed(0)
    block = _packed(_module(Block, WIDTH, HEADS, HIDDEN), BACKENDS["sdpa"])
    side = _sequences([4, 4])
    grads = []
    x = torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        x2, branch = block(x, None, Pair(side, side))
        (x2.sin() + branch.rows.cos()).sum().backward()
        grads.append({n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None})
    for name, first in grads[0].items():
        torch.testing.assert_close(grads[1][name], 2 * first)


def test_there_is_no_second_derivative():
    block = _packed(_module(Block, WIDTH, HEADS, HIDDEN), BACKENDS["sdpa"])
    keys = _sequences([4, 4])
    x = torch.randn(8, WIDTH, dtype=torch.float64, requires_grad=True)
    out = block(x, None, Pair(keys, keys))[0].sum()
    with pytest.raises(RuntimeError, match="differentiable once, got create_graph=True"):
        out.backward(create_graph=True)
