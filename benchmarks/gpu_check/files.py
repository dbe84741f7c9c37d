"""Files that a part leaves behind, written whole after every configuration."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "logged", "write_json"]

ROOT = Path(__file__).parents[2]
GRACE = 15  # seconds


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def logged(
    command: Sequence[str],
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a command in the repository's root, its output going to `log` as it comes. One that runs
    too long is interrupted, so that pytest says what failed so far, and 15 s later killed with all
    its children.

    Returns:
        The exit code (None when it ran past `seconds`) and the last line that it printed.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # one compiler cache, also for the processes of a parallel test run
    cache = {"TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", "/tmp/ijepa-triton")}
    env = {**os.environ, "PYTHONPATH": paths, **cache, **(environment or {})}
    code: int | None
    with log.open("a", encoding="utf-8") as stream:
        stream.write("$ " + " ".join(command) + "\n")
        stream.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            stream.write(f"\nstopped after {seconds:.0f} s\n")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    print(f"{Path(log).name}: exit {code}: {lines[-1]}", file=sys.stderr, flush=True)
    return {"exit_code": code, "last_line": lines[-1]}
