"""Part `sanitize`: every op under compute-sanitizer's four tools, torch's caching allocator off.

Only our kernels are instrumented: Triton keeps their Python names, which start with an underscore
and a small letter. Leaves sanitize.json and a log for each tool.
"""

import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.files import GRACE, logged, write_json
from benchmarks.harness import machine

__all__ = ["find_sanitizer", "run"]

TOOLS = {
    # bytes between allocations, so that a small step outside is seen
    "memcheck": ["--padding", "256"],
    "racecheck": [],
    "initcheck": [],
    "synccheck": [],
}
ALL, EACH = 530, 150  # seconds


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


def run(out: Path) -> bool:
    """The whole part; True if every tool ran and found nothing."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "error: no compute-sanitizer: install CUDA's or the wheel nvidia-cuda-sanitizer-api",
            file=sys.stderr,
        )
        return False
    result: dict[str, Any] = {"machine": machine(), "sanitizer": sanitizer, "tools": {}}
    end = time.monotonic() + ALL
    exercise = [sys.executable, "-m", "benchmarks.gpu_check.exercise"]
    # compile first: under the sanitizer nothing should wait for the compiler
    result["exercise"] = logged(exercise, out / "sanitize_exercise.txt", seconds=120)
    write_json(out / "sanitize.json", result)
    for number, (tool, options) in enumerate(TOOLS.items()):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *options]
        command += ["--kernel-name", "regex=^_[a-z][a-z0-9_]*_kernel", *exercise]
        result["tools"][tool] = logged(
            command,
            out / f"sanitize_{tool}.txt",
            seconds=min(EACH, (end - time.monotonic()) / (len(TOOLS) - number) - GRACE),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        write_json(out / "sanitize.json", result)
    codes = [result["exercise"]["exit_code"], *(t["exit_code"] for t in result["tools"].values())]
    return all(code == 0 for code in codes)
