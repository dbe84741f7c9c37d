"""What one rank holds while it trains: data, networks and schedules, from the newest checkpoint
on.
"""

import logging
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ijepa_fast import estimate
from ijepa_fast.callbacks import check_packages
from ijepa_fast.config import Config
from ijepa_fast.data import Quarantine, steps_per_epoch
from ijepa_fast.errors import UsageError
from ijepa_fast.evaluation import labelled_data
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import check_masks
from ijepa_fast.model import build_models
from ijepa_fast.ranks import distributed, load_index
from ijepa_fast.schedules import Schedules
from ijepa_fast.state import Preparation, RunFolder, checkpoint, checkpoint_folders
from ijepa_fast.step import make_step
from ijepa_fast.weights import start_weights

__all__ = ["Run", "check_data", "check_start", "check_step"]

_logger = logging.getLogger(__name__)

# wider ones fit no machine, and not one block of them may be made for a question
_WIDE = 32_768


def check_start(config: Config) -> None:
    """What can be refused before anything is read or written; training and `--dry-run` ask it.

    Raises:
        ValueError: masks do not fit the grid, a logger's package is missing, the folder cannot be
            had, or `init` is missing.
    """
    check_masks(config.masks, config.grid)
    check_packages(config.log.to)
    RunFolder.check(config)
    # what is resumed needs them no more
    started = checkpoint_folders(Path(config.out) / "checkpoints")
    if config.init is not None and not started and not Path(config.init).exists():
        raise UsageError(f"init must name weights, got {config.init}, which is missing")


def check_data(config: Config, images: int, device: torch.device) -> None:
    """What can be refused once the table of the data is there; likewise.

    Raises:
        ValueError: there are fewer images than a batch, or the labelled data cannot be used.
    """
    steps_per_epoch(images, config.batch.global_)
    if config.eval.data:
        labelled_data(config.eval.data, config.data, device, name="eval.data")


def check_step(config: Config, ranks: distributed.Ranks) -> None:
    """Whether this machine can do what is asked of a step: with one block of each network.

    Raises:
        ValueError: the back end, the precision or the graphs cannot be had here.
    """
    model = replace(config.model, depth=1, predictor_depth=1)
    if max(model.architecture.width, model.architecture.mlp_hidden) <= _WIDE:
        networks = build_models(model, config.data.crop_size)
        small = replace(config, model=model)
        make_step(small, *networks, ranks.device, local_world=ranks.local_world)


class Run:
    """One rank's part of a run.

    Args:
        config: the whole configuration.
        ranks: this rank.
        folder: the run's folder on rank 0, None on the others.
        device_batch: images of one forward pass.
        preparation: is told what is done before the first step.

    Attributes:
        index, digest: the table of the data, and what it is recognised by.
        schedules: by step.
        training: networks and step.
        step, end: optimiser steps done, and to be done in all.
        quarantine: files that cannot be used.

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
        preparation: Preparation,
    ) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder
        self.device_batch = device_batch
        preparation.begin("table of the data")
        self.index = load_index(config, ranks)
        distributed.on_main(ranks, lambda: check_data(config, len(self.index), ranks.device))
        self.digest = self.index.digest()
        self.schedules = Schedules.of(
            config.optim,
            global_batch=config.batch.global_,
            steps_per_epoch=steps_per_epoch(len(self.index), config.batch.global_),
        )
        preparation.begin("networks")
        generator = torch_generator(config.seed, Stream.INIT)
        networks = build_models(config.model, config.data.crop_size, generator)
        self.training = make_step(config, *networks, ranks.device, local_world=ranks.local_world)
        preparation.begin("checkpoints")
        self.step = self._resume()
        # a smaller max_steps than is done already asks for nothing more
        whole = self.schedules.run_steps
        self.end = max(min(whole, config.max_steps or whole), self.step)
        path, files = Path(config.out), len(self.index) + len(self.index.bad)
        self.quarantine = Quarantine(path / "quarantine.jsonl", config.data.max_bad_share, files)

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
            self._initialise()
            return 0
        tensors = {k: torch.from_numpy(v) for k, v in distributed.broadcast_arrays(arrays).items()}
        checkpoint.restore(
            self.training,
            checkpoint.State(tensors=tensors, step=step, adam_step=adam_step, meta={}),
        )
        _logger.info("resumed from the checkpoint at step %d", step)
        return step

    def _initialise(self) -> None:
        """Sets the weights that `init` names; rank 0 reads them for all."""
        name = self.config.init
        if name is None:
            return
        shapes = {key: value.shape for key, value in self.training.masters().items()}
        read = distributed.on_main(self.ranks, lambda: start_weights(name, self.config, shapes))
        arrays = {k: v.numpy() for k, v in read.items()} if read else None
        arrays = distributed.broadcast_arrays(arrays)
        checkpoint.load_weights(
            self.training, {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
        )
        found = sorted({key.partition(".")[0] for key in arrays})
        fresh = "" if "predictor" in found else "; the predictor starts afresh"
        _logger.info("weights of %s from %s%s", ", ".join(found), name, fresh)

    def _load_latest(self) -> checkpoint.State | None:
        assert self.folder is not None
        state = checkpoint.load_latest(self.folder.checkpoints)
        digest = str(state.meta.get("data")) if state else self.digest
        if not self.index.matches(digest) and not self.config.allow_changed_recipe:
            names = ", ".join(self.config.data.sources)
            raise UsageError(
                f"the images in {names} differ from those that the run was started with "
                f"(digest {digest[:12]} -> {self.digest[:12]}); restore them, train into "
                "another --out, or add --allow-changed-recipe"
            )
        return state

    @property
    def epoch(self) -> int:
        """Of the step that was done last, from 0."""
        return (self.step - 1) // self.schedules.steps_per_epoch

    def announce(self) -> None:
        """Says what is about to run."""
        config, ranks = self.config, self.ranks
        accumulation = config.batch.global_ // (self.device_batch * ranks.world)
        if not ranks.is_main:
            return
        steps = self.end - self.step
        hours, _ = estimate.hours(config, ranks.world, ranks.device, steps, seconds=0.3)
        _logger.info(
            "%d images in %d classes; %d steps of %d images, %s by an estimate",
            *(len(self.index), len(self.index.classes), steps, config.batch.global_),
            estimate.in_words(hours),
        )
        shares = ""
        if ranks.world > 1 or accumulation > 1:
            parts = f"{self.device_batch} on the device x {accumulation} accumulated"
            shares = f", {ranks.world} ranks x {parts}"
        _logger.info("%s on %s%s", config.optim.precision, ranks.device, shares)
        for text in self.training.describe().splitlines():
            for line in textwrap.wrap(text, 100, subsequent_indent="  "):
                _logger.info("%s", line)
        if config.optim.precision == "bfloat16" and distributed.slow_bfloat16(ranks.device):
            _logger.warning(
                "this CPU emulates bfloat16 products (no AVX-512 BF16 or AMX): many times as slow\n"
                "as --optim.precision float32"
            )
        reference, total = config.optim.lr_reference_batch, config.batch.global_
        if total != reference:
            _logger.info(
                "learning rates are for batches of %d; optim.lr_scaling=%s makes the peak %g",
                *(reference, config.optim.lr_scaling, self.schedules.lr),
            )
