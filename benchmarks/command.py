"""What ``python -m benchmarks`` runs: the ops and the training step, verified, timed, and as
tables and JSON.

It calls what ``pytest benchmarks`` calls; only the choice of cases is its own.
"""

import difflib
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import baselines, harness, step_report
from benchmarks.bench_step import GPU_MODELS
from benchmarks.gpu_check.files import write_json
from benchmarks.harness import Bench, Result, benches
from benchmarks.step_contest import measure, names_on
from benchmarks.step_providers import MODES, Case, make_case

__all__ = ["choose", "run"]

# seconds after which no further round of a small step is begun
STEP_SECONDS = 20


def choose(names: Sequence[str] | None) -> list[Bench]:
    """The ops' benchmarks of these names; all for an empty list, none for None.

    Raises:
        ValueError: there is no such op.
    """
    if names is None:
        return []
    known = {bench.name: bench for bench in benches()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)
            raise ValueError(f"--ops must name benchmarked ops, got {name}; {hint}")
    return [known[name] for name in dict.fromkeys(names)] if names else list(known.values())


# --- ops -----------------------------------------------------------------------------------------


def _measured(bench: Bench, full: bool, failed: list[str]) -> list[Result]:
    """Every case of an op; what fails is not timed, and named."""
    cases = bench.cases()
    if harness.device().type != "cuda":
        # libraries' kernels are for GPUs
        cases = [case for case in cases if case[0] in ("reference", "ours")]
    elif not full:
        cases = [case for case in cases if case[1] == cases[0][1]]
    results = []
    for provider, shape, direction in cases:
        try:
            results.append(bench.run(provider, shape, direction))
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on
            first = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            failed.append(f"{bench.name}, {shape}, {direction}, {provider}: {first}")
            gc.collect()
    return results


# --- the step ------------------------------------------------------------------------------------


def _cases(full: bool) -> list[Case]:
    if harness.device().type == "cuda":
        models, modes = (GPU_MODELS, MODES) if full else (GPU_MODELS[1:2], MODES[:1])
        return [make_case(model, batch=128, mode=mode) for mode in modes for model in models]
    if full:
        return [make_case("vits16", batch=8, mode=mode, precision="float32") for mode in MODES]
    small = make_case(
        "vits16", batch=2, mode=MODES[0], precision="float32", depth=2, predictor_depth=1
    )
    return [small]


# --- all of it -----------------------------------------------------------------------------------


def _heading(full: bool, chosen: Sequence[Bench]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in harness.machine().items() if value)]
    cuda = harness.device().type == "cuda"
    if chosen and not cuda:
        lines.append("No GPU: ops at a tiny shape, in plain PyTorch: no measurement of a kernel")
    if not full:
        ops, model = ("B/16's shapes", "ViT-B/16") if cuda else ("the tiny shape", "2 + 1 blocks")
        lines.append(f"Small: ops at {ops}, the step of {model}; --full is all")
    return "\n".join(lines)


def run(
    chosen: Sequence[Bench], *, step: bool, full: bool, out: Path | None, say: Callable[[str], None]
) -> int:
    """Measures and reports.

    Args:
        chosen: of the ops.
        step: also the training step.
        full: all shapes and models.
        out: gets the numbers as JSON, again after everything that is measured.
        say: prints.

    Returns:
        The exit code: 1 if something is wrong or could not be measured.
    """
    say(_heading(full, chosen))
    failed: list[str] = []
    results: list[Result] = []
    rows: list[step_report.Row] = []

    def keep() -> None:
        if out is not None:
            content = {
                "machine": harness.machine(),
                "full": full,
                "ops": {r.key: asdict(r) for r in results},
                "step": rows,
                "failed": failed,
            }
            write_json(out, content)

    for number, bench in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {bench.name}: verified, then timed")
        results += _measured(bench, full, failed)
        keep()
    if results:
        say("\n" + baselines.table(results))
        say(f"\nmedian of {results[0].calls} calls; GB/s of the fewest bytes that have to move")
    for case in _cases(full) if step else []:
        say(f"\ntraining step: {case}; every provider is verified, then they take turns")
        limit = float("inf") if full or harness.device().type == "cuda" else STEP_SECONDS
        device = harness.device()
        new = measure(case, names_on(device), device=device, seconds=limit)
        rows += new
        failed += [f"{case}, {row['provider']}: {row['error']}" for row in new if "error" in row]
        keep()
        say("\n" + step_report.table(new))
    for line in failed:
        say(f"FAILED, not timed: {line}")
    keep()
    return int(bool(failed))
