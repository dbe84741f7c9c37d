"""The loader side by side with what people write themselves, on photographs of ImageNet's size.

``python -m benchmarks.bench_data --out DIR``. Every provider takes the same 500x375 JPEG files of
about 110 kB to 224x224 random resized crops, in turns, in changing order; a turn begins when the
first batch is there. The plain loader is torch's DataLoader with Pillow in as many worker processes
as there are cores, once shipping uint8 and once normalised float32.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.gpu_check.files import write_json
from benchmarks.harness import machine
from benchmarks.photographs import write_photographs
from ijepa_fast.config import DataConfig
from ijepa_fast.data import Index, Loader, build_index, crop_windows

CROP = 224
BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# what each is held against, and how much faster it must be
TARGETS = {"torch uint8": 0.9, "torch float": 1.1}

Row = dict[str, Any]


def _windows(index: Index, ids: np.ndarray) -> np.ndarray:
    return crop_windows(
        index.width[ids],
        index.height[ids],
        ids,
        seed=0,
        epoch=0,
        scale=(0.3, 1.0),
        ratio=(3 / 4, 4 / 3),
    )


class _Plain(Dataset[torch.Tensor]):
    """A map-style data set as most trainers have it."""

    def __init__(self, index: Index, *, to_float: bool) -> None:
        self.paths = [index.path(row) for row in range(len(index))]
        self.windows = _windows(index, np.arange(len(index))).tolist()
        self.to_float = to_float

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, place: int) -> torch.Tensor:
        row = place % len(self.paths)
        top, left, height, width = self.windows[row]
        with Image.open(self.paths[row]) as file:
            image = file.convert("RGB").crop((left, top, left + width, top + height))
        image = image.resize((CROP, CROP), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image))
        if not self.to_float:
            return pixels
        scaled = pixels.permute(2, 0, 1).to(torch.float32).div_(255)
        return scaled.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def names(device: torch.device) -> list[str]:
    """What can be measured here."""
    ours = ["dali", "pillow"] if device.type == "cpu" else ["dali gpu", "dali", "pillow"]
    return [*ours, *TARGETS]


@contextmanager
def batches(
    name: str, index: Index, device: torch.device, cores: int
) -> Iterator[Iterator[torch.Tensor]]:
    """An endless stream of batches, as the training step would get them."""
    if name.startswith("torch"):
        plain = DataLoader(
            _Plain(index, to_float=name == "torch float"),
            BATCH,
            num_workers=cores,
            prefetch_factor=2,
        )
        stream = iter(plain)
        try:
            yield (batch.to(device, non_blocking=True) for batch in stream)
        finally:
            del stream
        return
    decoder, _, gpu = name.partition(" ")
    assert decoder in ("dali", "pillow")
    config = DataConfig(crop=CROP, decoder=decoder, threads=cores, prefetch=3)
    loader = Loader(
        index,
        config,
        seed=0,
        global_batch=BATCH,
        device_batch=BATCH,
        steps=1 << 40,
        device=device if gpu or device.type == "cpu" else "cpu",
    )
    with loader:
        yield (batch.images.to(device, non_blocking=True) for batch in loader)


def _cpu_seconds() -> float:
    """Of this process and its children, running or ended."""
    own = os.times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += spent.user + spent.system
    return total


def _resident() -> float:
    """Private and shared memory of this process and its children, shared counted once, in MiB."""
    process = psutil.Process()
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def turn(name: str, index: Index, device: torch.device, cores: int, seconds: float) -> Row:
    """One provider for some seconds."""
    started = time.perf_counter()
    with batches(name, index, device, cores) as stream:
        first = next(stream)
        to_first = time.perf_counter() - started
        assert first.shape[0] == BATCH, first.shape
        # what was decoded ahead is not this turn's work
        for _ in range(6):
            next(stream)
        begin, spent, count = time.perf_counter(), _cpu_seconds(), 0
        while time.perf_counter() - begin < seconds:
            next(stream)
            count += BATCH
        elapsed = time.perf_counter() - begin
        spent = _cpu_seconds() - spent
        resident = _resident()
    return {
        "provider": name,
        "images_per_second": count / elapsed,
        "cpu_percent": 100 * spent / elapsed,
        "ms_per_image_core": 1e3 * spent / count,
        "first_batch_s": to_first,
        "resident_mib": resident,
    }


def check(index: Index, device: torch.device) -> None:
    """No timing of wrong pixels: every provider's first images against Pillow's own."""
    plain = _Plain(index, to_float=False)
    for name in names(device):
        with batches(name, index, device, 1) as stream:
            images = next(stream)
        if name.startswith("torch"):
            expected = torch.stack([plain[place] for place in range(4)])
            if name == "torch float":
                images = images.cpu().permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
                images = (images * 255).round().to(torch.uint8)
            found = images[:4].cpu()
        else:
            config = DataConfig(crop=CROP, decoder="pillow")
            size = {"global_batch": BATCH, "device_batch": BATCH}
            with Loader(index, config, seed=0, steps=1, **size) as loader:
                ids = next(loader).ids.numpy()
            rows = [plain[int(row)] for row in ids[:4]]
            expected, found = torch.stack(rows), images[:4].cpu()
        off = (found.int() - expected.int()).abs()
        assert off.float().mean() < (1 if "gpu" in name else 0.5), (name, off.max())


def measure(
    index: Index, device: torch.device, *, cores: int, seconds: float, repeats: int
) -> list[Row]:
    """Turns of all providers; medians, and the ratio of each round to the baselines'."""
    wanted = names(device)
    rounds: list[dict[str, Row]] = []
    for number in range(repeats):
        order = wanted[number % len(wanted) :] + wanted[: number % len(wanted)]
        rounds.append({name: turn(name, index, device, cores, seconds) for name in order})
    rows = []
    for name in wanted:
        turns = [results[name] for results in rounds]
        row: Row = {"provider": name, "turns": len(turns), "cores": cores}
        for key in turns[0]:
            if key != "provider":
                row[key] = round(statistics.median(turn[key] for turn in turns), 2)
        for base in TARGETS:
            ratios = [r[name]["images_per_second"] / r[base]["images_per_second"] for r in rounds]
            row[f"x {base}"] = round(statistics.median(ratios), 2)
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| provider | images/s | per core | CPU | x torch uint8 | x torch float "
        "| first batch | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['provider']} | {row['images_per_second']:.0f} "
            f"| {row['images_per_second'] / row['cores']:.0f} | {row['cpu_percent']:.0f} % "
            f"| {row['x torch uint8']:.2f} | {row['x torch float']:.2f} "
            f"| {row['first_batch_s']:.2f} s | {row['resident_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


@pytest.mark.filterwarnings("default")
def bench_data(tmp_path: Path) -> None:
    """Short turns: that everything runs and the pixels are right."""
    index = build_index(write_photographs(tmp_path, 64))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(index, device)
    rows = measure(index, device, cores=os.cpu_count() or 1, seconds=1.0, repeats=1)
    print("\n" + table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="bench_data", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", type=torch.device)
    parser.add_argument("--out", type=Path, help="data.json and data.md")
    args = parser.parse_args(argv)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(write_photographs(Path(folder)))
        check(index, device)
        rows = measure(index, device, cores=args.cores, seconds=args.seconds, repeats=args.repeats)
        print(table(rows), flush=True)
    if args.out:
        write_json(args.out / "data.json", {"machine": machine(), "rows": rows})
        (args.out / "data.md").write_text(table(rows) + "\n")
    best = rows[0]
    missed = [
        f"{best[f'x {k}']} x {k}, wanted {v}" for k, v in TARGETS.items() if best[f"x {k}"] < v
    ]
    for line in missed:
        print(f"TARGET MISSED {best['provider']}: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
