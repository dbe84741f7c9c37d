"""The transformer block of `model.py` over packed rows: one autograd node, differentiated by hand.

The residual stream and the last branch travel apart, so that an addition and the norm behind it are
one pass over memory: a block takes (x, branch), adds them itself, and returns its own; `close` ends
a network. Kept for the backward pass are both sums with their norms' statistics, q, k, v,
attention's output and log-sum-exp, and the hidden rows before GELU: 24 D + 4 H + 16 bytes a row in
bfloat16. Normalised rows and GELUs are written again by kernels that read their inputs anyway.

A gradient of a weight goes straight into its ``.grad``, in the weight's dtype; that of a bias comes
with whatever kernel passes over the rows that it is the sum of, which is why a branch knows whose
bias was added to it last. Matrix products run in the dtype of the weights they are given: a weight
that is not in it has a rounded copy, which the optimiser writes. Norms are computed in float32.

Shape letters: R packed rows, D width, H heads, E head dim, Q distinct rows, U taken rows.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.fast.attention import Attention, Backend, Pair
from ijepa_fast.model import Block, matrix_layers
from ijepa_kernels.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward
from ijepa_kernels.column_sums import column_sums
from ijepa_kernels.gather_tokens import Gather, gather_rows, sum_rows
from ijepa_kernels.gelu import gelu_backward
from ijepa_kernels.join_heads import join_heads

__all__ = [
    "Branch",
    "Memory",
    "PackedBlock",
    "Settings",
    "add_norm",
    "attach_copies",
    "close",
    "linear",
    "operands",
]

_logger = logging.getLogger(__name__)

Memory = Literal["none", "full"]
Grads = tuple[Tensor | None, ...]


class Settings(NamedTuple):
    """How the networks of a step compute.

    Attributes:
        attention: back ends of packed attention.
        dtype: of matrix products.
        residual: of the residual stream.
        memory: `full` keeps the input of a block only, and recomputes the block in the backward
            pass.
        sharded: whether parameters are replaced while a step runs (FSDP2).
    """

    attention: Attention
    dtype: torch.dtype
    residual: torch.dtype
    memory: Memory
    sharded: bool


class Branch(NamedTuple):
    """What is still to be added to the residual stream.

    Attributes:
        rows: (R, D), in the dtype of products.
        layer: whose bias was added to every row last: its gradient is the sum of the rows'. Not the
            bias itself, of which FSDP2 would hand on a view.
    """

    rows: Tensor
    layer: nn.Linear | nn.Conv2d


# --- weights and their gradients -----------------------------------------------------------------


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
    """Weight and bias in the product's dtype, not differentiable."""
    weight, bias = layer.weight, layer.bias
    assert bias is not None
    if weight.dtype == dtype:
        return weight.detach(), bias.detach()
    weight, bias = layer.__dict__["copies"]
    return weight, bias


def _give(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Adds to the gradients of parameters, each with what it gets."""
    for parameter, grad in pairs:
        if parameter is None or grad is None:
            continue
        if grad.dtype != parameter.dtype or grad.shape != parameter.shape:
            grad = grad.to(parameter.dtype).view(parameter.shape)  # noqa: PLW2901
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.add_(grad)


def _only_once() -> None:
    """To be called by derivatives that have none themselves: `once_differentiable` says so too, in
    ten calls.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("packed rows are differentiable once, got create_graph=True")


def _outer(d: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of a weight (out, in), of its product's (R, out) and the product's input (R, in)."""
    if d.dtype == dtype:
        return torch.mm(d.T, rows)
    if _writes_float32(d.device, d.dtype):
        return torch.mm(d.T, rows, out_dtype=dtype)
    return torch.mm(d.T, rows).to(dtype)


@functools.cache
def _writes_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product can leave its sums as they are, without rounding them to `dtype`."""
    if device.type != "cuda":
        return False
    rows = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(rows.t(), rows, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        _logger.warning("gradients of weights are rounded to %s first: %s", dtype, reason)
        return False
    return True


class _Linear(torch.autograd.Function):
    """A layer's product; `anchor` is a parameter, so that autograd comes back here."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, anchor: Tensor, layer: nn.Linear | nn.Conv2d, own_bias: bool
    ) -> Tensor:
        weight, bias = operands(layer, rows.dtype)
        weight = _flat(weight, rows.shape[1])
        ctx.save_for_backward(rows, weight)
        ctx.parameters = layer.weight, layer.bias if own_bias else None
        return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Grads:
        _only_once()
        rows, weight = ctx.saved_tensors
        parameter, bias = ctx.parameters
        grad = _outer(d, rows, parameter.dtype)
        _give(
            (parameter, grad[:, : parameter[0].numel()].contiguous()),
            (bias, None if bias is None else column_sums(d)),
        )
        return torch.mm(d, weight) if ctx.needs_input_grad[0] else None, None, None, None


def _flat(weight: Tensor, width: int) -> Tensor:
    """(out, in), a convolution's as a matrix, zeros behind it up to `width` columns."""
    flat = weight.flatten(1)
    return flat if flat.shape[1] == width else F.pad(flat, (0, width - flat.shape[1]))


# mypy does not know what `apply` takes
_linear: Callable[..., Tensor] = _Linear.apply


def linear(layer: nn.Linear | nn.Conv2d, rows: Tensor, *, own_bias: bool = True) -> Tensor:
    """The layer's product of rows (R, in), in their dtype; a convolution's weight as a matrix.

    Args:
        layer: its weight's gradient goes into ``.grad``.
        rows: may have zeros behind the layer's own columns.
        own_bias: so does the bias's; else whoever takes the result as a `Branch` gives it.
    """
    if torch.is_grad_enabled():
        return _linear(rows, layer.weight, layer, own_bias)
    weight, bias = operands(layer, rows.dtype)
    return F.linear(rows, _flat(weight, rows.shape[1]), bias)


# --- norms at a network's end --------------------------------------------------------------------


def add_norm(layer: nn.LayerNorm, x: Tensor, f: Branch | None, dtype: torch.dtype) -> Tensor:
    """norm(x + f) of rows (R, D), in `dtype`; without gradients."""
    rows = None if f is None else f.rows
    return add_layer_norm_forward(x, rows, layer.weight, layer.bias, layer.eps, dtype)[1]


class _Close(torch.autograd.Function):
    """The last addition and the final norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, bias: Tensor, layer: nn.LayerNorm, dtype: torch.dtype
    ) -> Tensor:
        parameters = layer.weight, layer.bias
        x1, y, mean, rstd = add_layer_norm_forward(x, rows, *parameters, layer.eps, dtype)
        ctx.save_for_backward(x1, mean, rstd)
        ctx.parameters, ctx.bias = parameters, bias
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Grads:
        _only_once()
        x, mean, rstd = ctx.saved_tensors
        gain, shift = ctx.parameters
        dx, df, sums, _, dgain, dshift = add_layer_norm_backward(
            dy, None, x, mean, rstd, gain, shift, low_dtype=dy.dtype, with_normed=False
        )
        _give((ctx.bias, sums), (gain, dgain), (shift, dshift))
        return dx, df, None, None, None


_close: Callable[..., Tensor] = _Close.apply


def close(layer: nn.LayerNorm, x: Tensor, f: Branch, dtype: torch.dtype) -> Tensor:
    """norm(x + f) of rows (R, D), in `dtype`."""
    return _close(x, f.rows, f.layer.bias, layer, dtype)


# --- the block -----------------------------------------------------------------------------------


class _Task(NamedTuple):
    """What a block does, besides its input.

    Attributes:
        w: norm1's, qkv's, proj's, norm2's, fc1's and fc2's weight and bias, to compute with.
        parameters: whose gradients these get.
        heads, eps, settings: of the block.
        last: the layer whose bias is added last.
        bias: the last one added to the block's branch; its gradient is a sum of the block's.
        pair: the sequences; its queries are the taken rows where there are any.
        backend: of their attention.
        take: the U rows that are wanted, none twice; the others are keys and values only.
        source: the distinct rows that the R rows of the block's input are copies of.
    """

    w: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]
    heads: int
    eps: float
    settings: Settings
    last: nn.Linear
    bias: Tensor | None
    pair: Pair
    backend: Backend
    take: Gather | None
    source: Gather | None


def _forward(
    x: Tensor, f: Tensor | None, task: _Task, grad: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Any, ...]]:
    """New residual and branch, the tensors that the backward pass needs, and what attention keeps.

    Args:
        x: (R, D), or the distinct rows (Q, D).
        f: to be added to it.
        task: the rest.
        grad: whether a backward pass follows.
    """
    w, take, source = task.w, task.take, task.source
    first, y, *stats = add_layer_norm_forward(x, f, w[0], w[1], task.eps, task.settings.dtype)
    x = first if source is None else gather_rows(first, source.picked)
    if take is not None and source is None:
        width = x.shape[1]
        q = F.linear(gather_rows(y, take.picked), w[2][:width], w[3][:width])
        q = q.view(q.shape[0], task.heads, -1)
        kv = F.linear(y, w[2][width:], w[3][width:])
        k, v = kv.view(y.shape[0], 2, *q.shape[1:]).unbind(1)
    else:
        qkv = F.linear(y, w[2], w[3])
        if source is not None:
            qkv = gather_rows(qkv, source.picked)
        q, k, v = qkv.view(qkv.shape[0], 3, task.heads, -1).unbind(1)
        if take is not None:
            q = gather_rows(qkv[:, : first.shape[1]], take.picked).view(-1, *k.shape[1:])
    if take is not None:
        x = gather_rows(x, take.picked)
    out, attended = task.backend.forward(q, k, v, task.pair, grad)
    x2, branch, kept = _finish(x, out, task)
    return x2, branch, (first, *stats, out, *kept), attended


def _finish(x: Tensor, out: Tensor, task: _Task) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Everything behind attention, of x and attention's output: see `_forward`."""
    w = task.w
    branch = F.linear(out.flatten(1), w[4], w[5])
    x2, y2, *stats = add_layer_norm_forward(x, branch, w[6], w[7], task.eps, task.settings.dtype)
    h = F.linear(y2, w[8], w[9])
    return x2, F.linear(F.gelu(h), w[10], w[11]), (x2, *stats, h)


class _Block(torch.autograd.Function):
    """`_forward` with its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor | None, task: _Task) -> tuple[Tensor, Tensor]:
        full = task.settings.memory == "full"
        x2, branch, kept, attended = _forward(x, f, task, not full)
        ctx.task, ctx.full = task, full
        if full:
            ctx.save_for_backward(x, f)
        else:
            # a back end keeps tensors, all of them saved, for x2 is an output: as an attribute it
            # would be a cycle; or, under autograd, something else
            tensors = isinstance(attended[0], Tensor)
            ctx.attended = () if tensors else attended
            ctx.save_for_backward(*kept, *(attended if tensors else ()))
        return x2, branch

    @staticmethod
    def backward(ctx: Any, dx: Tensor, df: Tensor) -> Grads:
        _only_once()
        task = ctx.task
        if ctx.full:
            x, f = ctx.saved_tensors
            kept, attended = _forward(x, f, task, True)[2:]
        else:
            saved = ctx.saved_tensors
            kept, attended = saved[:8], ctx.attended or saved[8:]
        dx, dlow = _backward(dx, df, task, kept, attended)
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dlow if needs[1] else None, None


def _backward(
    dx: Tensor, df: Tensor, task: _Task, kept: tuple[Tensor, ...], attended: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients of the block's input and of its branch; all others are given, but that of fc2's
    bias, which is left to whoever adds the branch.
    """
    first, mean1, rstd1, out, x2, mean2, rstd2, h = kept
    w, p, take, source = task.w, task.parameters, task.take, task.source
    width, dtype, low = first.shape[1], p[2].dtype, df.dtype

    dh, db1, g = gelu_backward(torch.mm(df, w[10]), h)
    assert g is not None
    dw_fc2 = _outer(df, g, dtype)
    del g
    passed: Any = add_layer_norm_backward(
        torch.mm(dh, w[8]), dx, x2, mean2, rstd2, w[6], w[7], low_dtype=low
    )
    dx, dp, dbp, y2, dgain2, dshift2 = passed
    dw_fc1 = _outer(dh, y2, dtype)
    del dh, y2
    dw_proj = _outer(dp, out.flatten(1), dtype)
    dout = torch.mm(dp, w[4]).view_as(out)
    dq, dk, dv = task.backend.backward(dout, out, attended, task.pair)
    rows = dk.shape[0]
    if take is not None:  # nobody else's residual goes on
        dx = sum_rows(dx, take, rows)
    if take is not None and source is None:
        dq, dbq = join_heads((dq,))
        dkv, dbkv = join_heads((dk, dv))
        dy = torch.mm(dkv, w[2][width:])
        dy += sum_rows(torch.mm(dq, w[2][:width]), take, rows)
    else:
        if take is not None:
            dq = sum_rows(dq.flatten(1), take, rows).view_as(dk)
        dqkv, dbqkv = join_heads((dq, dk, dv))
        if source is not None:
            # what was copied gets the sum of the copies' gradients, and passes it on by itself
            dqkv = sum_rows(dqkv, source, first.shape[0])
            dx = sum_rows(dx, source, first.shape[0])
        dy = torch.mm(dqkv, w[2])
    passed = add_layer_norm_backward(dy, dx, first, mean1, rstd1, w[0], w[1], low_dtype=low)
    dx, dlow, sums, y, dgain1, dshift1 = passed
    if take is not None and source is None:
        dw_qkv = torch.cat([_outer(dq, gather_rows(y, take.picked), dtype), _outer(dkv, y, dtype)])
        dbqkv = torch.cat([dbq, dbkv])
    else:
        dw_qkv = _outer(dqkv, y, dtype)
    of_layers = (dgain1, dshift1, dw_qkv, dbqkv, dw_proj, dbp, dgain2, dshift2, dw_fc1, db1, dw_fc2)
    _give((task.bias, sums), *zip(p, of_layers, strict=False))
    return dx, dlow


# mypy does not know what `apply` takes
_block: Callable[..., tuple[Tensor, Tensor]] = _Block.apply


class PackedBlock(Block):
    """`Block` over packed rows; same parameters and names. Not to be run under autocast.

    Args:
        plain: the block whose layers these are: the same objects.
        settings: how they compute.
    """

    def __init__(self, plain: Any, settings: Settings) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn = plain.norm1, plain.attn
        self.norm2, self.mlp = plain.norm2, plain.mlp
        self.settings = settings

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        f: Branch | None,
        pair: Pair,
        take: Gather | None = None,
        source: Gather | None = None,
    ) -> tuple[Tensor, Branch]:
        """One block.

        Args:
            x: (R, D), in the residual's dtype.
            f: to be added to it; None for nothing.
            pair: the sequences; its queries are the rows that `take` picks, if it is given.
            take: the U rows that are wanted, none twice; the others serve as keys and values only.
            source: x is (Q, D), and the R rows of the block's input are copies of its rows: norm
                and QKV product then see only these.

        Returns:
            Residual and branch of the wanted rows, all by default.
        """
        rows, bias = (None, None) if f is None else (f.rows, f.layer.bias)
        task = self._task(pair, bias, take, source)
        if torch.is_grad_enabled():
            x2, branch = _block(x, rows, task)
        else:
            x2, branch = _forward(x, rows, task, False)[:2]
        return x2, Branch(branch, task.last)

    @torch.no_grad()
    def keys_values(self, x: Tensor, f: Branch | None, pair: Pair) -> tuple[Tensor, Any, Tensor]:
        """The sum and its normalised rows (R, D), and their keys and values (R, 2 * D)."""
        task = self._task(pair)
        w, rows = task.w, None if f is None else f.rows
        x, y, _, _ = add_layer_norm_forward(x, rows, w[0], w[1], task.eps, task.settings.dtype)
        width = x.shape[1]
        return x, y, F.linear(y, w[2][width:], w[3][width:])

    @torch.no_grad()
    def finish(
        self, x: Tensor, normed: Any, keys_values: Tensor, pair: Pair, take: Tensor
    ) -> tuple[Tensor, Branch]:
        """The rest of the block, for the wanted rows alone.

        Args:
            x, normed, keys_values: what `keys_values` returned.
            pair: wanted rows as queries, all rows as keys.
            take: the wanted rows.
        """
        task = self._task(pair)
        w, width = task.w, x.shape[1]
        q = F.linear(gather_rows(normed, take), w[2][:width], w[3][:width])
        q = q.view(q.shape[0], task.heads, -1)
        k, v = keys_values.view(keys_values.shape[0], 2, *q.shape[1:]).unbind(1)
        out, _ = task.backend.forward(q, k, v, pair, False)
        x2, branch, _ = _finish(gather_rows(x, take), out, task)
        return x2, Branch(branch, task.last)

    def _task(
        self,
        pair: Pair,
        bias: Tensor | None = None,
        take: Gather | None = None,
        source: Gather | None = None,
    ) -> _Task:
        fixed: Any = self.__dict__.get("_fixed")
        if fixed is None:
            attn, mlp, settings = self.attn, self.mlp, self.settings
            layers = (self.norm1, attn.qkv, attn.proj, self.norm2, mlp.fc1, mlp.fc2)
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            w: list[Tensor] = []
            for layer in layers:
                if isinstance(layer, nn.LayerNorm):
                    w += [layer.weight.detach(), layer.bias.detach()]
                else:
                    w += operands(layer, settings.dtype)
            fixed = tuple(w), tuple(parameters), attn.heads, self.norm1.eps, settings, mlp.fc2
            if not settings.sharded:
                self.__dict__["_fixed"] = fixed
        backend = self.settings.attention.of(pair)
        return _Task(*(*fixed, bias, pair, backend, take, source))
