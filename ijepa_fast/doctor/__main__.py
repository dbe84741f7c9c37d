"""``python -m ijepa_fast.doctor``: a report on this machine that is safe to paste into an issue.

Exit codes: 0 no problems, 1 problems, 2 wrong usage.
"""

import argparse
import functools
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.doctor import packages
from ijepa_fast.doctor.findings import Finding, first_line, report

__all__ = ["examine", "main"]

INTRODUCTION = "ijepa-fast doctor: no names of users and machines, no home folders, no addresses"


def _looked(section: str, name: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """What a look finds, or that it failed: the doctor goes on."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # whatever is broken here, it is the finding
        return [
            Finding(
                section=section,
                name=name,
                level="problem",
                text=f"cannot be looked at: {first_line(error)}",
                advice="the lines above may say why",
            )
        ]


def _torch() -> list[Finding]:
    """Nothing if torch can be imported."""
    importlib.import_module("torch")
    return []


def examine(out: Path | None, *, self_test: bool) -> list[Finding]:
    """Looks at everything.

    Args:
        out: a folder that a run is to be written to.
        self_test: also compute something.
    """
    found = packages.versions()
    broken = _looked("machine", "torch", _torch)
    if broken:
        return [*found, *broken, *_looked("packages", "", lambda: packages.wrong_packages(None))]

    # imported by name: each may fail, and the others are looked at then
    def part(module: str, function: str, *arguments: Any) -> list[Finding]:
        return getattr(importlib.import_module(f"ijepa_fast.doctor.{module}"), function)(*arguments)

    cuda = importlib.import_module("torch").version.cuda
    for section, module, function, arguments in (
        ("machine", "machine", "processor_and_gpus", ()),
        ("back ends", "backends", "operations", ()),
        ("back ends", "backends", "attention", ()),
        ("back ends", "backends", "decoder", ()),
        ("packages", "packages", "wrong_packages", (cuda,)),
        ("room", "machine", "room", (out,)),
        ("room", "machine", "limits", ()),
    ):
        name = function.replace("_", " ")
        found += _looked(section, name, functools.partial(part, module, function, *arguments))
    if self_test:
        found += _looked("self test", "self test", lambda: part("self_test", "child", out))
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    # not tyro: it may be what is missing
    parser = argparse.ArgumentParser(
        prog="python -m ijepa_fast.doctor",
        description="What this machine has, which back ends run on it, and what is wrong. The "
        "report holds no names of users and machines, no home folders and no addresses.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="a folder that a run is to be written to")
    parser.add_argument(
        "--no-self-test", action="store_true", help="leave out the work of at most 20 s"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _arguments(argv)
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        print(f"error: --out must be a folder, got {args.out}", file=sys.stderr)
        return 2
    found = examine(args.out, self_test=not args.no_self_test)
    text, data = report(found)
    if args.json:
        print(json.dumps(data, indent=1))
    else:
        print(f"{INTRODUCTION}\n\n{text}")
    return 1 if data["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
