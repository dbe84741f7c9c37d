"""One rank's part of a run: networks, data and files, from the newest checkpoint on."""

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Container
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast import checkpoint, distributed, evaluate
from ijepa_fast.cli import UsageError, as_dict
from ijepa_fast.config import Config
from ijepa_fast.data import Batch, Index, Quarantine, index_from_arrays, index_to_arrays, open_index
from ijepa_fast.data.cache import load_table, save_table
from ijepa_fast.data.order import epoch_order, replacement_id, steps_per_epoch
from ijepa_fast.data.shapes import write_shapes
from ijepa_fast.fast import FastStep, wants_compile
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import Masks
from ijepa_fast.metrics import Journal, MetricsFile, NonFiniteError, Reporter
from ijepa_fast.model import Predictor, VisionTransformer, build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.run_folder import RunFolder
from ijepa_fast.schedules import Schedules
from ijepa_fast.sharding import make_mesh

__all__ = ["Run", "load_index"]

_logger = logging.getLogger(__name__)


def load_index(config: Config, ranks: distributed.Ranks) -> Index:
    """Rank 0 makes the table or opens it; the others open the same file, or receive it."""
    sources = config.data.sources
    if sources == ("shapes",):
        # once on every machine, as its ranks read the files
        if ranks.local_rank == 0:
            write_shapes()
        distributed.barrier()
        sources = (str(write_shapes() / "train"),)
    made = distributed.on_main(ranks, lambda: open_index(sources, min_side=config.model.patch_size))
    index, path = made or (None, None)
    if ranks.world == 1:
        assert index is not None
        return index
    return _shared_index(index, path, ranks)


def _shared_index(index: Index | None, path: Path | None, ranks: distributed.Ranks) -> Index:
    """Rank 0's table on every rank: one file for all where they see it."""
    arrays: dict[str, NDArray[np.generic]] | None = None
    if index is not None:
        name = os.fsencode(path) if path else b""
        arrays = {"path": np.frombuffer(name, np.uint8), "digest": _bytes(index.digest())}
    told = distributed.broadcast_arrays(arrays)
    digest, where = told["digest"].tobytes().hex(), Path(os.fsdecode(told["path"].tobytes()))
    opened = index if path else _open_shared(where, digest)
    if not distributed.anyone(opened is None):
        assert opened is not None
        return opened
    # another machine has no such file: it gets the table, and keeps it for all its ranks
    arrays = distributed.broadcast_arrays(index_to_arrays(index) if index is not None else None)
    received = index if index is not None else index_from_arrays(arrays)
    if opened is None and ranks.local_rank == 0 and told["path"].size:
        try:
            save_table(where, received)
        except OSError as error:
            _logger.warning("the table of the data is kept in memory: %s", error)
    distributed.barrier()
    return opened or _open_shared(where, digest) or received


def _open_shared(path: Path, digest: str) -> Index | None:
    try:
        index = load_table(path)
    except (OSError, ValueError):
        return None
    return index if index.digest() == digest else None


def _bytes(digest: str) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(digest), np.uint8)


def _training(
    config: Config, ranks: distributed.Ranks, encoder: VisionTransformer, predictor: Predictor
) -> ReferenceStep | FastStep:
    """The step of the configured path."""
    networks = encoder.to(ranks.device), predictor.to(ranks.device)
    mean, std = config.data.mean, config.data.std
    if config.path == "reference":
        return ReferenceStep(*networks, config.optim, mean=mean, std=std)
    return FastStep(
        *networks,
        config.optim,
        mean=mean,
        std=std,
        attention=config.attention,
        compiled=wants_compile(config.compile, ranks.device),
        memory=config.memory,
        mesh=make_mesh(config.shard, ranks.device, ranks.local_world),
    )


class Run:
    """One rank's part of a run, from its newest checkpoint on.

    Args:
        config: the whole configuration.
        ranks: this rank.
        folder: the run's folder on rank 0, None on the others.
        device_batch: images of one forward pass.

    Raises:
        ValueError: the data set cannot be used, or is not the one that the run was started with.
        CheckpointError: there are checkpoints, and all are damaged.
        TooManyBadFiles: more files than allowed cannot be used.
    """

    def __init__(
        self,
        config: Config,
        ranks: distributed.Ranks,
        folder: RunFolder | None,
        device_batch: int,
    ) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.device_batch = device_batch
        self.index = load_index(config, ranks)
        self.digest = self.index.digest()
        self.schedules = Schedules.of(
            config.optim,
            global_batch=config.batch.global_,
            steps_per_epoch=steps_per_epoch(len(self.index), config.batch.global_),
        )
        self.end = min(self.schedules.run_steps, config.max_steps or self.schedules.run_steps)
        generator = torch_generator(config.seed, Stream.INIT)
        encoder, predictor = build_models(config.model, config.data.crop_size, generator)
        self.training = _training(config, ranks, encoder, predictor)
        self._graphs = 0
        self.step = self._resume()
        # a smaller max_steps than is done already asks for nothing more
        self.end = max(self.end, self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        path = Path(config.out)
        files = len(self.index) + len(self.index.bad)
        self.quarantine = Quarantine(path / "quarantine.jsonl", config.data.max_bad_share, files)
        metrics = reporter = None
        if folder:
            interval = config.log.interval if self.step < self.end else 1
            metrics = MetricsFile(path / "metrics.jsonl", step=self.step, interval=interval)
            events = path / "tensorboard" if config.log.tensorboard else None
            reporter = Reporter(last_step=self.end, tensorboard=events, step=self.step)
        self.journal = Journal(metrics, reporter)

    def _resume(self) -> int:
        """Restores the newest checkpoint on every rank; returns the steps done."""
        numbers = arrays = None
        state = distributed.on_main(self.ranks, self._load_latest)
        if self.folder:
            numbers = {"steps": np.array([state.step, state.adam_step] if state else [-1, -1])}
            arrays = {k: v.numpy() for k, v in state.tensors.items()} if state else None
        step, adam_step = (int(n) for n in distributed.broadcast_arrays(numbers)["steps"])
        if step < 0:
            if self.folder:
                self.folder.set_aside_records()
            distributed.barrier()
            return 0
        tensors = {k: torch.from_numpy(v) for k, v in distributed.broadcast_arrays(arrays).items()}
        checkpoint.restore(
            self.training,
            checkpoint.State(tensors=tensors, step=step, adam_step=adam_step, meta={}),
        )
        _logger.info("resumed from the checkpoint at step %d", step)
        return step

    def _load_latest(self) -> checkpoint.State | None:
        assert self.folder is not None
        state = checkpoint.load_latest(self.folder.checkpoints)
        digest = state.meta.get("data") if state else self.digest
        if digest != self.digest and not self.config.allow_changed_recipe:
            names = ", ".join(self.config.data.sources)
            raise UsageError(
                f"the images in {names} differ from those that the run was started with "
                f"(digest {str(digest)[:12]} -> {self.digest[:12]}); restore them, train into "
                "another --out, or add --allow-changed-recipe"
            )
        return state

    def accumulate(
        self, images: Tensor, masks: Masks, elements: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """One micro-step, see `ReferenceStep.accumulate`; `last` of its optimiser step."""
        training = self.training
        if isinstance(training, FastStep):
            training.reduce_gradients(last)
            return training.accumulate(images, training.prepare(masks), elements)
        return training.accumulate(images, training.prepare(masks), elements)

    def log_graphs(self) -> None:
        """Says so when more has been compiled since the last time."""
        training = self.training
        if isinstance(training, FastStep) and training.graphs > self._graphs:
            self._graphs = training.graphs
            _logger.info("compiled graphs by step %d: %d", self.step, self._graphs)

    def save(self) -> None:
        """Writes what is queued for the log, then (rank 0) a checkpoint, and deletes the oldest."""
        self.journal.flush()
        self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.journal.file:
            self.journal.file.sync()
        meta = {"config": as_dict(self.config), "data": self.digest, "images": len(self.index)}
        keep = self.ranks.is_main
        state = checkpoint.capture(self.training, step=self.step, meta=meta, keep=keep)
        if not self.folder:
            return
        checkpoint.write(self.folder.checkpoints, state)
        every = self.config.checkpoint.keep_every
        checkpoint.rotate(
            self.folder.checkpoints,
            newest=self.step,
            keep=self.config.checkpoint.keep,
            keep_every_steps=every * self.schedules.steps_per_epoch if every else None,
        )

    def score(self, name: str, *, with_pixels: bool) -> None:
        """Appends the kNN accuracy of the target encoder, once for each step."""
        root, file = self.config.eval.data, self.journal.file
        if not root:
            return
        prefix = "target_encoder."
        weights = {k: v for k, v in self.training.masters().items() if k.startswith(prefix)}
        weights = checkpoint.gather(weights, keep=self.ranks.is_main)
        if not file:
            return
        if any(row.get("data") == root and row["step"] == self.step for row in file.rows):
            return
        splits = evaluate.labelled_data(root, self.config.data, self.ranks.device)
        encoder, _ = build_models(self.config.model, self.config.data.crop_size)
        encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
        encoders = {name: encoder.to(self.ranks.device).requires_grad_(False)}
        scores = evaluate.knn_scores(encoders, splits, self.config, with_pixels=with_pixels)
        file.append({"step": self.step, "data": root, "knn": scores})

    def name_samples(self, error: NonFiniteError) -> NonFiniteError:
        """Writes `nonfinite.json` (on rank 0): the samples of the skipped steps over all ranks, by
        position in the global batch; returns an error that names the first of them.

        Where a file was quarantined, another is named that stood in for it: what the loader does,
        as far as `quarantine.jsonl` tells this machine.
        """
        if not self.folder:
            return error
        config, size = self.config, self.config.batch.global_
        # read anew: other ranks append to it
        bad = Quarantine(self.folder.path / "quarantine.jsonl", 1.0, len(self.index)).files
        steps: list[dict[str, Any]] = []
        for epoch, group in itertools.groupby(error.steps, self._epoch):
            order = epoch_order(len(self.index), seed=config.seed, epoch=epoch)
            for step in group:
                begin = (step - 1) % self.schedules.steps_per_epoch * size
                ids = [
                    self._used(int(order[position]), epoch, position, bad)
                    for position in range(begin, begin + size)
                ]
                files = [self.index.name(row) for row in ids]
                lr = self.schedules.at(step).lr
                steps.append({"step": step, "epoch": epoch, "lr": lr, "ids": ids, "files": files})
        path = self.folder.path / "nonfinite.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"seed": config.seed, "steps": steps}))
        temporary.replace(path)
        first = ", ".join(repr(name) for name in steps[0]["files"][:3])
        return NonFiniteError(
            error.steps,
            f"Lower optim.lr or look at the data: {path} lists the samples of all ranks, the first "
            f"{first}",
        )

    def _epoch(self, step: int) -> int:
        return (step - 1) // self.schedules.steps_per_epoch

    def _used(self, row: int, epoch: int, position: int, bad: Container[str]) -> int:
        """The sample at a position of an epoch: the drawn one, or what replaces it."""
        count, attempt = len(self.index), 0
        while self.index.name(row) in bad:
            row = replacement_id(
                count, seed=self.config.seed, epoch=epoch, position=position, attempt=attempt
            )
            attempt += 1
        return row

    def summary(self) -> None:
        """Prints all kNN scores of the run and draws its curves."""
        rows = self.journal.file.rows if self.journal.file else []
        root = self.config.eval.data
        mine = [row["knn"] for row in rows if "knn" in row and row.get("data") == root]
        scores = {name: value for knn in mine for name, value in knn.items()}
        if scores:
            _logger.info("%s", evaluate.table(scores))
        self.draw_curves()

    def draw_curves(self) -> None:
        """Draws the metrics so far."""
        if self.journal.file:
            rows = self.journal.file.rows
            self._draw("curves.png", lambda v, path: v.draw_curves(path, rows))

    def draw_masks(self, batch: Batch, masks: Masks) -> None:
        """Draws the masks of a batch's first images over them."""
        images = batch.images[:4].cpu().numpy()
        self._draw("masks.png", lambda v, path: v.draw_masks(path, images, masks, self.config.grid))

    def _draw(self, name: str, draw: Callable[[ModuleType, Path], None]) -> None:
        if not self.folder:
            return
        try:
            from ijepa_fast import visualize

            draw(visualize, self.folder.path / name)
        except ModuleNotFoundError as error:
            _logger.warning("%s is not drawn: %s (pip install 'ijepa-fast[viz]')", name, error)

    def close(self) -> None:
        """Closes the metrics file and the progress bar."""
        if self.journal.file and self.journal.reporter:
            self.journal.reporter.close()
            self.journal.file.close()
