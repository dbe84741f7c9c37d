"""Triton kernels for masked latent prediction. This version contains none yet; see
kernels/README.md.
"""

__all__: list[str] = []
