"""Part `data`: DALI's pipeline over its settings, then the trainer's loader, against Pillow.

One setting after the other is varied and its best value kept: batch, region of interest against
whole image, `hw_decoder_load`, threads, `prefetch_queue_depth`. Without DALI the loader with Pillow
is measured alone. Leaves data.json and data.md, written after every turn.
"""

import argparse
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bench_data
from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import OutOfTime, stopped_after, write_json
from benchmarks.harness import machine
from benchmarks.photographs import write_copies, write_photographs
from ijepa_fast.data import Index, build_index, crop_windows

__all__ = ["main"]

SECONDS = 180
CROP, FILES = 224, 480
# what is varied, in this order; the first value is where it starts
SETTINGS: dict[str, tuple[Any, ...]] = {
    "batch": (128, 64, 256),
    "decode": ("roi", "whole"),
    "hw_decoder_load": (0.5, 0.0, 0.9),
    "threads": (8, 4, 16),
    "prefetch_queue_depth": (1, 2),
}
TRIAL = {**SETTINGS, "batch": (4, 2), "hw_decoder_load": (0.5,), "threads": (1,)}

Row = dict[str, Any]


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if nothing failed and everything was measured."""
    parser = files.options("data", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument("--photographs", type=Path, help="folder of JPEG files; else they are made")
    parser.add_argument("--turn", type=float, default=2.0, help="seconds of one measurement")
    args = parser.parse_args(argv)
    files.start(args)
    result: dict[str, Any] = {"machine": machine(), "pipeline": [], "loader": []}
    green = True
    with tempfile.TemporaryDirectory() as made:
        source = args.photographs or write_photographs(Path(made) / "photographs", 48)
        index = build_index(write_copies(source, Path(made) / "data", FILES))
        try:
            with stopped_after(args.seconds):
                # first: it is what a user gets, the rest is how it could be better
                _loader(args, index, result)
                _pipelines(args, index, result)
        except OutOfTime:
            print(f"stopped after {args.seconds:.0f} s", file=sys.stderr)
            green = False
    _write(args.out, result)
    print((args.out / "data.md").read_text(encoding="utf-8"))
    return green and all("error" not in row for row in result["pipeline"] + result["loader"])


def _loader(args: argparse.Namespace, index: Index, result: dict[str, Any]) -> None:
    """The trainer's own, on half of the cores."""
    cores = max(1, (os.cpu_count() or 1) // 2)
    for name in bench_data.names(args.device):
        if name.startswith("torch"):
            continue
        row: Row = {"provider": name, "threads": cores}
        try:
            row |= bench_data.turn(name, index, args.device, cores, args.turn)
        except Exception as error:  # noqa: BLE001  # the others go on
            row["error"] = _said(error)
        result["loader"].append(row)
        _write(args.out, result)


def _pipelines(args: argparse.Namespace, index: Index, result: dict[str, Any]) -> None:
    settings = SETTINGS if args.device.type == "cuda" else TRIAL
    encoded = [np.fromfile(index.path(row), np.uint8) for row in range(len(index))]
    ids = np.arange(len(index))
    windows = crop_windows(
        index.width,
        index.height,
        ids,
        seed=0,
        epoch=0,
        scale=(0.3, 1.0),
        ratio=(3 / 4, 4 / 3),
    )
    best = {name: values[0] for name, values in settings.items()}
    rates: dict[tuple[Any, ...], float] = {}
    for name, values in settings.items():
        for value in values:
            tried = {**best, name: value}
            if (key := _key(best, name, value)) in rates:
                continue
            row: Row = dict(tried)
            try:
                row["images_per_second"] = _rate(tried, encoded, windows, args)
            except Exception as error:  # noqa: BLE001  # the others go on
                row["error"] = _said(error)
            rates[key] = row.get("images_per_second", 0.0)
            result["pipeline"].append(row)
            _write(args.out, result)
        best[name] = max(values, key=lambda value: rates[_key(best, name, value)])
    result["best"] = best


def _key(best: dict[str, Any], name: str, value: Any) -> tuple[Any, ...]:
    return tuple({**best, name: value}.values())


def _rate(
    settings: dict[str, Any],
    encoded: Sequence[NDArray[np.uint8]],
    windows: NDArray[np.int32],
    args: argparse.Namespace,
) -> float:
    """Images a second of DALI's pipeline alone, whose output stays where it decodes."""
    dali: Any = importlib.import_module("nvidia.dali")
    fn = importlib.import_module("nvidia.dali.fn")
    cuda, size = args.device.type == "cuda", settings["batch"]
    decoder = {"device": "mixed" if cuda else "cpu", "output_type": dali.types.RGB}
    decoder |= {"adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if cuda:
        decoder["hw_decoder_load"] = settings["hw_decoder_load"]

    def batches() -> Iterator[list[list[NDArray[Any]]]]:
        order = itertools.cycle(range(len(encoded)))
        while True:
            rows = list(itertools.islice(order, size))
            yield [
                [encoded[row] for row in rows],
                [windows[row, :2] for row in rows],
                [windows[row, 2:] for row in rows],
            ]

    @dali.pipeline_def(
        batch_size=size,
        num_threads=settings["threads"],
        device_id=torch.cuda.current_device() if cuda else None,
        prefetch_queue_depth=settings["prefetch_queue_depth"],
    )
    def build() -> Any:
        file, start, shape = fn.external_source(source=batches(), num_outputs=3)
        window = {"start": start, "shape": shape, "axes": [0, 1]}
        if settings["decode"] == "roi":
            image = fn.decoders.image_slice(file, **window, **decoder)
        else:
            image = fn.slice(fn.decoders.image(file, **decoder), **window)
        return fn.resize(image, size=[CROP, CROP], antialias=True)

    pipeline = build()
    pipeline.build()
    for _ in range(4):
        pipeline.run()
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < args.turn:
        pipeline.run()  # waits for its batch
        count += size
    return count / elapsed


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _write(out: Path, result: dict[str, Any]) -> None:
    write_json(out / "data.json", result)
    lines = ["| loader, batch 64 | threads | images/s | CPU |", "|---|---|---|---|"]
    for row in result["loader"]:
        rate = row.get("error") or f"{row['images_per_second']:.0f} | {row['cpu_percent']:.0f} %"
        lines.append(f"| {row['provider']} | {row['threads']} | {rate} |")
    lines += ["", "| " + " | ".join(SETTINGS) + " | images/s |", "|" + "---|" * 6]
    for row in result["pipeline"]:
        rate = row.get("error") or f"{row['images_per_second']:.0f}"
        lines.append("| " + " | ".join(str(row[name]) for name in SETTINGS) + f" | {rate} |")
    if "best" in result:
        lines += ["", "Best: " + ", ".join(f"{k} {v}" for k, v in result["best"].items()) + "."]
    (out / "data.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
