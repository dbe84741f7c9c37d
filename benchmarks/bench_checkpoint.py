"""How long a save holds up the step, and how long the write behind it takes.

``python -m benchmarks.bench_checkpoint``: a state of about 2.5 GB.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ijepa_fast.config import ModelConfig, OptimConfig
from ijepa_fast.fast import FastStep
from ijepa_fast.model import build_models
from ijepa_fast.state import checkpoint

# a state of 2.7 GB: no published size has that many weights
LARGE = {"width": 1024, "depth": 12, "heads": 16, "predictor_depth": 6}
SMALL = {"width": 64, "depth": 2, "heads": 2, "predictor_width": 32, "predictor_depth": 1}
MEAN, STD = (0.5,) * 3, (0.2,) * 3
VIT_H_GB = 10.4


def measure(folder: Path, model: dict[str, Any], repeats: int = 5) -> dict[str, float]:
    """Seconds: to copy (the stall), and to write."""
    config = ModelConfig(name="vit_small", patch_size=16, **model)
    encoder, predictor = build_models(config, (224, 224), torch.Generator().manual_seed(0))
    training = FastStep(encoder, predictor, OptimConfig(precision="float32"), mean=MEAN, std=STD)
    snapshot = checkpoint.Snapshot(training, keep=True)
    copies, writes = [], []
    for step in range(1, repeats + 1):
        begin = time.perf_counter()
        state = snapshot.take(training, step=step, meta={})
        copies.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        checkpoint.write(folder, state)
        writes.append(time.perf_counter() - begin)
        checkpoint.rotate(folder, newest=step, keep=1, keep_every_steps=None)
    assert checkpoint.read(checkpoint.checkpoint_folders(folder)[0]).step == repeats
    stall, write = statistics.median(copies), statistics.median(writes)
    return {"gb": snapshot.nbytes / 1e9, "stall_s": stall, "write_s": write}


def bench_checkpoint(tmp_path: Path) -> None:
    """A small state: that it runs."""
    found = measure(tmp_path, SMALL, repeats=2)
    assert found["stall_s"] < found["write_s"] + 1


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench_checkpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk in question; by default /tmp")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(Path(folder), LARGE)
    for name, value in found.items():
        print(f"{name:<18} {value:.3f}")
    scaled = found["stall_s"] * VIT_H_GB / found["gb"]
    print(f"scaled to ViT-H's {VIT_H_GB} GB: a stall of {scaled:.2f} s on this machine")
    return int(found["stall_s"] > 0.5)


if __name__ == "__main__":
    sys.exit(main())
