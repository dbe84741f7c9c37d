"""Attention within packed sequences: back ends, each with a forward and a backward of its own.

A block differentiates itself, so a back end is two plain functions over rows:

- ``cudnn``: cuDNN's dense kernel over views of the rows; where all lengths are equal;
- ``varlen``: PyTorch's variable-length flash kernel, its aten op called directly; ``fa3`` and
  ``fa4`` are the same op with the kernel of that package, where it is installed;
- ``xformers``: the flash operator of xformers;
- ``sdpa``: `scaled_dot_product_attention` under autograd, padded and masked where lengths differ;
  the one for CPUs and for float32, which flash kernels do not take.

Shape letters: S sequences, L tokens of a sequence, R packed rows, H heads, E head dim.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ijepa_fast._torch import (
    cudnn_attention,
    cudnn_attention_backward,
    flash_attention,
    flash_attention_backward,
)
from ijepa_fast.config import AttentionName
from ijepa_fast.model import attend

__all__ = ["BACKENDS", "Attention", "Backend", "Pair", "Sequences", "choose_attention"]

# flash kernels get the longest sequence rounded up to a multiple of this: few different numbers
BUCKET = 32
# another kernel has to be faster than the usual one by so much: the choice is the same every time
MARGIN = 1.1


@dataclass(frozen=True, eq=False)
class Sequences:
    """How packed rows divide into sequences.

    Attributes:
        cu: int32 (S + 1,) on the device, where each sequence begins, and R.
        count: S.
        longest: tokens of the longest sequence, or more where nothing is padded.
        equal: whether all have that many.
        pad: (S * longest,) the row of each place of the padded rectangle, which repeats a
            sequence's last row; None where nothing is padded.
        unpad: (R,) the place of each row; None likewise.
    """

    cu: Tensor
    count: int
    longest: int
    equal: bool
    pad: Tensor | None = None
    unpad: Tensor | None = None

    @functools.cached_property
    def bucket(self) -> int:
        """The longest sequence, rounded up."""
        return -(-self.longest // BUCKET) * BUCKET

    @functools.cached_property
    def valid(self) -> Tensor:
        """Bool (S, longest), False on padding."""
        column = torch.arange(self.longest, device=self.cu.device)
        return column < self.cu.diff()[:, None]

    def rectangle(self, rows: Tensor) -> Tensor:
        """(R, H, E) to (S, H, longest, E); a view where nothing is padded."""
        if self.pad is not None:
            rows = _pad(rows, self.pad, self.unpad)
        return rows.view(self.count, self.longest, *rows.shape[1:]).transpose(1, 2)

    def rows(self, rectangle: Tensor) -> Tensor:
        """(S, H, longest, E) to (R, H, E)."""
        rows = rectangle.transpose(1, 2).flatten(0, 1)
        return rows if self.unpad is None else rows.index_select(0, self.unpad)


class _Pad(torch.autograd.Function):
    """Packed rows to a rectangle. What stands on padding gets no gradient (masked keys, queries
    that nobody reads), so that the backward pass is a gather too.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        return rows.index_select(0, pad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (unpad,) = ctx.saved_tensors
        return grad.index_select(0, unpad), None, None


# mypy does not know what `apply` takes
_pad: Callable[..., Tensor] = _Pad.apply


@dataclass(frozen=True, eq=False)
class Pair:
    """Sequences of queries, and those of the keys that each of them sees: one attention's shape."""

    queries: Sequences
    keys: Sequences

    @functools.cached_property
    def equal(self) -> bool:
        """Whether nothing would be padded."""
        return self.queries.equal and self.keys.equal

    @functools.cached_property
    def block_diagonal(self) -> Any:
        """What xformers calls its bias, without a copy to or from the device."""
        bias = importlib.import_module("xformers.ops.fmha.attn_bias")
        infos = [
            bias._SeqLenInfo(
                seqstart=side.cu,
                max_seqlen=side.bucket,
                min_seqlen=0,
                seqstart_py=[],  # its flash operator does not read them
            )
            for side in (self.queries, self.keys)
        ]
        return bias.BlockDiagonalMask(q_seqinfo=infos[0], k_seqinfo=infos[1])


# --- back ends -----------------------------------------------------------------------------------

Kept = tuple[Any, ...]
Grads = tuple[Tensor, Tensor, Tensor]


class Backend(NamedTuple):
    """One implementation.

    Attributes:
        name: as in `--attention`.
        forward: q, k, v (R, H, E), the pair, and whether a backward pass follows: to the output
            (R, H, E) and what else the backward pass needs.
        backward: the output's gradient, the output, what was kept, and the pair: to the gradients
            of q, k and v.
        package: that it needs beside PyTorch.
        activated: the name by which PyTorch gives its flash op this package's kernel.
        obstacle: why `auto` leaves it out although it is installed, or None.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Pair, bool], tuple[Tensor, Kept]]
    backward: Callable[[Tensor, Tensor, Kept, Pair], Grads]
    package: str | None = None
    activated: str | None = None
    obstacle: Callable[[], str | None] = lambda: None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, pair: Pair, grad: bool) -> tuple[Tensor, Kept]:
    leaves = tuple([t.detach().requires_grad_(grad) for t in (q, k, v)])
    keys = pair.keys
    with torch.set_grad_enabled(grad):
        rectangles = (pair.queries, keys, keys)
        inputs = [side.rectangle(t) for side, t in zip(rectangles, leaves, strict=True)]
        out = attend(inputs[0], inputs[1], inputs[2], None if keys.equal else keys.valid)
        out = pair.queries.rows(out)
    return out.detach(), (leaves, out) if grad else ()


def _sdpa_backward(dout: Tensor, out: Tensor, kept: Kept, pair: Pair) -> Grads:
    leaves, attended = kept
    return torch.autograd.grad(attended, leaves, dout)  # type: ignore[return-value]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, pair: Pair, grad: bool) -> tuple[Tensor, Kept]:
    queries, keys = pair.queries, pair.keys
    qkv = queries.rectangle(q), keys.rectangle(k), keys.rectangle(v)
    out, lse, _, _, _, _, seed, offset, _ = cudnn_attention(*qkv, None, grad)
    return queries.rows(out), (*qkv, lse, seed, offset)


def _cudnn_backward(dout: Tensor, out: Tensor, kept: Kept, pair: Pair) -> Grads:
    queries, keys = pair.queries, pair.keys
    q, k, v, *rest = kept
    dq, dk, dv = cudnn_attention_backward(
        *(queries.rectangle(dout), q, k, v, queries.rectangle(out)),
        *rest,
        *(None, None, None, queries.longest, keys.longest, 0.0, False),
    )
    return queries.rows(dq), keys.rows(dk), keys.rows(dv)


def _varlen(q: Tensor, k: Tensor, v: Tensor, pair: Pair, grad: bool) -> tuple[Tensor, Kept]:
    a, b = pair.queries, pair.keys
    out, lse, rng, unused, _ = flash_attention(
        q, k, v, a.cu, b.cu, a.bucket, b.bucket, 0.0, False, False
    )
    return out, (q, k, v, lse, rng, unused)


def _varlen_backward(dout: Tensor, out: Tensor, kept: Kept, pair: Pair) -> Grads:
    a, b = pair.queries, pair.keys
    q, k, v, lse, rng, unused = kept
    grads: Grads = flash_attention_backward(
        dout, q, k, v, out, lse, a.cu, b.cu, a.bucket, b.bucket, 0.0, False, rng, unused
    )
    return grads


@functools.cache
def _fmha() -> Any:
    """Imported without the lines that xformers logs where its own library does not load."""
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops.fmha")
    finally:
        logger.setLevel(level)


# its dispatcher, which refuses beside another CUDA than its own library's, is not asked: the flash
# operator needs nothing of that library
def _xformers(q: Tensor, k: Tensor, v: Tensor, pair: Pair, grad: bool) -> tuple[Tensor, Kept]:
    fmha = _fmha()
    inputs = fmha.Inputs(q[None], k[None], v[None], attn_bias=pair.block_diagonal)
    out, context = fmha.flash.FwOp.apply(inputs, grad)
    return out[0], (q, k, v, context.lse) if grad else ()


def _xformers_backward(dout: Tensor, out: Tensor, kept: Kept, pair: Pair) -> Grads:
    fmha = _fmha()
    q, k, v, lse = kept
    inputs = fmha.Inputs(q[None], k[None], v[None], attn_bias=pair.block_diagonal)
    context = fmha.common.Context(lse=lse, out=out[None])
    grads = fmha.flash.BwOp.apply(context, inputs, dout[None])
    return grads.dq[0], grads.dk[0], grads.dv[0]


def _other_cuda() -> str | None:
    """Why xformers brings nothing here, or None: read from its files, without importing it."""
    spec = importlib.util.find_spec("xformers")
    assert spec is not None
    for folder in spec.submodule_search_locations or ():
        with contextlib.suppress(OSError, ValueError, KeyError):
            built = json.loads((Path(folder) / "cpp_lib.json").read_text())["version"]["cuda"]
            theirs = f"{built // 100}.{built % 100}"
            if theirs != torch.version.cuda:
                mine = torch.version.cuda
                return f"its library is built for CUDA {theirs}, this torch has {mine}"
    return None


CUDNN = Backend("cudnn", _cudnn, _cudnn_backward)
# `auto` takes the first that runs, unless a later one is faster
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("varlen", _varlen, _varlen_backward),
        Backend("fa3", _varlen, _varlen_backward, "flash_attn_interface", activated="FA3"),
        Backend("fa4", _varlen, _varlen_backward, "flash_attn.cute", activated="FA4"),
        Backend("xformers", _xformers, _xformers_backward, "xformers", obstacle=_other_cuda),
        Backend("sdpa", _sdpa, _sdpa_backward),
    )
}
assert {"auto", *BACKENDS} == set(get_args(AttentionName))


class Attention(NamedTuple):
    """The back ends of a run.

    Attributes:
        packed: for any lengths.
        dense: where all lengths are equal.
        why: how they were chosen, in words.
    """

    packed: Backend
    dense: Backend
    why: str

    def of(self, pair: Pair) -> Backend:
        """The back end for these sequences."""
        dense = pair.equal and min(pair.queries.longest, pair.keys.longest) > 1  # cuDNN's rule
        return self.dense if dense else self.packed

    def __str__(self) -> str:
        """Names, for the log."""
        if self.dense is self.packed:
            return self.packed.name
        return f"{self.dense.name} where lengths are equal, {self.packed.name} elsewhere"


# --- the choice ----------------------------------------------------------------------------------


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _activate(backend: Backend) -> bool:
    """Gives aten's flash op the kernel of the back end's package, if it has one."""
    if backend.activated:
        attention = importlib.import_module("torch.nn.attention")
        attention.activate_flash_attention_impl(backend.activated)
    return backend.activated is not None


@contextlib.contextmanager
def _active(backend: Backend) -> Iterator[None]:
    """`_activate`, for a while."""
    changed = _activate(backend)
    try:
        yield
    finally:
        if changed:
            importlib.import_module("torch.nn.attention").restore_flash_attention_impl()


def _sequences(count: int, length: int, device: torch.device) -> Sequences:
    cu = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
    return Sequences(cu, count, length, equal=True)


class _Failed(Exception):
    """A back end that runs and computes something else."""


def _trial(backend: Backend, device: torch.device, heads: int, head_dim: int) -> None:
    """Runs a back end forward and backward, as a block would, and compares it with float32."""
    keys = _sequences(3, 40, device)
    qkv = torch.randn(120, 3, heads, head_dim, device=device).to(torch.bfloat16)
    for length in (40, 24):  # the predictor's last block has fewer queries than keys
        pair = Pair(_sequences(3, length, device), keys)
        dout = torch.randn(3 * length, heads, head_dim, device=device).to(torch.bfloat16)
        results = []
        for each, dtype in ((backend, torch.bfloat16), (BACKENDS["sdpa"], torch.float32)):
            q, k, v = qkv.to(dtype).unbind(1)
            out, kept = each.forward(q[: 3 * length], k, v, pair, True)
            grads = each.backward(dout.to(dtype), out, kept, pair)
            results.append([t.float() for t in (out, *grads)])
        for name, mine, true in zip(("output", "dq", "dk", "dv"), *results, strict=True):
            error = float((mine - true).norm() / true.norm())
            if not error < 0.02:
                raise _Failed(f"its {name} is off by {error:.2g} of float32's")


def _milliseconds(
    backend: Backend, device: torch.device, shapes: Sequence[tuple[int, int, int]]
) -> float:
    """Forward and backward, summed over shapes (tokens, heads, head dim) of 64 sequences each."""
    total = 0.0
    for tokens, heads, head_dim in shapes:
        side = _sequences(64, tokens, device)
        pair = Pair(side, side)
        qkv = torch.randn(64 * tokens, 3, heads, head_dim, device=device, dtype=torch.bfloat16)
        q, k, v = qkv.unbind(1)
        dout, times = torch.randn_like(q), []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out, kept = backend.forward(q, k, v, pair, True)
            backend.backward(dout, out, kept, pair)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        total += statistics.median(times[2:])
    return total


def _usable(
    backend: Backend, device: torch.device, shapes: Sequence[tuple[int, int, int]]
) -> str | None:
    """Why a back end cannot be used here, or None."""
    if backend.package and not _installed(backend.package):
        return f"{backend.package} is not installed"
    try:
        with _active(backend):
            for _, heads, head_dim in shapes:
                _trial(backend, device, heads, head_dim)
    except (ImportError, AttributeError, RuntimeError, ValueError, TypeError, _Failed) as error:
        return str(error).splitlines()[0]
    return None


def _pick(
    candidates: Sequence[Backend],
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]],
    notes: list[str],
) -> Backend | None:
    """The first candidate that runs, unless a later one is faster by the margin."""
    usable = []
    for backend in candidates:
        reason = _usable(backend, device, shapes)
        if reason is None:
            usable.append(backend)
        else:
            notes.append(f"{backend.name}: {reason}")
    if len(usable) < 2:
        return usable[0] if usable else None
    times = {}
    for backend in usable:
        with _active(backend):
            times[backend.name] = _milliseconds(backend, device, shapes)
    notes.append(", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    best = min(usable, key=lambda backend: times[backend.name])
    return best if times[best.name] * MARGIN < times[usable[0].name] else usable[0]


def choose_attention(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int, int]],
) -> Attention:
    """The back ends of packed attention. Each is tried on the device, and compared with float32.

    Args:
        requested: `auto` or a back end's name.
        device: where the networks are.
        dtype: of queries, keys and values.
        shapes: tokens, heads and head dim of the networks' sequences.

    Raises:
        ValueError: the back end cannot be used here.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}, got {requested!r}")
    sdpa = BACKENDS["sdpa"]
    if requested == "sdpa":
        return Attention(sdpa, sdpa, "as asked for")
    obstacle = None
    if dtype not in {torch.bfloat16, torch.float16}:
        obstacle = f"flash kernels take half precision only, and this run is in {dtype}"
    elif device.type != "cuda":
        obstacle = f"flash kernels need CUDA, and this run is on {device.type}"
    if obstacle:
        if requested != "auto":
            raise ValueError(f"attention must be sdpa or auto here, got {requested!r}: {obstacle}")
        return Attention(sdpa, sdpa, obstacle)
    if requested != "auto":
        backend = BACKENDS[requested]
        if reason := _usable(backend, device, shapes):
            raise ValueError(f"attention must be usable here, got {requested}: {reason}")
        _activate(backend)
        return Attention(backend, backend, "as asked for")
    candidates, notes = [], []
    for backend in BACKENDS.values():
        if backend is sdpa or (backend.package and not _installed(backend.package)):
            continue
        if reason := backend.obstacle():
            notes.append(f"{backend.name}: {reason}")
        else:
            candidates.append(backend)
    packed = _pick(candidates, device, shapes, notes)
    if packed is None:
        return Attention(sdpa, sdpa, "; ".join(notes))
    dense: Backend | None = packed
    if torch.cuda.get_device_capability(device)[0] >= 9:
        # where PyTorch has but these two, cuDNN's is known to be the faster one
        others = [packed] if packed.name != "varlen" else []
        dense = _pick([CUDNN, *others], device, shapes, notes)
    _activate(packed)
    return Attention(packed, dense or packed, "; ".join(["the first that run", *notes]))
