"""Part `step`: parity of both paths in float32 and bfloat16, then whole training steps side by side
at batch 128, H/14 first; leaves step.json and step.md. Needs torch, numpy, safetensors and tyro; no
data set.

Where parity fails the times are measured all the same, of providers that compute the same as each
other, but the part fails. One call has time for some of the configurations; what it leaves out it
names, and the options
``--presets``, ``--modes`` and ``--providers`` ask for it.
"""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_report, targets
from benchmarks.gpu_check.files import write_json
from benchmarks.harness import machine
from benchmarks.step_contest import compiled_graphs, measure
from benchmarks.step_providers import Mode, make_case
from benchmarks.step_report import Row
from ijepa_fast import parity

__all__ = ["PRESETS", "check_parity", "run"]

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "p8_64.safetensors"
PRESETS = ("vith14_in1k", "vitb16_in1k", "vitl16_in1k")
REPEATS = 3
# seconds: no provider is begun after the first, all stops after the second
BEGIN, ALL = 400, 525


class OutOfTime(BaseException):
    """Not an error of what is being measured, so none of what catches those catches it."""


@contextlib.contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Replays the recording on both paths in both precisions."""
    results = []
    for path in ("reference", "fast"):
        for dtype in ("float32", "bfloat16"):
            result: dict[str, Any] = {"path": path, "dtype": dtype}
            results.append(result)
            try:
                report = parity.replay(GOLDEN, path=path, dtype=dtype, device=device)
            except Exception as error:  # noqa: BLE001  # the other path may hold
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                result |= {"ok": False, "error": message}
                print(f"error: parity, {path}, {dtype}: {message}", file=sys.stderr)
                continue
            worst: dict[str, float] = {}
            for row in report.rows:
                worst[row.kind] = max(worst.get(row.kind, 0.0), row.error)
            result |= {"ok": report.ok, "worst": worst}
            print(report.table().splitlines()[-1], flush=True)
    return results


def write(folder: Path, device: torch.device, result: dict[str, Any]) -> None:
    """Flushes what is known so far."""
    rows = result["rows"]
    graphs = compiled_graphs() - result["graphs_before"]
    result |= {"targets_missed": targets.missed_steps(rows), "graphs": graphs}
    write_json(folder / "step.json", result)
    lines = ["Parity: " + ", ".join(_verdict(p) for p in result["parity"]), ""]
    lines.append(step_report.markdown(device, rows))
    lines.append(f"Graphs compiled by the whole run: {graphs}.")
    if result["left_out"]:
        lines.append("Not measured, out of time: " + "; ".join(result["left_out"]) + ".")
    (folder / "step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _verdict(result: dict[str, Any]) -> str:
    return f"{result['path']} {result['dtype']} {'holds' if result['ok'] else 'FAILS'}"


def run(
    out: Path,
    device: torch.device,
    presets: Sequence[str],
    batch: int,
    modes: Sequence[Mode],
    providers: Sequence[str],
) -> bool:
    """The whole part; True if nothing failed. Targets that are missed are written down."""
    began = time.monotonic()
    result: dict[str, Any] = {"machine": machine(), "parity": [], "rows": [], "left_out": []}
    result["graphs_before"] = compiled_graphs()
    cases = [make_case(name, batch=batch, mode=mode) for mode in modes for name in presets]
    waiting = [str(case) for case in cases]
    try:
        with _stopped_after(ALL):
            result["parity"] = check_parity(device)
            write(out, device, result)
            for case in cases:
                if time.monotonic() > began + BEGIN:
                    break
                done = list(result["rows"])

                def flush(new: Sequence[Row], done: list[Row] = done) -> None:
                    result["rows"] = [*done, *new]
                    write(out, device, result)

                rows = measure(
                    case,
                    providers,
                    device=device,
                    repeats=REPEATS,
                    deadline=began + BEGIN,
                    flush=flush,
                )
                flush(rows)
                waiting.remove(str(case))
                for row in rows:
                    short = {k: v for k, v in row.items() if k not in ("kernels", "losses")}
                    print(json.dumps(short), flush=True)
    except OutOfTime:
        print(f"stopped after {ALL} s", file=sys.stderr)
    result["left_out"] = waiting
    write(out, device, result)
    return (
        not waiting
        and len(result["parity"]) > 0
        and all(p["ok"] for p in result["parity"])
        and all("error" not in row for row in result["rows"])
    )
