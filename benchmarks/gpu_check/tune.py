"""Part `tune`: times every candidate of every launch table, and names the best.

The largest model first. Leaves tune.json and tune.md, rewritten after every candidate; one that
computes something wrong is not timed. It measures, and so needs a GPU.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.discover import benches
from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import write_json
from benchmarks.harness import machine
from benchmarks.shapes import MODELS
from benchmarks.tune import TUNINGS

__all__ = ["main", "run"]

SECONDS = 240


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if every candidate was tried in time."""
    parser = files.options("tune", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument("--op", choices=[tuning.bench for tuning in TUNINGS], help="only this one")
    parser.add_argument("--model", choices=list(MODELS), help="only at its shapes")
    args = parser.parse_args(argv)
    if args.device.type != "cuda":
        print("error: part tune measures, it needs a CUDA device", file=sys.stderr)
        raise SystemExit(2)
    files.start(args)
    return run(args.out, args.op, args.model, args.seconds)


def run(
    out: Path, only: str | None = None, shape: str | None = None, seconds: float = SECONDS
) -> bool:
    """Tries all candidates; True if there was time."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"machine": machine(), "tables": []}
    by_name = {bench.name: bench for bench in benches()}
    tunings = [t for t in TUNINGS if only in (None, t.bench)]
    for model in [m for m in reversed(MODELS.values()) if shape in (None, m.name)]:
        for tuning in tunings:
            bench = by_name[tuning.bench]
            rows: list[tuple[Any, dict[str, Any]]] = []
            entry = {"bench": bench.name, "shape": model.name, "shipped": bench.median_us(model)}
            result["tables"].append({**entry, "tried": rows})
            for candidate in tuning.candidates(model):
                if time.monotonic() > end:
                    print(f"stopped after {seconds:.0f} s; go on with --op", file=sys.stderr)
                    return False
                try:
                    with tuning.applied(candidate):
                        bench.check("ours", model.name)
                        rows.append((candidate, bench.median_us(model)))
                except Exception as error:  # noqa: BLE001  # does not fit the machine
                    rows.append((candidate, {"error": f"{type(error).__name__}: {error}"[:200]}))
                write_json(out / "tune.json", result)
                (out / "tune.md").write_text(_markdown(result["tables"]))
            print(json.dumps(entry), flush=True)
    return True


def _markdown(tables: list[dict[str, Any]]) -> str:
    lines = ["| bench | shape | pass | shipped us | best us | best |", "|---|---|---|---|---|---|"]
    for entry in tables:
        for direction, shipped in entry["shipped"].items():
            timed = [(c, t[direction]) for c, t in entry["tried"] if direction in t]
            if timed:
                best, us = min(timed, key=lambda row: row[1])
                case = f"{entry['bench']} | {entry['shape']} | {direction}"
                lines.append(f"| {case} | {shipped:.1f} | {us:.1f} | {best} |")
    return "\n".join(lines) + "\n"
