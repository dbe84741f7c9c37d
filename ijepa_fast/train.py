"""Entry point and training loop: ``torchrun -m ijepa_fast.train``.

Exit codes: 0 done, 2 wrong input, 3 no usable checkpoint, 4 too many bad files or non-finite
gradients, 5 a file that cannot be read or written, 6 another rank is gone, 128 + signal after
SIGTERM, SIGINT or SIGUSR1 (a checkpoint is saved, and the same command goes on from there).
"""

import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ijepa_fast import estimate
from ijepa_fast.config import Config, Invocation, dump_yaml, parse
from ijepa_fast.data import Loader, default_threads, positions
from ijepa_fast.errors import (
    CheckpointError,
    NonFiniteError,
    NonFiniteState,
    TooManyBadFiles,
    UsageError,
)
from ijepa_fast.masks import check_masks, sample_masks
from ijepa_fast.ranks import Faults, Signals, distributed, load_index
from ijepa_fast.run import Run
from ijepa_fast.schedules import StepValues
from ijepa_fast.state import (
    Meter,
    Preparation,
    RunFolder,
    checkpoint_folders,
    id_hash,
    peak_flops,
)
from ijepa_fast.verify import name_samples

__all__ = ["main", "train"]

# not __name__: that is __main__ under `python -m`, and the log belongs to the package
_logger = logging.getLogger("ijepa_fast.train")


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """This rank's share of one step's loss, feature std and hash of sample ids."""

    loss: Tensor
    feature_std: Tensor
    ids_hash: Tensor


def train(run: Run, signals: Signals) -> int:
    """Trains to the end; returns the signal that ended it before, or 0.

    Nothing in the loop waits for the device: numbers are read one log interval late.

    Raises:
        NonFiniteError: three steps in a row were skipped.
    """
    config, ranks = run.config, run.ranks
    meter = Meter(
        images=config.batch.global_,
        world=ranks.world,
        flops=estimate.estimate(config).flops,
        peak=peak_flops(ranks.device, config.optim.precision),
        device=ranks.device,
    )
    agreement = distributed.Agreement()
    faults = Faults.of(_first_life("IJEPA_FAST_FAULT"), ranks.rank)
    received = 0
    # the ranks of one machine share its cores
    threads = config.data.threads or default_threads(ranks.local_world)
    run.preparation.begin("first batch")
    with Loader(
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
    ) as loader:
        meter.restart(run.step, 0.0)
        signals.patient = True
        while run.step < run.end:
            values = run.schedules.at(run.step + 1)
            faults.strike(run.step + 1, run.training)
            with faults.images(run.step + 1, run.training):
                sums = _forward_backward(run, loader)
            faults.gradients(run.step + 1, run.training)
            run.training.update(values)
            run.step += 1
            run.tell_first_step(sums.loss)
            ends = run.step == run.end
            broken = run.watch.check(run.step, run.training.skipped, last=ends)
            if run.step % config.log.interval == 0 or ends or broken:
                _report(run, values, sums, meter.read(run.step, loader.wait_seconds, run.end))
            if broken:
                run.journal.flush()
                raise broken
            run.saver.check()
            wishes = [signals.received, *run.wishes(agreement.delay)]
            received, save, no_look = agreement.exchange(wishes)
            # an agreement may be a step old: what was saved meanwhile is not due any more
            due = save and run.step - run.saved_step > agreement.delay
            if received or due or ends:
                run.save(last=bool(received or ends))
            if run.look_every and run.step % run.look_every == 0 and not (received or ends):
                run.look_between(refused=bool(no_look))
                meter.restart(run.step, loader.wait_seconds)
            if received:
                break
        agreement.finish()
    run.finish_saving()
    signals.patient = False
    # what the ranks agreed on: the signal may have reached another rank only
    return received if run.step < run.end else 0


def _forward_backward(run: Run, loader: Loader) -> _Sums:
    """All micro-steps of one optimiser step."""
    config, ranks = run.config, run.ranks
    loss = feature_std = torch.zeros((), device=ranks.device)
    ids_hash = torch.zeros((), dtype=torch.int64)
    for micro_step in range(loader.accumulation):
        batch = next(loader)
        own = positions(ranks.rank, ranks.world, micro_step, run.device_batch)
        masks = sample_masks(
            config.masks, grid=config.grid, seed=config.seed, step=run.step, positions=own
        )
        if run.step == micro_step == 0:
            run.preparation.begin("masks.png")
            run.pictures.masks(batch, masks, config.grid)
        _, num_targets, target_length = masks.target_index.shape
        # of the whole global batch: its images share one target size
        rows = config.batch.global_ * config.masks.num_contexts * num_targets * target_length
        elements = rows * config.model.architecture.width
        last = micro_step == loader.accumulation - 1
        part, part_std = run.accumulate(batch.images, masks, elements, last=last)
        loss = loss + part
        feature_std = feature_std + part_std / (loader.accumulation * ranks.world)
        ids_hash = ids_hash + id_hash(batch.ids, own)
        if run.samples:
            run.samples.add(run.step + 1, micro_step, own, batch.ids)
    return _Sums(loss=loss, feature_std=feature_std, ids_hash=ids_hash)


def _report(run: Run, values: StepValues, sums: _Sums, timing: dict[str, Any]) -> None:
    numbers = torch.stack([sums.loss, sums.feature_std])
    distributed.all_reduce_sum_([numbers])
    distributed.all_reduce_sum_([sums.ids_hash])
    row = {
        "step": run.step,
        "epoch": (run.step - 1) // run.schedules.steps_per_epoch,
        "lr": values.lr,
        "weight_decay": values.weight_decay,
        "momentum": values.momentum,
    }
    skipped = run.training.skipped
    run.journal.queue(row, numbers, skipped=skipped, ids_hash=sums.ids_hash, timing=timing)


def _agree(config: Config, ranks: distributed.Ranks) -> tuple[RunFolder | None, int]:
    """What rank 0 decides before anything is read: the folder is free, and the device batch."""

    def decide() -> tuple[RunFolder, int]:
        if not config.data.sources:
            raise UsageError("data.root must be given: --data DIR")
        check_masks(config.masks, config.grid)
        # what is resumed needs them no more
        started = checkpoint_folders(Path(config.out) / "checkpoints")
        if config.init is not None and not started and not Path(config.init).exists():
            raise UsageError(f"init must name weights, got {config.init}, which is missing")
        memory = estimate.device_memory(ranks.device, ranks.local_world)
        batch = estimate.device_batch(
            config, world=ranks.world, memory=memory, local_world=ranks.local_world
        )
        return RunFolder(config), batch

    decided = distributed.on_main(ranks, decide)
    folder, batch = decided or (None, 0)
    arrays = distributed.broadcast_arrays({"batch": np.array([batch])} if folder else None)
    return folder, int(arrays["batch"][0])


def _run(invocation: Invocation, ranks: distributed.Ranks) -> int:
    """Everything after the arguments are known to be right; returns the exit code."""
    config = invocation.config
    folder, device_batch = _agree(config, ranks)
    for note in invocation.notes:
        _logger.info("%s", note)
    try:
        with Signals() as signals, Preparation() as preparation:
            run = Run(config, ranks, folder, device_batch, preparation)
            try:
                run.announce()
                if run.step == 0:
                    run.look(ends=True)
                    distributed.barrier()
                received = 0
                if run.step == run.end:
                    _logger.info("the run is complete at step %d: nothing to train", run.end)
                else:
                    started = time.perf_counter()
                    try:
                        received = train(run, signals)
                    except NonFiniteError as error:
                        raise name_samples(run, error) from error
                    _logger.info("trained for %.0f s", time.perf_counter() - started)
                if received:
                    run.draw_curves()
                    _logger.warning("stopped by signal %d, saved at step %d", received, run.step)
                    return 128 + received
                run.look(ends=True)
                run.summary()
                _logger.info("done: %s", Path(config.out))
            finally:
                run.close()
    except Exception as error:
        # into train.log only; main() decides what the user sees
        _logger.debug("ended by an error", exc_info=error)
        raise
    finally:
        if folder:
            folder.close()
    return 0


def _dry_run(invocation: Invocation, ranks: distributed.Ranks) -> None:
    config = invocation.config
    check_masks(config.masks, config.grid)
    images = len(load_index(config, ranks)) if config.data.sources else None
    memory = estimate.device_memory(ranks.device, ranks.local_world)
    if ranks.is_main:
        text = estimate.report(
            config, ranks.world, ranks.device, memory, images, local_world=ranks.local_world
        )
        print("\n".join([*invocation.notes, text]))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    ranks = None
    try:
        invocation = parse(argv)
        if invocation.print_config:
            for note in invocation.notes:
                print(f"# {note}")
            print(dump_yaml(invocation.config), end="")
            return 0
        ranks = distributed.start(invocation.config.device)
        if invocation.dry_run:
            _dry_run(invocation, ranks)
            distributed.stop()
            return 0
        Faults.of(_first_life("IJEPA_FAST_FAULT"), ranks.rank)  # refused before work begins
        # a run that is not finite ends on all ranks
        together = (NonFiniteError, UsageError)
        with distributed.heartbeat(ranks, invocation.config.rank_timeout, together):
            code = _run(invocation, ranks)
        distributed.stop()
        return code
    except (UsageError, ValueError, ImportError) as error:
        return _fail(error, 2)
    except CheckpointError as error:
        return _fail(error, 3)
    except (TooManyBadFiles, NonFiniteError, NonFiniteState) as error:
        return _fail(error, 4)
    except OSError as error:
        return _fail(error, 5)
    except distributed.MainRankError:
        return 1
    finally:
        if ranks is not None:
            distributed.stop(failed=True)


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


if __name__ == "__main__":
    distributed.leave(main())
