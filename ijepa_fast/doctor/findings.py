"""Findings of the doctor, and what is taken out of them before they are shown: names of users and
machines, home folders, addresses.
"""

import contextlib
import getpass
import ipaddress
import os
import platform
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "Level", "clean", "first_line", "report"]

Level = Literal["ok", "note", "problem"]

# names of users and machines that say nothing of anyone, and would be replaced in ordinary text
COMMON = {"admin", "localhost", "nobody", "root", "runner", "ubuntu", "user"}
ADDRESS = re.compile(r"(?<![\w:.])[0-9A-Fa-f:.]{3,}(?![\w:])")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        section: of the report.
        name: what was looked at.
        level: `ok`, `note` (nothing to do, but good to know) or `problem`.
        text: what was found, in one line.
        advice: what to do about it; every problem has one.
    """

    section: str
    name: str
    level: Level
    text: str
    advice: str = ""


def first_line(error: BaseException) -> str:
    """What went wrong, in one line, with the kind of error where that says more."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _homes() -> list[str]:
    try:
        home = Path.home()
    except RuntimeError:
        return []
    # the longer first
    return sorted({str(home), os.path.realpath(home)} - {"/", "."}, key=len, reverse=True)


def _names() -> list[tuple[str, str]]:
    """Names of this user and this machine, and what is shown instead."""
    found = []
    with contextlib.suppress(KeyError, OSError):
        found.append((getpass.getuser(), "<user>"))
    # the environment may say another one
    if hasattr(os, "getuid"):
        import pwd

        with contextlib.suppress(KeyError):
            found.append((pwd.getpwuid(os.getuid()).pw_name, "<user>"))
    node = platform.node()
    found += [(node, "<host>"), (node.partition(".")[0], "<host>")]
    return [(name, shown) for name, shown in found if len(name) > 1 and name not in COMMON]


def _address(match: re.Match[str]) -> str:
    text = match[0].rstrip(".:")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return match[0]
    return "<address>" + match[0][len(text) :]


def clean(text: str) -> str:
    """A text without the home folder, names of user and machine, and IP addresses."""
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w-])", "~", text)
    for name, shown in _names():
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", shown, text)
    return ADDRESS.sub(_address, text)


def _line(text: str) -> str:
    """One line, without names and what could rewrite a terminal."""
    return clean("".join(filter(str.isprintable, " ".join(text.split()))))


def cleaned(finding: Finding) -> Finding:
    """The same, fit to be shown to anyone."""
    return replace(
        finding,
        name=_line(finding.name),
        text=_line(finding.text),
        advice=_line(finding.advice),
    )


def report(findings: list[Finding]) -> tuple[str, dict[str, object]]:
    """The report for a person, and for a machine."""
    shown = [cleaned(finding) for finding in findings]
    lines: list[str] = []
    section = ""
    for finding in shown:
        if finding.section != section:
            section = finding.section
            lines += ["", section]
        lines.append(f"  {finding.level:<8} {finding.name}: {finding.text}")
        if finding.advice:
            lines.append(f"           -> {finding.advice}")
    counts = {level: sum(f.level == level for f in shown) for level in ("ok", "note", "problem")}
    ends = {level: "" if counts[level] == 1 else "s" for level in counts}
    lines += [
        "",
        f"{counts['problem']} problem{ends['problem']}, {counts['note']} note{ends['note']}, "
        f"{counts['ok']} ok",
    ]
    return "\n".join(lines[1:]), {
        "problems": counts["problem"],
        "notes": counts["note"],
        "findings": [asdict(finding) for finding in shown],
    }
