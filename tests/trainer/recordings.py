"""Recordings to replay: the published trainer's, and small ones of the per-sequence loop."""

from pathlib import Path
from typing import Any

import torch

from ijepa_fast.verify.parity import compare
from tests.trainer import plain_step

FORWARD, GRADIENT, LOSS, FINAL = "forward", "gradient", "loss", "final weights"
MOVED, SCHEDULE = "target movement", "schedule"

GOLDEN = Path(__file__).parents[1] / "golden" / "p8_64.safetensors"

CASE: dict[str, Any] = {
    "img": 16,
    "patch": 4,
    "dim": 24,
    "depth": 1,
    "heads": 2,
    "pdim": 8,
    "pdepth": 1,
    "B": 2,
    "nenc": 1,
    "npred": 2,
    "epochs": 4,
    "ipe": 3,
    "warmup": 1,
    "ipe_scale": 1.0,
    "steps": 2,
    "start_lr": 2e-4,
    "lr": 1e-3,
    "final_lr": 1e-6,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    # far from 1, so that the target encoder moves by much more than float32 rounds its weights
    "ema": [0.2, 1.0],
    "loss": "smooth_l1",
    "norm_eps": 1e-6,
}

# two contexts, an odd grid of 7 x 7, schedules of 12.5 steps, run past their end
ODD: dict[str, Any] = {
    "img": 98,
    "patch": 14,
    "nenc": 2,
    "npred": 3,
    "epochs": 2,
    "ipe": 1,
    "warmup": 1,
    "ipe_scale": 1.25,
    "steps": 4,
    "heads": 3,
    "pdim": 12,
    "depth": 2,
    "pdepth": 2,
}

# changes to CASE; patches of a context and of a target block
OTHERS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "small": ({}, (4, 4)),
    "odd": (ODD, (9, 6)),
    "rectangle": ({"img": [16, 24], "loss": "l2", "warmup": 0, "epochs": 1, "B": 3}, (6, 5)),
    "l1": ({"loss": "l1", "nenc": 3, "warmup": 4}, (5, 3)),
    # the usual grid of 14 x 14 and four target blocks
    "14x14": (
        {"img": 224, "patch": 16, "heads": 3, "pdim": 12, "depth": 2, "pdepth": 2, "npred": 4},
        (61, 30),
    ),
}


def record(path: Path, *, context: int = 4, target: int = 4, drop: int = 0, **changes: Any) -> Path:
    """A recording of the per-sequence implementation, in float64.

    Args:
        path: file to write.
        context, target: patches of each, at first; contexts grow and target blocks shrink by one
            in every other step.
        drop: patches that context block i has less than block i - 1.
        changes: to CASE.
    """
    case = {**CASE, **changes}
    height, width = case["img"] if isinstance(case["img"], list) else (case["img"],) * 2
    grid = (height // case["patch"], width // case["patch"])
    generator = torch.Generator().manual_seed(0)
    networks = plain_step.random_weights(case, grid, generator, spread=0.05)
    batches = []
    for step in range(case["steps"]):
        lengths = {"context": context + step % 2, "target": target - step % 2}
        images, contexts, targets = plain_step.random_batch(case, grid, generator, **lengths)
        contexts = [
            [patches[: len(patches) - i * drop] for patches in block]
            for i, block in enumerate(contexts)
        ]
        batches.append((images, contexts, targets))
    plain_step.record(path, case, networks, batches)
    return path


def failures(file: Path | str, **arguments: Any) -> dict[str, set[str]]:
    """Names of the rows beyond their limit, by kind."""
    names: dict[str, set[str]] = {}
    for row in compare(Path(file), **arguments).rows:
        if not row.ok:
            names.setdefault(row.kind, set()).add(row.name)
    return names


def must_fail(file: Path, kinds: set[str], **arguments: Any) -> None:
    """Rows of these kinds fail, and none of what is computed before the first of them."""
    failed = failures(file, **arguments)
    assert kinds <= failed.keys()
    for earlier in (SCHEDULE, FORWARD, GRADIENT):
        if earlier in kinds:
            break
        assert earlier not in failed
