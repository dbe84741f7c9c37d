"""FSDP2: every network's parameters, gradients and optimiser state split over the ranks.

Context and target encoder are split alike, so that AdamW and the EMA run on local shards without
communication. Losses are divided by the elements of the whole global batch, so gradients are summed
over ranks, not averaged.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ijepa_fast.model import Block

__all__ = ["make_mesh", "shard"]


def make_mesh(kind: str, device: torch.device, local_world: int) -> DeviceMesh | None:
    """The ranks that a run shards over.

    Args:
        kind: `none`, `full` (over all ranks), `hybrid` (within a machine, replicated between
            machines), or `auto`: `full` with several ranks, `none` with one.
        device: of this rank.
        local_world: ranks of one machine.

    Raises:
        ValueError: `full` or `hybrid` without a process group, or `hybrid` with machines of
            different sizes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "none" or (kind == "auto" and world == 1):
        return None
    if not dist.is_initialized():
        raise ValueError(f"shard must be none or auto without torchrun, got {kind!r}")
    if kind != "hybrid":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % local_world:
        raise ValueError(
            f"shard must be full where the machines have different numbers of ranks, got {kind!r} "
            f"with {world} ranks, {local_world} of them here"
        )
    shape = (world // local_world, local_world)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    networks: Iterable[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, *, trained: bool
) -> None:
    """Shards networks in place, each block a unit, the rest of a network another.

    Args:
        networks: whole on every rank, with the same weights.
        mesh: from `make_mesh`.
        dtype: of matrix products.
        trained: gathered in `dtype` and kept until the backward pass, gradients reduced in
            float32; else gathered as they are and freed after use.
    """
    policy = MixedPrecisionPolicy()
    if trained and dtype != torch.float32:
        # the residual stream keeps its dtype: inputs are not cast
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for network in networks:
        blocks = [module for module in network.modules() if isinstance(module, Block)]
        for module in (*blocks, network):
            # what nobody differentiates is never resharded by a backward pass
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not trained)
            assert isinstance(module, FSDPModule)
            if trained:
                module.set_gradient_divide_factor(1.0)
                # gloo has no other; with a factor of 1 it is what is wanted
                module.set_force_sum_reduction_for_comms(True)
