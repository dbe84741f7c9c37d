"""What `--dry-run` prints."""

import textwrap
import time

import torch

from ijepa_fast.config import Config
from ijepa_fast.estimate.total import device_batch, estimate, ways_of

__all__ = ["hours", "in_words", "measured_flops", "report"]

# what it assumes of the measured matrix rate, for hours
ASSUMED_UTILISATION = 0.4


def measured_flops(device: torch.device, precision: str, seconds: float = 1.0) -> float:
    """FLOP/s of a large matrix product on this machine."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _ = float((a @ b.t())[0, 0])
    start, best = time.perf_counter(), float("inf")
    while (began := time.perf_counter()) < start + seconds:
        _ = float((a @ b.t())[0, 0])
        # other processes only make it slower
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def hours(
    config: Config, world: int, device: torch.device, steps: int, *, seconds: float = 1.0
) -> tuple[float, float]:
    """What so many steps take, and the FLOP/s that are measured for it in so many seconds."""
    rate = measured_flops(device, config.optim.precision, seconds)
    total = steps * config.batch.global_ * estimate(config).flops
    return total / (rate * ASSUMED_UTILISATION * world) / 3600, rate


def in_words(hours: float) -> str:
    """A run's length, as well as an estimate knows it."""
    if hours < 1 / 60:
        return "less than a minute"
    return f"about {hours:,.0f} hours" if hours >= 2 else f"about {60 * hours:.0f} minutes"


def report(
    config: Config,
    world: int,
    device: torch.device,
    memory: int,
    images: int | None,
    *,
    local_world: int | None = None,
) -> str:
    """What `--dry-run` prints; without `images` no hours. Arguments as of `device_batch`."""
    try:
        batch = device_batch(config, world=world, memory=memory, local_world=local_world)
        fits = ""
    except ValueError as error:
        batch, fits = 1, f"; it does not run here: {error}"
    e = estimate(config, batch=batch, world=world, local_world=local_world)
    accumulation = config.batch.global_ // (batch * world)
    share = [100 * part / e.flops for part in (e.target_flops, e.context_flops, e.predictor_flops)]
    grid = " x ".join(str(side) for side in config.grid)
    fast = config.path == "fast"
    left_out = 100 * (1 - e.executed_flops / e.flops)
    ways = ways_of(config, world, local_world or world)
    path = f"fast, memory {config.memory}" if fast else "reference"
    lines = [
        f"path              {path}, {config.optim.precision}, "
        f"shard {'none' if ways is None else f'over {ways} ranks'}",
        f"parameters        encoder {e.encoder_parameters / 1e6:.1f} M, "
        f"predictor {e.predictor_parameters / 1e6:.1f} M",
        f"GFLOP/image       {e.flops / 1e9:.1f} (target {share[0]:.0f} %, "
        f"context {share[1]:.0f} %, predictor {share[2]:.0f} %)"
        + (f", of which the fast path leaves out {left_out:.0f} %" if fast else ""),
        f"tokens            grid {grid}, context {e.context_tokens:.1f} "
        f"(truncation group {config.masks.truncation_group}), target block {e.target_tokens:.1f}",
        f"batch             global {config.batch.global_} = {world} "
        f"rank{'s' * (world > 1)} x {batch} on the device x {accumulation} accumulated{fits}",
        f"memory estimate   {e.memory(batch, accumulation) / 2**30:.2f} GiB a rank: "
        f"{e.state(accumulation) / 2**30:.2f} weights and optimiser + {batch} images x "
        f"{e.image_bytes / 2**20:.1f} MiB ({e.activation_bytes / 2**20:.1f} for the backward pass)",
    ]
    # weights of three networks, two moments of the trained ones, float32
    state = 4 * (4 * e.encoder_parameters + 3 * e.predictor_parameters)
    keep = config.checkpoint.keep
    lines.append(
        f"checkpoints       {state / 2**30:.2f} GiB each: in the memory of rank 0's machine for "
        f"the copy that is written, and on the disk for {keep} + 1 of them "
        f"{(keep + 1) * state / 2**30:.2f} GiB"
    )
    if images is not None:
        steps = config.optim.epochs * (images // config.batch.global_)
        steps = min(steps, config.max_steps or steps)
        time, rate = hours(config, world, device, steps)
        lines.append(
            f"run               {images:,} images, {steps:,} steps; {in_words(time)} at "
            f"{100 * ASSUMED_UTILISATION:.0f} % of the {rate / 1e12:.3g} TFLOP/s that a matrix "
            f"product reached here ({config.optim.precision})"
        )
    return "\n".join(
        part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent=" " * 18)
    )
