"""Attention within packed sequences, behind one function.

Back ends: ``xformers`` (memory-efficient attention with a block-diagonal
mask), ``varlen`` (PyTorch's variable-length flash attention), ``fa3`` and ``fa4`` (the same with
another flash kernel, where that package is installed), and ``sdpa`` (dense where all lengths are
equal, else padded and masked; the one for CPUs and for float32, which flash kernels do not take).

Shape letters: S sequences, L tokens of a sequence, R packed rows, H heads, E head dim.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.model import attend

__all__ = ["Pair", "Sequences", "attend_packed", "choose_attention"]

# flash kernels get the longest sequence rounded up to a multiple of this: few different numbers
BUCKET = 32


@dataclass(frozen=True, eq=False)
class Sequences:
    """How packed rows divide into sequences.

    Attributes:
        cu: int32 (S + 1,) on the device, where each sequence begins, and R.
        starts: the same on the host.
        longest: tokens of the longest sequence.
        equal: whether all are as long.
        pad: (S * longest,) the row of each place of the padded rectangle, which repeats a
            sequence's last row; None where nothing is padded.
        unpad: (R,) the place of each row; None likewise.
    """

    cu: Tensor
    starts: NDArray[np.int32]
    longest: int
    equal: bool
    pad: Tensor | None = None
    unpad: Tensor | None = None

    @property
    def count(self) -> int:
        """S."""
        return len(self.starts) - 1

    @property
    def bucket(self) -> int:
        """The longest sequence, rounded up."""
        return -(-self.longest // BUCKET) * BUCKET

    @functools.cached_property
    def valid(self) -> Tensor:
        """Bool (S, longest), False on padding."""
        column = torch.arange(self.longest, device=self.cu.device)
        return column < self.cu.diff()[:, None]

    def rectangle(self, rows: Tensor) -> Tensor:
        """(R, H, E) to (S, H, longest, E)."""
        if self.pad is not None:
            rows = _pad(rows, self.pad, self.unpad)
        return rows.unflatten(0, (self.count, self.longest)).transpose(1, 2)

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
    """Sequences of queries, and those of the keys that each of them sees: one attention's shape.

    Made once a step, so that what a back end derives from it is made once too.
    """

    queries: Sequences
    keys: Sequences

    @functools.cached_property
    def block_diagonal(self) -> Any:
        """What xformers calls its bias, without a copy to or from the device."""
        bias = importlib.import_module("xformers.ops.fmha.attn_bias")
        infos = [
            bias._SeqLenInfo(
                seqstart=side.cu,
                max_seqlen=side.bucket,
                min_seqlen=int(np.diff(side.starts).min()),
                seqstart_py=side.starts.tolist(),
            )
            for side in (self.queries, self.keys)
        ]
        return bias.BlockDiagonalMask(q_seqinfo=infos[0], k_seqinfo=infos[1])


Attend = Callable[[Tensor, Tensor, Tensor, Pair], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
    keys = pair.keys
    out = attend(
        pair.queries.rectangle(q),
        keys.rectangle(k),
        keys.rectangle(v),
        None if keys.equal else keys.valid,
    )
    return pair.queries.rows(out)


def _varlen(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = pair.queries, pair.keys
    return varlen_attn(q, k, v, queries.cu, keys.cu, queries.bucket, keys.bucket)  # type: ignore[return-value]


def _xformers(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    bias = pair.block_diagonal
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


_BACKENDS: dict[str, Attend] = {
    "xformers": _xformers,
    "varlen": _varlen,
    "fa3": _varlen,
    "fa4": _varlen,
    "sdpa": _sdpa,
}
# the package that each needs beside PyTorch
_PACKAGES = {"xformers": "xformers", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


def attend_packed(backend: str, q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> Tensor:
    """Full softmax attention inside each packed sequence, scale E**-0.5.

    Args:
        backend: a name that `choose_attention` returned.
        q: (rows of `pair.queries`, H, E); the last dimension contiguous.
        k, v: (rows of `pair.keys`, H, E), likewise.
        pair: sequence s of the queries attends to sequence s of the keys.

    Returns:
        (rows of `pair.queries`, H, E).
    """
    return _BACKENDS[backend](q, k, v, pair)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _trial(backend: str, device: torch.device, head_dim: int) -> None:
    """Runs a back end on two short sequences, forward and backward; whatever fails, raises."""
    if backend in {"fa3", "fa4"}:
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl(backend.upper())
    starts = np.array([0, 3, 8], dtype=np.int32)
    sequences = Sequences(torch.tensor(starts, device=device), starts, 5, False)
    q = torch.randn(8, 2, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    attend_packed(backend, q, q, q, Pair(sequences, sequences)).sum().backward()


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...]
) -> tuple[str, str]:
    """The back end of packed attention and why it is that one.

    Args:
        requested: `auto` or a back end's name.
        device: where the networks are.
        dtype: of queries, keys and values.
        head_dims: of the networks; each is tried out.

    Raises:
        ValueError: the back end cannot be used here.
    """
    if requested != "auto" and requested not in _BACKENDS:
        raise ValueError(
            f"attention must be one of auto, {', '.join(_BACKENDS)}, got {requested!r}"
        )
    if requested == "sdpa":
        return "sdpa", "as asked for"
    obstacle = None
    if dtype not in {torch.bfloat16, torch.float16}:
        obstacle = f"flash kernels take half precision only, and this run is in {dtype}"
    elif device.type != "cuda":
        obstacle = f"flash kernels need CUDA, and this run is on {device.type}"
    if obstacle:
        if requested != "auto":
            raise ValueError(f"attention must be sdpa or auto here, got {requested!r}: {obstacle}")
        return "sdpa", obstacle
    names, failures = [requested], []
    if requested == "auto":
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        names = [*(["fa3"] if hopper else []), "xformers", "varlen"]
    for name in names:
        package = _PACKAGES.get(name)
        if package and not _installed(package):
            failures.append(f"{name}: {package} is not installed")
            continue
        try:
            for head_dim in sorted(set(head_dims)):
                _trial(name, device, head_dim)
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            failures.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        why = "as asked for" if requested == name else "; ".join(["the first that runs", *failures])
        return name, why
    if requested == "auto":
        return "sdpa", "; ".join(failures)
    raise ValueError(f"attention must be usable here, got {failures[0]}")
