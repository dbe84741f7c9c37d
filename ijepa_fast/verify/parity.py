"""Computes recorded steps of the published trainer again and holds a path against them.

``ijepa-fast parity FILE`` loads initial weights, images and masks from a safetensors
file, trains the recorded number of steps and compares losses, schedules, the first step's
prediction, latent target and gradients, and the final weights of all three networks. In bfloat16
the fast path is also held against the reference path's errors. Exit code 0 only if every limit
holds and every tensor of the file was used.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from ijepa_fast.config import AttentionName, OptimConfig, run_command
from ijepa_fast.errors import UsageError
from ijepa_fast.fast import FastStep, Memory
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.verify.comparison import (
    FAST_LIMITS,
    LIMITS,
    Limits,
    Report,
    key_bias_bounds,
    relative,
)
from ijepa_fast.verify.recording import IMAGENET_MEAN, IMAGENET_STD, Recording

__all__ = ["compare", "main"]

PathName = Literal["reference", "fast"]
Precision = Literal["float32", "bfloat16"]


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Turns TF32 off, in matrix products and cuDNN, and restores the settings afterwards."""
    saved = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


def compare(
    file: Path,
    *,
    dtype: Precision = "float32",
    device: torch.device | None = None,
    path: PathName = "reference",
    attention: str = "auto",
    memory: Memory = "none",
) -> Report:
    """Trains the recorded steps and compares.

    Args:
        file: recording in safetensors format.
        dtype: `float32`, or `bfloat16` for products in it.
        device: where to run, by default CUDA where there is one.
        path: which implementation of the step.
        attention: back end of the fast path's attention.
        memory: what the fast path recomputes.

    Raises:
        ValueError: the file is unreadable or lacks an entry, the back end of attention cannot be
            used here, or an option is not the reference path's.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path == "reference":
        for name, value, plain in (
            ("attention", attention, ("auto", "sdpa")),
            ("memory", memory, ("none",)),
        ):
            if value not in plain:
                raise ValueError(
                    f"{name} must be {' or '.join(plain)} with path reference, got {value!r}"
                )
    recording = Recording(file)
    config = OptimConfig(loss=recording.case["loss"], precision=dtype)
    channels: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}

    def reference() -> Report:
        step = ReferenceStep(*_networks(recording, device), config, **channels)
        return _train(recording, Report(path="reference", dtype=dtype), LIMITS[dtype], step)

    with exact_float32():
        if path == "reference":
            report = reference()
        else:
            step = FastStep(
                *_networks(recording, device),
                config,
                attention=attention,
                memory=memory,
                **channels,
            )
            report = _train(recording, Report(path=path, dtype=dtype), FAST_LIMITS[dtype], step)
            if dtype == "bfloat16":
                report.add_ratios(reference())
    report.unused = sorted(recording.unused)
    return report


def _networks(recording: Recording, device: torch.device) -> tuple[VisionTransformer, Predictor]:
    """Those of the recording, with its initial weights."""
    encoder, predictor = recording.networks()
    recording.load(encoder, "init.encoder.")
    recording.load(predictor, "init.predictor.")
    return encoder.to(device), predictor.to(device)


def _tables(recording: Recording, report: Report) -> None:
    """Holds the position tables against the recorded ones, which `_networks` loads."""
    encoder, predictor = recording.networks()
    for name, table in (
        ("encoder.pos_embed", encoder.pos_embed),
        ("predictor.predictor_pos_embed", predictor.predictor_pos_embed),
    ):
        label = f"init.{name}"
        error = relative(table, recording.take(label))
        report.add("forward", label, error, LIMITS["float32"].forward)


def _train(
    recording: Recording, report: Report, limits: Limits, step: ReferenceStep | FastStep
) -> Report:
    case = recording.case
    _tables(recording, report)
    trained = {"encoder": step.encoder, "predictor": step.predictor}
    schedules, steps = recording.schedules(), []
    for entry in ("loss", "lr", "wd", "momentum"):
        if (count := recording.take(entry).numel()) != case["steps"]:
            raise ValueError(
                f"FILE must hold {entry!r} of every step ({case['steps']}), got {count} values"
            )
    for index in range(case["steps"]):
        values = schedules.at(index + 1)
        images = recording.images(index).to(step.device)
        masks = recording.masks(index, step.encoder.pos_embed.shape[1])
        # each takes what its own `prepare` returns
        batch: Any = step.prepare(masks)
        if index == 0:
            _forward_rows(recording, report, limits, *step.forward(images, batch)[:2])
        loss, _ = step.accumulate(images, batch, masks.elements(case["B"], case["dim"]))
        if index == 0:
            for name, network in trained.items():
                for key, parameter in network.named_parameters():
                    label, grad = f"step0.grad.{name}.{key}", parameter.grad
                    assert grad is not None
                    held = limits.gradient, limits.key_gradient
                    report.add_weights("gradient", label, grad, recording.take(label), *held)
        step.update(values)
        steps.append(values)
        expected_loss = float(recording.take("loss")[index])
        error = abs(float(loss) - expected_loss) / abs(expected_loss)
        report.add("loss", f"step{index}.loss", error, limits.loss)
        for entry, value in (
            ("lr", values.lr),
            ("wd", values.weight_decay),
            ("momentum", values.momentum),
        ):
            recorded = float(recording.take(entry)[index])
            error = abs(value - recorded) / (abs(recorded) or 1.0)
            report.add("schedule", f"step{index}.{entry}", error, limits.schedule)
    bounds = key_bias_bounds(steps, step.config)
    # not the modules' parameters: in bfloat16 the fast path's target encoder has rounded ones
    for name, actual in step.masters().items():
        if name.endswith("pos_embed"):
            continue
        label = f"final.{name}"
        expected = recording.take(label)
        averaged = name.startswith("target_encoder.")
        # each run rounds a weight once a step, an average twice
        rounding = 2 * case["steps"] * torch.finfo(torch.float32).eps * float(expected.abs().max())
        key_limit = bounds[averaged] + rounding
        report.add_weights("final weights", label, actual, expected, limits.weights, key_limit)
        if averaged:
            initial = recording.take(f"init.{name.removeprefix('target_')}")
            report.add_movement(limits, label, actual, expected, initial)
    return report


def _forward_rows(
    recording: Recording, report: Report, limits: Limits, prediction: Tensor, target: Tensor
) -> None:
    """Both sides of the loss, in the recording's order: [target, context, image]."""
    repeated = target.unsqueeze(1).expand_as(prediction)
    for name, actual in (("prediction", prediction), ("latent_target", repeated)):
        expected = recording.take(f"step0.{name}")
        error = relative(actual.flatten(0, 2), expected)
        report.add("forward", f"step0.{name}", error, limits.forward)


@dataclass(frozen=True, kw_only=True)
class ParityArgs:
    """Computes a recording of the published trainer again and compares step for step."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECORDING")]
    """Recording (safetensors)."""
    path: PathName = "reference"
    """Which implementation of the step to hold against it."""
    dtype: Precision = "float32"
    """bfloat16 runs matrix products in it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto is CUDA where there is one."""
    attention: AttentionName = "auto"
    """Back end of attention on the fast path; auto chooses."""
    memory: Memory = "none"
    """What the fast path recomputes in the backward pass: nothing but norms and GELUs, or whole
    blocks.
    """
    json: bool = False
    """Print all comparisons as JSON instead of the table."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all held, 1 something did not, 2 unusable input."""
    return run_command(ParityArgs, _compare, argv, "parity")


def _compare(args: ParityArgs) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device must be auto or cpu here, got cuda: no CUDA device")
    report = compare(
        args.file,
        dtype=args.dtype,
        device=None if args.device == "auto" else torch.device(args.device),
        path=args.path,
        attention=args.attention,
        memory=args.memory,
    )
    if args.json:
        rows = [{**dataclasses.asdict(row), "ok": row.ok} for row in report.rows]
        result = {"ok": report.ok, "path": report.path, "dtype": report.dtype, "rows": rows}
        print(json.dumps({**result, "unused": report.unused}, indent=1))
    else:
        print(report.table())
    return 0 if report.ok else 1
