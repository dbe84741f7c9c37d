"""The passes over memory of a block, in plain torch."""

import torch
from torch import Tensor

__all__ = ["column_sums", "join_heads"]


def _sums(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def join_heads(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    joined = torch.stack(parts, 1).flatten(1)
    return joined, joined.sum(0, dtype=_sums(joined))


def column_sums(d: Tensor) -> Tensor:
    return d.sum(0, dtype=_sums(d))
