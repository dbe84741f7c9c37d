"""The decoder that decodes with NVIDIA DALI."""

import importlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from ijepa_fast.data.pillow_decoder import (
    PillowDecoder,
    default_threads,
    empty_batch,
    resize_all,
)

__all__ = ["DaliDecoder", "last_line"]

logger = logging.getLogger(__name__)

# So many batches in a row that DALI refuses and Pillow accepts are no longer the files' fault.
_MAX_UNEXPLAINED = 3


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
        limit: float = math.inf,
    ) -> None:
        """Builds the pipeline.

        Args:
            crop_size: height and width of the output, pixels.
            threads: decoder threads; None = `default_threads()`.
            max_batch: largest batch that will be decoded.
            device: where the images go; a CUDA device decodes there ("mixed"), the CPU on the CPU.
            limit: time to decode one image with Pillow, seconds.

        Raises:
            ImportError: DALI is not installed.
            RuntimeError: DALI cannot build the pipeline (no driver, no memory).
        """
        self.crop_size = crop_size
        self.device = torch.device(device)
        self.max_batch = max_batch
        self._threads = threads or default_threads()
        self._pillow = PillowDecoder(crop_size, self._threads, device, limit)
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
        """See `ImageDecoder.decode`.

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
        images = empty_batch(len(output), self.crop_size, self.device)
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
                f"file; data.decoder=pillow does without it. DALI: {last_line(error)}"
            ) from error
        logger.warning("DALI failed, this batch was decoded by Pillow: %s", last_line(error))
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


def last_line(error: RuntimeError) -> str:
    """The cause at the end of one of DALI's reports (many lines, with a traceback)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("Current pipeline", "C++ context"))]
    return causes[-1] if causes else type(error).__name__
