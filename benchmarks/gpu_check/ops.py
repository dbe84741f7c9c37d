"""Part `ops`: every op beside eager, compile and library, one model at a time.

Leaves ops_bench.txt and, after every measurement, ops_results.json (in the form of a baseline) and
ops_results.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import ROOT, left, logged
from benchmarks.shapes import MODELS, SMALL

__all__ = ["main"]

SECONDS = 240


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if nothing failed."""
    parser = files.options("ops", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument("--model", choices=list(MODELS), default="H/14")
    parser.add_argument("--ops", nargs="+", default=[], help="benchmarks; all without")
    args = parser.parse_args(argv)
    files.start(args)
    found = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    known = {path.stem.removeprefix("bench_"): str(path) for path in found if _is_op(path)}
    if unknown := set(args.ops) - set(known):
        parser.error(f"--ops must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    cuda = args.device.type == "cuda"
    # what torch's compiler warns of is no failed measurement
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default"]
    chosen = [known[name] for name in args.ops or known]
    command = [*pytest, "-p", "no:cacheprovider", *chosen]
    command += ["-k", args.model if cuda else SMALL.name]
    command += ["--results", str((args.out / "ops_results").resolve())]
    result = logged(command, args.out / "ops_bench.txt", seconds=left(args))
    return bool(result["exit_code"] == 0 and not result["stopped"])


def _is_op(path: Path) -> bool:
    """Tells the ops' benchmarks from those of masks and of the compiled code."""
    return "harness import Bench" in path.read_text(encoding="utf-8")
