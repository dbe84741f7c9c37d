"""What to run on a CUDA machine: ``make gpu-check PART=first OUT=dir PYTHON=python3``.

Made for a machine that is there for minutes and has no network: every part has a budget in seconds
(``--seconds``), writes its results to OUT after every turn, at most 8 files, and with ``--device
cpu`` tries itself out without a GPU. CONTRIBUTING.md says what to bring along.
"""

import argparse
import importlib
import sys

PARTS = ("first", "step", "ops", "data", "train", "sanitize", "tune")


def main() -> int:
    """Command line; returns the exit code: 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=PARTS, help="its options: PART --help")
    part = parser.parse_known_args(sys.argv[1:2])[0].part
    # ops and sanitize need torch and triton alone, the others the trainer and its packages
    module = importlib.import_module(f"benchmarks.gpu_check.{part}")
    return 0 if module.main(sys.argv[2:]) else 1


if __name__ == "__main__":
    sys.exit(main())
