"""Runs every op once forward and backward at small and odd sizes: what the sanitizer watches."""

import dataclasses
import sys

from benchmarks.discover import benches
from benchmarks.harness import device
from benchmarks.shapes import SMALL

__all__ = ["main"]

ODD = dataclasses.replace(
    SMALL, name="odd", patch=7, grid=5, width=100, context=11, target=3, batch=3, predictor_width=36
)


def main() -> int:
    """Command line; returns the exit code."""
    count = 0
    for bench in benches():
        for model in (SMALL, ODD):
            results = bench.outputs(bench.function("ours"), model)
            count += sum(t.numel() for t in results)
    print(f"exercised {len(benches())} benchmarks on {device()}, {count} elements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
