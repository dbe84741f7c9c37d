"""The whole training step side by side: what users run today, the reference, and the fast path.

``python -m benchmarks.bench_step --full --out DIR`` measures the models at their full depth; under
pytest a machine without a GPU gets small ones. A step goes from masks as sampled, on the host, to
updated weights. Every provider first runs all steps, and its losses and final weights are held
against the reference's; then it and `fast` take turns over the same steps, in changing order, and
every turn is compared with the other's of its round.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import step_report, targets
from benchmarks.gpu_check.files import OutOfTime, stopped_after
from benchmarks.harness import device as default_device
from benchmarks.step_contest import REPEATS, measure, names_on
from benchmarks.step_providers import MODES, PROVIDERS, Case, make_case
from benchmarks.step_report import ROWS, Row
from ijepa_fast.config.presets import PRESETS

GPU_MODELS = ("vith14_in1k", "vitb16_in1k", "vitl16_in1k")


# --- under pytest --------------------------------------------------------------------------------


def _cases() -> list[Case]:
    if default_device().type == "cuda":
        return [make_case(m, batch=128, mode=mode) for mode in MODES for m in GPU_MODELS]
    small = [
        make_case("vits16", batch=2, mode=mode, precision="float32", depth=2, predictor_depth=1)
        for mode in MODES
    ]
    # bfloat16 is slow on most CPUs: a still smaller network
    tiny = [make_case("demo", batch=2, mode=mode, depth=1, predictor_depth=1) for mode in MODES]
    return [*small, *tiny]


# what torch's compiler warns of is no failed measurement
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", _cases(), ids=str)
def bench_step(case: Case) -> None:
    device = default_device()
    rows = measure(
        case,
        names_on(device),
        device=device,
        seconds=600 if device.type == "cuda" else 10,
    )
    failed = {row["provider"]: row["error"] for row in rows if "error" in row}
    assert not failed, failed
    ROWS.extend(rows)
    # times of a machine without a GPU are reported, and no reason to fail
    missed = targets.missed_steps(rows) if device.type == "cuda" else []
    assert not missed, missed


# --- as a command --------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What is measured; where, for how long and into which folder is the caller's."""
    parser.add_argument("--full", action="store_true", help="on a CPU: full depth, float32")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), metavar="PRESET")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    parser.add_argument("--compile", action="store_true", help="reference+compile on a CPU, too")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=8, help="different steps of a turn")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measures what was asked for; the exit code is 1 if something could not be measured."""
    cuda = args.device.type == "cuda"
    depths = {} if args.full or cuda else {"depth": 4, "predictor_depth": 2}
    cases = [
        make_case(
            recipe,
            batch=args.batch or (128 if cuda else 8),
            mode=mode,
            precision=precision,
            steps=args.steps,
            **depths,
        )
        for mode in args.modes
        for recipe in args.presets or (GPU_MODELS if cuda else ["vits16"])
        for precision in args.precisions or ["bfloat16" if cuda else "float32"]
    ]
    wanted = args.providers or names_on(args.device, compiled=args.compile)
    names = [name for name in PROVIDERS if name in wanted]
    late = {"error": "out of time"}
    rows = {(c, n): {**step_report.new_row(c, n), **late} for c in cases for n in names}

    def flush(case: Case, new: Sequence[Row]) -> None:
        rows.update({(case, row["provider"]): row for row in new})
        step_report.write(args.out, args.device, list(rows.values()))

    try:
        with stopped_after(args.seconds):
            for case in cases:
                keep = functools.partial(flush, case)
                new = measure(case, names, device=args.device, repeats=args.repeats, flush=keep)
                print(step_report.table(new) + "\n", flush=True)
    except OutOfTime:
        for row in rows.values():
            if args.repeats and "ms" not in row:
                row.setdefault("error", "out of time")
        print(f"stopped after {args.seconds:.0f} s\n{step_report.table(list(rows.values()))}\n")
    step_report.write(args.out, args.device, list(rows.values()))
    for line in targets.missed_steps(rows.values()):
        print(f"TARGET MISSED {line}")
    return int(any("error" in row for row in rows.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--out", type=Path, help="step.json and step.md, as they come")
    return run(add_options(parser).parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
