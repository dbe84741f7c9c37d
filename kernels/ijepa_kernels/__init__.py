"""Triton kernels for masked latent prediction, as differentiable torch ops; see kernels/README.md.

CUDA tensors run Triton, CPU tensors run plain torch, under the same names.
"""

from ijepa_kernels._checks import debug_checks
from ijepa_kernels.add_layer_norm import add_layer_norm

__all__ = ["add_layer_norm", "debug_checks"]
