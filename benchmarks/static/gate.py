"""The gate: measures every kernel and holds the numbers against the committed table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import triton

from benchmarks.shapes import MODELS
from benchmarks.static.measure import measure
from benchmarks.static.occupancy import SMS
from benchmarks.static.record import kernel_names, op_names, record
from benchmarks.static.table import TABLE, Rows, compare, load, pinned_version, save, show

__all__ = ["Report", "accept", "check", "judge", "measured"]

ACCEPT = "if intended, `make static-accept`"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the gate measured and, after `judge`, what it thinks of it."""

    version: str  # of Triton
    table: Rows
    unlaunched: frozenset[str] = frozenset()  # kernels that no case launches
    skipped: frozenset[str] = frozenset()  # rows that there are but that were not asked for
    ops: frozenset[str] | None = None  # whose rows these are; None: all
    broken: tuple[str, ...] = ()  # cannot be accepted
    worse: tuple[str, ...] = ()  # than the table
    notes: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Any of them turns the gate red."""
        return self.broken + self.worse

    def text(self) -> str:
        """The table, then what changed, then what is wrong."""
        heading = f"compiled code, triton {self.version}, {' / '.join(self.table)}"
        parts = [heading, show(self.table)]
        if self.notes:
            parts.append("\n".join(self.notes))
        if self.failures:
            parts.append("\n".join(f"FAILED {failure}" for failure in self.failures))
        return "\n\n".join(parts)

    def covers(self, row: str) -> bool:
        """Whether the report would have a row of this name if anything launched it."""
        of_these = self.ops is None or row.partition(" | ")[0] in self.ops
        return of_these and row not in self.skipped


def measured(
    only: Sequence[str] = (), models: Sequence[str] = tuple(MODELS), sms: Sequence[int] = tuple(SMS)
) -> Report:
    """Compiles and measures all ops, or those named, and judges nothing.

    Raises:
        ValueError: `only` names an op that does not exist.
    """
    names = op_names()
    if unknown := set(only) - set(names):
        raise ValueError(f"only must be among {', '.join(names)}, got {', '.join(unknown)}")
    ops = list(only) or names
    # of all models, so that a row has the same name whatever is asked for
    recorded = record(tuple(MODELS.values()), sms, ops)
    asked = {
        sm: {
            row: launch
            for row, launch in rows.items()
            if set(models) & set(row.split(" | ")[2].split())
        }
        for sm, rows in recorded.items()
    }
    numbers = measure(launch for rows in asked.values() for launch in rows.values())
    launched = {launch.kernel for rows in recorded.values() for launch in rows.values()}
    return Report(
        version=triton.__version__,
        table={
            f"sm_{sm}": {row: numbers[launch] for row, launch in rows.items()}
            for sm, rows in asked.items()
        },
        unlaunched=frozenset(kernel_names(ops) - launched),
        skipped=frozenset(row for sm in sms for row in recorded[sm].keys() - asked[sm].keys()),
        ops=frozenset(only) or None,
    )


def judge(report: Report, versions: dict[str, Rows], pinned: str) -> Report:
    """The same report with failures and notes.

    Args:
        report: what was measured.
        versions: the committed tables.
        pinned: under any other Triton kernels have to compile without spills, no more.
    """
    broken = [
        f"{row} | {sm}: spills, must be 0, got {numbers.spills}"
        for sm, rows in report.table.items()
        for row, numbers in rows.items()
        if numbers.spills
    ]
    broken += [f"{k} is never launched by static_cases" for k in sorted(report.unlaunched)]
    is_pinned = report.version == pinned
    known = versions.get(report.version, {} if is_pinned else versions.get(pinned, {}))
    changes = [c for c in compare(known, report.table) if c.metric != "spills" or not c.worse]
    if not is_pinned:
        note = f"told only, the table is of triton {pinned}: "
        notes = [note + str(change) for change in changes if change.worse]
        if others := len(changes) - len(notes):
            notes.append(f"{note}{others} other numbers differ, not for the worse")
        return replace(report, broken=tuple(broken), notes=tuple(notes))
    worse = [f"{change}; {ACCEPT}" for change in changes if change.worse]
    of_table = {f"{row} | {sm}" for sm, rows in known.items() for row in rows}
    measured_rows = [f"{row} | {sm}" for sm, rows in report.table.items() for row in rows]
    gone = [
        f"{row} | {sm}"
        for sm, rows in report.table.items()
        for row in known.get(sm, {})
        if row not in rows and report.covers(row)
    ]
    worse += _by_op([row for row in measured_rows if row not in of_table], "not in the table")
    worse += _by_op(gone, "in the table but no longer launched")
    notes = [f"changed, not for the worse: {change}" for change in changes if not change.worse]
    return replace(report, broken=tuple(broken), worse=tuple(worse), notes=tuple(notes))


def _by_op(rows: Sequence[str], what: str) -> list[str]:
    """One line an op, not one a row."""
    lines = []
    for op in dict.fromkeys(row.partition(" | ")[0] for row in rows):
        its = [row for row in rows if row.startswith(f"{op} | ")]
        lines.append(f"{op}: {len(its)} rows {what}, first {its[0]}; {ACCEPT}")
    return lines


def check(
    only: Sequence[str] = (), models: Sequence[str] = tuple(MODELS), sms: Sequence[int] = tuple(SMS)
) -> Report:
    """Measures and judges by the committed table."""
    return judge(measured(only, models, sms), load(), pinned_version())


def accept(report: Report, path: Path = TABLE) -> None:
    """Makes what was measured the table of this Triton version; rows of ops that were not
    measured stay.
    """
    versions = load(path)
    known = versions.get(report.version, {})
    versions[report.version] = known | {
        sm: {row: n for row, n in known.get(sm, {}).items() if not report.covers(row)} | rows
        for sm, rows in report.table.items()
    }
    save(versions, path)
