"""``python -m benchmarks``: ops and training step on this machine.

Every op and every step is held against the reference before it is timed. Exit codes: 0 done, 1
something is wrong or could not be measured (it is named), 2 wrong usage.
"""

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from ijepa_fast.errors import UsageError

__all__ = ["BenchArgs", "main"]


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Times the ops and the training step beside plain PyTorch, after verifying them. Without --ops
    and --step it does both, small: minutes on two cores.
    """

    ops: tuple[str, ...] | None = None
    """Only ops: these, or all of them where none is named."""
    step: bool = False
    """Only the training step (with --ops: both)."""
    full: bool = False
    """All shapes and models, at their whole depth: much longer."""
    out: Path | None = None
    """Also write the numbers there, as JSON."""
    force: bool = False
    """Replace the file of --out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where; `auto` is CUDA where there is one."""


def _check(args: BenchArgs) -> torch.device:
    """What can be known before anything is imported or measured."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device must be cpu or auto where torch sees no CUDA device, got cuda")
    if args.out is not None:
        if args.out.is_dir():
            raise UsageError(f"--out must be a file, got the folder {args.out}")
        if args.out.exists() and not args.force:
            raise UsageError(f"--out must be a new file, got {args.out}: --force replaces it")
        folder = args.out.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--out must be in a folder that can be written, got {args.out}")
    cuda = args.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = tyro.cli(BenchArgs, args=argv, prog="python -m benchmarks")
    try:
        importlib.import_module("benchmarks.harness").use(_check(args))
        command = importlib.import_module("benchmarks.command")
        both = args.ops is None and not args.step
        chosen = command.choose(() if both else args.ops)
    except ModuleNotFoundError as error:
        print(
            f"error: benchmarks need {error.name}, which is not installed: "
            "pip install 'ijepa-fast[train,test]'",
            file=sys.stderr,
        )
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say = functools.partial(print, flush=True)
    try:
        return command.run(chosen, step=both or args.step, full=args.full, out=args.out, say=say)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
