"""Part `sanitize`: every op under one of compute-sanitizer's tools, torch's caching allocator off.

``ARGS='--tool racecheck'``. Only our kernels are instrumented: Triton keeps their Python names,
which start with an underscore and a small letter. Leaves sanitize_exercise.txt and
sanitize_<tool>.txt. On a CPU only the exercise runs.
"""

import dataclasses
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check import files
from benchmarks.gpu_check.files import left, logged
from benchmarks.harness import benches, device
from benchmarks.shapes import SMALL

__all__ = ["exercise", "find_sanitizer", "main"]

SECONDS = 240
TOOLS = {
    # bytes between allocations, so that a small step outside is seen
    "memcheck": ["--padding", "256"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}


def find_sanitizer() -> str | None:
    """On the PATH, or in the wheel `nvidia-cuda-sanitizer-api`."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    places = [*sys.path, sysconfig.get_path("purelib")]
    for place in places:
        for binary in sorted(Path(place).glob("nvidia/*/compute-sanitizer/compute-sanitizer")):
            if not os.access(binary, os.X_OK):
                binary.chmod(binary.stat().st_mode | 0o111)  # wheels lose the permission
            return str(binary)
    return None


ODD = dataclasses.replace(
    SMALL, name="odd", patch=7, grid=5, width=100, context=11, target=3, batch=3, predictor_width=36
)


def exercise() -> None:
    """Runs every op once forward and backward at small and odd sizes: what the tool watches."""
    count = 0
    for bench in benches():
        for model in (SMALL, ODD):
            results = bench.outputs(bench.function("ours"), model)
            count += sum(t.numel() for t in results)
    print(f"exercised {len(benches())} benchmarks on {device()}, {count} elements")


def main(argv: Sequence[str]) -> bool:
    """The whole part; True if the tool ran and found nothing."""
    parser = files.options("sanitize", __doc__.split("\n\n")[0], SECONDS)
    parser.add_argument("--tool", choices=list(TOOLS), default="memcheck")
    args = parser.parse_args(argv)
    files.start(args)
    command = [sys.executable, "-m", "benchmarks.gpu_check.sanitize"]
    # compile first: under the sanitizer nothing should wait for the compiler
    result = logged(command, args.out / "sanitize_exercise.txt", seconds=args.seconds / 2)
    if result["exit_code"] or args.device.type == "cpu":
        return not result["exit_code"]
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "error: no compute-sanitizer: install CUDA's or the wheel nvidia-cuda-sanitizer-api",
            file=sys.stderr,
        )
        return False
    result = logged(
        [
            *(sanitizer, "--tool", args.tool, "--error-exitcode", "9", *TOOLS[args.tool]),
            *("--kernel-name", "regex=^_[a-z][a-z0-9_]*_kernel", *command),
        ],
        args.out / f"sanitize_{args.tool}.txt",
        seconds=left(args),
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    return bool(result["exit_code"] == 0 and not result["stopped"])


if __name__ == "__main__":
    exercise()
