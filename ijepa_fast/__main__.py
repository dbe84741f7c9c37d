"""The command: `ijepa-fast NAME ...`, or `python -m ijepa_fast NAME ...`.

Exit codes: those of the named command; 2 for wrong input, 5 where stdout cannot be written, 130
after Ctrl-C, 141 where what reads stdout has gone.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, NoReturn

from ijepa_fast import __version__
from ijepa_fast.errors import UsageError, exit_code, require

__all__ = ["enter", "main"]

COMMANDS = {
    "train": "pretrain a network; the same command goes on with a run that was stopped",
    "data": "what a data set consists of, before a run depends on it",
    "evaluate": "accuracy of features on labelled images",
    "embed": "features of images, into a file",
    "export": "weights for transformers, timm or another run",
    "visualize": "pictures of data, runs and what they learnt",
    "doctor": "what this machine has, and what is wrong with it",
    "bench": "where the benchmarks are",
    "parity": "hold a training step against a recording of the published trainer",
    "replay": "compute a step again that was not finite",
}
# where the others have their `main`
MODULES = {
    "data": "data.__main__",
    "evaluate": "evaluation.command",
    "embed": "evaluation.embedding",
    "export": "weights.export",
    "visualize": "visualize.__main__",
    "doctor": "doctor.__main__",
    "parity": "verify.parity",
    "replay": "verify.replay",
}
SHELLS = ("bash", "zsh", "fish")
USAGE = "\n".join(
    [
        "usage: ijepa-fast COMMAND ...",
        "",
        *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
        "",
        "  --help     this text; `ijepa-fast COMMAND --help` lists the options of a command",
        "  --version  the version",
        f"  --completion {'|'.join(SHELLS)}",
        "             a script for the shell that completes commands and the options of train",
    ]
)


def _completion(shell: str) -> None:
    import tyro

    from ijepa_fast.config import TrainArguments

    require(shell in SHELLS, "--completion", f"one of {', '.join(SHELLS)}", shell)
    kinds: list[Any] = [Annotated[TrainArguments, tyro.conf.subcommand("train")]]
    for name in COMMANDS.keys() - {"train"}:
        kinds.append(Annotated[make_dataclass(name, []), tyro.conf.subcommand(name)])
    union = reduce(lambda a, b: a | b, kinds)
    tyro.cli(union, args=["--tyro-print-completion", shell], prog="ijepa-fast")


def _bench() -> None:
    """Benchmarks are no part of the wheel."""
    root = Path(__file__).parents[1]
    if (root / "benchmarks" / "__main__.py").is_file():
        print(f"cd {root} && python -m benchmarks --help")
    else:
        print(
            "benchmarks are in the repository only: in a clone of it, python -m benchmarks --help"
        )


def main(argv: Sequence[str]) -> int:
    """Runs a command; returns its exit code.

    The arguments of `train` are parsed before it is imported, as torch takes seconds.

    Raises:
        UsageError: there is no such command, or the arguments of `train` are wrong.
        SystemExit: after `--help`.
    """
    name, *rest = argv or ["--help"]
    if name in ("--help", "-h"):
        print(USAGE)
    elif name == "--version":
        print(f"ijepa-fast {__version__}")
    elif name == "--completion":
        _completion(rest[0] if rest else "")
    elif name == "bench":
        _bench()
    else:
        if name == "train":
            # not for the doctor, who finds what is missing
            from ijepa_fast.config import parse

            asked = parse(rest)
            if asked.print_config and not asked.open_:
                print(asked.as_yaml(), end="")
                return 0
            if not (asked.print_config or asked.dry_run) and os.environ.get("RANK", "0") == "0":
                # a run goes on without a stdout that is full
                with contextlib.suppress(OSError):
                    print(f"ijepa-fast {__version__}: loading PyTorch", flush=True)
        require(name in COMMANDS, "COMMAND", f"one of {', '.join(COMMANDS)}", name)
        module = importlib.import_module(f"ijepa_fast.{MODULES.get(name, name)}")
        return module.main(rest)
    return 0


def enter(*words: str) -> NoReturn:
    """The whole process: a command, behind these words the process's own, and its end."""
    if sys.getfilesystemencoding() != "utf-8":
        # names of files and configurations are UTF-8 everywhere: again, in Python's UTF-8 mode
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        code = _ended([*words, *sys.argv[1:]])
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except OSError as error:
        print(f"error: stdout must be writable, got {error}", file=sys.stderr)
        code = 5
    ranks = sys.modules.get("ijepa_fast.ranks")
    if ranks is not None:
        ranks.distributed.leave(code)
    if code in (5, 141):
        # what could not be written is not tried again at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _ended(argv: Sequence[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        # all ranks find the same
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    enter()
