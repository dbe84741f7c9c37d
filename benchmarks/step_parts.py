"""Where a training step's time and memory go, watched from outside.

The step's modules are wrapped while it is watched, and tensor hooks tell when the backward pass
goes from loss to predictor and from predictor to context encoder. Parts: `target`, the target
encoder; `context`, the context encoder, and `predictor`, both with their backward pass; `loss`,
with latent targets and metrics; `optimiser`, all of the update; `rest`.
"""

import bisect
import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

__all__ = ["PARTS", "Kernel", "SavedBytes", "Timeline", "attribute", "kernel_table", "profiled"]

PARTS = ("target", "context", "predictor", "loss", "optimiser", "rest")
MARK = "bench_step part "

# correlation number, start and end in ns, name
Kernel = tuple[int, int, int, str]


class Timeline:
    """Time of each part, between the moments at which a step passes from one to the next: on the
    host's clock, on CUDA on the stream's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def switch(self, part: str) -> None:
        """From now on it is this part."""
        moment: Any
        if self._device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((part, moment))
        with torch.profiler.record_function(MARK + part):
            pass

    def milliseconds(self) -> dict[str, float]:
        """Of each part, up to the last switch."""
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        total = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total[part] += start.elapsed_time(end) if cuda else 1e3 * (end - start)
        return total

    @contextlib.contextmanager
    def watching(self, step: Any) -> Iterator[None]:
        """Within it the step's parts are told apart."""
        with contextlib.ExitStack() as stack:
            for owner, name, part, then in _places(step):
                wrapped = self._around(getattr(owner, name), part, then)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
            backward = Tensor.backward

            def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
                backward(tensor, *args, **kwargs)
                self.switch("loss")

            stack.enter_context(mock.patch.object(Tensor, "backward", watched))
            self.switch("rest")
            yield
            self.switch("rest")

    def _around(self, call: Callable[..., Any], part: str, then: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.switch(part)
            result = call(*args, **kwargs)
            if isinstance(result, Tensor) and result.requires_grad:
                # its gradient is there: what computed it goes backward next
                result.register_hook(lambda _: self.switch(part))
            self.switch(then)
            return result

        return wrapped


def _places(step: Any) -> list[tuple[Any, str, str, str]]:
    """Object, method, its part, and the part after it."""
    places = [
        (step, "prepare", "rest", "rest"),
        (step, "accumulate", "rest", "rest"),
        (step, "update", "optimiser", "rest"),
        (step.predictor, "forward", "predictor", "loss"),
    ]
    if hasattr(step, "_target"):  # the fast step: pixels to rows that the loss takes
        return [
            *places,
            (step, "_target", "target", "context"),
            (step.encoder, "forward", "context", "predictor"),
        ]
    return [
        *places,
        (step.target_encoder, "forward", "target", "loss"),
        (step.encoder, "embed", "context", "context"),
        (step.encoder, "encode", "context", "predictor"),
    ]


# --- the profiler's view -------------------------------------------------------------------------


def profiled(
    body: Callable[[], object],
) -> tuple[list[Kernel], dict[int, int], list[tuple[int, str]]]:
    """Runs something that a `Timeline` watches, on CUDA.

    Returns:
        Kernels and copies on the device; the host's time of each launch by correlation number;
        the host's time of each switch, and the part.
    """
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as found:
        body()
        torch.cuda.synchronize()
    kernels: list[Kernel] = []
    launches: dict[int, int] = {}
    marks: list[tuple[int, str]] = []
    inner: Any = found.profiler
    for event in inner.kineto_results.events():
        name, start = event.name(), event.start_ns()
        on_device = event.device_type().name == "CUDA"
        if name.startswith(MARK):
            # the profiler repeats some of them on the device
            if not on_device:
                marks.append((start, name.removeprefix(MARK)))
        elif on_device:
            kernels.append((event.correlation_id(), start, start + event.duration_ns(), name))
        elif name.startswith("cu"):  # the runtime's and the driver's calls
            launches[event.correlation_id()] = start
    return kernels, launches, sorted(marks)


def attribute(
    kernels: Iterable[Kernel], launches: Mapping[int, int], marks: Sequence[tuple[int, str]]
) -> tuple[dict[str, float], float]:
    """The device's busy time in milliseconds, by the part that launched it.

    A kernel whose launch was not recorded belongs to the part of the one before it.

    Args:
        kernels, launches, marks: of `profiled`.

    Returns:
        Of each part, and of all together, where overlapping kernels count once.
    """
    times = [moment for moment, _ in marks]
    total, busy, until, part = dict.fromkeys(PARTS, 0.0), 0, 0, "rest"
    for correlation, start, end, _ in sorted(kernels, key=lambda kernel: kernel[1]):
        if correlation in launches:
            before = bisect.bisect_right(times, launches[correlation])
            part = marks[before - 1][1] if before else "rest"
        total[part] += (end - start) / 1e6
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return total, busy / 1e6


def kernel_table(kernels: Iterable[Kernel], rows: int = 20) -> list[str]:
    """Markdown: what takes most of the device's time."""
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for _, start, end, name in kernels:
        times[name] += end - start
        calls[name] += 1
    total = times.total()
    lines = ["| operation | calls | ms | share |", "|---|---|---|---|"]
    for name, spent in times.most_common(rows):
        short = name[:90].replace("|", "/")
        lines.append(f"| `{short}` | {calls[name]} | {spent / 1e6:.3f} | {spent / total:.1%} |")
    return lines


# --- memory without a GPU ------------------------------------------------------------------------


class _Kept:
    """What autograd holds in a tensor's place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, every storage once, without weights.

    Args:
        weights: what is there anyway.

    Attributes:
        largest: the most at any time so far.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._holders: Counter[int] = Counter()
        self._now = self.largest = 0

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Within it saved tensors are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept, storage = _Kept(tensor), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self._weights:
            if not self._holders[place]:
                self._now += size
                self.largest = max(self.largest, self._now)
            self._holders[place] += 1
            weakref.finalize(kept, self._drop, place, size)
        return kept

    @staticmethod
    def _unpack(kept: _Kept) -> Tensor:
        return kept.tensor

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            self._now -= size
