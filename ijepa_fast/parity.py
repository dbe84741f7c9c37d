"""Replays recorded steps of the published trainer and holds a path against them.

``python -m ijepa_fast.parity FILE`` loads initial weights, images and masks from a safetensors
file, trains the recorded number of steps and compares losses, schedules, the first step's
prediction, latent target and gradients, and the final weights of all three networks. Exit code 0
only if every limit holds and every tensor of the file was used.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ijepa_fast.config import OptimConfig
from ijepa_fast.masks import Masks
from ijepa_fast.model import NORM_EPS, Predictor, VisionTransformer
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules

__all__ = ["Limits", "Report", "Row", "main", "replay"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest errors allowed: relative for loss and schedules, relative L2 per tensor elsewhere.

    Attributes:
        loss, schedule, forward, gradient, weights: of the entries so named.
        key_bias: absolute, for the key third of qkv biases, whose true gradient is zero.
        target_movement: error of the target encoder, as a share of its own movement from the start.
    """

    loss: float
    schedule: float
    forward: float
    gradient: float
    weights: float
    key_bias: float
    target_movement: float


LIMITS = {
    "float32": Limits(
        loss=1e-6,
        schedule=1e-9,
        forward=1e-6,
        gradient=5e-6,
        weights=1e-5,
        key_bias=1e-6,
        target_movement=1e-3,
    ),
    # wide enough for bf16 products on small networks, narrow enough to notice a wrong formula
    "bfloat16": Limits(
        loss=1e-2,
        schedule=1e-9,
        forward=3e-2,
        gradient=1.5e-1,
        weights=3e-2,
        key_bias=1e-2,
        target_movement=3e-1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    kind: str
    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit


@dataclass(kw_only=True)
class Report:
    """All comparisons of one replay."""

    path: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every limit holds and every tensor was used."""
        return not self.unused and all(row.ok for row in self.rows)

    def add(self, kind: str, name: str, error: float, limit: float) -> None:
        """Appends a comparison."""
        self.rows.append(Row(kind=kind, name=name, error=error, limit=limit))

    def table(self) -> str:
        """Each step's values line by line, the worst tensor of every other kind, and all
        failures.
        """
        lines = [f"{'entry':<58} {'error':>10} {'limit':>9}  result"]
        for kind in dict.fromkeys(row.kind for row in self.rows):
            rows = [row for row in self.rows if row.kind == kind]
            shown = rows
            if kind not in ("loss", "schedule", "forward"):
                worst = max(rows, key=lambda r: r.error / r.limit if r.error == r.error else 1e99)
                shown = [r for r in rows if not r.ok or r is worst]
                lines.append(f"{kind}: {len(rows)} tensors, worst:")
            lines += [
                f"{row.name:<58} {row.error:10.2e} {row.limit:9.0e}  {'ok' if row.ok else 'FAIL'}"
                for row in shown
            ]
        lines += [f"never used: {name}" for name in self.unused]
        failed = sum(not row.ok for row in self.rows)
        verdict = "PASS" if self.ok else "FAIL"
        lines.append(
            f"{verdict}: {self.path} path, {self.dtype}, {len(self.rows)} comparisons, "
            f"{failed} failed, {len(self.unused)} tensors unused"
        )
        return "\n".join(lines)


class _Recording:
    """A golden file that remembers which of its tensors were read."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"FILE must be a readable safetensors file, got {path}: {error}"
            ) from None
        if "case" not in metadata:
            raise ValueError(
                f"FILE must have the metadata entry 'case', got {sorted(metadata)} in {path}"
            )
        try:
            self.case: dict[str, Any] = dict(json.loads(metadata["case"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'case' of FILE must be a JSON object, got {error}") from None
        self.unused = set(self.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"FILE must hold the tensor {name!r}, which is missing")
        self.unused.discard(name)
        return self.tensors[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.take(name) for name in names}


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Turns TF32 off, in matrix products and cuDNN, and restores the settings afterwards."""
    saved = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double().cpu(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def _models(recording: _Recording) -> tuple[VisionTransformer, Predictor]:
    case = recording.case
    if case.get("norm_eps", NORM_EPS) != NORM_EPS:
        raise ValueError(f"norm_eps must be {NORM_EPS}, got {case['norm_eps']}")
    size = case["img"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    encoder = VisionTransformer(
        image_size=size,
        patch_size=case["patch"],
        width=case["dim"],
        depth=case["depth"],
        heads=case["heads"],
        mlp_hidden=4 * case["dim"],
        in_channels=recording.take("step0.images_uint8").shape[1],
    )
    predictor = Predictor(
        grid=encoder.grid,
        encoder_width=case["dim"],
        width=case["pdim"],
        depth=case["pdepth"],
        heads=case["heads"],
        mlp_hidden=4 * case["pdim"],
    )
    return encoder, predictor


def _load(network: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    """Loads the initial weights; names and shapes must match exactly."""
    wanted = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in weights.items()}
    differing = [n for n in wanted | given if wanted.get(n) != given.get(n)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"FILE must hold {prefix}{name} as its case says ({wanted.get(name, 'not at all')}), "
            f"got {given.get(name, 'none')}"
        )
    network.load_state_dict(weights)


def _masks(recording: _Recording, step: int, num_patches: int) -> Masks:
    case = recording.case
    contexts = [recording.take(f"step{step}.context{i}") for i in range(case["nenc"])]
    targets = [recording.take(f"step{step}.target{i}") for i in range(case["npred"])]
    for index in (*contexts, *targets):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_patches:
            raise ValueError(
                f"mask indices of step {step} must be in 0..{num_patches - 1}, "
                f"got {int(index.min())}..{int(index.max())}"
            )
    image = torch.arange(case["B"])[:, None] * num_patches
    lengths = torch.tensor([0] + [c.shape[1] for c in contexts for _ in range(case["B"])])
    return Masks(
        context_index=torch.cat([(c + image).flatten() for c in contexts]).int(),
        context_cu=lengths.cumsum(0).int(),
        max_context=int(lengths.max()),
        target_index=torch.stack(targets, dim=1).int(),
    )


def _compare_weights(
    report: Report, kind: str, name: str, actual: Tensor, expected: Tensor, limits: Limits
) -> None:
    limit = limits.gradient if kind == "gradient" else limits.weights
    if name.endswith("attn.qkv.bias") and actual.shape == expected.shape:
        # softmax does not see a constant added to all keys, so only rounding noise is left here
        q, k, v = actual.detach().chunk(3)
        q_, k_, v_ = expected.chunk(3)
        difference = float((k.double().cpu() - k_.double()).abs().max())
        report.add(kind, f"{name} (key third, absolute)", difference, limits.key_bias)
        actual, expected = torch.cat([q, v]), torch.cat([q_, v_])
    report.add(kind, name, _relative(actual, expected), limit)


def replay(file: Path, *, dtype: str = "float32", device: torch.device | None = None) -> Report:
    """Trains the recorded steps and compares.

    Args:
        file: recording in safetensors format.
        dtype: `float32`, or `bfloat16` for autocast.
        device: where to run, by default CUDA where there is one.

    Raises:
        ValueError: the file is unreadable or lacks an entry.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recording = _Recording(file)
    report = Report(path="reference", dtype=dtype)
    try:
        with exact_float32():
            _replay(recording, report, LIMITS[dtype], device)
    except KeyError as error:
        raise ValueError(
            f"FILE must name {error} in its case, got {sorted(recording.case)}"
        ) from None
    report.unused = sorted(recording.unused)
    return report


def _replay(recording: _Recording, report: Report, limits: Limits, device: torch.device) -> None:
    case = recording.case
    encoder, predictor = _models(recording)
    initial = recording.state("init.encoder.")
    initial_predictor = recording.state("init.predictor.")
    for name, table, loaded in (
        ("pos_embed", encoder.pos_embed, initial.get("pos_embed")),
        (
            "predictor_pos_embed",
            predictor.predictor_pos_embed,
            initial_predictor.get("predictor_pos_embed"),
        ),
    ):
        error = float("inf") if loaded is None else _relative(table, loaded)
        report.add("forward", f"init.{name}", error, LIMITS["float32"].forward)
    _load(encoder, initial, "init.encoder.")
    _load(predictor, initial_predictor, "init.predictor.")
    config = OptimConfig(
        loss=case["loss"], precision="bfloat16" if report.dtype == "bfloat16" else "float32"
    )
    step = ReferenceStep(
        encoder.to(device), predictor.to(device), config, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    networks = {
        "encoder": step.encoder,
        "predictor": step.predictor,
        "target_encoder": step.target_encoder,
    }
    schedules = Schedules(
        steps_per_epoch=case["ipe"],
        epochs=case["epochs"],
        warmup=case["warmup"],
        ipe_scale=case["ipe_scale"],
        start_lr=case["start_lr"],
        lr=case["lr"],
        final_lr=case["final_lr"],
        weight_decay=case["weight_decay"],
        final_weight_decay=case["final_weight_decay"],
        momentum=case["ema"][0],
        final_momentum=case["ema"][1],
    )
    for entry in ("loss", "lr", "wd", "momentum"):
        if (count := recording.take(entry).numel()) != case["steps"]:
            raise ValueError(
                f"FILE must hold {entry!r} of every step ({case['steps']}), got {count} values"
            )
    for index in range(case["steps"]):
        values = schedules.at(index + 1)
        images = recording.take(f"step{index}.images_uint8").permute(0, 2, 3, 1).to(device)
        masks = _masks(recording, index, encoder.pos_embed.shape[1]).to(device)
        if index == 0:
            prediction, target, _ = step.forward(images, masks)
            repeats = prediction.shape[1]
            target = target.unsqueeze(1).expand(-1, repeats, -1, -1, -1).flatten(0, 2)
            _forward_rows(recording, report, limits, prediction.flatten(0, 2), target)
        rows = case["npred"] * case["nenc"] * case["B"] * masks.target_index.shape[2]
        loss, _ = step.accumulate(images, masks, rows * case["dim"])
        if index == 0:
            for name in ("encoder", "predictor"):
                for key, parameter in networks[name].named_parameters():
                    expected = recording.take(f"step0.grad.{name}.{key}")
                    assert parameter.grad is not None
                    _compare_weights(
                        report,
                        "gradient",
                        f"step0.grad.{name}.{key}",
                        parameter.grad,
                        expected,
                        limits,
                    )
        step.update(values)
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
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            label = f"final.{name}.{key}"
            expected = recording.take(label)
            _compare_weights(report, "final weights", label, parameter, expected, limits)
            if name == "target_encoder":
                _movement_row(report, limits, label, parameter, expected, initial[key])


def _forward_rows(
    recording: _Recording, report: Report, limits: Limits, prediction: Tensor, target: Tensor
) -> None:
    for name, actual in (("prediction", prediction), ("latent_target", target)):
        error = _relative(actual, recording.take(f"step0.{name}"))
        report.add("forward", f"step0.{name}", error, limits.forward)


def _movement_row(
    report: Report, limits: Limits, name: str, actual: Tensor, expected: Tensor, initial: Tensor
) -> None:
    """The EMA moves little, so an error is also measured against that movement."""
    if name.endswith("attn.qkv.bias"):
        rows = torch.arange(actual.shape[0])
        keep = (rows < len(rows) // 3) | (rows >= 2 * len(rows) // 3)
        actual, expected, initial = actual.detach().cpu()[keep], expected[keep], initial[keep]
    difference = (actual.detach().double().cpu() - expected.double()).norm()
    movement = (expected.double() - initial.double()).norm()
    error = float(difference / movement.clamp_min(1e-300))
    report.add("target movement", f"{name} (of its movement)", error, limits.target_movement)


@dataclass(frozen=True, kw_only=True)
class ParityArgs:
    """Replay a recording of the published trainer and compare step for step."""

    file: Annotated[Path, tyro.conf.Positional]
    """Recording (safetensors)."""
    path: Literal["reference", "fast"] = "reference"
    """Which implementation of the step to hold against it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 autocasts matrix products."""
    json: bool = False
    """Print all comparisons as JSON instead of the table."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code: 0 all held, 1 something did not, 2 unusable input."""
    args = tyro.cli(ParityArgs, args=argv, prog="python -m ijepa_fast.parity")
    if args.path == "fast":
        print(
            "error: path must be reference, got fast: this version has no fast path",
            file=sys.stderr,
        )
        return 2
    try:
        report = replay(args.file, dtype=args.dtype)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        rows = [{**dataclasses.asdict(row), "ok": row.ok} for row in report.rows]
        result = {"ok": report.ok, "path": report.path, "dtype": report.dtype, "rows": rows}
        print(json.dumps({**result, "unused": report.unused}, indent=1))
    else:
        print(report.table())
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
