"""Two decoders with one interface: encoded files and crop windows in, one uint8 tensor out.

Both cut the window out first and resize it then (bilinear, antialiased, to uint8): on the CPU with
torch, which rounds as Pillow does to within 1 and takes half the time, on a GPU with DALI. Files
that are not `plain` (see `pixels`) are decoded by Pillow in either, so that the conversion to RGB
is one rule.
"""

import importlib
import io
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.dlpack
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.config import DataConfig
from ijepa_fast.data.pixels import decode_window, describe

__all__ = [
    "DaliDecoder",
    "DecodeError",
    "Decoder",
    "PillowDecoder",
    "default_threads",
    "make_decoder",
]

logger = logging.getLogger(__name__)

# So many batches in a row that DALI refuses and Pillow accepts are no longer the files' fault.
_MAX_UNEXPLAINED = 3


class DecodeError(Exception):
    """Files of a batch cannot be decoded.

    Attributes:
        failures: row of the batch -> reason.
    """

    def __init__(self, failures: Mapping[int, str]) -> None:
        """Takes row of the batch -> reason."""
        self.failures = dict(sorted(failures.items()))
        listed = "; ".join(f"row {row}: {reason}" for row, reason in self.failures.items())
        super().__init__(f"{len(self.failures)} files of the batch cannot be decoded: {listed}")


class Decoder(Protocol):
    """Decodes, crops and resizes a batch."""

    def decode(
        self,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        plain: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Decodes a batch.

        Args:
            encoded: B files.
            windows: int32 (B, 4): top, left, height, width, pixels.
            plain: bool (B,), the index's column; None = all False, so Pillow for every row.

        Returns:
            uint8 (B, H, W, 3) on the decoder's device, ordered on the current stream.

        Raises:
            DecodeError: files cannot be decoded; the decoder stays usable.
        """
        ...

    def close(self) -> None:
        """Ends the threads."""
        ...


def default_threads() -> int:
    """Half of the cores that this process may use, at least 1 and at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(max(cores // 2, 1), 8)


def _empty(count: int, crop_size: tuple[int, int], device: torch.device) -> Tensor:
    """Host memory for a batch."""
    pinned = device.type == "cuda"
    return torch.empty((count, *crop_size, 3), dtype=torch.uint8, pin_memory=pinned)


def resize_all(
    pool: ThreadPoolExecutor, threads: int, window: Callable[[int], Tensor], images: Tensor
) -> dict[int, str]:
    """Fills a batch on the CPU, a share of it in each thread.

    Args:
        pool: at least `threads` threads.
        threads: how many to use.
        window: uint8 (h, w, 3) pixels of a place in the batch.
        images: uint8 (B, H, W, 3), overwritten.

    Returns:
        Place -> reason, where `window` has failed.
    """

    def fill(places: range) -> dict[int, str]:
        reasons = {}
        for place in places:
            try:
                pixels = window(place)
            except MemoryError:
                raise
            # Pillow raises nearly anything on a hostile file; all of it is the file's fault.
            except Exception as error:  # noqa: BLE001
                reasons[place] = describe(error)
                continue
            target = images[place]
            if pixels.shape != target.shape:
                # channels last throughout: nothing is copied on the way in
                nchw = pixels.permute(2, 0, 1)[None]
                size = (target.shape[0], target.shape[1])
                resized = F.interpolate(nchw, size=size, mode="bilinear", antialias=True)
                pixels = resized[0].permute(1, 2, 0)
            target.copy_(pixels)
        return reasons

    count = len(images)
    # two shares a thread, so that one with large images does not keep the others waiting
    shares = min(2 * threads, count)
    bounds = [count * share // shares for share in range(shares + 1)] if shares else [0]
    found: dict[int, str] = {}
    for reasons in pool.map(fill, map(range, bounds[:-1], bounds[1:])):
        found |= reasons
    return found


class PillowDecoder:
    """Decodes with Pillow in a pool of threads (its codecs release the interpreter lock)."""

    def __init__(
        self,
        crop_size: tuple[int, int],
        threads: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Starts the pool.

        Args:
            crop_size: height and width of the output, pixels.
            threads: decoder threads; None = `default_threads()`.
            device: where the images go.
        """
        self.crop_size = crop_size
        self.device = torch.device(device)
        self.threads = threads or default_threads()
        self._pool = ThreadPoolExecutor(self.threads, "ijepa-pillow")

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Its threads."""
        return self._pool

    def decode(
        self,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        plain: NDArray[np.bool_] | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """See `Decoder.decode`; `plain` makes no difference."""
        return self.decode_rows(encoded, windows, range(len(encoded)))

    def decode_rows(
        self, encoded: Sequence[bytes], windows: NDArray[np.int32], rows: Sequence[int]
    ) -> torch.Tensor:
        """Decodes only some rows of a batch: uint8 (len(rows), H, W, 3).

        Raises:
            DecodeError: with the rows' numbers in the batch.
        """

        def decode_one(place: int) -> Tensor:
            # a copy: Pillow's pixels are read-only, which torch does not know
            row = rows[place]
            return torch.from_numpy(np.array(decode_window(encoded[row], windows[row])))

        images = _empty(len(rows), self.crop_size, self.device)
        reasons = resize_all(self._pool, self.threads, decode_one, images)
        failures = {rows[place]: reason for place, reason in reasons.items()}
        if failures:
            raise DecodeError(failures)
        return images.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class DaliDecoder:
    """Decodes with NVIDIA DALI: the window only, on the GPU where the training device is one.

    Attributes:
        refused: rows of the last batch that Pillow decodes and DALI does not; after each of them
            the pipeline has to be built anew, so the caller does better not to call them plain.
    """

    def __init__(
        self,
        crop_size: tuple[int, int],
        threads: int | None = None,
        max_batch: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        """Builds the pipeline.

        Args:
            crop_size: height and width of the output, pixels.
            threads: decoder threads; None = `default_threads()`.
            max_batch: largest batch that will be decoded.
            device: where the images go; a CUDA device decodes there ("mixed"), the CPU on the CPU.

        Raises:
            ImportError: DALI is not installed.
            RuntimeError: DALI cannot build the pipeline (no driver, no memory).
        """
        self.crop_size = crop_size
        self.device = torch.device(device)
        self.max_batch = max_batch
        self._threads = threads or default_threads()
        self._pillow = PillowDecoder(crop_size, self._threads, device)
        self._unexplained = 0
        self.refused: list[int] = []
        self._pipeline: Any = self._build(max_batch)

    def _build(self, max_batch: int) -> Any:
        pipeline_module = importlib.import_module("nvidia.dali.pipeline")
        fn = importlib.import_module("nvidia.dali.fn")
        types = importlib.import_module("nvidia.dali.types")
        cuda = self.device.type == "cuda"
        # Only None builds without a driver; on CUDA an index is needed, else DALI takes GPU 0.
        device_id = None
        if cuda:
            index = self.device.index
            device_id = torch.cuda.current_device() if index is None else index
        # Depth 1: a run returns the batch that it was given; the loader's queue is what runs ahead.
        pipeline = pipeline_module.Pipeline(
            batch_size=max_batch,
            num_threads=self._threads,
            device_id=device_id,
            prefetch_queue_depth=1,
            seed=0,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            window = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axes=[0, 1],
                device="mixed" if cuda else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                # Chroma is interpolated on the GPU too, as libjpeg (and so Pillow) does.
                jpeg_fancy_upsampling=True,
            )
            if cuda:
                # its resize takes twice as long as torch's on the CPU
                size, linear = list(self.crop_size), types.INTERP_LINEAR
                window = fn.resize(window, size=size, interp_type=linear, antialias=True)
            pipeline.set_outputs(window)
        pipeline.build()
        return pipeline

    def decode(
        self,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        plain: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """See `Decoder.decode`.

        Raises:
            ValueError: the batch is larger than `max_batch`.
            RuntimeError: DALI refused several batches in a row in which Pillow finds no fault.
        """
        count = len(encoded)
        if count > self.max_batch:
            raise ValueError(
                f"a batch must have at most max_batch ({self.max_batch}) files, got {count}"
            )
        plain = np.zeros(count, dtype=np.bool_) if plain is None else np.asarray(plain)
        by_dali, by_pillow = np.flatnonzero(plain), np.flatnonzero(~plain)
        if by_dali.size == 0:
            return self._pillow.decode(encoded, windows)
        if by_pillow.size == 0:
            return self._run(encoded, windows, by_dali)
        images = torch.empty((count, *self.crop_size, 3), dtype=torch.uint8, device=self.device)
        images[by_pillow] = self._pillow.decode_rows(encoded, windows, by_pillow.tolist())
        images[by_dali] = self._run(encoded, windows, by_dali)
        return images

    def _run(
        self, encoded: Sequence[bytes], windows: NDArray[np.int32], rows: NDArray[np.intp]
    ) -> torch.Tensor:
        self.refused = []
        try:
            if self._pipeline is None:
                self._pipeline = self._build(self.max_batch)
            images = self._images(self._outputs(self._pipeline, encoded, windows, rows))
        except RuntimeError as error:
            return self._explain(error, encoded, windows, rows)
        self._unexplained = 0
        return images

    @staticmethod
    def _outputs(
        pipeline: Any, encoded: Sequence[bytes], windows: NDArray[np.int32], rows: NDArray[np.intp]
    ) -> Any:
        # Without a stream argument `run` returns when the images are there, on the GPU too.
        (output,) = pipeline.run(
            encoded=[np.frombuffer(encoded[row], dtype=np.uint8) for row in rows],
            start=np.ascontiguousarray(windows[rows, :2]),
            shape=np.ascontiguousarray(windows[rows, 2:]),
        )
        return output

    def _images(self, output: Any) -> torch.Tensor:
        if self.device.type == "cuda":
            images: torch.Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
            # DALI's allocator does not know torch's streams: copy before it reuses the buffer.
            images = images.clone()
            torch.cuda.current_stream(self.device).synchronize()
            return images
        images = _empty(len(output), self.crop_size, self.device)
        pool, threads = self._pillow.pool, self._threads
        resize_all(pool, threads, lambda place: torch.from_numpy(np.asarray(output[place])), images)
        return images

    def _explain(
        self,
        error: RuntimeError,
        encoded: Sequence[bytes],
        windows: NDArray[np.int32],
        rows: NDArray[np.intp],
    ) -> torch.Tensor:
        """After a failed run, which ends a pipeline for good and names no sample: asks Pillow."""
        self._pipeline = None
        images = self._pillow.decode_rows(encoded, windows, rows.tolist())
        if self._works():
            self.refused = self._refused(encoded, windows, rows)
            if self.refused:
                self._unexplained = 0
                return images
        self._unexplained += 1
        if self._unexplained >= _MAX_UNEXPLAINED:
            raise RuntimeError(
                f"DALI failed on {self._unexplained} batches in a row in which Pillow finds no bad "
                f"file; data.decoder=pillow does without it. DALI: {_last_line(error)}"
            ) from error
        logger.warning("DALI failed, this batch was decoded by Pillow: %s", _last_line(error))
        return images

    def _works(self) -> bool:
        """Whether DALI decodes a file that nothing is wrong with."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (90, 120, 150)).save(buffer, "JPEG")
        window = np.array([[0, 0, 16, 16]], dtype=np.int32)
        try:
            self._outputs(self._build(1), [buffer.getvalue()], window, np.array([0]))
        except RuntimeError:
            return False
        return True

    def _refused(
        self, encoded: Sequence[bytes], windows: NDArray[np.int32], rows: NDArray[np.intp]
    ) -> list[int]:
        """The rows that DALI cannot decode, tried one by one."""
        refused, pipeline = [], None
        for row in rows:
            try:
                pipeline = pipeline or self._build(1)
                self._outputs(pipeline, encoded, windows, np.array([row]))
            except RuntimeError:
                pipeline = None
                refused.append(int(row))
        return refused

    def close(self) -> None:
        """Ends the threads and frees the pipeline."""
        self._pillow.close()
        self._pipeline = None


def _last_line(error: RuntimeError) -> str:
    """The cause at the end of one of DALI's reports (many lines, with a traceback)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("Current pipeline", "C++ context"))]
    return causes[-1] if causes else type(error).__name__


def make_decoder(
    config: DataConfig, device: torch.device | str, *, max_batch: int
) -> tuple[Decoder, str]:
    """The decoder that `config.decoder` asks for.

    Args:
        config: `decoder`, `crop` and `threads` are used.
        device: the training device.
        max_batch: largest batch that will be decoded.

    Returns:
        The decoder, and one line saying which it is and why (to be logged once).

    Raises:
        ImportError: `dali` is asked for and not installed.
        ValueError: `dali` is asked for and cannot start (an old driver, no memory).
    """
    device = torch.device(device)
    size, threads = config.crop_size, config.threads or default_threads()
    where = f"{threads} threads, {'GPU' if device.type == 'cuda' else 'CPU'}"
    if config.decoder == "pillow":
        return PillowDecoder(
            size, threads, device
        ), f"decoder: Pillow, as asked ({threads} threads)"
    try:
        version = importlib.import_module("nvidia.dali").__version__
    except ImportError as error:
        if config.decoder == "dali":
            raise ImportError(
                "data.decoder must be a decoder that is installed, got 'dali': "
                f"pip install nvidia-dali-cuda130, or data.decoder=pillow ({error})"
            ) from error
        reason = f"decoder: Pillow ({threads} threads), because DALI cannot be imported: {error}"
        return PillowDecoder(size, threads, device), reason
    try:
        decoder = DaliDecoder(size, threads, max_batch, device)
    except RuntimeError as error:
        if config.decoder == "dali":
            raise ValueError(
                "data.decoder must be a decoder that works here, got 'dali' "
                f"(data.decoder=pillow does without it): {_last_line(error)}"
            ) from error
        reason = f"decoder: Pillow ({threads} threads), because DALI fails: {_last_line(error)}"
        return PillowDecoder(size, threads, device), reason
    asked = "as asked" if config.decoder == "dali" else "the default where it is installed"
    return decoder, f"decoder: DALI {version}, {asked} ({where})"
