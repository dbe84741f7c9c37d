"""Findings of the doctor, and what is taken out of them before they are shown: names of users and
machines, home folders, addresses.
"""

import contextlib
import getpass
import ipaddress
import os
import platform
import pwd
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

__all__ = ["Finding", "clean", "first_line", "render"]

# names of users and machines that say nothing of anyone, and would be replaced in ordinary text
COMMON = {"admin", "localhost", "nobody", "root", "runner", "ubuntu", "user"}
ADDRESS = re.compile(r"(?<![\w:.])[0-9A-Fa-f:.]{3,}(?![\w:])")


class Finding(NamedTuple):
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        text: what was found, in one line.
        level: `ok`, `note` (nothing to do, but good to know) or `problem`.
        advice: what to do about it; every problem has one.
    """

    name: str
    text: str
    level: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""


def first_line(error: BaseException) -> str:
    """What went wrong, in one line, with the kind of error where that says more; no file names."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0].strip()}"[:300]


def _private() -> dict[str, str]:
    """Names of this user and this machine, and what is shown instead."""
    found = {}
    with contextlib.suppress(RuntimeError):
        home = Path.home()
        found = {str(home): "~", os.path.realpath(home): "~"}
    with contextlib.suppress(KeyError, OSError):
        found[getpass.getuser()] = "<user>"
    # the environment may say another one
    with contextlib.suppress(KeyError):
        found[pwd.getpwuid(os.getuid()).pw_name] = "<user>"
    node = platform.node()
    return {**found, node: "<host>", node.partition(".")[0]: "<host>"}


def _address(match: re.Match[str]) -> str:
    text = match[0].rstrip(".:")
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return match[0]
    return "<address>" + match[0][len(text) :]


def clean(text: str) -> str:
    """One line without the home folder, names of user and machine, IP addresses, and what could
    rewrite a terminal.
    """
    text = "".join(filter(str.isprintable, " ".join(text.split())))
    private = _private()
    for name in sorted(private, key=len, reverse=True):
        if len(name) > 1 and name not in COMMON:
            whole = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
            text = re.sub(whole, private[name], text)
    return ADDRESS.sub(_address, text)


def render(sections: Mapping[str, Sequence[Finding]]) -> tuple[str, dict[str, Any]]:
    """The report for a person, and for a machine, both fit to be shown to anyone."""
    lines: list[str] = []
    rows: list[dict[str, str]] = []
    for section, findings in sections.items():
        lines.append(section)
        for finding in findings:
            name, text, advice = map(clean, (finding.name, finding.text, finding.advice))
            lines.append(f"  {finding.level:<8} {name}: {text}")
            lines += [f"           -> {advice}"] if advice else []
            row = {"section": section, "name": name, "level": finding.level, "text": text}
            rows.append({**row, "advice": advice})
        lines.append("")
    counts = {level: sum(r["level"] == level for r in rows) for level in ("problem", "note", "ok")}
    problems, notes, ok = counts.values()
    plural = ("" if problems == 1 else "s", "" if notes == 1 else "s")
    lines.append(f"{problems} problem{plural[0]}, {notes} note{plural[1]}, {ok} ok")
    return "\n".join(lines), {"problems": problems, "notes": notes, "findings": rows}
