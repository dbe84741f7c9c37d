"""Baselines of measured times, one file a GPU: ``benchmarks/baselines/<gpu>.json``."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.files import write_json
from benchmarks.harness import Result

__all__ = ["LIMIT", "accept", "compare", "dump", "path_of", "table"]

FOLDER = Path(__file__).parent / "baselines"
LIMIT = 1.10


def path_of(device: str, folder: Path = FOLDER) -> Path:
    """``NVIDIA H100 80GB HBM3`` -> ``<folder>/nvidia-h100-80gb-hbm3.json``."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def dump(path: Path, machine: Mapping[str, Any], results: Iterable[Result]) -> None:
    """Writes results, whole or not at all."""
    found = {r.key: asdict(r) for r in results}
    write_json(path, {"machine": dict(machine), "results": found})


def accept(machine: Mapping[str, Any], results: Iterable[Result], folder: Path = FOLDER) -> Path:
    """Makes these results the device's baseline. Cases that were not run keep theirs, unless that
    was measured under another driver, torch or triton.
    """
    path = path_of(str(machine["device"]), folder)
    kept: list[Result] = []
    results = list(results)
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        new = {r.key for r in results}
        if not _changed(old["machine"], machine):
            kept = [Result(**f) for key, f in old["results"].items() if key not in new]
    dump(path, machine, sorted([*kept, *results], key=lambda r: r.key))
    return path


def compare(
    machine: Mapping[str, Any], results: Iterable[Result], folder: Path = FOLDER
) -> tuple[str, list[str]]:
    """Holds our own times against the device's baseline.

    Returns:
        What was compared, and a line for every case 10 % slower or more.
    """
    path = path_of(str(machine["device"]), folder)
    if not path.is_file():
        return f"no baseline for {machine['device']} yet: `make bench-accept` writes it", []
    baseline = json.loads(path.read_text(encoding="utf-8"))
    old = baseline["results"]
    slower, compared = [], 0
    for result in results:
        if result.provider != "ours" or result.key not in old:
            continue
        compared += 1
        before = old[result.key]["median_us"]
        if result.median_us >= LIMIT * before:
            slower.append(
                f"{result.key}: {result.median_us:.2f} us, baseline {before:.2f} us "
                f"({result.median_us / before:.2f} x, limit {LIMIT:.2f} x)"
            )
    theirs = baseline["machine"]
    head = f"{compared} cases held against {path.name}"
    if changed := _changed(theirs, machine):
        head += "; mind: " + ", ".join(f"{k} was {theirs.get(k)}" for k in changed)
    return head, slower


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [k for k in ("driver", "torch", "triton") if old.get(k) != new.get(k)]


def table(results: Iterable[Result]) -> str:
    """Markdown, a line a case; `x reference` above 1 is faster than the reference."""
    results = list(results)
    plain = {
        (r.op, r.shape, r.direction): r.median_us for r in results if r.provider == "reference"
    }
    lines = [
        "| op | shape | pass | provider | median us | 20-80 % | x reference | GB/s | % of copy "
        "| host us |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    for r in sorted(results, key=lambda r: (r.op, r.shape, r.direction)):
        reference = plain.get((r.op, r.shape, r.direction))
        ratio = "-" if not reference else f"{reference / r.median_us:.2f}"
        lines.append(
            f"| {r.op} | {r.shape} | {r.direction} | {r.provider} | {r.median_us:.1f} "
            f"| {r.spread_us:.1f} | {ratio} | {cell(r.gb_per_s)} | {cell(r.percent_of_copy)} "
            f"| {cell(r.host_us)} |"
        )
    return "\n".join(lines)
