"""Micro-batches in order, decoded ahead of the training step by one background thread.

Which samples a batch holds, and how they are cropped, is a pure function of (seed, step, position
in the global batch) and of which files are bad; so a run resumes anywhere, on any number of ranks.
While one batch is decoded, a pool of threads reads the files of the next.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_fast.config import DataConfig
from ijepa_fast.data.build import lost_parts
from ijepa_fast.data.crops import crop_windows
from ijepa_fast.data.decoders import make_decoder
from ijepa_fast.data.index import Index
from ijepa_fast.data.order import epoch_order, positions, steps_per_epoch, usable_ids
from ijepa_fast.data.pillow_decoder import DecodeError, ImageDecoder
from ijepa_fast.data.quarantine import Quarantine
from ijepa_fast.data.reading import Parts, Reader, require_decodable
from ijepa_fast.errors import TooManyBadFiles

__all__ = ["Batch", "DataStalled", "Loader", "known_bad"]

logger = logging.getLogger(__name__)

# How often a blocked loader thread looks whether it is still wanted, seconds.
_POLL = 0.1
# A wait that returns so late, in seconds, was stopped itself.
_ASLEEP = 1.0
# How often a waiting step says so, seconds.
_SAID_EVERY = 10.0
# Decoding may take so many times as long as `data.timeout` before it counts as stuck.
_PATIENCE = 10


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        images: uint8 (B, H, W, C) on the training device; 0-255, not normalised.
        ids: int64 (B,) sample ids (rows of the index), on the CPU.
    """

    images: torch.Tensor
    ids: torch.Tensor


class DataStalled(OSError):
    """No batch has come for `data.timeout` seconds."""


class _NotWanted(Exception):
    """The loader is being closed."""


class _Plan(NamedTuple):
    """One micro-batch: places in its epoch, what was drawn there, and what is taken."""

    epoch: int
    places: NDArray[np.int64]
    drawn: NDArray[np.int64]
    ids: NDArray[np.int64]


class _Ready(NamedTuple):
    """A decoded batch, and the event after which the consumer's stream may read it (CUDA only)."""

    batch: Batch
    event: torch.cuda.Event | None


class _End(NamedTuple):
    """The last entry of the queue: what ended the thread, or None after the last batch."""

    error: BaseException | None


class Loader(Iterator[Batch]):
    """Iterates over (step, micro-step) in order; a context manager.

    Attributes:
        steps_per_epoch: global batches in one epoch.
        accumulation: micro-batches of one step on one rank.
        wait_seconds: time that the consumer has waited for data, summed.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        device_batch: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        quarantine: Quarantine | None = None,
        decoder: ImageDecoder | None = None,
    ) -> None:
        """Checks the arguments and starts decoding.

        Args:
            index: the data set.
            config: crop, scale, ratio, decoder, threads, prefetch, max_bad_share.
            seed: seed of the run.
            global_batch: images of one optimiser step over all ranks.
            device_batch: images of one micro-batch on one rank.
            steps: the step to stop before, counted from 0 over the whole run.
            start_step: first step.
            rank: this rank.
            world: number of ranks.
            device: the training device, where the images go.
            quarantine: known bad files; None keeps a list of its own, in memory.
            decoder: used instead of the configured one, and then closed by the caller.

        Raises:
            ValueError: an argument is out of range, or there are fewer images than global_batch.
            ImportError: the configured decoder is not installed.
            TooManyBadFiles: the index alone holds more bad files than allowed.
        """
        self.steps_per_epoch = steps_per_epoch(len(index), global_batch)
        if global_batch % (device_batch * world) != 0:
            raise ValueError(
                f"batch.global must be divisible by batch.device * ranks "
                f"({device_batch} * {world}), got {global_batch}"
            )
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step must be in 0..steps ({steps}), got {start_step}")
        positions(rank, world, 0, device_batch)
        self.accumulation = global_batch // (device_batch * world)
        self.wait_seconds = 0.0
        self._index, self._config, self._seed = index, config, seed
        self._global_batch, self._device_batch = global_batch, device_batch
        self._rank, self._world = rank, world
        self._steps = range(start_step, steps)
        self._device = torch.device(device)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

        if quarantine is None:
            quarantine = Quarantine(None, config.max_bad_share, len(index) + len(index.bad))
        self._quarantine = quarantine
        # what is lost as a whole is allowed, or this table would not have been opened
        lost = lost_parts(index)
        single = [entry for entry in index.bad if entry[0] not in lost]
        quarantine.add_known(single, write=rank == 0)
        for name, count in lost.items() if rank == 0 else ():
            about = f": about {count} images are missing" if count else ""
            logger.warning("%r is not whole%s", name, about)
        self._bad = known_bad(index, quarantine)
        self._plain = index.plain
        self._require_good()

        self._own_decoder = decoder is None
        if decoder is None:
            decoder, reason = make_decoder(config, self._device, max_batch=device_batch)
            logger.info("%s", reason)
        self._decoder = decoder
        self._stop = threading.Event()
        self._reader = Reader(index, self._stop)
        self._decoding = ""
        self._queue: queue.Queue[_Ready | _End] = queue.Queue(maxsize=config.prefetch)
        self._stalled = False
        self._end: _End | None = None
        # Not a daemon: the interpreter must not be torn down under a running decoder. It ends by
        # itself when the main thread does.
        self._thread = threading.Thread(target=self._produce, name="ijepa-loader")
        self._thread.start()

    def __next__(self) -> Batch:
        """The next micro-batch; an error of the thread is raised here, with its traceback."""
        if self._end is None:
            if self._stop.is_set():
                raise StopIteration
            started = time.perf_counter()
            item = self._wait()
            self.wait_seconds += time.perf_counter() - started
            if isinstance(item, _Ready):
                if item.event is not None:
                    stream = torch.cuda.current_stream(self._device)
                    stream.wait_event(item.event)
                    item.batch.images.record_stream(stream)
                return item.batch
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def _wait(self) -> _Ready | _End:
        """The next entry of the queue.

        Raises:
            DataStalled: nothing has been read for too long.
        """
        started = now = time.monotonic()
        limit = self._config.timeout
        poll = min(_SAID_EVERY, limit / 2)
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=poll)
            before, now = now, time.monotonic()
            if now - before > poll + _ASLEEP:
                # this process itself was stopped, and reads nothing meanwhile
                started = now
            idle = now - max(self._reader.progress, started)
            decoding = self._decoding
            reading = f"reading {self._reader.being_read()}"
            if idle >= (_PATIENCE * limit if decoding else limit):
                self._stalled = True
                raise DataStalled(
                    f"data.timeout must be longer than any time without data ({limit:g} s), "
                    f"got {idle:.0f} s, "
                    + (decoding or f"{reading}; is the storage there and fast enough?")
                )
            words = "the step waits for data for %.0f s: %s"
            logger.warning(words, now - started, decoding or reading)

    def __enter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the background thread and drops what it has read ahead."""
        self.close()

    def close(self) -> None:
        """Ends the thread, after the batch that it is decoding; further calls do nothing.

        One that hangs in a read is left to itself: it ends with the process.
        """
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        if not self._stalled:
            # a read that hangs behind batches that were ready is not waited for either
            self._thread.join(self._config.timeout + _SAID_EVERY)
        if self._thread.is_alive():
            self._reader.close(wait=False)
            return
        self._reader.close(wait=True)
        if self._own_decoder:
            self._decoder.close()

    def _produce(self) -> None:
        """Body of the thread."""
        cuda = self._device.type == "cuda"
        error: BaseException | None = None
        try:
            # A stream of its own, so that copies and GPU decoding run beside the training step.
            stream = torch.cuda.Stream(self._device) if cuda else None
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                tasks = ((s, m) for s in self._steps for m in range(self.accumulation))
                following = next(tasks, None)
                ahead = self._read(*following) if following else None
                while ahead is not None:
                    current, following = ahead, next(tasks, None)
                    ahead = self._read(*following) if following else None
                    batch = self._load(*current)
                    event = stream.record_event() if stream else None
                    if not self._put(_Ready(batch, event)):
                        return
        except _NotWanted:
            return
        # Whatever ends the thread must reach the consumer, who would wait for ever otherwise.
        except BaseException as caught:  # noqa: BLE001
            error = caught
        self._put(_End(error))

    def _put(self, item: _Ready | _End) -> bool:
        """Waits for a place in the queue; False if nobody wants the item any more."""
        while not self._stop.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=_POLL)
                return True
        return False

    def _plan(self, step: int, micro_step: int) -> _Plan:
        """Which samples a micro-batch holds, as far as bad files are known now."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        own = positions(self._rank, self._world, micro_step, self._device_batch)
        places = step_in_epoch * self._global_batch + own
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._index), seed=self._seed, epoch=epoch))
        drawn = self._order[1][places]
        return self._without_bad(_Plan(epoch, places, drawn, drawn))

    def _without_bad(self, plan: _Plan) -> _Plan:
        """Every sample that is known to be bad replaced, as a function of its position."""
        epoch, places = plan.epoch, plan.places
        ids = usable_ids(plan.drawn, self._bad, seed=self._seed, epoch=epoch, places=places)
        return plan._replace(ids=ids)

    def _read(self, step: int, micro_step: int) -> tuple[_Plan, Parts]:
        """Begins to read a batch's files."""
        plan = self._plan(step, micro_step)
        return plan, self._reader.begin(plan.ids.tolist())

    def _load(self, plan: _Plan, parts: Parts) -> Batch:
        """Waits for the files and decodes them."""
        while True:
            if self._bad[plan.ids].any():
                # The batch before has found out. Once more from the start: the pixels are then
                # those of a run that knew before.
                plan = self._without_bad(plan)
                parts = self._reader.begin(plan.ids.tolist())
            try:
                return Batch(images=self._decode(plan, parts), ids=torch.from_numpy(plan.ids))
            except DecodeError as error:
                for row, reason in error.failures.items():
                    sample = int(plan.ids[row])
                    self._bad[sample] = True
                    self._quarantine.add(
                        self._index.name(sample),
                        reason,
                        sample_id=sample,
                        epoch=plan.epoch,
                        position=int(plan.places[row]),
                    )
                    self._require_good()

    def _require_good(self) -> None:
        """Without a single good file the search for a replacement would not end."""
        if self._bad.all():
            raise TooManyBadFiles(
                f"at least one image must be usable, got {len(self._bad)} bad ones"
            )

    def _decode(self, plan: _Plan, parts: Parts) -> torch.Tensor:
        """Decodes a batch that is being read.

        Raises:
            DecodeError: files cannot be read or decoded.
        """
        index, config, ids = self._index, self._config, plan.ids
        windows = crop_windows(
            index.width[ids],
            index.height[ids],
            ids,
            seed=self._seed,
            epoch=plan.epoch,
            scale=config.scale,
            ratio=config.ratio,
        )
        read = list(chain.from_iterable(part.result() for part in parts))
        encoded = [item for item in read if isinstance(item, bytes)]
        if len(read) != len(ids):
            raise _NotWanted
        if len(encoded) != len(ids):
            raise DecodeError({row: item for row, item in enumerate(read) if isinstance(item, str)})
        require_decodable(index, ids, encoded)
        work = index.width[ids].astype(np.int64) * index.height[ids] * index.length[ids]
        name = index.name(int(ids[work.argmax()]))
        self._decoding = f"decoding {len(ids)} images, {name!r} with the most pixels and bytes"
        self._reader.progress = time.monotonic()
        try:
            images = self._decoder.decode(encoded, windows, self._plain[ids])
        finally:
            self._decoding, self._reader.progress = "", time.monotonic()
        refused = getattr(self._decoder, "refused", ())
        if refused:
            self._leave_to_pillow(ids[refused])
        return images

    def _leave_to_pillow(self, rows: NDArray[np.int64]) -> None:
        """Rows that DALI refuses, though they are good, do not reach it again."""
        if self._plain is self._index.plain:
            self._plain = self._index.plain.copy()
        self._plain[rows] = False
        names = ", ".join(repr(self._index.name(int(row))) for row in rows)
        logger.warning("DALI cannot decode %s; Pillow can, and does from now on", names)


def known_bad(index: Index, quarantine: Quarantine) -> NDArray[np.bool_]:
    """Bad rows (N,), as far as a quarantine knows."""
    bad = np.zeros(len(index), dtype=np.bool_)
    left_out = {name for name, _ in index.bad}
    unknown = {name for name in quarantine.files if name not in left_out}
    for name, row in quarantine.ids.items():
        if 0 <= row < len(index) and index.name(row) == name:
            bad[row] = True
            unknown.discard(name)
    # an earlier table numbered them otherwise, or they are gone
    for name in unknown:
        bad[index.rows_named(name)] = True
    return bad
