"""What `bench_step` found, as JSON and as Markdown."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import targets
from benchmarks.gpu_check.files import write_json
from benchmarks.harness import machine
from benchmarks.step_parts import PARTS
from benchmarks.step_providers import CAPTURED, FAST, REFERENCE, RELEASED, Case
from ijepa_fast.estimate import Rows, estimate, measured_flops
from ijepa_fast.state.metrics import peak_flops

__all__ = ["ROWS", "Row", "markdown", "matrix_rate", "new_row", "table", "write"]

Row = dict[str, Any]

# of this process's pytest run
ROWS: list[Row] = []

TIMES = "ms/step: median of the turns, and half their range. "
ON_GPU = TIMES + (
    "MFU: FLOPs of the method (tokens of the masks alone) over the data sheet's bf16 rate. Peak: "
    "the allocator's, without other providers. Parts: share of the step's time on the stream, "
    "backward passes with their forward passes. Idle: without a kernel, in the longest step."
)
ON_CPU = TIMES + (
    "No GPU. Utilisation: FLOPs of the method over the rate of a matrix product measured here in "
    "the same run; not given in bfloat16, where that product takes another way than a layer's. "
    "Saved: the most bytes that autograd keeps for the backward pass at one time, weights not "
    "counted; no measurement of the process. Parts: share of the longest step's time."
)


@functools.cache
def matrix_rate(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a step is held against: the data sheet's, on a CPU a matrix product's."""
    if device.type == "cuda":
        return peak_flops(device, precision)
    if precision != "float32":
        return None
    # other work on the machine only ever makes it less
    return max(measured_flops(device, precision, 0.5) for _ in range(5))


@functools.lru_cache(maxsize=8)
def _arithmetic(case: Case, path: str) -> tuple[float, float]:
    """GFLOP of an image in a run, and GiB that the case's own steps allocate, by arithmetic."""
    config = replace(case.config, path=path)
    rows = [
        rows
        for step in range(case.steps)
        for rows in Rows.of(case.masks(step), config.grid[0] * config.grid[1], case.batch)
    ]
    needed = estimate(config, batch=case.batch, steps=rows)
    return estimate(config, batch=case.batch).flops / 1e9, needed.allocated(case.batch) / 2**30


def new_row(case: Case, provider: str) -> Row:
    """What is known before anything is measured."""
    path = "fast" if provider in (FAST, CAPTURED) else "reference"
    gflop, gib = _arithmetic(case, path)
    return {
        "model": case.name,
        "batch": case.batch,
        "precision": case.precision,
        "mode": case.mode,
        "provider": provider,
        "gflop_per_image": gflop,
        "estimated_gib": gib,
        "speed": {},  # times as fast as others
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a provider and case."""
    cuda = any("peak_gib" in row for row in rows)
    memory = ["peak GiB", "estimated"] if cuda else ["saved MiB"]
    heads = ["model", "batch", "dtype", "contexts", "provider", "ms/step", "+-", "images/s"]
    heads += ["x reference", "x released", "MFU" if cuda else "utilisation", *memory, *PARTS]
    heads += ["idle"] if cuda else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row[key] for key in ("model", "batch", "precision", "mode", "provider")]
        if "error" in row:
            cells += [f"not measured: {row['error']}".replace("|", "/")]
        elif "ms" not in row:
            cells += ["verified only"]
        else:
            cells += [_ms(row["ms"]), _ms(row["spread_ms"] / 2)]
            cells += [_number(row["images_per_second"], 1)]
            cells += [_speed(row, REFERENCE), _speed(row, RELEASED)]
            cells += [_percent(row.get("utilisation"))]
            keys = ["peak_gib", "estimated_gib"] if cuda else ["saved_mib"]
            cells += [_number(row.get(key), 1) for key in keys]
            cells += [_percent(row.get("parts", {}).get(part)) for part in PARTS]
            cells += [_percent(row.get("idle"))] if cuda else []
        cells += [""] * (len(heads) - len(cells))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _speed(row: Row, other: str) -> str:
    return "1" if row["provider"] == other else _number(row["speed"].get(other), 2)


def markdown(device: torch.device, rows: Sequence[Row]) -> str:
    """The table, what is to be known with it, and what missed its target."""
    cuda = device.type == "cuda"
    names = ", ".join(f"{key} {value}" for key, value in machine().items() if value)
    parts = [names, ON_GPU if cuda else ON_CPU, table(rows)]
    if missed := targets.missed_steps(rows):
        parts.append("\n".join(f"- TARGET MISSED {line}" for line in missed))
    notes = [f"- {_case(row)}: {note}" for row in rows for note in _notes(row)]
    if notes:
        parts.append("\n".join(notes))
    for row in rows:
        if "kernels" in row:
            parts.append(
                "\n".join([f"{_case(row)}, longest step by operation:", "", *row["kernels"]])
            )
    return "\n\n".join(parts) + "\n"


def _case(row: Row) -> str:
    return f"{row['model']}, {row['precision']}, {row['mode']}, {row['provider']}"


def _notes(row: Row) -> list[str]:
    notes = []
    if row.get("skipped"):
        notes.append(f"{row['skipped']} steps skipped, their gradients were not finite")
    if row.get("graphs_while_timed"):
        notes.append(f"{row['graphs_while_timed']} graphs compiled in its rounds: do not trust it")
    if "synchronisation" in row:
        notes.append(f"host waits for the device in a warm step: {row['synchronisation']}")
    if row.get("graphs"):
        notes.append(f"{row['graphs']} graphs compiled")
    if "profile_error" in row:
        notes.append(f"not profiled: {row['profile_error']}")
    if "busy" in row:
        busy = ", ".join(f"{part} {_percent(share)}" for part, share in row["busy"].items())
        unknown = row["kernels_without_launch"], row["kernels_total"]
        notes.append(
            f"device busy: {busy}, idle {_percent(row['idle'])} "
            f"({unknown[0]} of {unknown[1]} kernels by order)"
        )
    return notes


def write(folder: Path | None, device: torch.device, rows: Sequence[Row]) -> None:
    """Replaces step.json and step.md, if there is a folder."""
    if folder is None:
        return
    write_json(folder / "step.json", {"machine": machine(), "rows": list(rows)})
    (folder / "step.md").write_text(markdown(device, rows), encoding="utf-8")
