"""Attention behind one function. This version has one back end: PyTorch's SDPA."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Full softmax attention inside each sequence, scale E**-0.5.

    Args:
        q, k, v: (S, H, L, E).
        valid: bool (S, L), True where a key is a real token; None where all are.

    Returns:
        (S, H, L, E).
    """
    mask = None if valid is None else valid[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # PyTorch's CPU backward in bfloat16 takes 6 times as long as in float32, so under autocast the
    # attention itself stays in float32 there
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return out.to(q.dtype)
