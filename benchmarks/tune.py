"""What there is to search in each op's launch table, for ``make gpu-check PART=tune``.

Shipped kernels carry fixed tables, not autotuners: a search here, on the machine, and the winner
is written into the op's file by hand, with the numbers in docs/performance.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import triton

from benchmarks.shapes import Model

__all__ = ["TUNINGS", "Tuning"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One launch table.

    Args:
        op: module in ijepa_kernels, and name of the `Bench` to time.
        table: name of the function that gives the launch configuration.
        candidates: what it might return for a model's shapes.
    """

    op: str
    table: str
    candidates: Callable[[Model], Sequence[Any]]


def _rows(width: int) -> list[tuple[int, int, int]]:
    """Tiles of 1 to 4 rows with 2 to 16 warps."""
    columns = triton.next_power_of_2(width)
    return [(rows, columns, warps) for rows in (1, 2, 4) for warps in (2, 4, 8, 16)]


TUNINGS = (Tuning(op="add_layer_norm", table="_tile", candidates=lambda model: _rows(model.width)),)
