"""Micro-batches in order, decoded ahead of the training step by one background thread.

Which samples a batch holds, and how they are cropped, is a pure function of (seed, step, position
in the global batch) and of which files are bad; so a run resumes anywhere, on any number of ranks.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ijepa_fast.config import DataConfig
from ijepa_fast.data.batch import Batch
from ijepa_fast.data.crops import crop_windows
from ijepa_fast.data.decoders import DecodeError, Decoder, default_threads, make_decoder
from ijepa_fast.data.index import Index
from ijepa_fast.data.order import epoch_order, positions, replacement_id, steps_per_epoch
from ijepa_fast.data.pixels import describe
from ijepa_fast.data.quarantine import Quarantine, TooManyBadFiles

__all__ = ["Loader"]

logger = logging.getLogger(__name__)

# How often a blocked loader thread looks whether it is still wanted, seconds.
_POLL = 0.1


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
        decoder: Decoder | None = None,
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
        quarantine.add_known(index.bad, write=rank == 0)
        self._bad = {row for row in range(len(index)) if index.name(row) in quarantine}
        self._require_good()

        self._own_decoder = decoder is None
        if decoder is None:
            decoder, reason = make_decoder(config, self._device, max_batch=device_batch)
            logger.info("%s", reason)
        self._decoder = decoder
        self._readers = ThreadPoolExecutor(config.threads or default_threads(), "ijepa-read")
        self._queue: queue.Queue[_Ready | _End] = queue.Queue(maxsize=config.prefetch)
        self._stop = threading.Event()
        self._end: _End | None = None
        # Not a daemon: the interpreter must not be torn down under a running decoder. It ends by
        # itself when the main thread does.
        self._thread = threading.Thread(target=self._produce, name="ijepa-loader")
        self._thread.start()

    def __iter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; an error of the thread is raised here, with its traceback."""
        if self._end is None:
            if self._stop.is_set():
                raise StopIteration
            started = time.perf_counter()
            item = self._queue.get()
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

    def __enter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()

    def close(self) -> None:
        """Ends the thread, after the batch that it is decoding; further calls do nothing."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join()
        self._readers.shutdown(wait=True, cancel_futures=True)
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
                for step in self._steps:
                    for micro_step in range(self.accumulation):
                        batch = self._load(step, micro_step)
                        event = stream.record_event() if stream else None
                        if not self._put(_Ready(batch, event)):
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

    def _load(self, step: int, micro_step: int) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        own = positions(self._rank, self._world, micro_step, self._device_batch)
        places = step_in_epoch * self._global_batch + own
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._index), seed=self._seed, epoch=epoch))
        drawn = self._order[1][places]
        while True:
            ids = self._replace_bad(drawn, epoch, places)
            try:
                images = self._decode(ids, epoch)
            except DecodeError as error:
                for row, reason in error.failures.items():
                    self._condemn(int(ids[row]), reason, epoch, int(places[row]))
                # Once more from the start: the pixels are then those of a run that knew before.
                continue
            return Batch(images=images, ids=torch.from_numpy(ids))

    def _replace_bad(
        self, drawn: NDArray[np.int64], epoch: int, places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Sample ids with every known bad one replaced, as a function of its position."""
        ids = drawn.copy()
        for row in range(ids.size):
            attempt = 0
            while int(ids[row]) in self._bad:
                ids[row] = replacement_id(
                    len(self._index),
                    seed=self._seed,
                    epoch=epoch,
                    position=int(places[row]),
                    attempt=attempt,
                )
                attempt += 1
        return ids

    def _condemn(self, row: int, reason: str, epoch: int, position: int) -> None:
        self._bad.add(row)
        name = self._index.name(row)
        self._quarantine.add(name, reason, sample_id=row, epoch=epoch, position=position)
        self._require_good()

    def _require_good(self) -> None:
        """Without a single good file the search for a replacement would not end."""
        if len(self._bad) >= len(self._index):
            raise TooManyBadFiles(
                f"at least one image must be usable, got {len(self._bad)} bad ones"
            )

    def _decode(self, ids: NDArray[np.int64], epoch: int) -> torch.Tensor:
        """Reads and decodes a batch.

        Raises:
            DecodeError: files cannot be read or decoded.
        """
        index, config = self._index, self._config
        windows = crop_windows(
            index.width[ids],
            index.height[ids],
            ids,
            seed=self._seed,
            epoch=epoch,
            scale=config.scale,
            ratio=config.ratio,
        )
        read = list(self._readers.map(self._read, ids.tolist()))
        encoded = [item for item in read if isinstance(item, bytes)]
        if len(encoded) != len(read):
            raise DecodeError({row: item for row, item in enumerate(read) if isinstance(item, str)})
        return self._decoder.decode(encoded, windows, index.plain[ids])

    def _read(self, row: int) -> bytes | str:
        """The file's bytes, or what is wrong with it."""
        try:
            return self._index.read(row)
        except OSError as error:
            return describe(error)
