"""What all commands share: arguments of a dataclass or function, errors in a line, exit codes."""

import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ijepa_fast.errors import UsageError, exit_code, require

__all__ = ["AnyPath", "call_of", "one_word", "parse_arguments", "require_choices", "run_command"]


def one_word(metavar: str) -> PrimitiveConstructorSpec[Any]:
    """For a function's argument that is anything in Python, and a path on its command line."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is not None,
        str_from_instance=lambda value: [str(value)],
    )


AnyPath = Annotated[str | os.PathLike[str], one_word("PATH")]


def call_of(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """Takes a function's arguments, as its command line does, and returns them.

    Args:
        function: documented in Google style.
        more: options of the command alone, by name: their annotated types, of booleans.

    Returns:
        With the signature of `function` and of `more`; its result is the positional arguments and
        the others by name.
    """

    def call(*args: Any, **named: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named

    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
    ]
    for name, kind in more.items():
        only = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, only, default=False, annotation=kind))
    call.__dict__["__signature__"] = inspect.Signature(parameters)
    call.__annotations__ = hints | more
    # an argument's text without its line breaks, which tyro would keep
    call.__doc__ = re.sub(r"\n {8,}", " ", inspect.getdoc(function) or "")
    return call


def require_choices(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Arguments of a function hold one of the values of their Literal, or several of them; type
    checkers see it, Python does not.

    Raises:
        UsageError: one does not.
    """
    for name, hint in get_type_hints(function).items():
        several = get_origin(hint) is Sequence
        choices = get_args(get_args(hint)[0] if several else hint)
        if several or get_origin(hint) is Literal:
            for value in given[name] if several else [given[name]]:
                require(value in choices, name, f"one of {', '.join(choices)}", value)


def _required(match: re.Match[str]) -> str:
    """The names alone: tyro puts the help of each behind it."""
    names = re.findall(r"(?:^|\(required\) )(\S+)", match[1])
    return f"what is required must be given: {', '.join(names)}"


# tyro's words (of 1.0) in ours; what it words otherwise stays as it is
WORDS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (
        r"Error parsing (-\S+): invalid literal for int\(\) .*: (.+)",
        r"\1 must be a whole number, got \2",
    ),
    (
        r"Error parsing (-\S+): could not convert string to float: (.+)",
        r"\1 must be a number, got \2",
    ),
    (
        r"Error parsing (-\S+): no type matching (?:{None}\|)?(.+) could be .* \[(.*)\]\.",
        r"\1 must be \2, got \3",
    ),
    (r"Error parsing (-\S+): Could not parse .*\[(.*)\] into .*\[(.*)\]", r"\1 must be \3, got \2"),
    (r"invalid choice (.+) for argument '(.+)'\. .*\((.+)\)\.", r"\2 must be one of \3, got \1"),
    (
        r"Missing value for argument '(.+)'\. Expected 1 .*",
        r"\1 must be followed by a value, got none",
    ),
    (
        r"Missing value for argument '(.+)'\. Expected (\d+) .*",
        r"\1 must be followed by \2 values, got fewer",
    ),
    (r"Missing from [^:]+: (.+)", _required),
    (r"Expected one of \{(.+)\}\.", r"COMMAND must be one of \1, got none"),
    (
        r"Unrecognized options: (\S+).* Available subcommands: (.+)",
        r"COMMAND must be one of \2, got \1",
    ),
    (r"Unrecognized options: (-[^,]+).*", r"unknown option \1"),
    (r"Unrecognized options: (.+)", r"unexpected argument \1"),
    # rules of the dataclass itself
    (r"Error parsing [\w.]+: (.+)", r"\1"),
)


def parse_arguments(kind: Any, argv: Sequence[str] | None, name: str, **options: Any) -> Any:
    """The arguments of `ijepa-fast NAME` as a `kind`; options are `tyro.cli`'s.

    Raises:
        UsageError: an argument is wrong, in one line.
        SystemExit: after `--help`.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=f"ijepa-fast {name}", **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(_in_one_line(errors.getvalue()))


def _in_one_line(box: str) -> str:
    """What is wrong: tyro prints a title, rules and paragraphs, in a box where the output is UTF-8
    and with dashes elsewhere.
    """
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    lines = [line if line.strip("─-╰╯") else "" for line in lines]
    first, _, rest = "\n".join(lines).strip("\n").partition("\n\n")
    if rest.startswith("Available subcommands"):
        first, _, rest = f"{first}\n{rest}".partition("\n\n")
    text = " ".join(first.split())
    for theirs, ours in WORDS:
        if re.fullmatch(theirs, text):
            text = re.sub(theirs, ours, text)
            break
    near = re.search(r"Perhaps you meant:\s+(-\S+)", rest)
    return f"{text}; did you mean {near[1]}?" if near else text


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

    Raises:
        BrokenPipeError: what reads stdout has gone.
    """
    try:
        return work(parse_arguments(kind, argv, name, **options)) or 0
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        # what is not ours keeps its traceback
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
