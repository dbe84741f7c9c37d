"""Training steps against each other on one case: verified, then timed in turns, then watched."""

import contextlib
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import step_report
from benchmarks.step_parts import SavedBytes, Timeline, attribute, kernel_table, profiled
from benchmarks.step_providers import (
    CAPTURED,
    COMPILE,
    FAST,
    REFERENCE,
    RELEASED,
    Case,
    Contestant,
    Workload,
    check_losses,
    check_weights,
)
from benchmarks.step_report import Row

__all__ = ["REPEATS", "compiled_graphs", "measure", "names_on"]

REPEATS = 5

Flush = Callable[[Sequence[Row]], None]


def names_on(device: torch.device, *, compiled: bool = False) -> list[str]:
    """Providers, the most important first; `compiled` asks for the slow ones of a CPU too."""
    if device.type == "cuda":
        return [REFERENCE, FAST, CAPTURED, RELEASED, COMPILE]
    return [REFERENCE, FAST, RELEASED, *([COMPILE] if compiled else [])]


def measure(
    case: Case,
    names: Sequence[str],
    *,
    device: torch.device,
    repeats: int = REPEATS,
    seconds: float = float("inf"),
    flush: Flush = lambda rows: None,
) -> list[Row]:
    """Measures the providers on one case, one after the other: each is built, verified and then
    takes turns with `fast` (the first to come, where there is no `fast`), before the next is built.
    So two at most are in memory, and a time that is cut short has whole results.

    Args:
        case: what to run.
        names: of the providers.
        device: where.
        repeats: rounds; 0 verifies only.
        seconds: after so many no round of a provider is begun but its first.
        flush: gets the rows after every turn, and whenever else some have changed.

    Returns:
        A row for each provider. What could not be measured says why, under "error".
    """
    torch._dynamo.reset()
    contest, began = _Contest(case, device, flush), time.monotonic()
    for name in names:
        partner = FAST if FAST in contest.alive else next(iter(contest.alive), None)
        for other in [n for n in contest.alive if n != partner]:
            contest.dismiss(other)
        contest.admit(name)
        if repeats:
            # alone it is timed once, so that there is something to see
            alone = len(contest.alive) < 2 and name != names[-1]
            contest.play(1 if alone else repeats, began + seconds)
            contest.examine(name)
    for name in list(contest.alive):
        contest.dismiss(name)
    return contest.rows


class _Contest:
    """The providers of a case that are alive, what is known of all, and the rounds played."""

    def __init__(self, case: Case, device: torch.device, flush: Flush) -> None:
        self.case, self.device, self._flush = case, device, flush
        self.workload = Workload(case, device)
        self.alive: dict[str, Contestant] = {}
        self._rows: dict[str, Row] = {}
        self._rounds: list[dict[str, float]] = []
        # whose losses and weights the others are held against
        self._expected: tuple[str, list[float], dict[str, torch.Tensor]] | None = None
        self._rate = step_report.matrix_rate(device, case.precision)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Calls; a provider that fails is out, and its row says why."""
        failure = None
        try:
            call()
        except Exception as error:  # noqa: BLE001  # whatever it is, the others go on
            failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if failure is not None:
            print(f"{self.case}, {name}: {failure}", file=sys.stderr, flush=True)
            self._rows[name]["error"] = failure
            self.dismiss(name)

    def dismiss(self, name: str) -> None:
        self.alive.pop(name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def admit(self, name: str) -> None:
        """Builds a provider, verifies it on all steps, which also warms it up, and measures its
        memory.
        """
        self._rows[name] = step_report.new_row(self.case, name)
        self._flush(self.rows)
        self._guarded(name, lambda: self._verify(name))
        self._flush(self.rows)

    def _verify(self, name: str) -> None:
        row, cuda = self._rows[name], self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if cuda else 0
        graphs = compiled_graphs()
        contestant = self.alive[name] = Contestant(name, self.workload)
        saved = SavedBytes(_weights(contestant.step))
        with contextlib.nullcontext() if cuda else saved.watching():
            losses = [float(loss) for loss in contestant.run_all()]
        row["losses"] = losses
        if self._expected is None:
            weights = {k: v.to("cpu", copy=True) for k, v in contestant.weights().items()}
            self._expected = name, losses, weights
        row["held_against"], expected_losses, expected_weights = self._expected
        row["loss_error"] = check_losses(name, losses, expected_losses, self.case.precision)
        row["weights_error"] = check_weights(contestant, expected_weights)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            contestant.run_all()
            row["peak_gib"] = (torch.cuda.max_memory_allocated(self.device) - before) / 2**30
        else:
            row["saved_mib"] = saved.largest / 2**20
        row["graphs"] = compiled_graphs() - graphs

    def play(self, repeats: int, until: float) -> None:
        """Rounds in which each that is alive takes one turn; every second round in reverse."""
        graphs = compiled_graphs()
        for repeat in range(repeats):
            if repeat and time.monotonic() > until:
                break
            self._rounds.append({})
            for name in list(self.alive)[:: -1 if repeat % 2 else 1]:
                self._guarded(name, lambda name=name: self._turn(name))  # type: ignore[misc]
                self._summarise(name)
                self._flush(self.rows)
        if recompiled := compiled_graphs() - graphs:
            for name in self.alive:
                self._rows[name]["graphs_while_timed"] = recompiled

    def _turn(self, name: str) -> None:
        contestant = self.alive[name]
        count = len(self.workload.masks)
        if self.device.type == "cuda":
            # what another provider left in the allocator's cache may have to go first
            contestant.run_all()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contestant.run_all()
            end.record()
            end.synchronize()
            ms = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            contestant.run_all()
            ms = 1e3 * (time.perf_counter() - began)
        self._rounds[-1][name] = ms / count

    def _summarise(self, name: str) -> None:
        times = [r[name] for r in self._rounds if name in r]
        row = self._rows[name]
        if not times or "error" in row:
            return
        row["ms"], row["repeats"] = statistics.median(times), len(times)
        row["spread_ms"], row["turns_ms"] = max(times) - min(times), times
        row["images_per_second"] = 1e3 * self.case.batch / row["ms"]
        if self._rate:
            flops = row["images_per_second"] * row["gflop_per_image"] * 1e9
            row["utilisation"] = flops / self._rate
        for one, other in itertools.product(self._rows, repeat=2):
            ratio = self._ratio(one, other)
            if ratio is not None and one != other and "error" not in self._rows[one]:
                self._rows[one]["speed"][other] = ratio

    def _ratio(self, name: str, other: str) -> float | None:
        """How many times as fast as the other: median over rounds; where they never played together
        by way of one whom both have played.
        """

        def direct(one: str, two: str) -> float | None:
            rounds = [r[two] / r[one] for r in self._rounds if one in r and two in r]
            return statistics.median(rounds) if rounds else None

        if (ratio := direct(name, other)) is not None:
            return ratio
        for partner in self._rows:
            legs = direct(name, partner), direct(partner, other)
            if legs[0] is not None and legs[1] is not None:
                return legs[0] * legs[1]
        return None

    def examine(self, name: str) -> None:
        """Where its time goes, and what else there is to know of a provider that is warm."""
        if name in self.alive:
            self._guarded(name, lambda: self._examine(name))
            self._flush(self.rows)

    def _examine(self, name: str) -> None:
        row, contestant = self._rows[name], self.alive[name]
        longest, cuda = self.workload.longest, self.device.type == "cuda"
        numbers = range(self.case.steps) if cuda else [longest]
        timeline = Timeline(self.device)
        with timeline.watching(contestant.step):
            for number in numbers:
                contestant.run(number)
        times = timeline.milliseconds()
        total = sum(times.values())
        row["parts"] = {part: ms / total for part, ms in times.items()}
        row["skipped"] = contestant.skipped
        if not cuda:
            return
        try:
            row |= self._profile(contestant)
        except Exception as error:  # noqa: BLE001  # the times are not lost with it
            row["profile_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if name in (FAST, CAPTURED):
            row["synchronisation"] = _synchronisation(contestant)

    def _profile(self, contestant: Contestant) -> Row:
        """Of the device's busy time, each part's share of a step; the rest of it is idle."""
        wall = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        number = self.workload.longest
        contestant.run(number)
        wall[0].record()
        contestant.run(number)
        wall[1].record()
        torch.cuda.synchronize(self.device)
        whole = wall[0].elapsed_time(wall[1])
        timeline = Timeline(self.device)

        def body() -> None:
            with timeline.watching(contestant.step):
                contestant.run(number)

        kernels, launches, marks = profiled(body)
        if not kernels:
            return {"profile_error": "the profiler recorded no device time"}
        times, busy = attribute(kernels, launches, marks)
        unknown = sum(kernel[0] not in launches for kernel in kernels)
        return {
            "busy": {part: ms / whole for part, ms in times.items()},
            "idle": 1 - busy / whole,
            "kernels_without_launch": unknown,
            "kernels_total": len(kernels),
            "kernels": kernel_table(kernels),
        }


def compiled_graphs() -> int:
    """Graphs compiled so far by this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _weights(step: Any) -> list[torch.Tensor]:
    networks = step.encoder, step.predictor, step.target_encoder
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    return [*tensors, *(rounded for _, rounded in getattr(step, "copies", []))]


def _synchronisation(contestant: Contestant) -> str:
    """Whether a warm step makes the host wait for the device, as torch sees it."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contestant.run(0)
    except RuntimeError as error:
        contestant.step.optimizer.zero_grad()
        return str(error).splitlines()[0][:300]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return "none"
