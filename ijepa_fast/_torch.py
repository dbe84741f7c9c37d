"""Private API of PyTorch, all that the trainer uses: one place to look when a version changes it.

Seen in 2.11 (CPU and CUDA 13.0) and in 2.13 (CPU). What is missing in a later version fails where
it is called, not here.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "cpu_has",
    "cudnn_attention",
    "cudnn_attention_backward",
    "end_capture_pool",
    "flash_attention",
    "flash_attention_backward",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
]


def _private(holder: Any, name: str) -> Callable[..., Any]:
    """A private function, or one that says that this PyTorch has none."""
    try:
        found: Callable[..., Any] = getattr(holder, name)
    except AttributeError:

        def found(*_: Any, **__: Any) -> Any:
            raise AttributeError(f"PyTorch {torch.__version__} has no {name}")

    return found


# Many tensors in one launch on CUDA. Without them: loops of add_, copy_, lerp_, mul, mul_ and
# torch.linalg.vector_norm, in more launches.
foreach_add_ = _private(torch, "_foreach_add_")
foreach_copy_ = _private(torch, "_foreach_copy_")
foreach_lerp_ = _private(torch, "_foreach_lerp_")
foreach_mul = _private(torch, "_foreach_mul")
foreach_mul_ = _private(torch, "_foreach_mul_")
foreach_norm = _private(torch, "_foreach_norm")

# Attention as two functions, forward and backward, for blocks that differentiate themselves.
# Without them: scaled_dot_product_attention (as the back end `sdpa`) or, for the flash ones,
# torch.nn.attention.varlen.varlen_attn, both under autograd.
cudnn_attention = _private(torch.ops.aten, "_scaled_dot_product_cudnn_attention")
cudnn_attention_backward = _private(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward")
flash_attention = _private(torch.ops.aten, "_flash_attention_forward")
flash_attention_backward = _private(torch.ops.aten, "_flash_attention_backward")

# Ends an allocator's share in a capture that failed. Without it: the run stops there instead.
end_capture_pool = _private(torch._C, "_cuda_endAllocateToPool")


def cpu_has(feature: str) -> bool | None:
    """Whether this CPU has a feature (`avx512_bf16`, `amx_tile`), None where PyTorch cannot tell.

    Without the private functions: the flags in /proc/cpuinfo.
    """
    ask = getattr(torch.cpu, f"_is_{feature}_supported", None)
    return None if ask is None else bool(ask())
