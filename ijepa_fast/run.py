"""One rank's part of a run: networks, data and files, from the newest checkpoint on."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ijepa_fast import evaluate
from ijepa_fast.config import Config, as_dict
from ijepa_fast.data import Quarantine, steps_per_epoch
from ijepa_fast.errors import UsageError
from ijepa_fast.evaluate import UNTRAINED, collapse_warning, look_interval
from ijepa_fast.evaluate import OnlineEvaluation as Looks
from ijepa_fast.fast import CapturedStep, FastStep, make_mesh
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import Masks
from ijepa_fast.model import Predictor, VisionTransformer, build_models
from ijepa_fast.ranks import distributed, load_index
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules
from ijepa_fast.state import (
    Allowance,
    Journal,
    MetricsFile,
    Preparation,
    Reporter,
    RunFolder,
    SampleLog,
    Saver,
    Watch,
    checkpoint,
    require_room,
)
from ijepa_fast.visualize import Pictures
from ijepa_fast.weights import start_weights

__all__ = ["Run"]

_logger = logging.getLogger(__name__)


def _training(
    config: Config, ranks: distributed.Ranks, encoder: VisionTransformer, predictor: Predictor
) -> ReferenceStep | FastStep:
    """The step of the configured path."""
    networks = encoder.to(ranks.device), predictor.to(ranks.device)
    mean, std = config.data.mean, config.data.std
    if config.path == "reference":
        return ReferenceStep(*networks, config.optim, mean=mean, std=std)
    mesh = make_mesh(config.shard, ranks.device, ranks.local_world)
    options: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "attention": config.attention,
        "memory": config.memory,
        "target_precision": config.target_precision,
    }
    if config.graphs == "on":
        if ranks.device.type != "cuda" or mesh is not None:
            where = "on a CPU" if mesh is None else "with sharded weights (see --shard none)"
            raise UsageError(f"graphs must be auto or off {where}, got on")
        return CapturedStep(*networks, config.optim, **options)
    return FastStep(*networks, config.optim, mesh=mesh, **options)


class Run:
    """One rank's part of a run, from its newest checkpoint on.

    Args:
        config: the whole configuration.
        ranks: this rank.
        folder: the run's folder on rank 0, None on the others.
        device_batch: images of one forward pass.
        preparation: is told what is done before the first step.

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
        self.device_batch, self.preparation = device_batch, preparation
        self.allowance = Allowance()
        self.pictures = Pictures(folder.path if folder else None, self.allowance)
        preparation.begin("table of the data")
        self.index = load_index(config, ranks)
        self.digest = self.index.digest()
        self.schedules = Schedules.of(
            config.optim,
            global_batch=config.batch.global_,
            steps_per_epoch=steps_per_epoch(len(self.index), config.batch.global_),
        )
        self.end = min(self.schedules.run_steps, config.max_steps or self.schedules.run_steps)
        preparation.begin("networks")
        generator = torch_generator(config.seed, Stream.INIT)
        encoder, predictor = build_models(config.model, config.data.crop_size, generator)
        self.training = _training(config, ranks, encoder, predictor)
        preparation.begin("checkpoints")
        self.step = self._resume()
        # a smaller max_steps than is done already asks for nothing more
        self.end = max(self.end, self.step)
        self.saved_step, self.saved_at = self.step, time.monotonic()
        self.saver = Saver(self.step or None)
        self._broken: str | None = None
        # a run that is complete saves nothing more
        if self.step < self.end:
            self.snapshot = checkpoint.Snapshot(self.training, keep=self.ranks.is_main)
            distributed.on_main(self.ranks, self._require_room)
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
        self.looks = Looks(config, self.index, ranks.device)
        self.look_every = look_interval(config, self.schedules.run_steps, ranks.world)
        self.watch = Watch(ranks.device)
        self.samples: SampleLog | None = None
        if config.log.samples and self.step < self.end:
            self.samples = SampleLog(path / f"samples-rank{ranks.rank}.jsonl", self.step)

    def _require_room(self) -> None:
        assert self.folder is not None
        size = self.snapshot.nbytes
        try:
            require_room(self.folder.checkpoints, size)
        except OSError as error:
            raise UsageError(
                f"out must have room for a checkpoint of {size / 2**30:.2f} GiB and let it be "
                f"written, got {self.folder.checkpoints}: {error}"
            ) from None

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
        digest = state.meta.get("data") if state else self.digest
        if digest != self.digest and not self.config.allow_changed_recipe:
            names = ", ".join(self.config.data.sources)
            raise UsageError(
                f"the images in {names} differ from those that the run was started with "
                f"(digest {str(digest)[:12]} -> {self.digest[:12]}); restore them, train into "
                "another --out, or add --allow-changed-recipe"
            )
        return state

    def announce(self) -> None:
        """One look at what is about to run."""
        config, ranks = self.config, self.ranks
        accumulation = config.batch.global_ // (self.device_batch * ranks.world)
        _logger.info(
            "%d images in %d classes; %d steps of %d images (%d ranks x %d on the device x %d "
            "accumulated), %s on %s",
            len(self.index),
            len(self.index.classes),
            self.end,
            config.batch.global_,
            ranks.world,
            self.device_batch,
            accumulation,
            config.optim.precision,
            ranks.device,
        )
        _logger.info("%s", self.training.describe())
        if config.optim.precision == "bfloat16" and distributed.slow_bfloat16(ranks.device):
            _logger.warning(
                "this CPU emulates bfloat16 products (no AVX-512 BF16 or AMX): many times as slow "
                "as --optim.precision float32"
            )
        reference, total = config.optim.lr_reference_batch, config.batch.global_
        if total != reference:
            _logger.info(
                "batch.global is %d, the learning rates belong to %d: optim.lr_scaling=%s makes "
                "the peak %g",
                total,
                reference,
                config.optim.lr_scaling,
                self.schedules.lr,
            )
        if self.step < self.end:
            look = "a look at the features, " if self.look_every and not self.step else ""
            _logger.info("preparing the first step: %sdecoder, first batch", look)

    def accumulate(
        self, images: Tensor, masks: Masks, elements: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """One micro-step, see `ReferenceStep.accumulate`; `last` of its optimiser step."""
        self.preparation.begin("first step")
        training = self.training
        if isinstance(training, FastStep):
            training.reduce_gradients(last)
            return training.accumulate(images, training.prepare(masks), elements)
        return training.accumulate(images, training.prepare(masks), elements)

    def tell_first_step(self, loss: Tensor) -> None:
        """Says what it took until the first step was done, which is waited for; then nothing."""
        if not self.preparation.done:
            loss.item()
            self.preparation.finish()

    def wishes(self, ahead: int) -> list[int]:
        """What rank 0 wants: a checkpoint (1), and not to look at features (1).

        A checkpoint is due `checkpoint.minutes` after the last one and at every so many epochs;
        while one is being written the next one waits, and training goes on. Looks that `eval.every`
        does not ask for are left out once their time is used up.

        Args:
            ahead: steps until all ranks act on it.
        """
        if not self.ranks.is_main:
            return [0, 0]
        late = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint.minutes
        every = self._keep_every_steps()
        kept = every and (self.step + ahead) // every > self.saved_step // every
        no_look = self.config.eval.every is None and not self.allowance.covers("look")
        return [int((late or bool(kept)) and not self.saver.busy), int(no_look)]

    def _keep_every_steps(self) -> int | None:
        epochs = self.config.checkpoint.keep_every
        return epochs * self.schedules.steps_per_epoch if epochs else None

    def save(self, *, last: bool) -> None:
        """Writes what is queued for the log and copies the state; rank 0 writes the copy to the
        disk, deletes the oldest checkpoint and draws the curves while training goes on.

        Args:
            last: no step follows.
        """
        with self.allowance.spend("save"):
            self.journal.flush()
            self.saved_step, self.saved_at = self.step, time.monotonic()
            # the copy before is this one's memory; only the last save finds one being written
            self.saver.wait()
            meta = {"config": as_dict(self.config), "data": self.digest, "images": len(self.index)}
            state = self.snapshot.take(self.training, step=self.step, meta=meta)
        if not self.folder:
            return
        folder, file, options = self.folder.checkpoints, self.journal.file, self.config.checkpoint
        kept, rows = self._keep_every_steps(), file.rows if file else []

        def write() -> bool:
            # a checkpoint counts once the rows before it are on the disk
            if file:
                file.sync()
            self._broken = checkpoint.not_finite(state)
            if self._broken:
                _logger.error(
                    "the checkpoint at step %d is not written: %s is not finite",
                    *(state.step, self._broken),
                )
                return False
            checkpoint.write(folder, state)
            checkpoint.rotate(folder, newest=state.step, keep=options.keep, keep_every_steps=kept)
            if not last:
                self.pictures.curves_at_times(rows)
            return True

        self.saver.start(self.step, write)

    def finish_saving(self) -> None:
        """Waits until the last checkpoint is on the disk.

        Raises:
            OSError: it could not be written (on rank 0; the others leave with it).
            NonFiniteState: its weights are not finite (likewise).
        """

        def wait() -> None:
            error = self.saver.wait()
            if self._broken:
                raise checkpoint.NonFiniteState(
                    f"weights must be finite to be saved, got {self._broken}: no checkpoint was "
                    f"written at step {self.step}"
                )
            if error is not None:
                last = self.saver.saved
                known = "none was written" if last is None else f"the last good one is step {last}"
                raise OSError(f"cannot write the checkpoint at step {self.step}: {error}; {known}")

        with self.allowance.spend("save"):
            distributed.on_main(self.ranks, wait)

    def look_between(self, *, refused: bool) -> None:
        """Looks at the features while training, unless there is no time for it."""
        if not refused:
            self.look(ends=False)
            return
        _logger.info(
            "no look at step %d: saves, pictures and looks have taken %.1f s of %.0f s",
            *(self.step, self.allowance.spent, self.allowance.elapsed),
        )

    def look(self, *, ends: bool) -> None:
        """Looks at the features, once for each step, if the run is to; see `looks.py`.

        Args:
            ends: before the first step or after the last.
        """
        if self.look_every:
            self.preparation.begin("first look")
            with self.allowance.spend("look"):
                self._look(ends=ends)

    def _look(self, *, ends: bool) -> None:
        weights = checkpoint.gather(self.training.masters(), keep=self.ranks.is_main)
        file, root = self.journal.file, self.config.eval.data
        whole = ends and self.config.eval.whole
        if not file or not self.journal.reporter:
            return
        self.journal.flush()
        rows = [row for row in file.rows if "monitors" in row]
        if any(
            row["step"] == self.step
            and row.get("data") == root
            and (not whole or "images" not in row)
            for row in rows
        ):
            return
        untrained = not self.step and self.config.init is None
        name = UNTRAINED if untrained else f"target encoder, step {self.step}"
        try:
            row = self.looks.look(weights, name, whole=whole, baselines=not self.step)
            before = self._before_training(rows) if self.step else row["monitors"]
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            # before the first step and after the last an error in the labelled data ends the run;
            # otherwise a look is no reason to lose it
            if ends and not isinstance(error, torch.OutOfMemoryError):
                raise
            _logger.warning("no look at step %d: %s", self.step, error)
            return
        row = {"step": self.step, **row}
        file.append(row)
        self.journal.reporter.show_look(row)
        warning = collapse_warning(row["monitors"], before) if self.step else None
        if warning:
            _logger.warning("step %d: %s", self.step, warning)

    def _before_training(self, looks: Sequence[Mapping[str, Any]]) -> Mapping[str, float]:
        """The monitors of the network that the run started from. Where it did not look then: of
        the untrained one.
        """
        first = next((row["monitors"] for row in looks if row["step"] == 0), None)
        return first or self.looks.untrained()

    def summary(self) -> None:
        """Prints all kNN scores of the run and draws its curves."""
        rows = self.journal.file.rows if self.journal.file else []
        root = self.config.eval.data
        mine = [
            row
            for row in rows
            if "knn" in row and row.get("data") == root and row["step"] in (0, self.step)
        ]
        images = mine[-1].get("images") if mine else None
        alike = [row["knn"] for row in mine if row.get("images") == images]
        scores = {name: value for knn in alike for name, value in knn.items()}
        if scores:
            _logger.info("%s", evaluate.knn_table(scores, images))
        self.draw_curves()

    def draw_curves(self) -> None:
        """Draws the metrics so far."""
        if self.journal.file:
            self.pictures.curves(self.journal.file.rows)

    def close(self) -> None:
        """Waits for a checkpoint that is being written; closes the metrics and the progress bar."""
        self.saver.wait()
        if self.samples:
            self.samples.close()
        if self.journal.file and self.journal.reporter:
            self.journal.reporter.close()
            self.journal.file.close()
