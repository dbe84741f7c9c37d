"""The transformer block of `model.py` over packed rows, and how its products get their weights.

Matrix products run in the dtype of the weights they are given: a weight that is not in it already
has a rounded copy, which the optimiser writes (`attach_copies`); the gradient goes to the weight.
Norms are computed in float32.

Shape letters: R packed rows, D width, H heads, E head dim.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ijepa_fast.fast.attention import Pair, attend_packed
from ijepa_fast.model import Block, matrix_layers
from ijepa_kernels import gather_tokens

__all__ = [
    "Memory",
    "PackedBlock",
    "Settings",
    "attach_copies",
    "linear",
    "norm",
    "operands",
]

Memory = Literal["none", "selective", "full"]
Parts = tuple[Callable[..., Tensor], Callable[..., Tensor]]
Take = Callable[[Tensor], Tensor]


class Settings:
    """How the blocks of a step compute.

    Attributes:
        attention: back end of packed attention.
        dtype: of matrix products.
        residual: of the residual stream.
        memory: what a block keeps for its backward pass: `none` of it is recomputed, `selective`
            recomputes norms and GELUs, `full` everything but the block's input.
        compiled: whether the parts of a block around attention are compiled.
    """

    def __init__(
        self,
        *,
        attention: str,
        dtype: torch.dtype,
        residual: torch.dtype,
        memory: Memory,
        compiled: bool,
    ) -> None:
        self.attention, self.dtype, self.residual = attention, dtype, residual
        self.memory = memory
        self.compiled = compiled

    def parts(self) -> "Parts":
        """What the blocks of one network run before and after attention, compiled if wanted."""
        if not self.compiled:
            return _before, _after
        lean = self.memory == "selective"
        return _compiled(_before, lean), _compiled(_after, lean)


def _compiled(part: Callable[..., Tensor], lean: bool) -> Callable[..., Tensor]:
    """Compiled for one network. Dynamo counts recompilations by code object, so each network has
    its own: three networks of different sizes would come near its limit together.

    Args:
        part: what to compile.
        lean: let the compiler recompute norms and GELUs that a product of the backward pass
            reads; otherwise it keeps them.
    """
    assert isinstance(part, FunctionType)
    own = FunctionType(part.__code__.replace(), part.__globals__, part.__name__)
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True)
    if not lean:
        return compiled
    from torch._functorch import config

    setting = config.patch(ban_recompute_materialized_backward=False)

    def with_recomputation(*args: Any) -> Tensor:
        # read when a graph is compiled, at whichever call that is
        with setting:
            return compiled(*args)

    return with_recomputation


# --- rounded copies of weights -------------------------------------------------------------------


class _Rounded(torch.autograd.Function):
    """The rounded copy of a weight in the weight's place; the gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


# mypy does not know what `apply` takes
_rounded: Callable[..., Tensor] = _Rounded.apply


def attach_copies(network: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Parameter, Tensor]]:
    """Gives every matrix layer rounded copies of its weight and bias.

    Returns:
        Pairs of parameter and copy, for `AdamWEMA.mirror`.
    """
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for layer in matrix_layers(network):
        assert layer.bias is not None
        own: list[nn.Parameter] = [layer.weight, layer.bias]  # type: ignore[list-item]
        copies = [p.detach().to(dtype, copy=True) for p in own]
        # neither parameter nor buffer: no part of the state dict
        layer.__dict__["copies"] = copies
        pairs += list(zip(own, copies, strict=True))
    return pairs


def operands(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias in the product's dtype."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    if weight.dtype == dtype:
        return weight, bias
    copies = layer.__dict__["copies"]
    return _rounded(weight, copies[0]), _rounded(bias, copies[1])


def linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The layer's product, (R, in) to (R, out), in `dtype`, as x is."""
    return F.linear(x, *operands(layer, dtype))


def norm(layer: nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """LayerNorm of rows of any dtype, computed in float32 and rounded to `dtype`."""
    weight, bias = layer.weight.float(), layer.bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, layer.eps).to(dtype)


# --- recomputation -------------------------------------------------------------------------------


class _NormLinear(torch.autograd.Function):
    """linear(norm(x)) that keeps x and the statistics, not the normalised rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor
    ) -> Tensor:
        wide, shape = x.float(), [x.shape[-1]]
        normed, mean, rstd = torch.native_layer_norm(wide, shape, gain, shift, eps)
        ctx.save_for_backward(x, gain, shift, mean, rstd, weight)
        ctx.eps = eps
        return F.linear(normed.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, shift, mean, rstd, weight = ctx.saved_tensors
        wide, shape = x.float(), [x.shape[-1]]
        normed = torch.native_layer_norm(wide, shape, gain, shift, ctx.eps)[0].to(weight.dtype)
        inner = (grad @ weight).float()
        grads = torch.ops.aten.native_layer_norm_backward(
            inner, wide, shape, mean, rstd, gain, shift, [True, True, True]
        )
        return grads[0].to(x.dtype), grads[1], grads[2], None, grad.t() @ normed, grad.sum(0)


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(h)) that keeps h only."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        inner = torch.ops.aten.gelu_backward(grad @ weight, h)
        return inner, grad.t() @ F.gelu(h), grad.sum(0)


_norm_linear: Callable[..., Tensor] = _NormLinear.apply
_gelu_linear: Callable[..., Tensor] = _GeluLinear.apply


# --- the parts of a block ------------------------------------------------------------------------


def _normed_linear(
    first: nn.LayerNorm, layer: nn.Linear, x: Tensor, dtype: torch.dtype, lean: bool
) -> Tensor:
    if not lean:
        return linear(layer, norm(first, x, dtype), dtype)
    gain, shift = first.weight.float(), first.bias.float()
    return _norm_linear(x, gain, shift, first.eps, *operands(layer, dtype))


def _before(block: Block, x: Tensor, dtype: torch.dtype, lean: bool) -> Tensor:
    """First norm and QKV product: (R, D) to (R, 3 * D)."""
    return _normed_linear(block.norm1, block.attn.qkv, x, dtype, lean)


def _after(block: Block, x: Tensor, mixed: Tensor, dtype: torch.dtype, lean: bool) -> Tensor:
    """Everything behind attention: residual rows and attention's output (R, D) to (R, D)."""
    x = x + linear(block.attn.proj, mixed, dtype)
    hidden = _normed_linear(block.norm2, block.mlp.fc1, x, dtype, lean)
    if lean:
        out = _gelu_linear(hidden, *operands(block.mlp.fc2, dtype))
    else:
        out = linear(block.mlp.fc2, F.gelu(hidden), dtype)
    return x + out


class PackedBlock(Block):
    """`Block` over packed rows; `parts` from `Settings.parts`, the same for a network's blocks."""

    settings: Settings
    parts: Parts

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        pair: Pair,
        take: Take | None = None,
        distinct: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (R, D), in the residual's dtype.
            pair: the sequences; its queries are the rows that `take` picks, if it is given.
            take: picks the rows that are wanted; the others serve as keys and values only.
            distinct: rows (Q, D) and an index (R,): row r of x equals row index[r] of these, so
                that norm and QKV product need to see only them.

        Returns:
            The wanted rows, all by default.
        """
        if self.settings.memory == "full" and torch.is_grad_enabled():
            return checkpoint(self._run, x, pair, take, distinct, use_reentrant=False)
        return self._run(x, pair, take, distinct)

    def _run(
        self, x: Tensor, pair: Pair, take: Take | None, distinct: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        if take is not None and distinct is None:
            return self.finish(take(x), *self.keys_values(x), pair, take)
        rows, index = (x, None) if distinct is None else distinct
        qkv = self._call(0, rows)
        if index is not None:
            qkv = gather_tokens(qkv, index)
        q, k, v = self._heads(qkv)
        if take is not None:
            x, q = take(x), self._heads(take(q.flatten(1)))[0]
        return self._mix(x, q, k, v, pair)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised rows (R, D), and their keys and values (R, 2 * D)."""
        dtype, width = self.settings.dtype, x.shape[1]
        normed = norm(self.norm1, x, dtype)
        weight, bias = operands(self.attn.qkv, dtype)
        return normed, F.linear(normed, weight[width:], bias[width:])

    def finish(
        self, x: Tensor, normed: Tensor, keys_values: Tensor, pair: Pair, take: Take
    ) -> Tensor:
        """The rest of the block, for the wanted rows alone.

        Args:
            x: the wanted rows of the block's input.
            normed, keys_values: what `keys_values` returned, of all rows.
            pair: wanted rows as queries, all rows as keys.
            take: picks the wanted rows.
        """
        weight, bias = operands(self.attn.qkv, self.settings.dtype)
        width = x.shape[1]
        q = F.linear(take(normed), weight[:width], bias[:width])
        (q,), (k, v) = self._heads(q), self._heads(keys_values)
        return self._mix(x, q, k, v, pair)

    def _mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
        mixed = attend_packed(self.settings.attention, q, k, v, pair).flatten(1)
        return self._call(1, x, mixed)

    def _call(self, part: int, *rows: Tensor) -> Tensor:
        settings = self.settings
        # in compiled code the compiler does it
        lean = settings.memory == "selective" and not settings.compiled
        if settings.compiled and torch.is_grad_enabled():
            for tensor in rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self.parts[part](self, *rows, settings.dtype, lean and torch.is_grad_enabled())

    def _heads(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(R, n * D) to n times (R, H, E)."""
        count = rows.shape[1] // self.attn.proj.in_features
        return rows.unflatten(1, (count, self.attn.heads, -1)).unbind(1)
