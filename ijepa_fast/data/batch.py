"""What the loader hands to a training step."""

from dataclasses import dataclass

import torch

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images: uint8 (B, H, W, C) on the training device; 0-255, not normalised.
        ids: int64 (B,) sample ids (rows of the index), on the CPU.
    """

    images: torch.Tensor
    ids: torch.Tensor
