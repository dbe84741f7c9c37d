"""``python -m ijepa_fast.doctor``: a report on this machine that is safe to paste into an issue.

Exit codes: 0 no problems, 1 problems, 2 wrong usage.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ijepa_fast.__main__ import enter
from ijepa_fast.doctor.findings import Finding, first_line, render

__all__ = ["examine", "main"]

INTRODUCTION = "ijepa-fast doctor: no names of users and machines, no home folders, no addresses"


def examine(out: Path | None, *, self_test: bool) -> dict[str, list[Finding]]:
    """Looks at everything; what fails is said once, and the rest is looked at.

    Args:
        out: a folder that a run is to be written to.
        self_test: also compute something.

    Returns:
        Findings by section.
    """
    sections: dict[str, list[Finding]] = {}
    failed = set()
    for section, module, function in (
        ("versions", "packages", "versions"),
        ("machine", "machine", "processor"),
        ("machine", "machine", "gpus"),
        ("back ends", "backends", "operations"),
        ("back ends", "backends", "attention"),
        ("back ends", "backends", "decoder"),
        ("back ends", "packages", "dali"),
        ("room", "machine", "room"),
        ("room", "machine", "shared_memory"),
        *([("self test", "self_test", "child")] if self_test else []),
    ):
        found = sections.setdefault(section, [])
        try:
            part = getattr(importlib.import_module(f"ijepa_fast.doctor.{module}"), function)
            found += part(out) if function == "room" else part()
        except Exception as error:  # noqa: BLE001  # whatever is broken here, it is the finding
            text = f"cannot be looked at: {first_line(error)}"
            if text not in failed:
                name, advice = function.replace("_", " "), "the lines above may say why"
                found.append(Finding(name, text, "problem", advice))
            failed.add(text)
    return sections


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    # not tyro: it may be what is missing
    parser = argparse.ArgumentParser(
        prog="ijepa-fast doctor",
        description="What this machine has, which back ends run on it, and what is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="a folder that a run is to be written to")
    parser.add_argument("--no-self-test", action="store_true", help="leave out its few seconds")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        print(f"error: unknown option {unknown[0]}; see --help for the valid ones", file=sys.stderr)
        return 2
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        print(f"error: --out must be a folder, got {args.out}", file=sys.stderr)
        return 2
    text, data = render(examine(args.out, self_test=not args.no_self_test))
    print(json.dumps(data, indent=1) if args.json else f"{INTRODUCTION}\n\n{text}")
    return 1 if data["problems"] else 0


if __name__ == "__main__":
    enter("doctor")
