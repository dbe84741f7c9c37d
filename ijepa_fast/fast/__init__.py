"""The fast step: packed rows, fused kernels, sharded weights.

Here stands what the rest of the trainer uses of it.
"""

from ijepa_fast.fast.attention import choose_attention
from ijepa_fast.fast.block import Memory
from ijepa_fast.fast.capture import CapturedStep
from ijepa_fast.fast.sharding import make_mesh
from ijepa_fast.fast.step import FastStep

__all__ = ["CapturedStep", "FastStep", "Memory", "choose_attention", "make_mesh"]
