"""Part `train`: the real entry point on JPEG files, and one rank under torchrun with FSDP2.

First the bare step, then ``python -m ijepa_fast.train`` for a minute, then its first twenty steps
again under torchrun with ``--shard full``, whose losses must agree. Leaves train.json, train.md and
the logs of the runs.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import OutOfTime, left, logged, stopped_after, write_json
from benchmarks.harness import machine
from benchmarks.photographs import write_copies, write_photographs
from benchmarks.step_contest import measure
from benchmarks.step_providers import FAST, TOLERANCE, Case
from ijepa_fast.config import Config
from ijepa_fast.config.cli import parse

__all__ = ["main"]

SECONDS = 280
# before a run's first step: imports, the compiler
STARTING = 60
FILES = 960
# steps between two losses that are told
LOG = 5
TINY = (
    *("--data.crop", "64", "--model.patch-size", "8"),
    *("--model.width", "32", "--model.depth", "1", "--model.heads", "2"),
    *("--model.mlp-hidden", "64", "--model.predictor-width", "16", "--model.predictor-depth", "1"),
    *("--masks.min-keep", "1", "--optim.precision", "float32", "--data.threads", "1"),
)


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if nothing failed."""
    parser = files.options("train", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files; else they are made")
    parser.add_argument("--preset", default="vitb16_in1k")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--decoder", default="auto", help="auto: DALI where it is installed")
    parser.add_argument("--run", type=float, default=60.0, help="seconds of training")
    parser.add_argument("--steps", type=int, default=20, help="of the sharded run")
    args = parser.parse_args(argv)
    files.start(args)
    if args.device.type == "cpu":
        args.batch = 8
    result: dict[str, Any] = {"machine": machine(), "preset": args.preset, "batch": args.batch}
    with tempfile.TemporaryDirectory() as folder:
        source = args.photographs or write_photographs(Path(folder) / "photographs", 48)
        write_copies(source, Path(folder) / "data", FILES)
        try:
            with stopped_after(args.seconds):
                for part in (_bare, _entry_point, _sharded):
                    part(args, Path(folder), result)
                    _write(args.out, result)
        except OutOfTime:
            result.setdefault("error", f"out of time after {args.seconds:.0f} s")
    _write(args.out, result)
    print((args.out / "train.md").read_text(encoding="utf-8"))
    return "error" not in result


def _bare(args: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """The run's step without loader, sampling of masks, metrics and saves."""
    cuda = args.device.type == "cuda"
    config = _config(args, folder)
    case = Case(name=args.preset, mode="published", config=config, steps=8 if cuda else 1)
    (row,) = measure(case, [FAST], device=args.device, repeats=3 if cuda else 1)
    if "error" in row:
        result.setdefault("error", f"bare step: {row['error']}")
    result["bare"] = row.get("images_per_second")


def _arguments(args: argparse.Namespace, data: Path, out: Path) -> list[str]:
    batch = str(args.batch)
    words = ["--preset", args.preset, "--data", str(data), "--out", str(out)]
    words += ["--device", args.device.type, "--data.decoder", args.decoder]
    words += ["--log.interval", str(LOG)]
    words += ["--batch.global", batch, "--batch.device", batch, "--masks.truncation-group", batch]
    return words if args.device.type == "cuda" else [*words, *TINY]


def _config(args: argparse.Namespace, folder: Path) -> Config:
    return parse(_arguments(args, folder, folder)).config


def _rows(out: Path) -> list[dict[str, Any]]:
    file = out / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "loss" in row]


def _entry_point(args: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Trains until it is interrupted; the rate is of all steps after the log's first line."""
    out, log = folder / "run", args.out / "train.txt"
    command = [sys.executable, "-m", "ijepa_fast.train", *_arguments(args, folder / "data", out)]
    if args.device.type == "cpu":
        command += ["--max-steps", "30"]
    found = logged(command, log, seconds=min(STARTING + args.run, left(args)))
    rows = _rows(out)
    result["entry_point"] = {**found, "losses": [row["loss"] for row in rows]}
    # 130: interrupted, and saved
    if found["exit_code"] not in (0, 130) or len(rows) < 2:
        result.setdefault("error", f"entry point: exit {found['exit_code']}: {found['last_line']}")
        return
    timing = [row["timing"] for row in rows[1:]]
    rate = statistics.harmonic_mean(line["images_per_second"] for line in timing)
    wait = statistics.fmean(line["data_wait_ms"] for line in timing)
    result["entry_point"] |= {"steps": rows[-1]["step"], "data_wait_ms": wait}
    result["entry_point"] |= {"images_per_second": rate}


def _sharded(args: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """The first steps again with FSDP2, by NCCL on CUDA and gloo on a CPU."""
    out, log = folder / "sharded", args.out / "train_sharded.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["-m", "ijepa_fast.train", *_arguments(args, folder / "data", out)]
    command += ["--shard", "full", "--max-steps", str(args.steps)]
    found = logged(command, log, seconds=left(args))
    losses = [row["loss"] for row in _rows(out)]
    pairs = list(zip(losses, result["entry_point"]["losses"], strict=False))
    worst = max((abs(ours - plain) / abs(plain) for ours, plain in pairs), default=math.inf)
    limit = TOLERANCE[_config(args, folder).optim.precision]
    result["sharded"] = {**found, "losses": losses, "error": worst, "limit": limit}
    if found["exit_code"] or len(pairs) != math.ceil(args.steps / LOG):
        result.setdefault("error", f"--shard full: exit {found['exit_code']}: {found['last_line']}")
    elif not worst <= limit:
        result.setdefault("error", f"--shard full: losses differ by {worst:.1e}, limit {limit:g}")


def _write(out: Path, result: dict[str, Any]) -> None:
    write_json(out / "train.json", result)
    bare, run = result.get("bare"), result.get("entry_point", {})
    lines = [f"{result['preset']}, batch {result['batch']}:"]
    if bare:
        lines.append(f"- bare step {bare:.0f} images/s")
    if run.get("images_per_second"):
        rate = run["images_per_second"]
        beside = f", {rate / bare:.1%} of the bare step" if bare else ""
        lines.append(
            f"- entry point {rate:.0f} images/s{beside}; {run['steps']} steps, data wait "
            f"{run['data_wait_ms']:.1f} ms, exit {run['exit_code']}"
        )
    if shard := result.get("sharded"):
        lines.append(
            f"- --shard full: {len(shard['losses'])} losses, every {LOG}th step, within "
            f"{shard['error']:.1e} of the unsharded ones, limit {shard['limit']:g}"
        )
    lines.append(f"- {'FAILED: ' + result['error'] if 'error' in result else 'nothing failed'}")
    (out / "train.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
