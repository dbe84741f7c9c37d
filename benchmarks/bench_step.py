"""The whole training step side by side: what users run today, the reference, and the fast path.

``python -m benchmarks.bench_step --full --out DIR`` measures the models at their full depth; under
pytest a machine without a GPU gets small ones. A step goes from masks as sampled, on the host, to
updated weights. Every provider first runs all steps, and its losses and final weights are held
against the reference's; then they take turns over the same steps, in changing order, and every turn
is compared with the others' of its round. Where not all providers fit the GPU at once, each of them
takes turns with `fast` alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import step_report, targets
from benchmarks.harness import device as default_device
from benchmarks.step_contest import REPEATS, measure, names_on
from benchmarks.step_providers import MODES, PROVIDERS, Case, make_case
from benchmarks.step_report import ROWS, Row

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
def bench_step(case: Case, request: pytest.FixtureRequest) -> None:
    device = default_device()
    disabled = request.config.getoption("benchmark_disable", default=False)
    rows = measure(
        case,
        names_on(device),
        device=device,
        repeats=0 if disabled else REPEATS,
        seconds=600 if device.type == "cuda" else 10,
    )
    failed = {row["provider"]: row["error"] for row in rows if "error" in row}
    assert not failed, failed
    if disabled:
        return
    ROWS.extend(rows)
    # times of a machine without a GPU are reported, and no reason to fail
    missed = targets.missed_steps(rows) if device.type == "cuda" else []
    assert not missed, missed


# --- as a command --------------------------------------------------------------------------------


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="on a CPU: full depth, float32")
    parser.add_argument("--presets", nargs="+", help="instead of the machine's")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"])
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS))
    parser.add_argument("--compile", action="store_true", help="reference+compile on a CPU, too")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=8, help="different steps of a turn")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", type=Path, help="step.json and step.md, as they come")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if something could not be measured."""
    args = _arguments(argv)
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
    rows: list[Row] = []
    for case in cases:
        done = list(rows)

        def flush(new: Sequence[Row], done: list[Row] = done) -> None:
            step_report.write(args.out, args.device, [*done, *new])

        rows += measure(case, names, device=args.device, repeats=args.repeats, flush=flush)
        step_report.write(args.out, args.device, rows)
        print(step_report.table(rows[len(done) :]) + "\n", flush=True)
    for line in targets.missed_steps(rows):
        print(f"TARGET MISSED {line}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
