"""Part `first`: whether this state of the code works on this machine, in 150 seconds.

Parity of both paths, op tests, and two steps each of B/16 and H/14 with losses and weights held
against the reference path. The op tests run beside the rest: nothing is timed here. Leaves
first.json, first.txt (the verdict) and first_tests.txt.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import ROOT, OutOfTime, logged, stopped_after, write_json
from benchmarks.harness import machine
from benchmarks.step_contest import measure
from benchmarks.step_providers import FAST, REFERENCE, Case, make_case
from ijepa_fast.verify import parity

__all__ = ["main"]

SECONDS = 150
GOLDEN = ROOT / "tests" / "golden" / "p8_64.safetensors"
RUNS = [(path, dtype) for path in ("reference", "fast") for dtype in ("float32", "bfloat16")]


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if all of it holds."""
    parser = files.options("first", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument(
        "--tests", default="tests/ops -m 'not gpu'", help="op tests, as pytest takes them"
    )
    parser.add_argument("--presets", nargs="+", default=["vitb16_in1k", "vith14_in1k"])
    parser.add_argument("--workers", type=int, default=8, help="processes of the op tests")
    args = parser.parse_args(argv)
    files.start(args)
    began = time.monotonic()
    result: dict[str, Any] = {"machine": machine(), "parity": [], "tests": {}, "steps": []}
    with ThreadPoolExecutor(1) as pool:
        tests = pool.submit(_op_tests, args)
        try:
            with stopped_after(args.seconds):
                _check(args, tests, result)
        except OutOfTime:
            print(f"stopped after {args.seconds:.0f} s", file=sys.stderr)
    result["tests"] = tests.result()
    result["seconds"] = round(time.monotonic() - began)
    lines, green = verdict(args, result)
    write_json(args.out / "first.json", result)
    (args.out / "first.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return green


def _op_tests(args: argparse.Namespace) -> dict[str, Any]:
    # pytest-benchmark, where it is installed, warns of parallel runs
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "no:benchmark", "-n", str(args.workers), *shlex.split(args.tests)]
    return logged(command, args.out / "first_tests.txt", seconds=max(1, args.seconds - files.GRACE))


def _check(args: argparse.Namespace, tests: Future[dict[str, Any]], result: dict[str, Any]) -> None:
    """Adds to the result what is known, as it comes."""
    for path, dtype in RUNS:
        result["parity"].append(_parity(path, dtype, args.device))
        write_json(args.out / "first.json", result)
    for case in _cases(args):
        result["steps"] += measure(case, [REFERENCE, FAST], device=args.device, repeats=0)
        write_json(args.out / "first.json", result)
    tests.result()


def _cases(args: argparse.Namespace) -> list[Case]:
    if args.device.type == "cuda":
        return [make_case(name, batch=128, steps=2) for name in args.presets]
    tiny = {"batch": 2, "depth": 1, "predictor_depth": 1, "precision": "float32", "steps": 2}
    return [make_case("demo", **tiny) for _ in args.presets]


def _parity(path: Any, dtype: Any, device: torch.device) -> dict[str, Any]:
    """Replays the recorded steps; what fails does not end the others."""
    result = {"path": path, "dtype": dtype, "ok": False}
    try:
        report = parity.compare(GOLDEN, path=path, dtype=dtype, device=device)
    except Exception as error:  # noqa: BLE001  # the other path may hold
        return {**result, "said": f"{type(error).__name__}: {error}".splitlines()[0]}
    worst = max(report.rows, key=lambda row: row.error / row.limit)
    said = f"{len(report.rows)} rows, worst {worst.name}: {worst.error:.1e} of {worst.limit:.0e}"
    return {**result, "ok": report.ok, "said": said}


def verdict(args: argparse.Namespace, result: dict[str, Any]) -> tuple[list[str], bool]:
    """Ten lines, and whether everything was done and holds."""
    names = ("device", "driver", "torch", "triton", "python")
    lines = [", ".join(f"{n} {result['machine'][n]}" for n in names if result["machine"][n])]
    held = {(row["path"], row["dtype"]): row for row in result["parity"]}
    green = []

    def add(name: str, ok: bool, said: str) -> None:
        green.append(ok)
        lines.append(f"{'ok  ' if ok else 'FAIL'}  {name}: {said}")

    for path, dtype in RUNS:
        row = held.get((path, dtype), {"ok": False, "said": "out of time"})
        add(f"parity, {path}, {dtype}", row["ok"], row["said"])
    tests = result["tests"]
    said = f"out of time; {tests['last_line']}" if tests["stopped"] else tests["last_line"]
    add(f"op tests, {args.tests}", tests["exit_code"] == 0 and not tests["stopped"], said)
    fast = [row for row in result["steps"] if row["provider"] == FAST]
    for number, preset in enumerate(args.presets):
        if number >= len(fast):
            add(f"step, {preset}", False, "out of time")
            continue
        row = fast[number]
        peak = f", peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        said = row.get("error") or (
            f"losses within {row['loss_error']:.1e} of the {row['held_against']}'s, weights "
            f"within {row['weights_error']:.1e} of their movement{peak}"
        )
        ok = "error" not in row and row["held_against"] == REFERENCE
        add(f"step, {row['model']}, {row['precision']}", ok, said)
    lines.append(f"took {result['seconds']} s of {args.seconds:.0f}")
    lines.append(f"VERDICT: {'all holds' if all(green) else f'{green.count(False)} FAILED'}")
    return lines, all(green)
