"""Part `ops`: the ops' tests on CUDA, parity, then every op beside eager, compile and library.

Leaves ops.json, ops_tests.txt, ops_bench.txt and, after every measurement, ops_results.json (in the
form of a baseline) and ops_results.md.
"""

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.files import GRACE, ROOT, logged, write_json
from benchmarks.harness import machine

__all__ = ["run"]

# seconds; the benchmarks have what is left
ALL, TESTS, BIG_TESTS = 535, 190, 60


def run(out: Path, device: torch.device) -> bool:
    """The whole part; True if nothing failed."""
    end = time.monotonic() + ALL
    result: dict[str, Any] = {"machine": machine()}
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # pytest-benchmark warns of parallel runs
    tests, log = [*pytest, "-p", "no:benchmark", "tests/ops"], out / "ops_tests.txt"

    result["tests"] = logged([*tests, *parallel, "-m", "not gpu"], log, seconds=TESTS)
    write_json(out / "ops.json", result)
    # rows past 2**31 elements: one at a time, for their memory
    result["big_tests"] = logged([*tests, "-m", "gpu"], log, seconds=BIG_TESTS)
    write_json(out / "ops.json", result)
    result["parity"] = _parity(device)
    write_json(out / "ops.json", result)

    files = sorted(str(p) for p in (ROOT / "benchmarks").glob("bench_*.py") if _is_op(p))
    result["benchmarks"] = logged(
        # what torch's compiler warns of is no failed measurement
        [*pytest, "-W", "default", *files, "--results", str((out / "ops_results").resolve())],
        out / "ops_bench.txt",
        seconds=end - time.monotonic() - GRACE,
    )
    write_json(out / "ops.json", result)
    green = all(result[name]["exit_code"] == 0 for name in ("tests", "big_tests", "benchmarks"))
    return green and all(p["ok"] for p in result["parity"])


def _parity(device: torch.device) -> list[dict[str, Any]]:
    """Of the trainer, which needs more packages than the ops."""
    try:
        from benchmarks.gpu_check.step import check_parity
    except ModuleNotFoundError as error:
        print(f"error: no parity: {error}", file=sys.stderr)
        return [{"ok": False, "error": str(error)}]
    return check_parity(device)


def _is_op(path: Path) -> bool:
    """Tells the ops' benchmarks from those of masks and of the compiled code."""
    return "harness import Bench" in path.read_text(encoding="utf-8")
