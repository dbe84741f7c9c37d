"""Triton kernels for masked latent prediction, as torch ops; see kernels/README.md.

CUDA tensors run Triton, CPU tensors run plain torch, under the same names.
"""

from ijepa_kernels._checks import debug_checks
from ijepa_kernels.add_layer_norm import add_layer_norm
from ijepa_kernels.column_sums import column_sums
from ijepa_kernels.gather_tokens import gather_tokens
from ijepa_kernels.gelu import gelu
from ijepa_kernels.join_heads import join_heads
from ijepa_kernels.latent_loss import latent_loss
from ijepa_kernels.optim import adamw_ema_, ema_update_
from ijepa_kernels.patchify import patchify
from ijepa_kernels.quantize_rows import Float8Rows, quantize_rows
from ijepa_kernels.scatter_tokens import scatter_tokens

__all__ = [
    "Float8Rows",
    "adamw_ema_",
    "add_layer_norm",
    "column_sums",
    "debug_checks",
    "ema_update_",
    "gather_tokens",
    "gelu",
    "join_heads",
    "latent_loss",
    "patchify",
    "quantize_rows",
    "scatter_tokens",
]

__version__ = "0.1.0"
