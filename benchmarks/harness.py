"""Measures one op of `ijepa_kernels` beside plain torch, torch.compile and the best library.

Every provider is verified against the reference before it is timed. On a GPU times come from CUDA
events around single calls, queued behind a sleeping kernel so that the host is never waited for,
over sets of inputs and results that together exceed the L2 cache twice; the median is reported, in
GB/s of the op's fewest bytes and in percent of the copy bandwidth measured in the same run. Without
a GPU the shapes are small and the times only show that the benchmark works.
"""

import functools
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks.shapes import MODELS, SMALL, Model
from ijepa_kernels.testing import relative_error

__all__ = [
    "MISSING",
    "RESULTS",
    "Bench",
    "Result",
    "benches",
    "copy_bandwidth",
    "device",
    "machine",
    "measured",
    "time_on_gpu",
    "use",
]

WARMUP, CALLS, HOST_CALLS, MAX_SETS = 5, 40, 30, 16
CPU_CALLS = 30
# of the verification, by the coarsest dtype among reference and provider
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float8_e4m3fn: 2e-2,  # few values are halfway between two
}
# of single rows, relative to the tolerance of all: one wrong row of thousands does not move the sum
WORST_ROW = 10


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured case."""

    op: str
    shape: str
    direction: str
    provider: str
    median_us: float
    spread_us: float  # between the 20th and the 80th percentile
    calls: int
    host_us: float | None = None  # until a call returns
    gb_per_s: float | None = None
    percent_of_copy: float | None = None

    @property
    def key(self) -> str:
        """Names the case in baselines."""
        return f"{self.op}/{self.shape}/{self.direction}/{self.provider}"


RESULTS: list[Result] = []
MISSING: set[str] = set()  # what was not measured, and why


_asked: list[torch.device] = []


def use(asked: torch.device) -> None:
    """Runs benchmarks there; to be said before any of them is imported."""
    _asked[:] = [asked]


def device() -> torch.device:
    """Where benchmarks run: a GPU where there is one, unless `use` said otherwise."""
    return _asked[0] if _asked else _default_device()


@functools.cache
def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def machine() -> dict[str, str | None]:
    """Names that every number belongs to."""
    cuda = torch.cuda.is_available() and device().type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    return names[0] if names else platform.processor() or "CPU"


def _driver() -> str | None:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"(\d+\.\d+(\.\d+)?)", version.read_text()) if version.is_file() else None
    return found[1] if found else None


# --- timing --------------------------------------------------------------------------------------


def time_on_gpu(calls: Sequence[Callable[[], object]]) -> tuple[list[float], float]:
    """Device times of single calls in microseconds, cycling through `calls`, and the host's time
    per call.
    """
    for call, _ in zip(_cycle(calls), range(max(WARMUP, len(calls))), strict=False):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for call, _ in zip(_cycle(calls), range(HOST_CALLS), strict=False):
        call()
    host_us = (time.perf_counter() - began) / HOST_CALLS * 1e6
    torch.cuda.synchronize()

    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(CALLS)]
    torch.cuda._sleep(int(2e6 + CALLS * host_us * 3e3))  # cycles: longer than queueing takes
    for call, (start, end) in zip(_cycle(calls), events, strict=False):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events], host_us


def _cycle(calls: Sequence[Callable[[], object]]) -> Iterable[Callable[[], object]]:
    while True:
        yield from calls


@functools.cache
def copy_bandwidth() -> float:
    """GB/s of a large device-to-device copy, bytes read plus bytes written; median."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    source.random_()
    times, _ = time_on_gpu([lambda: target.copy_(source)])
    return 2 * source.numel() / statistics.median(times) / 1e3


def time_on_cpu(call: Callable[[], object]) -> list[float]:
    """Times of single calls in microseconds."""
    times = []
    for number in range(-3, CPU_CALLS):  # three to warm up
        began = time.perf_counter()
        call()
        if number >= 0:
            times.append((time.perf_counter() - began) * 1e6)
    return times


# --- one op --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What there is to measure of one op.

    Args:
        name: of the op.
        inputs: fresh random positional arguments of all providers, drawn with a CPU generator.
        providers: functions by name, among them `reference` and `ours`; None where the package is
            missing. `compile` is made of the reference.
        through: what a provider is called through, e.g. a function that adds the backward pass;
            `compile` compiles what is inside.
        bytes: fewest bytes of a forward or backward pass.
        differentiate: positions of the inputs whose gradients the backward pass gives.
        compile: whether torch.compile of the reference is measured too (on a GPU).
    """

    name: str
    inputs: Callable[[Model, torch.device, torch.Generator], tuple[Any, ...]]
    providers: Mapping[str, Callable[..., Any] | None]
    bytes: Callable[[Model, bool], int]
    differentiate: tuple[int, ...] = ()
    through: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    compile: bool = True
    _verified: set[tuple[str, str]] = field(default_factory=set)

    def cases(self) -> list[tuple[str, str, str]]:
        """(provider, shape, direction) of everything that this machine can measure."""
        on_gpu = device().type == "cuda"
        shapes = list(MODELS) if on_gpu else [SMALL.name]
        directions = ["forward", "backward"] if self.differentiate else ["forward"]
        names = [name for name, function in self.providers.items() if function is not None]
        missing = {n: "not installed, or no GPU" for n in self.providers if n not in names}
        if on_gpu and self.compile:
            names.insert(1, "compile")
        elif on_gpu:
            missing["compile"] = "left out"
        MISSING.update(f"{self.name}/{name} ({why})" for name, why in missing.items())
        return [(p, s, d) for s in shapes for d in directions for p in names]

    def run(self, provider: str, shape: str, direction: str) -> Result:
        """Verifies, times, and records the result."""
        return self.measure(provider, shape, direction)[0]

    def measure(self, provider: str, shape: str, direction: str) -> tuple[Result, list[float]]:
        """`run`, with the times of the single calls in microseconds.

        Raises:
            AssertionError: the provider does not compute what the reference computes.
        """
        model = MODELS.get(shape, SMALL)
        self.verify(provider, shape)
        calls = self._calls(self.function(provider, shape), model, direction)
        host = speed = percent = None
        if device().type == "cuda":
            times, host = time_on_gpu(calls)
            speed = self.bytes(model, direction == "backward") / statistics.median(times) / 1e3
            percent = round(100 * speed / copy_bandwidth(), 1)
        else:
            times = time_on_cpu(calls[0])
        ordered = sorted(times)
        spread = ordered[len(ordered) * 4 // 5 - 1] - ordered[len(ordered) // 5]
        result = Result(
            op=self.name,
            shape=shape,
            direction=direction,
            provider=provider,
            median_us=round(statistics.median(times), 2),
            spread_us=round(spread, 2),
            calls=len(times),
            host_us=None if host is None else round(host, 1),
            gb_per_s=None if speed is None else round(speed, 1),
            percent_of_copy=percent,
        )
        RESULTS.append(result)
        return result, times

    def verify(self, provider: str, shape: str) -> None:
        """Holds a provider's outputs and gradients against the reference's, once."""
        if provider != "reference" and (provider, shape) not in self._verified:
            self.check(provider, shape)
            self._verified.add((provider, shape))

    def check(self, provider: str, shape: str) -> None:
        """The same, every time.

        Raises:
            AssertionError: the provider does not compute what the reference computes.
        """
        model = MODELS.get(shape, SMALL)
        theirs = _expected(self, shape)
        ours = self.outputs(self.function(provider, shape), model)
        assert len(ours) == len(theirs), f"{self.name}: {provider} has {len(ours)} results"
        for number, (actual, truth) in enumerate(zip(ours, theirs, strict=True)):
            where = f"{self.name}: {provider} differs from reference on {shape}, result {number}"
            if not truth.is_floating_point():
                assert torch.equal(actual, truth), where
                continue
            limit = max(TOLERANCE[actual.dtype], TOLERANCE[truth.dtype])
            error = relative_error(actual, truth)
            assert error <= limit, f"{where}: {error:.1e} > {limit:.0e}; nothing is timed"
            error, limit = _worst_row(actual, truth), WORST_ROW * limit
            assert error <= limit, f"{where}, a row: {error:.1e} > {limit:.0e}; nothing is timed"

    def function(self, provider: str, shape: str = "") -> Callable[..., Any]:
        """What is called; `shape` is for `compile`, which is compiled once for each."""
        inner = self.providers["reference" if provider == "compile" else provider]
        assert inner is not None
        return self.through(_compiled(inner, shape) if provider == "compile" else inner)

    def _arguments(self, model: Model, seed: int) -> tuple[tuple[Any, ...], list[Tensor]]:
        arguments = self.inputs(model, device(), torch.Generator().manual_seed(seed))
        leaves = [arguments[position].requires_grad_() for position in self.differentiate]
        return arguments, leaves

    def outputs(self, function: Callable[..., Any], model: Model) -> list[Tensor]:
        """Everything a provider computes from the inputs of seed 0: results, then gradients."""
        arguments, leaves = self._arguments(model, 0)
        if not leaves:
            with torch.no_grad():
                return _flat(function(*arguments))
        results = _flat(function(*arguments))
        outputs, weights = _weighted(results)
        grads = torch.autograd.grad(outputs, leaves, weights)
        return [t.detach() for t in (*results, *grads)]

    def median_us(self, model: Model) -> dict[str, float]:
        """Of our own forward and backward passes on a GPU, without verification."""
        directions = ["forward", "backward"] if self.differentiate else ["forward"]
        times = {}
        for direction in directions:
            calls = self._calls(self.function("ours"), model, direction)
            times[direction] = statistics.median(time_on_gpu(calls)[0])
        return times

    def _calls(
        self, function: Callable[..., Any], model: Model, direction: str
    ) -> list[Callable[[], object]]:
        """The same call on as many input sets as it takes to pass the L2 cache twice."""
        sets = 1
        if device().type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            l2 = torch.cuda.get_device_properties(device()).L2_cache_size
            sets = max(2, min(MAX_SETS, -(-2 * l2 // self.bytes(model, direction == "backward"))))
        return [self._call(function, model, direction, seed) for seed in range(sets)]

    def _call(
        self, function: Callable[..., Any], model: Model, direction: str, seed: int
    ) -> Callable[[], object]:
        arguments, leaves = self._arguments(model, seed)
        if direction == "backward":
            outputs, grads = _weighted(_flat(function(*arguments)))
            return _kept(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))
        if leaves:
            return _kept(lambda: function(*arguments))
        return torch.no_grad()(_kept(lambda: function(*arguments)))


@functools.cache
def benches() -> tuple[Bench, ...]:
    """Every `Bench` of the modules ``benchmarks/bench_*.py``."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    modules = [import_module(f"benchmarks.{name}") for name in names]
    return tuple(b for module in modules for b in vars(module).values() if isinstance(b, Bench))


def measured(bench: Bench) -> Callable[..., None]:
    """For pytest: a test of every case that this machine can measure. pytest-benchmark's tables and
    files get the times; with `--benchmark-disable` a case is verified only.
    """

    @pytest.mark.parametrize(("provider", "shape", "direction"), bench.cases())
    def run(benchmark: Any, provider: str, shape: str, direction: str) -> None:
        benchmark.pedantic(lambda: None, rounds=1)
        if benchmark.disabled:
            bench.verify(provider, shape)
            return
        result, times = bench.measure(provider, shape, direction)
        # the device's own times, not those of a call that returns before the device is done
        benchmark.stats.stats.data[:] = [t / 1e6 for t in times]
        numbers = {k: v for k, v in vars(result).items() if isinstance(v, int | float)}
        benchmark.extra_info.update(numbers)

    return run


@functools.lru_cache(maxsize=1)
def _expected(bench: Bench, shape: str) -> list[Tensor]:
    """The reference's results, for all providers of a shape."""
    return bench.outputs(bench.function("reference"), MODELS.get(shape, SMALL))


@functools.lru_cache(maxsize=1)
def _compiled(function: Callable[..., Any], shape: str) -> Callable[..., Any]:
    torch._dynamo.reset()
    # or a backward pass on a retained graph is refused
    import_module("torch._functorch.config").donated_buffer = False  # type: ignore[attr-defined]
    return torch.compile(function, dynamic=False)


def _kept(call: Callable[[], object]) -> Callable[[], None]:
    """The same, its result in memory until the next time: with several sets of inputs the results
    too are written past the L2, not to one place again and again.
    """
    last: list[object] = []

    def again() -> None:
        last[:] = [call()]

    return again


def _worst_row(actual: Tensor, truth: Tensor) -> float:
    """Largest norm of a row's difference, over the root mean square of the rows' norms."""
    if truth.ndim < 2 or not truth.numel():
        return 0.0
    rows = truth.float().flatten(0, -2)
    difference = torch.linalg.vector_norm(actual.float().flatten(0, -2) - rows, dim=1)
    size = torch.linalg.vector_norm(rows, dim=1).square().mean().sqrt()
    return float(difference.max() / size) if size > 0 else float(difference.max())


def _flat(result: Any) -> list[Tensor]:
    """Tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]


def _weighted(results: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiable results, and a fixed random gradient of each (1 for scalars)."""
    outputs = [t for t in results if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(t.shape, generator=generator).to(t) if t.ndim else torch.ones_like(t)
        for t in outputs
    ]
    return outputs, grads
