"""`ijepa-fast replay FILE`: one step of a run again, without its data or checkpoints.

A run that ends because loss or gradients stay non-finite leaves such a file (see `nonfinite`). The
step is computed on this machine with the file's weights and images, and what is not finite in it is
named: weights, samples, gradients.

Exit codes: 0 every number is finite here, 1 some are not, 2 wrong input.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ijepa_fast.config import Config, from_tree, run_command
from ijepa_fast.errors import UsageError
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.ranks import distributed
from ijepa_fast.state import checkpoint, misfit
from ijepa_fast.step import TrainingStep, make_step, one_device
from ijepa_fast.verify.nonfinite import REPLAY_FORMAT

__all__ = ["Replay", "main", "read_replay", "replay"]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A recorded step.

    Attributes:
        config: of the run.
        step: optimiser step, from 1.
        device_batch: images of one micro-step.
        images: uint8 (global batch, height, width, 3).
        ids: int64 (global batch,).
        files: name of each image's file.
        weights: float32 tensors of all three networks, by name.
    """

    config: Config
    step: int
    device_batch: int
    images: Tensor
    ids: Tensor
    files: list[str]
    weights: dict[str, Tensor]


def read_replay(path: Path) -> Replay:
    """Reads a replay file.

    Raises:
        UsageError: it is unreadable, or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != REPLAY_FORMAT:
                raise UsageError(
                    f"FILE must have format {REPLAY_FORMAT!r}, got {meta.get('format')!r} in {path}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recorded = Replay(
            config=from_tree(json.loads(meta["config"])),
            step=int(meta["step"]),
            device_batch=int(meta["device_batch"]),
            images=tensors.pop("images"),
            ids=tensors.pop("ids"),
            files=[str(name) for name in json.loads(meta["files"])],
            weights=tensors,
        )
    except (OSError, KeyError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"FILE must be a whole replay file, got {path}: {error!r}") from None
    size = recorded.config.batch.global_
    lengths = (len(recorded.images), len(recorded.ids), len(recorded.files))
    if lengths != (size,) * 3 or size % recorded.device_batch:
        raise UsageError(f"FILE must hold batch.global ({size}) images, ids and files in {path}")
    return recorded


def _training(
    recorded: Replay, path: Literal["fast", "reference"], device: torch.device
) -> TrainingStep:
    config = replace(one_device(recorded.config), path="fast")
    if path == "reference":
        optim = replace(config.optim, residual="float32")
        config = replace(config, path=path, optim=optim, target_precision="same")
    networks = build_models(config.model, config.data.crop_size)
    training = make_step(config, *networks, device)
    if wrong := misfit(training.masters(), recorded.weights):
        raise UsageError(f"FILE must hold the weights of its configuration: {wrong}")
    checkpoint.load_weights(training, recorded.weights)
    return training


def replay(
    recorded: Replay, path: Literal["fast", "reference"], device: torch.device
) -> dict[str, Any]:
    """Computes the step.

    Args:
        recorded: from `read_replay`.
        path: `fast` or `reference`.
        device: where.

    Returns:
        loss (the global batch's); names of non-finite weights and gradients; (place in the global
        batch, id, file) of the samples whose own loss is not finite.
    """
    config, size = recorded.config, recorded.device_batch
    training = _training(recorded, path, device)
    weights = [name for name, value in recorded.weights.items() if not value.isfinite().all()]
    loss, samples = torch.zeros((), device=device), []
    for begin in range(0, config.batch.global_, size):
        places = np.arange(begin, begin + size)
        masks = sample_masks(
            config.masks,
            grid=config.grid,
            seed=config.seed,
            step=recorded.step - 1,
            positions=places,
        )
        images = recorded.images[begin : begin + size].to(device)
        elements = masks.elements(config.batch.global_, config.model.architecture.width)
        batch = training.prepare(masks)
        with torch.no_grad():
            # (M, C, B, T, D) against (M, B, T, D)
            prediction, target, _ = training.forward(images, batch)
            off = (prediction.float() - target.float()[:, None]).abs().sum(dim=(0, 1, 3, 4))
        for place in torch.nonzero(~off.isfinite()).flatten().tolist():
            where = begin + place
            samples.append((where, int(recorded.ids[where]), recorded.files[where]))
        part, _ = training.accumulate(images, batch, elements)
        loss = loss + part
    gradients = [
        name
        for network in ("encoder", "predictor")
        for name, p in getattr(training, network).named_parameters(prefix=network)
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    return {
        "loss": float(loss),
        "weights": weights,
        "samples": samples,
        "gradients": gradients,
    }


def _show(title: str, names: list[Any], total: int) -> None:
    if names:
        print(f"  {title}: {len(names)} of {total}, the first:")
        for name in names[:5]:
            print(f"    {name!r}")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Computes a recorded step again and names what is not finite in it."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """OUT/replay-step-<n>.safetensors, written by a run that ended with exit code 4."""
    path: Literal["both", "fast", "reference"] = "both"
    """Which step computes it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the step is computed again."""
    precision: Literal["recorded", "float32"] = "recorded"
    """`float32` shows whether it was bfloat16 that broke."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(Arguments, _replay, argv, "replay")


def _replay(arguments: Arguments) -> int:
    device = distributed.start(arguments.device).device
    recorded = read_replay(arguments.file)
    if arguments.precision == "float32":
        optim = replace(recorded.config.optim, precision="float32", residual="float32")
        config = replace(recorded.config, optim=optim, target_precision="same")
        recorded = replace(recorded, config=config)
    both: tuple[Literal["fast", "reference"], ...] = ("reference", "fast")
    paths = both if arguments.path == "both" else (arguments.path,)
    found = {path: replay(recorded, path, device) for path in paths}
    config = recorded.config
    print(
        f"step {recorded.step}, {config.batch.global_} images, {config.optim.precision} on {device}"
    )
    broken = False
    for path, result in found.items():
        finite = np.isfinite(result["loss"]) and not any(
            result[name] for name in ("weights", "samples", "gradients")
        )
        broken = broken or not finite
        print(f"{path}: loss {result['loss']:.6f}, {'all finite' if finite else 'NOT FINITE'}")
        _show("weights", result["weights"], len(recorded.weights))
        _show("samples (place, id, file)", result["samples"], config.batch.global_)
        _show("gradients", result["gradients"], len(recorded.weights))
    if not broken:
        print(
            "The step is finite here: what broke it was not in weights or images. Look at the "
            "device that ran it (memory errors), or at a changed version."
        )
    return int(broken)
