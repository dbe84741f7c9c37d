"""What is used of PyTorch's private interface, all of it, as seen in torch 2.13.

Beside the names here, `EMA` overrides `nn.Module._apply`, through which `.to()` and the like reach
its copy too; without it the copy would have to be a submodule that is left out of state dicts.
"""

from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "below_autograd",
    "foreach_add_",
    "foreach_copy_",
    "foreach_mul_",
    "forward_level",
    "fused_adamw_",
    "local",
    "reads_scaler",
]

# Skips autograd within, as C++ kernels of ops do. When it goes: `torch.library.register_autograd`,
# which costs the host 2 us a call and 6 with gradients.
below_autograd: Any = torch._C._AutoDispatchBelowAutograd

# Below 0 without forward-mode differentiation. When it goes: `forward_ad.unpack_dual` always.
forward_level = partial(attrgetter("_current_level"), forward_ad)

# Lists of tensors at once. When they go: a loop.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_mul_ = torch._foreach_mul_

# AdamW with a flag on the device that skips the step. When it goes: `adamw_ema_ref` and
# `torch.where`.
fused_adamw_ = torch._fused_adamw_


def local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor on this rank (the same tensor each time); others as they are.

    When `_local_tensor` goes: `DTensor.to_local`, which gives another tensor each time.
    """
    # not isinstance: importing torch.distributed.tensor takes a second and is not always possible
    return getattr(tensor, "_local_tensor", tensor)


def reads_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Makes `torch.amp.GradScaler` set `grad_scale` and `found_inf` rather than read them itself.

    When this goes: whatever torch's fused optimisers do instead.
    """
    vars(optimizer)["_step_supports_amp_scaling"] = True
