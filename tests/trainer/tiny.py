"""A data set of a few coloured JPEG files, a recipe of a few thousand weights, and ways to run it.

`run` trains in this process. `start` forks a process that has torch already imported (a fork
server imports it once), for what needs a real process: kills, signals, ranks.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import matplotlib.pyplot  # noqa: F401  # here, so that the fork server has it
import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimizer imports it
import yaml
from PIL import Image
from safetensors.torch import load_file

from ijepa_fast import train
from ijepa_fast.config.cli import parse
from ijepa_fast.fast import FastStep
from ijepa_fast.ranks import distributed
from ijepa_fast.visualize.run_pictures import Pictures

__all__ = [
    "RECIPE",
    "arguments",
    "assert_near",
    "assert_same_state",
    "bad_png",
    "config",
    "final_state",
    "log_lines",
    "losses",
    "rank_environments",
    "rows",
    "run",
    "run_ranks",
    "snapshot",
    "start",
    "stop_at",
    "write_images",
]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.trainer.tiny"])

RECIPE = {
    "seed": 3,
    "device": "cpu",
    "model": {
        "name": "vit_tiny",
        "patch_size": 8,
        "width": 32,
        "depth": 1,
        "heads": 2,
        "predictor_width": 16,
        "predictor_depth": 1,
    },
    "masks": {"min_keep": 1, "truncation_group": 4},
    "data": {"crop": 32, "decoder": "pillow", "threads": 1},
    "optim": {
        "epochs": 3,
        "warmup": 1,
        "precision": "float32",
        "lr": 2e-3,
        "lr_reference_batch": 8,
    },
    "batch": {"global": 8, "device": 8},
    "log": {"interval": 2},
    "eval": {"data": None, "seconds": 0.0},
}
"""40 images in batches of 8: 5 steps an epoch, 15 in all."""


def write_images(root: Path, count: int = 40, classes: int = 2) -> Path:
    """Writes small JPEG files into class folders; a class is a colour with a little noise."""
    colours = np.array([[200, 60, 40], [40, 90, 200], [60, 190, 70], [190, 180, 60]])
    for number in range(count):
        rng = np.random.default_rng(number)
        label = number % classes
        noise = rng.integers(-35, 36, (5, 5, 3))
        coarse = np.clip(colours[label] + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(coarse).resize((40, 36 + number % 3), Image.Resampling.BICUBIC)
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03d}.jpg", quality=90)
    return root


def bad_png(path: Path) -> Path:
    """Writes a PNG whose header and end are right and whose pixels cannot be read."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    middle = data.index(b"IDAT") + 64
    data[middle : middle + 64] = bytes(64)
    path.write_bytes(data)
    return path


def arguments(data: Path, out: Path, **settings) -> list[str]:
    """The command line of a tiny run: the recipe as YAML, `settings` as flags over it.

    A dot in a flag is written as two underscores: `optim__epochs=2`. True is a bare flag.
    """
    recipe = out.parent / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(RECIPE))
    argv = ["--config", str(recipe), "--preset", "demo", "--data", str(data), "--out", str(out)]
    for name, value in settings.items():
        flag = "--" + name.replace("__", ".").replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    return argv


def config(data: Path, out: Path, **settings):
    """The configuration of `arguments`."""
    return parse(arguments(data, out, **settings)).config


def run(data: Path, out: Path, *, pictures: bool = False, **settings) -> int:
    """Trains in this process; returns the exit code. Pictures take longer than the rest."""
    return _main(arguments(data, out, **settings), pictures)


def _main(argv: list[str], pictures: bool) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    no_pictures = mock.patch.object(Pictures, "_draw", return_value=None)
    try:
        with contextlib.nullcontext() if pictures else no_pictures:
            return train.main(argv)
    finally:
        torch.set_num_threads(before)


def _in_child(argv: list[str], output: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with output.open("a", buffering=1) as file:
        # what is not Python's goes there too
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        code = _main(argv, pictures=False)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    distributed.leave(code)


def start(argv: list[str], output: Path, environment: dict[str, str] | None = None):
    """Starts `ijepa_fast.train` with a command line in a process of its own.

    Its stdout and stderr are appended to `output`.
    """
    process = _FORKS.Process(target=_in_child, args=(argv, output, environment or {}))
    process.start()
    return process


def rank_environments(world: int, local_world: int = 1) -> list[dict[str, str]]:
    """What torchrun would set, for each rank, on machines of so many ranks."""
    # not one of those that the system gives to connections: it might, before rank 0 listens
    for port in random.sample(range(15_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            break
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common["LOCAL_WORLD_SIZE"] = local_world
    return [
        {k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(world)
    ]


def run_ranks(
    data: Path, out: Path, *, world: int = 2, local_world: int = 1, **settings
) -> tuple[list[int], str]:
    """Trains on several ranks, each a process; returns their exit codes and what they printed."""
    argv, output = arguments(data, out, **settings), out.parent / f"{out.name}.txt"
    children = [
        start(argv, output, environment) for environment in rank_environments(world, local_world)
    ]
    for child in children:
        child.join(60)
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()
    return [child.exitcode for child in children], output.read_text()


def rows(out: Path, *, timing: bool = False) -> list[dict]:
    """Rows of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in r.items() if k != "timing"} for r in lines]


def losses(out: Path) -> list[float]:
    """Losses of metrics.jsonl."""
    return [row["loss"] for row in rows(out)]


def final_state(out: Path) -> dict[str, torch.Tensor]:
    """Tensors of the newest checkpoint, with the steps under `step` and `adam_step`."""
    newest = max((out / "checkpoints").glob("step-*"))
    header = json.loads((newest / "state.json").read_text())
    counts = {k: torch.tensor(header[k]) for k in ("step", "adam_step")}
    return {**load_file(newest / "state.safetensors"), **counts}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_same_state(left: Path, right: Path) -> None:
    """Newest checkpoints and deterministic metrics of two runs are the same, bit for bit."""
    a, b = final_state(left), final_state(right)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name
    ours, others = rows(left), rows(right)
    assert ours == others, [pair for pair in zip(ours, others, strict=False) if pair[0] != pair[1]]


def assert_near(left: Path, right: Path, steps: int) -> None:
    """Two runs of so many steps, every one logged, are the same but for rounding."""
    ours, others = rows(left), rows(right)
    assert len(ours) == len(others) == steps
    for row, other in zip(ours, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        for key in ("step", "lr", "weight_decay", "momentum", "ids_hash", "skipped"):
            assert row[key] == other[key]
    a, b = final_state(left), final_state(right)
    assert a.keys() == b.keys()
    for name in a:
        if name.startswith("exp_avg"):
            continue
        x, y = a[name].double(), b[name].double()
        if name.endswith("qkv.bias"):
            # keys: their true gradient is zero, what Adam makes of its rounding is noise
            q, _, v = range(3)
            x, y = x.view(3, -1)[[q, v]], y.view(3, -1)[[q, v]]
        assert (x - y).norm() <= 1e-5 * y.norm(), name


def stop_at(signal_number: int, step: int, monkeypatch) -> None:
    """Sends this process a signal in the middle of the update of a step (counted from 1)."""
    original = FastStep.update
    done = 0

    def update(self, values):
        nonlocal done
        done += 1
        if done == step:
            signal.raise_signal(signal_number)
        original(self, values)

    monkeypatch.setattr(FastStep, "update", update)


@contextlib.contextmanager
def log_lines():
    """Collects what the package logs, whoever else listens."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, logger = Collect(), logging.getLogger("ijepa_fast")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
