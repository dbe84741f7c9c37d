"""Parameters, FLOPs, tokens and memory of a configuration, by arithmetic: nothing is allocated."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ijepa_fast.config import Config, MaskConfig
from ijepa_fast.estimate.costs import Costs, Rows
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import Block, build_models, matrix_layers
from ijepa_fast.ranks import BUCKET_ELEMENTS

__all__ = ["Estimate", "device_batch", "device_memory", "estimate", "ways_of"]

# `batch.device=auto` goes no higher: larger batches do not run faster
LARGEST_DEVICE_BATCH = 256
# share of the device's memory that `auto` plans with; the rest is for the allocator and other
# processes
MEMORY_SHARE = 0.8
# steps whose masks are sampled, of so many images or of one group or batch, whichever is most;
# fewer where they would hold more patches, as that takes a second
STEPS, IMAGES, PATCHES = 200, 128, 250_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one configuration.

    Attributes:
        encoder_parameters, predictor_parameters: trained parameters.
        context_tokens, target_tokens: mean tokens of a context sequence and of a target block.
        target_flops, context_flops, predictor_flops: of one image, backward included where there
            is one. The recipe's: what the published trainer computes, whichever path runs, so that
            utilisations compare.
        executed_flops: of one image, without the work that the fast path leaves out as it cannot
            reach the loss. What `memory` recomputes does not count, nor do the positions of mask
            tokens, which a device batch sees once.
        fixed_bytes: weights, optimiser state and averages on one rank.
        gradient_bytes: gradients on one rank when the update runs. The backward pass allocates them
            while it frees activations: at its beginning, the height of a step, there are none.
        accumulation_bytes: gradients that are there already where a micro-step is not the first;
            sharded ones add up whole.
        activation_bytes: kept for the backward pass, of each image of the device batch.
        working_bytes: of each image of the device batch beside them: pixels waiting, what passes
            by at the height of a step, the target encoder's CUDA graph.
        graph_bytes: of them, memory of the graph's own, which torch reserves and does not count as
            allocated.
        update_bytes: what an update needs for a while, when the activations are gone.
    """

    encoder_parameters: int
    predictor_parameters: int
    context_tokens: float
    target_tokens: float
    target_flops: float
    context_flops: float
    predictor_flops: float
    executed_flops: float
    fixed_bytes: float
    gradient_bytes: float
    accumulation_bytes: float
    activation_bytes: float
    working_bytes: float
    graph_bytes: float
    update_bytes: float

    @property
    def flops(self) -> float:
        """FLOPs of one image, all parts, of the recipe."""
        return self.target_flops + self.context_flops + self.predictor_flops

    @property
    def image_bytes(self) -> float:
        """Of each image of the device batch."""
        return self.activation_bytes + self.working_bytes

    def state(self, accumulated: int) -> float:
        """Bytes that do not depend on the device batch, with so many micro-steps."""
        return self.fixed_bytes + (self.accumulation_bytes if accumulated > 1 else 0)

    def memory(self, batch: int, accumulated: int = 1) -> float:
        """Bytes of a step with this device batch and number of micro-steps."""
        update = self.fixed_bytes + self.gradient_bytes + self.update_bytes
        return max(self.state(accumulated) + batch * self.image_bytes, update)

    def allocated(self, batch: int) -> float:
        """Bytes that `torch.cuda.max_memory_allocated` shows of a step of one micro-step."""
        return self.memory(batch) - batch * self.graph_bytes


@functools.lru_cache(maxsize=8)
def _sampled(config: MaskConfig, grid: tuple[int, int], seed: int, batch: int) -> tuple[Rows, ...]:
    """Of device batches of some steps."""
    group = config.truncation_group
    positions = np.arange(group * -(-max(IMAGES, batch) // group))
    patches = len(positions) * grid[0] * grid[1] * (config.num_contexts + config.num_targets)
    masks = (
        sample_masks(config, grid=grid, seed=seed, step=step, positions=positions)
        for step in range(min(max(PATCHES // patches, 2), STEPS))
    )
    return tuple(rows for step in masks for rows in Rows.of(step, grid[0] * grid[1], batch))


def ways_of(config: Config, world: int, local_world: int) -> int | None:
    """Over how many ranks weights are split; None where they are whole on each."""
    whole = config.shard == "none" or (config.shard == "auto" and world == 1)
    if config.path == "reference" or whole:
        return None
    return local_world if config.shard == "hybrid" else world


def _state(
    config: Config, encoder: nn.Module, predictor: nn.Module, world: int, ways: int | None
) -> dict[str, float]:
    """Bytes that do not depend on the device batch, by the names of `Estimate`."""
    half = config.optim.precision == "bfloat16"
    own, other = _parameters(encoder), _parameters(predictor)
    trained = own + other
    matrices = sum(_parameters(layer) for layer in matrix_layers(encoder))
    rounded = matrices + sum(_parameters(layer) for layer in matrix_layers(predictor))
    # the target encoder: float32 averages, and the matrices once more, rounded
    target = 4 * own + (2 * matrices if half and config.path == "fast" else 0)
    buffers = [2 * b.numel() for b in encoder.buffers()] + [b.numel() for b in predictor.buffers()]
    fixed: float = 12 * trained + target
    if ways is None:
        # rounded copies, the optimiser's or autocast's
        fixed += 2 * rounded if half else 0
        # the bucket of the reduction; the reference's EMA computes into a temporary copy
        update = 4 * min(trained, BUCKET_ELEMENTS) if world > 1 else 0
        if config.path == "reference":
            update = max(update, 4 * own)
    else:
        size, update = 2 if half else 4, 0
        blocks = (m for n in (encoder, predictor) for m in n.modules() if isinstance(m, Block))
        # gathered weights stay until the backward pass; one block's gradients on their way, as
        # computed and as sent
        passing = size * trained + (size + 4) * max(_parameters(block) for block in blocks)
        fixed = fixed / ways + passing
    return {
        "fixed_bytes": fixed + 4 * sum(buffers),
        "gradient_bytes": 4 * trained / (ways or 1),
        "accumulation_bytes": 4 * trained,
        "update_bytes": update,
    }


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def estimate(
    config: Config,
    *,
    batch: int = IMAGES,
    world: int = 1,
    local_world: int | None = None,
    steps: Sequence[Rows] | None = None,
) -> Estimate:
    """Arithmetic over a configuration; see `Estimate`.

    Memory is that of the device batch with most rows in 200 steps.

    Args:
        config: the configuration; `device` does not count.
        batch: images of a device batch: the smaller it is, the more rows may an image of it have.
        world: number of ranks.
        local_world: of one machine, if not all of them.
        steps: what the masks of some device batches hold; sampled by default.
    """
    with torch.device("meta"):
        encoder, predictor = build_models(config.model, config.data.crop_size)
    usual = steps or _sampled(config.masks, config.grid, config.seed, IMAGES)
    steps = steps or _sampled(config.masks, config.grid, config.seed, batch)
    costs = Costs(config)
    context = float(np.mean([rows.context for rows in usual])) / costs.contexts
    target = float(np.mean([rows.target for rows in usual]))
    needed = float(np.mean([rows.needed for rows in usual]))
    parts = costs.recipe(context, target)
    ways = ways_of(config, world, local_world or world)
    graph = costs.fast and ways is None
    # decoded ahead, being decoded, in use, and in the graph's place
    copies = config.data.prefetch + 2 + int(graph)
    kept = [(costs.activations(rows), costs.working(rows, copies, graph)) for rows in steps]
    activation, working = max(kept, key=sum)
    return Estimate(
        encoder_parameters=_parameters(encoder),
        predictor_parameters=_parameters(predictor),
        context_tokens=context,
        target_tokens=target,
        target_flops=parts[0],
        context_flops=parts[1],
        predictor_flops=parts[2],
        executed_flops=costs.executed(context, target, needed) if costs.fast else sum(parts),
        activation_bytes=activation,
        working_bytes=working,
        graph_bytes=costs.graph()[1] if graph else 0,
        **_state(config, encoder, predictor, world, ways),
    )


def device_memory(device: torch.device, local_world: int) -> int:
    """Bytes that one rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world


def device_batch(config: Config, *, world: int, memory: int, local_world: int | None = None) -> int:
    """Images of one forward pass on one rank.

    Args:
        config: `batch.device` may be `auto`: then the largest divisor of the rank's share that the
            memory estimate allows, at most 256.
        world: number of ranks.
        memory: bytes one rank may plan with, before the safety margin.
        local_world: ranks of one machine, if not all of them.

    Raises:
        ValueError: batch.global is not divisible by the ranks (and the device batch), or not
            even one image fits.
    """
    total, chosen = config.batch.global_, config.batch.device
    if total % world:
        raise ValueError(
            f"batch.global must be divisible by the number of ranks ({world}), got {total}"
        )
    share = total // world
    if chosen != "auto":
        if share % chosen:
            raise ValueError(
                f"batch.device must divide batch.global / ranks ({total} / {world} = {share}), "
                f"got {chosen}"
            )
        return chosen
    need = 0.0
    for size in range(min(share, LARGEST_DEVICE_BATCH), 0, -1):
        if share % size == 0:
            e = estimate(config, batch=size, world=world, local_world=local_world)
            need = e.memory(size, share // size)
            if need <= MEMORY_SHARE * memory:
                return size
    raise ValueError(
        f"batch.device must fit into {100 * MEMORY_SHARE:.0f} % of the memory "
        f"({memory / 2**30:.1f} GiB), got one image that needs {need / 2**30:.1f} GiB"
    )
