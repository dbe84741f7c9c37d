"""Part `tune`: times every candidate of every launch table, and names the best.

The largest model first. Leaves tune.json and tune.md, rewritten after every candidate; one that
computes something wrong is not timed. It measures, and so needs a GPU. Shipped kernels carry fixed
tables, not autotuners: the winner is written into the op's file by hand, with the numbers in
docs/log/.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import triton

from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import write_json
from benchmarks.harness import benches, machine
from benchmarks.shapes import MODELS, Model

__all__ = ["main", "run"]

SECONDS = 240

# names in an op's module, and what they might be; for a function, what it might return
Candidate = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One launch table.

    Args:
        bench: name of the `Bench` to time.
        module: in ijepa_kernels, where the table is.
        candidates: for a model's shapes.
    """

    bench: str
    module: str
    candidates: Callable[[Model], Sequence[Candidate]]

    @contextmanager
    def applied(self, candidate: Candidate) -> Iterator[None]:
        """Within it the module has the candidate's values."""
        module: Any = import_module(f"ijepa_kernels.{self.module}")
        shipped = {name: getattr(module, name) for name in candidate}
        _forget(module)
        for name, value in candidate.items():
            setattr(module, name, _returning(value) if callable(shipped[name]) else value)
        try:
            yield
        finally:
            for name, value in shipped.items():
                setattr(module, name, value)
            _forget(module)


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def _forget(module: Any) -> None:
    """Drops what functions of the table have cached."""
    for value in vars(module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


def _rows(model: Model) -> list[Candidate]:
    """Tiles of 1 to 4 whole rows with 2 to 16 warps."""
    columns = triton.next_power_of_2(model.width)
    return [{"_tile": (rows, columns, warps)} for rows in (1, 2, 4) for warps in (2, 4, 8, 16)]


def _grid(**values: Sequence[Any]) -> Callable[[Model], list[Candidate]]:
    """A function that gives every combination of these values, whatever the model."""
    rows = [dict(zip(values, row, strict=True)) for row in product(*values.values())]
    return lambda _: list(rows)


_STREAM = {"BLOCK": (1024, 2048, 4096, 8192), "WARPS": (4, 8, 16)}
_TILES = _grid(TILE=(1024, 2048, 4096, 8192))

TUNINGS = (
    Tuning(bench="latent_loss", module="latent_loss", candidates=_rows),
    Tuning(bench="add_layer_norm", module="_layer_norm", candidates=_rows),
    Tuning(bench="adamw_ema_", module="optim.adamw_ema", candidates=_grid(**_STREAM)),
    Tuning(bench="ema_update_", module="optim.ema_update", candidates=_grid(**_STREAM)),
    Tuning(
        bench="patchify",
        module="patchify",
        candidates=_grid(LANES=(128, 256, 512), LANE_ROWS=(1, 2, 4)),
    ),
    Tuning(bench="gather_tokens", module="_segments", candidates=_TILES),
    Tuning(bench="scatter_tokens", module="_segments", candidates=_TILES),
)


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
