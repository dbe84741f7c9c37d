"""Finds the benchmarks of the ops: modules ``benchmarks/bench_*.py`` with `Bench` objects."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

from benchmarks.harness import Bench

__all__ = ["benches", "modules"]


@functools.cache
def modules() -> tuple[ModuleType, ...]:
    """All benchmark modules, in order of their names."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return tuple(importlib.import_module(f"benchmarks.{name}") for name in names)


def benches() -> list[Bench]:
    """Every op's `Bench` objects."""
    return [b for module in modules() for b in vars(module).values() if isinstance(b, Bench)]
