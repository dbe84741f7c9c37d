"""The passes over memory of a block, in plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten: Any = torch.ops.aten


def _wide(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype.itemsize < 4 else rows


def _sums(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def add_layer_norm_forward(
    x: Tensor, f: Tensor | None, gain: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if f is not None:
        x = torch.add(x, f)
    y, mean, rstd = torch.native_layer_norm(_wide(x), (x.shape[1],), _wide(gain), _wide(shift), eps)
    return x, y.to(out_dtype), mean, rstd


def add_layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    *,
    low_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, shape, gain, shift = _wide(x), (x.shape[1],), _wide(gain), _wide(shift)
    y = torch.native_layer_norm(rows, shape, gain, shift, eps)[0].to(low_dtype)
    inner, dgain, dshift = aten.native_layer_norm_backward(
        _wide(dy), rows, shape, mean, rstd, gain, shift, (True, True, True)
    )
    if dsum is not None:
        inner = inner.add_(dsum)
    dlow = inner.to(low_dtype)
    return inner.to(x.dtype), dlow, dlow.sum(0, dtype=_sums(dlow)), y, dgain, dshift


def gelu_backward(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dh = aten.gelu_backward(dg, h)
    return dh, dh.sum(0, dtype=_sums(h)), F.gelu(h)


def join_heads(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    joined = torch.stack(parts, 1).flatten(1)
    return joined, joined.sum(0, dtype=_sums(joined))


def column_sums(d: Tensor) -> Tensor:
    return d.sum(0, dtype=_sums(d))
