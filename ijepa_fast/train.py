"""Entry point and training loop: ``torchrun -m ijepa_fast.train``.

Exit codes: 0 done, 2 wrong input, 3 no usable checkpoint, 4 too many bad files or non-finite
gradients, 5 a file that cannot be read or written, 6 another rank is gone, 128 + signal after
SIGTERM, SIGINT, SIGUSR1 or SIGHUP (a checkpoint is saved, and the same command goes on from there).
"""

import sys

if __name__ == "__main__":
    # parses the arguments before torch is imported, which takes seconds
    from ijepa_fast.__main__ import enter

    enter("train")

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_fast import __version__, estimate
from ijepa_fast.callbacks import (
    Callback,
    Callbacks,
    MetricsFile,
    Progress,
    RunInfo,
    Status,
    loggers,
    read_rows,
)
from ijepa_fast.config import AnyPath, Config, Invocation, as_arguments, as_dict, parse
from ijepa_fast.data import Data, Loader, data_roots, default_threads, make_decoder, positions
from ijepa_fast.errors import MainRankError, NonFiniteError, UsageError, exit_code, require
from ijepa_fast.evaluation import ScheduledEvaluation
from ijepa_fast.masks import sample_masks
from ijepa_fast.ranks import Faults, Signals, distributed, load_index
from ijepa_fast.run import Run, check_data, check_start, check_step
from ijepa_fast.settings import settle
from ijepa_fast.state import (
    Allowance,
    Journal,
    Meter,
    Preparation,
    RunFolder,
    SampleLog,
    Saves,
    Watch,
    checkpoint,
    id_hash,
    peak_flops,
)
from ijepa_fast.step import TrainingStep, graphs_would_pay
from ijepa_fast.verify import name_samples
from ijepa_fast.visualize import Pictures

__all__ = ["RunResult", "main", "pretrain", "train"]

# not __name__: that is __main__ under `python -m`, and the log belongs to the package
_logger = logging.getLogger("ijepa_fast.train")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended. It is also the path of its folder: whatever takes a run takes this.

    Attributes:
        out: the run's folder.
        step: optimiser steps done.
        end: steps of the whole run.
        signal: number of the signal that stopped it before its end, or 0.

    Example:
        >>> run = ijepa_fast.pretrain("tiny.yaml", data="images", out="runs/mine", max_steps=3)
        ijepa-fast ...
        done: runs/mine
        >>> run.step, run.signal, ijepa_fast.load_encoder(run).width
        (3, 0, 32)
    """

    out: Path
    step: int
    end: int
    signal: int = 0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What `metrics.jsonl` holds: a row a log interval (`step`, `loss`, ...) or evaluation."""
        return read_rows(self.out / "metrics.jsonl")

    def __fspath__(self) -> str:
        return str(self.out)


class _Beside:
    """What stands beside the steps of a run: callbacks, saves, evaluation, pictures."""

    def __init__(self, run: Run, preparation: Preparation, callbacks: Sequence[Callback]) -> None:
        config, path = run.config, Path(run.config.out)
        unfinished = run.step < run.end
        self.callbacks = Callbacks()
        if run.folder:
            interval = config.log.interval if unfinished else 1
            metrics = MetricsFile(path / "metrics.jsonl", step=run.step, interval=interval)
            others = [*loggers(config.log.to), *callbacks]
            self.callbacks = Callbacks(metrics, Progress(), others)
        self.preparation = preparation
        self.journal = Journal(self.callbacks)
        allowance = Allowance(doing=self._doing)
        folder = run.folder.path if run.folder else None
        self.pictures = Pictures(folder, allowance, len(run.index), whole=config.eval.whole)
        self.evaluation = ScheduledEvaluation(
            config,
            run.index,
            run.ranks.device,
            lambda: checkpoint.gather(run.training.masters(), keep=run.ranks.is_main),
            self.journal,
            allowance,
            run_steps=run.schedules.run_steps,
            world=run.ranks.world,
        )
        epochs = config.checkpoint.keep_every
        # a run that is complete saves nothing more
        self.saves: Saves | None = None
        self.samples: SampleLog | None = None
        if unfinished:
            self.saves = Saves(
                run.training,
                config.checkpoint,
                run.ranks,
                run.folder,
                self.journal,
                allowance,
                step=run.step,
                every=epochs * run.schedules.steps_per_epoch if epochs else None,
                meta={"config": as_dict(config), "data": run.digest, "images": len(run.index)},
                after=self.pictures.curves_at_times,
            )
            if config.log.samples:
                self.samples = SampleLog(path / f"samples-rank{run.ranks.rank}.jsonl", run.step)

    def _doing(self, kind: str) -> None:
        """Names what stands between the steps."""
        self.preparation.begin(kind)
        self.callbacks.doing(kind or "training")

    def start(self, run: Run) -> None:
        """The callbacks begin."""
        self.preparation.begin("callbacks")
        self.callbacks.start(
            RunInfo(
                config=run.config,
                out=Path(run.config.out),
                step=run.step,
                last_step=run.end,
                images=len(run.index),
            )
        )
        self.preparation.begin("")

    def report(self, status: str, *, done: bool) -> None:
        """Draws what the run has brought, and writes its report."""
        if self.callbacks.file:
            self.pictures.at_end(self.callbacks.file.rows, status, done=done)

    def close(self, status: Status, step: int) -> None:
        """Waits for a checkpoint that is being written, and ends the callbacks."""
        try:
            if self.saves:
                self.saves.close()
            if self.samples:
                self.samples.close()
        finally:
            self.preparation.begin("callbacks")
            self.callbacks.end(status, step)


def train(run: Run, beside: _Beside, signals: Signals) -> int:
    """Trains to the end; returns the signal that ended it before, or 0.

    Nothing in the loop waits for the device after the first step: numbers are read once they are
    there.

    Raises:
        NonFiniteError: three steps in a row were skipped.
    """
    config, ranks, evaluation = run.config, run.ranks, beside.evaluation
    saves, journal, watch = beside.saves, beside.journal, Watch(ranks.device)
    assert saves is not None
    meter = Meter(
        images=config.batch.global_,
        world=ranks.world,
        flops=estimate.estimate(config).flops,
        peak=peak_flops(ranks.device, config.optim.precision),
        device=ranks.device,
    )
    agreement = distributed.Agreement()
    training = Faults.of(_first_life("IJEPA_FAST_FAULT"), ranks.rank).around(run.training, run.step)
    received = 0
    beside.preparation.begin("first batch")
    with _loader(run) as loader:
        meter.restart(run.step, 0.0)
        signals.patient = True
        while run.step < run.end and not received:
            values = run.schedules.at(run.step + 1)
            numbers, ids_hash = _forward_backward(run, beside, training, loader)
            training.update(values)
            run.step += 1
            if not beside.preparation.done:
                first = numbers.clone()
                distributed.all_reduce_sum_([first])
                beside.preparation.finish(float(first[0]))  # waits for the first step
            ends, skipped = run.step == run.end, training.skipped
            broken = watch.check(run.step, skipped, last=ends)
            if run.step % config.log.interval == 0 or ends or broken:
                distributed.all_reduce_sum_([numbers])
                distributed.all_reduce_sum_([ids_hash])
                journal.queue(
                    {"step": run.step, "epoch": run.epoch, **asdict(values)},
                    numbers,
                    skipped,
                    ids_hash=f"{int(ids_hash) & (2**64 - 1):016x}",
                    timing=meter.read(run.step, loader.wait_seconds, run.end),
                )
            journal.poll(run.step)
            if broken:
                journal.flush()
                raise broken
            wishes = [
                signals.received,
                int(saves.wanted(run.step + agreement.delay)),
                int(ranks.is_main and evaluation.refused()),
            ]
            received, save, refused = agreement.exchange(wishes)
            last = bool(received or ends)
            if last or (save and saves.due(run.step, agreement.delay)):
                saves.save(run.step, last=last)
            if evaluation.due(run.step) and not last:
                evaluation.between(run.step, refused=bool(refused))
                meter.restart(run.step, loader.wait_seconds)
        agreement.finish()
    saves.finish()
    signals.patient = False
    # what the ranks agreed on: the signal may have reached another rank only
    return received if run.step < run.end else 0


def _loader(run: Run) -> Loader:
    config, ranks = run.config, run.ranks
    # the ranks of one machine share its cores
    threads = config.data.threads or default_threads(ranks.local_world)
    return Loader(
        run.index,
        replace(config.data, threads=threads),
        seed=config.seed,
        global_batch=config.batch.global_,
        device_batch=run.device_batch,
        steps=run.end,
        start_step=run.step,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
        quarantine=run.quarantine,
    )


def _forward_backward(
    run: Run, beside: _Beside, training: TrainingStep, loader: Loader
) -> tuple[Tensor, Tensor]:
    """All micro-steps of one optimiser step: this rank's share of its loss and of the features'
    std, (2,) on the device; and of the hash of sample ids, on the host.
    """
    config, ranks, total = run.config, run.ranks, loader.accumulation
    numbers = torch.zeros(2, device=ranks.device)
    ids_hash = torch.zeros((), dtype=torch.int64)
    for micro_step in range(total):
        batch = next(loader)
        own = positions(ranks.rank, ranks.world, micro_step, run.device_batch)
        masks = sample_masks(
            config.masks, grid=config.grid, seed=config.seed, step=run.step, positions=own
        )
        if run.step == micro_step == 0:
            beside.pictures.masks(batch, masks, config.grid)
        if not beside.preparation.done:
            beside.preparation.begin("first step")
        elements = masks.elements(config.batch.global_, config.model.architecture.width)
        prepared, last = training.prepare(masks), micro_step == total - 1
        loss, std = training.accumulate(batch.images, prepared, elements, last=last)
        numbers += torch.stack([loss, std / (total * ranks.world)])
        ids_hash += id_hash(batch.ids, own)
        if beside.samples:
            beside.samples.add(run.step + 1, micro_step, own, batch.ids)
    return numbers, ids_hash


def _agree(
    config: Config, ranks: distributed.Ranks, callbacks: Sequence[Callback]
) -> tuple[RunFolder | None, int]:
    """What rank 0 decides before anything is read: the folder is free, and the device batch."""

    def decide() -> tuple[RunFolder, int]:
        given: object = callbacks
        known = isinstance(given, Sequence) and all(isinstance(each, Callback) for each in given)
        require(known, "callbacks", "a list of objects of Callback", given)
        if not config.data.sources:
            raise UsageError("data.root must be given: --data DIR")
        check_start(config)
        memory = estimate.device_memory(ranks.device, ranks.local_world)
        batch = estimate.device_batch(
            config, world=ranks.world, memory=memory, local_world=ranks.local_world
        )
        return RunFolder(config), batch

    decided = distributed.on_main(ranks, decide)
    folder, batch = decided or (None, 0)
    arrays = distributed.broadcast_arrays({"batch": np.array([batch])} if folder else None)
    return folder, int(arrays["batch"][0])


def _run(
    invocation: Invocation,
    ranks: distributed.Ranks,
    callbacks: Sequence[Callback],
    signals: Signals,
) -> RunResult:
    """Everything after the arguments are known to be right."""
    config = invocation.config
    status: Status = "failed"
    folder, device_batch = _agree(config, ranks, callbacks)
    _logger.info("ijepa-fast %s, training into %s", __version__, config.out)
    for note in invocation.notes:
        _logger.info("%s", note)
    try:
        with signals, Preparation() as preparation:
            run = Run(config, ranks, folder, device_batch, preparation)
            beside = _Beside(run, preparation, callbacks)
            try:
                beside.start(run)
                received = _ends(run, beside, signals)
                status = "stopped" if received else "done"
            finally:
                beside.close(status, run.step)
            out = Path(config.out)
            return RunResult(out=out, step=run.step, end=run.end, signal=received)
    except Exception as error:
        # into train.log only; main() decides what the user sees
        _logger.debug("ended by an error", exc_info=error)
        raise
    finally:
        if folder:
            folder.close()


def _ends(run: Run, beside: _Beside, signals: Signals) -> int:
    """The first evaluation, training, and the last one; returns the signal that ended it, or 0."""
    evaluation, received = beside.evaluation, 0
    run.announce()
    _advise_graphs(run)
    if run.step == 0:
        evaluation.evaluate(0, ends=True)
        distributed.barrier()
    if run.step == run.end:
        _logger.info("the run is complete at step %d: nothing to train", run.end)
    else:
        started = time.perf_counter()
        try:
            received = train(run, beside, signals)
        except NonFiniteError as error:
            raise name_samples(run, error) from error
        _logger.info("trained for %.0f s", time.perf_counter() - started)
    if received:
        status = f"stopped by signal {received}, saved at step {run.step}"
        beside.report(f"{status} of {run.end}; the same command goes on", done=False)
        _logger.warning("%s", status)
        return received
    evaluation.evaluate(run.step, ends=True)
    evaluation.summary(run.step)
    beside.report(f"done at step {run.step}", done=True)
    _logger.info("done: %s", Path(run.config.out))
    return 0


def _advise_graphs(run: Run) -> None:
    config, device = run.config, run.ranks.device
    if config.path != "fast" or config.graphs != "auto" or run.ranks.world > 1:
        return
    peak = peak_flops(device, config.optim.precision)
    if graphs_would_pay(estimate.estimate(config).flops * run.device_batch, peak):
        _logger.info(
            "the device is faster than the host: --graphs on captures the whole step, not only\n"
            "the target encoder"
        )


def _dry_run(invocation: Invocation, ranks: distributed.Ranks) -> None:
    config = invocation.config
    distributed.on_main(ranks, lambda: check_start(config))
    images = len(load_index(config, ranks)) if config.data.sources else None
    make_decoder(config.data, ranks.device, max_batch=1)[0].close()
    check_step(config, ranks)
    if images is not None:
        distributed.on_main(ranks, lambda: check_data(config, images, ranks.device))
    memory = estimate.device_memory(ranks.device, ranks.local_world)
    if ranks.is_main:
        text = estimate.report(
            config, ranks.world, ranks.device, memory, images, local_world=ranks.local_world
        )
        print("\n".join([*invocation.notes, text]))


def pretrain(
    config: Config | AnyPath | None = None,
    *,
    data: Data | Sequence[Data] | None = None,
    out: AnyPath | None = None,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> RunResult:
    """Pretrains a network, as `ijepa-fast train` does; the same call goes on with a run that was
    stopped.

    Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP end it after a step, which is saved; in a thread other than
    the main one they are not heard. What is printed is what the command prints.

    Args:
        config: where the settings start from: a `Config`, a preset's name, the path of a YAML file,
            or None, with which those that are not given are chosen to fit the images.
        data: a folder of images, a list file, tar shards, the name of a set, an `ImageSource`, or
            several of these.
        out: the run's folder.
        callbacks: objects of `Callback`, which are told what happens on rank 0.
        **settings: the command's options: `batch_size=64`, `optim__lr=1e-4`,
            `optim={"lr": 1e-4}` or `optim=OptimConfig(...)`, which go before those of `config`.

    Returns:
        Steps done, and the run's folder.

    Raises:
        UsageError: a setting is unknown or wrong, or the data cannot be used (a ValueError).
        CheckpointError: there are checkpoints, and all are damaged.
        TooManyBadFiles: more files than `data.max_bad_share` cannot be used.
        NonFiniteError: loss or gradients stay non-finite.
        OSError: a file cannot be read or written.
        MainRankError: on the other ranks, after an error on rank 0.

    Example:
        >>> run = ijepa_fast.pretrain("tiny.yaml", data="images", out="runs/new", epochs=1)
        looking at the images in images
        ...
        done: runs/new
        >>> [row["step"] for row in run.rows]
        [2, 4, 5]
    """
    for name in ("print_config", "dry_run"):
        require(name not in settings, name, "left to the command", settings.get(name))
    # networks are made with random numbers of torch's own, and then initialised
    with data_roots([] if data is None else data) as roots, torch.random.fork_rng(devices=[]):
        require(data is None or bool(roots), "data", "at least one source", data)
        given = {name: value for name, value in (("data", roots), ("out", out)) if value}
        result = _command(as_arguments(config, given | settings), callbacks, ends_process=False)
    assert result is not None
    return result


def _command(
    argv: list[str] | None, callbacks: Sequence[Callback], *, ends_process: bool
) -> RunResult | None:
    """The whole command, its errors raised; None where it only prints."""
    ranks, failed = None, True
    try:
        invocation = parse(argv)
        if invocation.open_:
            ranks = distributed.start(invocation.config.device)
            invocation = settle(argv, invocation, ranks)
        result = None
        if invocation.print_config:
            print(invocation.as_yaml(), end="")
        else:
            ranks = ranks or distributed.start(invocation.config.device)
            if invocation.dry_run:
                _dry_run(invocation, ranks)
            else:
                Faults.of(_first_life("IJEPA_FAST_FAULT"), ranks.rank)  # refused before work begins
                # a run that is not finite ends on all ranks
                together = (NonFiniteError, UsageError)
                with distributed.heartbeat(ranks, invocation.config.rank_timeout, together):
                    signals = Signals(ends_process=ends_process)
                    result = _run(invocation, ranks, callbacks, signals)
        failed = False
        return result
    finally:
        if ranks is not None:
            distributed.stop(failed=failed)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    try:
        result = _command(argv, (), ends_process=True)
        return 128 + result.signal if result and result.signal else 0
    except MainRankError as error:
        return exit_code(error)
    except OSError as error:
        return _fail(error, 5)
    except (RuntimeError, ValueError, ImportError) as error:
        # what is not ours keeps its traceback
        if isinstance(error, RuntimeError) and not hasattr(error, "exit_code"):
            raise
        return _fail(error, exit_code(error))


def _first_life(variable: str) -> str:
    """A variable of the environment, unless torchrun has restarted the job."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return "" if restarted else os.environ.get(variable, "")


def _fail(error: Exception, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    # before the process group every rank finds the same error; afterwards each has its own
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif dist.is_initialized():
        print(f"error on rank {rank}: {error}", file=sys.stderr)
    return code
