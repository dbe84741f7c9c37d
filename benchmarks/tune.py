"""What there is to search in the ops' launch tables, for ``make gpu-check PART=tune``.

Shipped kernels carry fixed tables, not autotuners: a search here, on the machine, and the winner
is written into the op's file by hand, with the numbers in docs/log/.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any

import triton

from benchmarks.shapes import Model

__all__ = ["TUNINGS", "Tuning"]

# names in an op's module, and what they might be; for a function, what it might return
Candidate = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One launch table.

    Args:
        bench: name of the `Bench` to time.
        module: in ijepa_kernels, where the table is.
        candidates: for a model's shapes.
    """

    bench: str
    module: str
    candidates: Callable[[Model], Sequence[Candidate]]

    @contextmanager
    def applied(self, candidate: Candidate) -> Iterator[None]:
        """Within it the module has the candidate's values."""
        module: Any = import_module(f"ijepa_kernels.{self.module}")
        shipped = {name: getattr(module, name) for name in candidate}
        _forget(module)
        for name, value in candidate.items():
            setattr(module, name, _returning(value) if callable(shipped[name]) else value)
        try:
            yield
        finally:
            for name, value in shipped.items():
                setattr(module, name, value)
            _forget(module)


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def _forget(module: Any) -> None:
    """Drops what functions of the table have cached."""
    for value in vars(module).values():
        if isinstance(value, functools._lru_cache_wrapper):
            value.cache_clear()


def _rows(model: Model) -> list[Candidate]:
    """Tiles of 1 to 4 whole rows with 2 to 16 warps."""
    columns = triton.next_power_of_2(model.width)
    return [{"_tile": (rows, columns, warps)} for rows in (1, 2, 4) for warps in (2, 4, 8, 16)]


def _grid(**values: Sequence[Any]) -> Callable[[Model], list[Candidate]]:
    """A function that gives every combination of these values, whatever the model."""
    rows = [dict(zip(values, row, strict=True)) for row in product(*values.values())]
    return lambda _: list(rows)


_STREAM = {"BLOCK": (1024, 2048, 4096, 8192), "WARPS": (4, 8, 16)}
_TILES = _grid(TILE=(1024, 2048, 4096, 8192))

TUNINGS = (
    Tuning(bench="latent_loss", module="latent_loss", candidates=_rows),
    Tuning(bench="add_layer_norm", module="_layer_norm", candidates=_rows),
    Tuning(bench="adamw_ema_", module="optim.adamw_ema", candidates=_grid(**_STREAM)),
    Tuning(bench="ema_update_", module="optim.ema_update", candidates=_grid(**_STREAM)),
    Tuning(
        bench="patchify",
        module="patchify",
        candidates=_grid(LANES=(128, 256, 512), LANE_ROWS=(1, 2, 4)),
    ),
    Tuning(bench="gather_tokens", module="_segments", candidates=_TILES),
    Tuning(bench="scatter_tokens", module="_segments", candidates=_TILES),
)
