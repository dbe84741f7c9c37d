"""The committed table: Triton version, architecture, row; what counts as worse; how it is shown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.static.measure import Numbers

__all__ = ["TABLE", "Change", "Rows", "compare", "load", "pinned_version", "save", "show"]

TABLE = Path(__file__).with_name("table.json")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

# by architecture ("sm_80"), then by row ("op | case | models | kernel")
Rows = dict[str, dict[str, Numbers]]


@dataclass(frozen=True)
class Change:
    """A number that is not what the table says."""

    sm: str
    row: str
    metric: str
    old: float | None
    new: float | None
    worse: bool

    def __str__(self) -> str:
        return f"{self.row} | {self.sm}: {_TITLES[self.metric]} {_text(self.old)} -> " + _text(
            self.new
        )


def pinned_version() -> str:
    """The Triton that constraints.txt names."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("triton==") for line in lines if line.startswith("triton=="))


def load(path: Path = TABLE) -> dict[str, Rows]:
    """The tables by Triton version."""
    if not path.exists():
        return {}
    versions = json.loads(path.read_text(encoding="utf-8"))
    return {
        version: {
            sm: {row: Numbers(**numbers) for row, numbers in rows.items()}
            for sm, rows in by_sm.items()
        }
        for version, by_sm in versions.items()
    }


def save(versions: Mapping[str, Rows], path: Path = TABLE) -> None:
    """One row a line, sorted, so that a diff of the file can be read."""
    blocks = []
    for version in sorted(versions):
        by_sm = []
        for sm in sorted(versions[version], key=lambda name: int(name[3:])):
            rows = sorted(versions[version][sm].items())
            lines = [f"      {json.dumps(row)}: {json.dumps(asdict(n))}" for row, n in rows]
            by_sm.append(f"    {json.dumps(sm)}: {{\n" + ",\n".join(lines) + "\n    }")
        blocks.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(by_sm) + "\n  }")
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


# --- what is worse -------------------------------------------------------------------------------


def compare(old: Rows, new: Rows) -> list[Change]:
    """The changes in rows that both have, the worse ones first.

    Worse are: registers up by more than 10 %, any spill, more shared memory, lower occupancy, a
    share of 128-bit accesses lower by more than half a percentage point, instructions per element
    up by more than 5 %. `warps` and `tile` are only told.
    """
    changes = [
        Change(sm, row, metric, before, after, _is_worse(metric, before, after))
        for sm, rows in new.items()
        for row, numbers in rows.items()
        if row in old.get(sm, {})
        for metric, after in asdict(numbers).items()
        if (before := getattr(old[sm][row], metric)) != after
    ]
    return sorted(changes, key=lambda change: not change.worse)


def _is_worse(metric: str, old: float | None, new: float | None) -> bool:
    # no access is as good as wide ones
    before = 100.0 if old is None else old
    after = 100.0 if new is None else new
    limits = {
        "registers": after > 1.1 * before,
        "spills": after > 0,
        "shared": after > before,
        "occupancy": after < before,
        "wide_loads": after < before - 0.5,
        "wide_stores": after < before - 0.5,
        "instructions": after > 1.05 * before,
    }
    return limits.get(metric, False)


# --- how it is shown -----------------------------------------------------------------------------

_TITLES = {
    "warps": "warps",
    "tile": "tile",
    "registers": "registers",
    "spills": "spills",
    "shared": "shared B",
    "occupancy": "occupancy %",
    "wide_loads": "128-bit ld %",
    "wide_stores": "128-bit st %",
    "instructions": "instr./element",
}
assert list(_TITLES) == [field.name for field in fields(Numbers)]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def show(table: Rows) -> str:
    """One line a kernel and case: where architectures differ, "80 / 90 / 100" are side by side,
    and models with the same numbers share a line.
    """
    models: dict[tuple[str, ...], list[str]] = {}
    for row in sorted({row for rows in table.values() for row in rows}):
        op, case, model, kernel = row.split(" | ")
        found = [rows[row] for rows in table.values() if row in rows]
        cells = [_merged(getattr(n, metric) for n in found) for metric in _TITLES]
        short = kernel.removeprefix("_").replace("_kernel", "")
        models.setdefault((op, case, short, *cells), []).append(model)
    lines = [("op", "case", "models", "kernel", *_TITLES.values())]
    lines += [
        (op, case, " ".join(names), kernel, *cells)
        for (op, case, kernel, *cells), names in models.items()
    ]
    return _aligned(lines)


def _merged(values: Iterable[float | None]) -> str:
    texts = [_text(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
