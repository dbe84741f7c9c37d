"""``python -m ijepa_fast.bench``: the benchmarks of ops and training step on this machine.

They lie in the repository's folder `benchmarks`, not in the package, and are found from a clone.
Every op and every step is held against the reference before it is timed. Exit codes: 0 done, 1
something is wrong or could not be measured (it is named), 2 wrong usage, or no clone.
"""

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import ijepa_fast
from ijepa_fast.cli import UsageError

__all__ = ["BenchArgs", "main"]

NO_CLONE = (
    "benchmarks come with the repository, not with the installed package: git clone it, and run "
    "this again in the clone"
)


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


def _benchmarks(root: Path, device: torch.device) -> Any:
    """The module `benchmarks.command` of a clone.

    Raises:
        UsageError: there is no clone, or a package that the benchmarks need is missing.
    """
    if not (root / "benchmarks" / "command.py").is_file():
        raise UsageError(NO_CLONE)
    # benchmarks, and the tests' plain computations that they are held against
    for folder in (root / "kernels", root):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    try:
        importlib.import_module("benchmarks.harness").use(device)
        return importlib.import_module("benchmarks.command")
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name.partition(".")[0] == "benchmarks":
            raise UsageError(
                f"another package called benchmarks hides the one in the clone ({error}): "
                "uninstall it, or use another environment"
            ) from None
        raise UsageError(
            f"benchmarks need {name}, which is not installed: pip install 'ijepa-fast[train,test]'"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = tyro.cli(BenchArgs, args=argv, prog="python -m ijepa_fast.bench")
    try:
        device = _check(args)
        command = _benchmarks(Path(ijepa_fast.__file__).parents[1], device)
        both = args.ops is None and not args.step
        chosen = command.choose(() if both else args.ops)
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
