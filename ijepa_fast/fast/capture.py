"""Captured steps: one CUDA graph for each shape of a batch, so that the host launches two graphs
where it launched hundreds of kernels.

A step is two bodies over memory that never moves: `accumulate` (images and layout to gradients,
added up in one flat tensor, with the loss behind them) and `update`. The first time a key is seen
its body runs as it is, the second time it is captured, from then on replayed. Between the two, the
flat gradients of several ranks are reduced.

What a body reads and writes: images, the flat array of a layout, schedule values, gradients, loss,
the returned numbers and the count of skipped steps, all allocated once.
"""

import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ijepa_fast._torch import end_capture_pool, foreach_add_, foreach_copy_
from ijepa_fast.fast.attention import Pair
from ijepa_fast.fast.layout import Key, grid_sequences, pack, size_of, views
from ijepa_fast.fast.step import FastStep
from ijepa_fast.masks import Masks
from ijepa_fast.ranks import all_reduce_sum_
from ijepa_fast.reference import count_skip
from ijepa_fast.schedules import StepValues

__all__ = ["CapturedStep"]

_logger = logging.getLogger(__name__)

Body = Callable[[], None]
# the least recently used beyond these go
MOST = 128


class Packed(NamedTuple):
    """What `layout.pack` made, still on the host."""

    flat: NDArray[np.int32]
    key: Key


class _Ring:
    """Pinned memory for copies to the device that nobody waits for."""

    SLOTS = 4

    def __init__(self) -> None:
        self._slots: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0

    def send(self, values: NDArray[Any], out: Tensor) -> None:
        """Copies values to the front of `out`, in order with what the current stream does.

        Args:
            values: one dimension.
            out: of the same dtype.
        """
        source, out = torch.from_numpy(values), out[: len(values)]
        if out.device.type == "cpu":
            out.copy_(source)
            return
        if len(self._slots) < self.SLOTS:
            empty = torch.empty(0, dtype=torch.uint8), torch.cuda.Event()
            self._slots = [empty] * self.SLOTS
        self._next = (self._next + 1) % self.SLOTS
        memory, copied = self._slots[self._next]
        copied.synchronize()  # of a copy some steps ago
        if len(memory) < values.nbytes:
            memory = torch.empty(2 * values.nbytes, dtype=torch.uint8, pin_memory=True)
        slot = memory[: values.nbytes].view(source.dtype)
        slot.copy_(source)
        out.copy_(slot, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._slots[self._next] = memory, copied


class _Gradients:
    """All gradients of a step side by side in float32, and the loss behind them.

    Attributes:
        flat: (elements + 1,).
        views: the parts of it, one for each parameter.
        loss: the last element.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [-(-p.numel() // 4) * 4 for p in parameters]  # 16 bytes
        self.flat = parameters[0].new_zeros(sum(sizes) + 1, dtype=torch.float32)
        pieces = self.flat[:-1].split(sizes)
        self.views = [
            piece[: p.numel()].view(p.shape) for piece, p in zip(pieces, parameters, strict=True)
        ]
        self.loss = self.flat[-1]
        self._parameters = parameters
        self.lend()

    def lend(self) -> None:
        """Makes the views the parameters' gradients."""
        for parameter, view in zip(self._parameters, self.views, strict=True):
            parameter.grad = view

    def collect(self, run: Callable[[], Tensor], *, first: bool) -> None:
        """Runs a backward pass into fresh gradients and adds them, and the loss, to the flat ones.

        Args:
            run: makes the gradients, returns the loss.
            first: of a step: what is there is overwritten.
        """
        for parameter in self._parameters:
            parameter.grad = None
        loss = run()
        fresh: list[Any] = [p.grad for p in self._parameters]
        assert all(g is not None for g in fresh), "a parameter has no gradient"
        both: Any = ([*self.views, self.loss], [*fresh, loss])
        if first:
            foreach_copy_(*both)
        else:
            foreach_add_(*both)
        self.lend()


def _record(body: Body, pool: Any) -> Body:
    """Captures a body, without running it; returns what replays it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # other threads (loader, saver) may allocate meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            body()
    except RuntimeError:
        # PyTorch leaves its stream, and an allocator that waits for the capture's end
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # none was begun
            end_capture_pool(stream.device_index, pool)
        raise
    return graph.replay


def _pool(device: torch.device) -> Any:
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class _Graphs:
    """Runs bodies by key: the first time as they are, then captured.

    Args:
        device: where they run.

    Attributes:
        failed: whether a capture failed; then bodies run as they are to the run's end.
    """

    def __init__(self, device: torch.device) -> None:
        self.failed = False
        self._device = device
        self._seen: set[Hashable] = set()
        self._replays: OrderedDict[Hashable, Body] = OrderedDict()
        self._pool = _pool(device)
        self._seconds = 0.0

    def __len__(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def run(self, key: Hashable, body: Body) -> None:
        """Does what the body does. All that it depends on besides memory must be in the key."""
        replay = self._replays.get(key)
        if replay is None and key in self._seen and not self.failed:
            replay = self._capture(key, body)
        if replay is None:
            self._seen.add(key)
            body()
            return
        self._replays.move_to_end(key)
        replay()

    def drop(self) -> None:
        """Forgets all graphs: weights or moments have moved."""
        self._replays.clear()
        self._seen.clear()
        self._pool = _pool(self._device)  # one that lost all its graphs takes no new ones

    def _capture(self, key: Hashable, body: Body) -> Body | None:
        started = time.perf_counter()
        try:
            replay = _record(body, self._pool)
        except RuntimeError as error:
            self.failed = True
            self._replays.clear()
            reason = str(error).splitlines()[0]
            _logger.warning("graphs are off for this run, a capture failed: %s", reason)
            return None
        self._seconds += time.perf_counter() - started
        self._replays[key] = replay
        if len(self._replays) > MOST:
            self._replays.popitem(last=False)
        count = len(self._replays)
        if count in (2, 8, 32, MOST):
            _logger.info("%d graphs captured in %.1f s, %s", count, self._seconds, self._memory())
        return replay

    def _memory(self) -> str:
        if self._device.type != "cuda":
            return "no pool"
        return f"{torch.cuda.memory_reserved(self._device) / 2**30:.2f} GiB reserved in all"


class CapturedStep(FastStep):
    """`FastStep`, captured; weights whole on every rank.

    Args:
        args, options: as of `FastStep`, without a mesh.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert self.mesh is None
        # float64, as the numbers are that a step is given otherwise
        self._values = torch.zeros(3, dtype=torch.float64, device=self.device)
        lr, weight_decay, momentum = self._values.unbind()
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = lr, momentum
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self._gradients = _Gradients(self.parameters)
        self._numbers = torch.zeros(2, device=self.device)
        self._counted = torch.zeros_like(self.skipped)
        self._graphs, self._ring = _Graphs(self.device), _Ring()
        self._images: dict[torch.Size, tuple[Tensor, Pair]] = {}
        self._layouts: dict[Key, Tensor] = {}
        self._first = True

    def describe(self) -> str:
        """How the step runs, in one line."""
        return super().describe() + "\nthe step is captured as CUDA graphs"

    def prepare(self, masks: Masks) -> Packed:  # type: ignore[override]
        """Masks as sampled, on the CPU, to what a step takes; nothing is sent yet."""
        return Packed(*pack(masks, self.num_patches, padded=self._padded, few=True))

    def accumulate(  # type: ignore[override]
        self, images: Tensor, batch: Packed, elements: int, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """See `FastStep.accumulate`."""
        flat, key = batch
        if images.shape not in self._images:
            grid = grid_sequences(len(images), self.num_patches, self.device)
            self._images[images.shape] = torch.empty_like(images), grid
        if key not in self._layouts:
            self._layouts[key] = torch.empty(size_of(key), dtype=torch.int32, device=self.device)
        pixels, layout, first = self._images[images.shape][0], self._layouts[key], self._first
        pixels.copy_(images)
        self._ring.send(flat, layout)

        def run() -> Tensor:
            loss, std = self._backward(pixels, views(layout, key), elements)
            self._numbers.copy_(torch.stack([loss, std]))
            return loss

        self._graphs.run(
            (key, images.shape, elements, first),
            lambda: self._gradients.collect(run, first=first),
        )
        self._first = False
        loss, std = self._numbers.clone().unbind()
        return loss, std

    def _target(self, images: Tensor, batch: Any) -> Tensor:
        grid = self._images[images.shape][1]
        return self.target_encoder(images, self.mean, self.std, batch, grid)

    @torch.no_grad()
    def update(self, values: StepValues) -> None:
        """See `FastStep.update`."""
        assert not self._first, "update() before accumulate()"
        all_reduce_sum_([self._gradients.flat])
        self._ring.send(np.array([values.lr, values.weight_decay, values.momentum]), self._values)
        self._graphs.run("update", self._update_flat)
        # what was handed out before is read later
        self.skipped = self._counted.clone()
        self._first = True

    @torch.no_grad()
    def _update_flat(self) -> None:
        bad = (~torch.isfinite(self._gradients.flat.norm())).float()
        self._update(bad)
        self._counted.copy_(count_skip(self._counted, bad))

    def round(self) -> None:
        """See `FastStep.round`; graphs are captured anew."""
        super().round()
        self._counted.copy_(self.skipped)
        self._graphs.drop()
