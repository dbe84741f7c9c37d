"""Parameters, FLOPs, tokens and memory of a configuration, by arithmetic: nothing is allocated.

A multiply-add counts as two FLOPs; only matrix products and attention are counted. The backward
pass costs twice the forward pass.
"""

import os
import time
from dataclasses import dataclass

import numpy as np
import torch

from ijepa_fast.config import Config
from ijepa_fast.masks import mean_tokens, sample_masks
from ijepa_fast.model import build_models

__all__ = ["Estimate", "device_batch", "estimate", "measured_flops"]

# `batch.device=auto` goes no higher: larger batches do not run faster
LARGEST_DEVICE_BATCH = 256
# share of the device's memory that `auto` plans with; the rest is for the allocator and other
# processes
MEMORY_SHARE = 0.8
# what --dry-run assumes of the measured matrix rate, for hours
ASSUMED_UTILISATION = 0.4


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one configuration.

    Attributes:
        encoder_parameters, predictor_parameters: trained parameters.
        context_tokens, target_tokens: mean tokens of a context sequence and of a target block.
        longest_context, longest_target: of 100 steps; a step pads to its longest sequence.
        target_flops, context_flops, predictor_flops: of one image, backward included where there
            is one.
        fixed_bytes: weights, gradients and optimiser state on one rank.
        image_bytes: activations kept for the backward pass, of each image of the device batch.
    """

    encoder_parameters: int
    predictor_parameters: int
    context_tokens: float
    target_tokens: float
    longest_context: int
    longest_target: int
    target_flops: float
    context_flops: float
    predictor_flops: float
    fixed_bytes: int
    image_bytes: float

    @property
    def flops(self) -> float:
        """FLOPs of one image, all parts."""
        return self.target_flops + self.context_flops + self.predictor_flops

    def memory(self, batch: int) -> float:
        """Bytes of a step with this device batch."""
        return self.fixed_bytes + batch * self.image_bytes


def _block_flops(tokens: float, width: int, hidden: int) -> float:
    """One forward pass of one block over one sequence."""
    return tokens * 2 * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width


def _block_bytes(width: int, hidden: int, half: bool) -> float:
    """Kept for the backward pass by one block, of each token: under autocast the residual stream
    stays float32 and the operands of matrix products are bfloat16.
    """
    small = 2 if half else 4
    return 2 * 4 * width + small * (6 * width + 2 * hidden)


def estimate(config: Config) -> Estimate:
    """Arithmetic over a configuration; see `Estimate`."""
    with torch.device("meta"):
        encoder, predictor = build_models(config.model, config.data.crop_size)
    encoder_parameters = sum(p.numel() for p in encoder.parameters())
    predictor_parameters = sum(p.numel() for p in predictor.parameters())
    a = config.model.architecture
    patches = config.grid[0] * config.grid[1]
    tokens = mean_tokens(config.masks, config.grid, seed=config.seed)
    context, target = tokens.context, tokens.target
    contexts, targets = config.masks.num_contexts, config.masks.num_targets
    narrow, narrow_hidden = config.model.predictor_width, 4 * config.model.predictor_width
    sequence = context + target
    pairs = contexts * targets
    embed = 2 * patches * 3 * config.model.patch_size**2 * a.width
    wide_block = _block_flops(patches, a.width, a.mlp_hidden)
    context_block = _block_flops(context, a.width, a.mlp_hidden)
    narrow_block = _block_flops(sequence, narrow, narrow_hidden)
    projections = 2 * narrow * a.width * (context + target)
    # memory is that of the longest step, FLOPs those of the mean one
    longest_context, longest_target = _longest(config)
    half = config.optim.precision == "bfloat16"
    wide_bytes = _block_bytes(a.width, a.mlp_hidden, half)
    narrow_bytes = _block_bytes(narrow, narrow_hidden, half)
    kept_wide = contexts * longest_context * a.depth * wide_bytes
    kept_narrow = pairs * (longest_context + longest_target) * a.predictor_depth * narrow_bytes
    # once more at the seams: prediction and its gradient, latent targets, target encoder's output
    rows = 3 * pairs * longest_target + 2 * patches + 2 * contexts * longest_context
    seams = 4 * a.width * rows
    trained = encoder_parameters + predictor_parameters
    return Estimate(
        encoder_parameters=encoder_parameters,
        predictor_parameters=predictor_parameters,
        context_tokens=context,
        target_tokens=target,
        longest_context=longest_context,
        longest_target=longest_target,
        target_flops=a.depth * wide_block + embed,
        context_flops=3 * (contexts * a.depth * context_block) + 2 * embed,
        predictor_flops=3 * pairs * (a.predictor_depth * narrow_block + projections),
        # weight, gradient, two moments; the target encoder's weight and the EMA's temporary copy
        fixed_bytes=4 * (4 * trained + 2 * encoder_parameters),
        image_bytes=kept_wide + kept_narrow + seams,
    )


def _longest(config: Config) -> tuple[int, int]:
    """Longest context sequence and target block of 100 steps of 128 images or one group."""
    group = config.masks.truncation_group
    positions = np.arange(group * -(-128 // group))
    sampled = [
        sample_masks(
            config.masks, grid=config.grid, seed=config.seed, step=step, positions=positions
        )
        for step in range(100)
    ]
    targets = max(int(masks.target_index.shape[2]) for masks in sampled)
    return max(masks.max_context for masks in sampled), targets


def device_memory(device: torch.device, local_world: int) -> int:
    """Bytes that one rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_world


def device_batch(config: Config, *, world: int, memory: int) -> int:
    """Images of one forward pass on one rank.

    Args:
        config: `batch.device` may be `auto`: then the largest divisor of the rank's share that the
            memory estimate allows, at most 256.
        world: number of ranks.
        memory: bytes one rank may plan with, before the safety margin.

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
    need = estimate(config)
    fitting = [
        size
        for size in range(1, min(share, LARGEST_DEVICE_BATCH) + 1)
        if share % size == 0 and need.memory(size) <= MEMORY_SHARE * memory
    ]
    if not fitting:
        raise ValueError(
            f"batch.device must fit into {100 * MEMORY_SHARE:.0f} % of the memory "
            f"({memory / 2**30:.1f} GiB), got one image that needs {need.memory(1) / 2**30:.1f} GiB"
        )
    return fitting[-1]


def measured_flops(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product on this machine."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _ = float((a @ b)[0, 0])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        _ = float((a @ b)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def report(
    config: Config, world: int, device: torch.device, memory: int, images: int | None
) -> str:
    """What `--dry-run` prints.

    Args:
        config: the configuration.
        world: number of ranks.
        device: the training device.
        memory: bytes of one rank.
        images: of the data set, or None to leave the hours out.
    """
    e = estimate(config)
    try:
        batch, fits = device_batch(config, world=world, memory=memory), ""
    except ValueError as error:
        batch, fits = 1, f"; it does not run here: {error}"
    accumulation = config.batch.global_ // (batch * world)
    share = [100 * part / e.flops for part in (e.target_flops, e.context_flops, e.predictor_flops)]
    grid = " x ".join(str(side) for side in config.grid)
    lines = [
        f"parameters        encoder {e.encoder_parameters / 1e6:.1f} M, "
        f"predictor {e.predictor_parameters / 1e6:.1f} M",
        f"GFLOP/image       {e.flops / 1e9:.1f} (target {share[0]:.0f} %, "
        f"context {share[1]:.0f} %, predictor {share[2]:.0f} %)",
        f"tokens            grid {grid}, context {e.context_tokens:.1f} "
        f"(truncation group {config.masks.truncation_group}), target block {e.target_tokens:.1f}",
        f"batch             global {config.batch.global_} = {world} ranks x {batch} on the device "
        f"x {accumulation} accumulated{fits}",
        f"memory estimate   {e.memory(batch) / 2**30:.2f} GiB a rank "
        f"({e.fixed_bytes / 2**30:.2f} fixed + {e.image_bytes / 2**20:.1f} MiB an image)",
    ]
    if images is not None:
        steps = config.optim.epochs * (images // config.batch.global_)
        rate = measured_flops(device, config.optim.precision)
        total = steps * config.batch.global_ * e.flops
        hours = total / (rate * ASSUMED_UTILISATION * world) / 3600
        lines.append(
            f"run               {images} images, {steps} steps; about {hours:.2g} hours at "
            f"{100 * ASSUMED_UTILISATION:.0f} % of the {rate / 1e12:.3g} TFLOP/s that a matrix "
            f"product reached here ({config.optim.precision})"
        )
    return "\n".join(lines)
