"""What a run leaves when loss and gradients stay non-finite: names, and a step to replay.

``OUT/nonfinite.json`` lists the samples of the skipped steps over all ranks. The replay file
``OUT/replay-step-<n>.safetensors`` holds the weights and images of the last of them, so that
``ijepa-fast replay`` shows elsewhere, without data or checkpoints, where they break.
"""

import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from ijepa_fast.atomic import atomic_write
from ijepa_fast.config import as_dict
from ijepa_fast.data import Loader, Quarantine, epoch_order, known_bad, usable_ids
from ijepa_fast.errors import NonFiniteError
from ijepa_fast.ranks import distributed
from ijepa_fast.run import Run
from ijepa_fast.state import checkpoint

__all__ = ["REPLAY_FORMAT", "name_samples"]

_logger = logging.getLogger(__name__)

REPLAY_FORMAT = "ijepa-fast replay 1"


def name_samples(run: Run, error: NonFiniteError) -> NonFiniteError:
    """Writes both files (on rank 0; all ranks must call it).

    Where a file was quarantined, another is named that stood in for it: what the loader does, as
    far as `quarantine.jsonl` tells this machine.

    Returns:
        An error that names the first samples and the files.
    """
    weights = checkpoint.gather(run.training.masters(), keep=run.ranks.is_main)
    try:
        return _report(run, error, weights) if run.folder else error
    finally:
        # rank 0 needs a while, and torchrun ends all ranks when the first has left
        distributed.barrier()


def _report(run: Run, error: NonFiniteError, weights: dict[str, torch.Tensor]) -> NonFiniteError:
    assert run.folder is not None
    path = run.folder.path
    # read anew: other ranks append to it
    quarantine = Quarantine(path / "quarantine.jsonl", 1.0, len(run.index))
    steps = _steps(run, error.steps, known_bad(run.index, quarantine))
    report = path / "nonfinite.json"
    with atomic_write(report) as temporary:
        temporary.write_text(json.dumps({"seed": run.config.seed, "steps": steps}))
    first = ", ".join(repr(name) for name in steps[0]["files"][:3])
    text = (
        f"Lower optim.lr or look at the data: {report} lists the samples of all ranks, the first "
        f"{first}"
    )
    try:
        replay = _write_replay(run, error.steps[-1], weights, quarantine)
        text += f"; ijepa-fast replay {replay} shows where the numbers break"
    # what was wrong with the step may be wrong with this too; the names are what matters most
    except (OSError, RuntimeError, ValueError) as failed:
        _logger.warning("no replay file: %s", failed)
    return NonFiniteError(error.steps, text)


def _steps(run: Run, steps: range, bad: NDArray[np.bool_]) -> list[dict[str, Any]]:
    config, index, size = run.config, run.index, run.config.batch.global_
    per_epoch = run.schedules.steps_per_epoch
    found = []
    for epoch, group in itertools.groupby(steps, lambda step: (step - 1) // per_epoch):
        order = epoch_order(len(index), seed=config.seed, epoch=epoch)
        for step in group:
            begin = (step - 1) % per_epoch * size
            places = np.arange(begin, begin + size)
            drawn = order[places]
            ids = usable_ids(drawn, bad, seed=config.seed, epoch=epoch, places=places).tolist()
            files = [index.name(row) for row in ids]
            lr = run.schedules.at(step).lr
            found.append({"step": step, "epoch": epoch, "lr": lr, "ids": ids, "files": files})
    return found


def _write_replay(
    run: Run, step: int, weights: dict[str, torch.Tensor], quarantine: Quarantine
) -> Path:
    """One step with all that it needs.

    Raises:
        OSError: it cannot be written.
    """
    config, batch = run.config, run.device_batch
    images, ids = [], []
    with Loader(
        run.index,
        replace(config.data, prefetch=1),
        seed=config.seed,
        global_batch=config.batch.global_,
        device_batch=batch,
        start_step=step - 1,
        steps=step,
        quarantine=quarantine,
    ) as loader:
        for part in loader:
            images.append(part.images)
            ids.append(part.ids)
    path = Path(config.out) / f"replay-step-{step:08d}.safetensors"
    tensors = {**weights, "images": torch.cat(images), "ids": torch.cat(ids)}
    names = [run.index.name(row) for row in tensors["ids"].tolist()]
    meta = {
        "format": REPLAY_FORMAT,
        "config": json.dumps(as_dict(config)),
        "step": str(step),
        "device_batch": str(batch),
        "files": json.dumps(names),
    }
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, meta)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    return path
