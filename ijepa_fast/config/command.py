"""What all commands share: arguments of a dataclass, errors in one line, exit codes."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from ijepa_fast.errors import UsageError, exit_code

__all__ = ["parse_arguments", "run_command"]


def parse_arguments(kind: Any, argv: Sequence[str] | None, name: str, **options: Any) -> Any:
    """The arguments of `python -m ijepa_fast.NAME` as a `kind`; options are `tyro.cli`'s.

    Raises:
        UsageError: an argument is wrong, in one line.
        SystemExit: after `--help`.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=f"python -m ijepa_fast.{name}", **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    message = _first_paragraph(errors.getvalue())
    raise UsageError(re.sub(r"^Error parsing [\w.]+: ", "", message))


def _first_paragraph(box: str) -> str:
    """What is wrong, in one line: tyro prints a title, rules and paragraphs, in a box where the
    output is UTF-8 and with dashes elsewhere.
    """
    words: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip(" │")
        if text.strip("─-╰╯"):
            words += text.split()
        elif words:
            break
    return " ".join(words)


def run_command(
    kind: Any,
    work: Callable[[Any], int | None],
    argv: Sequence[str] | None,
    name: str,
    **options: Any,
) -> int:
    """Parses the arguments, does the work and returns the exit code; what is wrong with the input
    is one line on stderr.

    Args:
        kind, argv, name, options: as of `parse_arguments`.
        work: takes the arguments; returns the exit code, or nothing for 0.
    """
    try:
        return work(parse_arguments(kind, argv, name, **options)) or 0
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        # what is not ours keeps its traceback
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
