"""Compiles every kernel for A100, H100 and B200 without a GPU, prints what the machine code does
and fails if that is worse than the committed table.
"""

import argparse
import sys

from benchmarks.shapes import MODELS
from benchmarks.static.gate import accept, check
from benchmarks.static.occupancy import SMS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="write the table of this Triton")
    parser.add_argument("--only", action="append", default=[], metavar="OP", help="repeatable")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="repeatable")
    parser.add_argument("--sm", action="append", type=int, choices=list(SMS), help="repeatable")
    options = parser.parse_args()
    try:
        report = check(options.only, options.model or list(MODELS), options.sm or list(SMS))
    except ValueError as error:
        parser.error(f"--{error}")
    print(report.text())
    if not options.accept:
        return int(bool(report.failures))
    if report.broken:
        print("\nnot accepted: spills and kernels without a case have to be mended")
        return 1
    accept(report)
    print("\naccepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
