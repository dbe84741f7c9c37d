"""A run's state on disk: safetensors, JSON and a SHA-256 manifest; never pickle.

Layout: ``OUT/checkpoints/step-00001234/{state.safetensors, state.json, manifest.json}``. A
checkpoint is written into a temporary folder, flushed to the disk and renamed, so that a folder
with a final name is complete or, if its manifest does not match, damaged. Tensors are full
float32 tensors named ``encoder.*``, ``predictor.*``, ``target_encoder.*``, ``exp_avg.*`` and
``exp_avg_sq.*``: nothing depends on the path or on the number of ranks.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ijepa_fast.errors import CheckpointError
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.state.durable import fsync, safetensors_pieces, sha256_of, write_file

__all__ = [
    "FORMAT_VERSION",
    "HasState",
    "Snapshot",
    "State",
    "checkpoint_folders",
    "gather",
    "load_latest",
    "load_weights",
    "misfit",
    "not_finite",
    "read",
    "recipe_of",
    "restore",
    "rotate",
    "write",
]

FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIX = "step-"
# a copy that somebody made (step-00000100.bak) is not one of ours
_NAME = re.compile(rf"{PREFIX}\d{{8,}}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """What a checkpoint holds.

    Attributes:
        tensors: all tensors, on the CPU.
        step: optimiser steps done, skipped ones included: the schedule's step.
        adam_step: updates that AdamW has applied.
        meta: plain JSON values: configuration, data digest, whatever the caller adds.
    """

    tensors: Mapping[str, Tensor]
    step: int
    adam_step: int
    meta: Mapping[str, Any]


class HasState(Protocol):
    """The part of `step.TrainingStep` that a checkpoint is taken of.

    Attributes:
        device: where all of this is.
        skipped: int64 (4,), see `reference.count_skip`.
    """

    device: torch.device
    skipped: Tensor

    @property
    def encoder(self) -> VisionTransformer:
        """Context encoder."""

    @property
    def predictor(self) -> Predictor:
        """Predictor."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the first two networks, with their moments."""

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights and tables of all three networks, by name; DTensors where sharded."""

    def round(self) -> None:
        """Follows a change of the masters by something else than `update`."""


class Snapshot:
    """Memory for one copy of a run's state, allocated once: a save stalls the step for the copy
    alone.

    Args:
        training: networks and optimiser.
        keep: whether this rank keeps the copy; the others only take part.
    """

    def __init__(self, training: HasState, *, keep: bool) -> None:
        self._keep = keep
        self._copies: dict[str, Tensor] = {}
        if not keep:
            return
        pinned = training.device.type == "cuda"
        shapes = {key: tensor.shape for key, tensor in training.masters().items()}
        for key, parameter in _trained(training).items():
            shapes |= {f"{moment}.{key}": parameter.shape for moment in MOMENTS}
        # one block: pinned, each would be rounded up to a power of two; written to, so that the
        # first save does not wait for its pages
        sizes = [shape.numel() for shape in shapes.values()]
        block = torch.empty(sum(sizes), pin_memory=pinned).zero_()
        for (key, shape), piece in zip(shapes.items(), block.split(sizes), strict=True):
            self._copies[key] = piece.view(shape)

    @property
    def nbytes(self) -> int:
        """Size of the copy; 0 on the ranks that keep none."""
        return sum(copy.nbytes for copy in self._copies.values())

    def take(self, training: HasState, *, step: int, meta: Mapping[str, Any]) -> State:
        """Copies the state, over the last copy. Where weights are sharded, all ranks must call it.

        Args:
            training: networks and optimiser.
            step: optimiser steps done.
            meta: plain JSON values.

        Returns:
            The state; its tensors are this snapshot's memory, and none on ranks that keep none.
        """
        adam_step = 0
        tensors = training.masters()
        for key, parameter in _trained(training).items():
            state = training.optimizer.state.get(parameter)
            if state:
                if not adam_step:  # the same for all parameters; reading it waits for the device
                    adam_step = int(state["step"])
                tensors[f"exp_avg.{key}"] = state["exp_avg"]
                tensors[f"exp_avg_sq.{key}"] = state["exp_avg_sq"]
            else:  # before the first update
                zeros = torch.zeros_like(parameter)
                tensors[f"exp_avg.{key}"] = tensors[f"exp_avg_sq.{key}"] = zeros
        for key, tensor in tensors.items():
            whole = _whole(tensor)
            if self._keep:
                self._copies[key].copy_(whole, non_blocking=True)
        if training.device.type == "cuda":
            torch.cuda.current_stream(training.device).synchronize()
        return State(tensors=self._copies, step=step, adam_step=adam_step, meta=meta)


def not_finite(state: State) -> str | None:
    """Name of a tensor that holds NaN or infinity, or None: such a state is worth no checkpoint."""
    for key, tensor in state.tensors.items():
        # a sum needs no memory; where it overflows, the numbers themselves decide
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            return key
    return None


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU. Where tensors are sharded, all ranks must call it.

    Args:
        tensors: of the same names on every rank.
        keep: whether this rank wants them; the result is empty on the others.
    """
    copies = {}
    for key, tensor in tensors.items():
        whole = _whole(tensor)
        if keep:
            copies[key] = whole.to("cpu", copy=True).contiguous()
    return copies


@torch.no_grad()
def restore(training: HasState, state: State) -> None:
    """Puts a captured state back, each rank its part.

    Raises:
        CheckpointError: names or shapes differ from the networks'.
    """
    masters = training.masters()
    trained = _trained(training)
    wanted: dict[str, Tensor] = {**masters}
    for key, parameter in trained.items():
        wanted |= {f"{moment}.{key}": parameter for moment in MOMENTS}
    if wrong := misfit(wanted, state.tensors):
        raise CheckpointError(f"the checkpoint does not fit the configuration: {wrong}")
    for key, tensor in masters.items():
        tensor.copy_(_part(state.tensors[key], tensor))
    for key, parameter in trained.items():
        own = training.optimizer.state[parameter]
        own["step"] = torch.tensor(float(state.adam_step), device=parameter.device)
        for moment in MOMENTS:
            own[moment] = _part(state.tensors[f"{moment}.{key}"], parameter)
    total = state.step - state.adam_step
    training.skipped = torch.tensor([0, 0, total, 0], device=training.device)
    training.round()


def misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor is missing, not wanted or of another shape or dtype, what it must
    be and what it is; None where all fit.
    """
    must, got = (
        {key: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for key, t in tree.items()}
        for tree in (wanted, given)
    )
    for key in sorted(must.keys() | got.keys()):
        if must.get(key) != got.get(key):
            return f"{key} must be {must.get(key, 'absent')}, got {got.get(key, 'none')}"
    return None


@torch.no_grad()
def load_weights(training: HasState, tensors: Mapping[str, Tensor]) -> None:
    """Sets some of the weights, each rank its part.

    Args:
        training: networks and optimiser.
        tensors: named as in a checkpoint, of the right shapes.
    """
    masters = training.masters()
    for key, tensor in tensors.items():
        masters[key].copy_(_part(tensor, masters[key]))
    training.round()


def _part(whole: Tensor, like: Tensor) -> Tensor:
    """A new tensor like another one, sharded as it is, of a whole one that every rank has."""
    whole = whole.to(like.device, copy=True)
    if not isinstance(like, DTensor):
        return whole
    # every rank cuts its own part
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _trained(training: HasState) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, network in (("encoder", training.encoder), ("predictor", training.predictor))
        for key, parameter in network.named_parameters()
    }


def write(folder: Path, state: State) -> Path:
    """Writes one checkpoint atomically.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        state: what to write.

    Returns:
        The checkpoint's own folder. One that already stands at this step is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    final = folder / f"{PREFIX}{state.step:08d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        header = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "adam_step": state.adam_step,
            **state.meta,
        }
        manifest = {
            "state.json": write_file(temporary / "state.json", [_text(header)]),
            "state.safetensors": write_file(
                temporary / "state.safetensors", safetensors_pieces(state.tensors)
            ),
        }
        write_file(temporary / "manifest.json", [_text(manifest)])
        fsync(temporary)
        if final.exists():
            _remove(final)
        temporary.rename(final)
        fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _text(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode()


def _sweep(folder: Path) -> None:
    """Deletes what interrupted writes left behind: their names can come again, as in a container
    the process number is always the same.
    """
    for path in folder.iterdir():
        if path.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    # renamed first, so that a kill in the middle leaves no half-deleted checkpoint under a final
    # name
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    folder.rename(trash)
    shutil.rmtree(trash)


def read(folder: Path) -> State:
    """Reads and verifies one checkpoint.

    Raises:
        CheckpointError: a file is missing, differs from the manifest or has another format version.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in ("state.safetensors", "state.json"):
            path, entry = folder / name, manifest[name]
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{path} must have {entry['bytes']} bytes, got {path.stat().st_size}"
                )
            if sha256_of(path) != entry["sha256"]:
                raise CheckpointError(f"{path} does not match the SHA-256 in its manifest")
        header = json.loads((folder / "state.json").read_text())
        if header["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} must have format_version {FORMAT_VERSION}, "
                f"got {header['format_version']}"
            )
        step, adam_step = (header.pop(key) for key in ("step", "adam_step"))
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error!r}") from None
    if not type(step) is type(adam_step) is int or not 0 <= adam_step <= step < 2**53:
        raise CheckpointError(
            f"{folder} must have whole numbers 0 <= adam_step <= step, got {adam_step!r}, {step!r}"
        )
    for key, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{folder} must hold float32 tensors, got {key} in {tensor.dtype}"
            )
    return State(tensors=tensors, step=step, adam_step=adam_step, meta=header)


def recipe_of(folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint was made with; empty where that cannot be read, which
    `read` reports.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        header = json.loads((folder / "state.json").read_bytes())
        if isinstance(header, dict) and isinstance(header.get("config"), dict):
            return header["config"]
    return {}


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def load_latest(folder: Path) -> State | None:
    """The newest usable checkpoint, or None where there never was one.

    A damaged one is named in the log and the next older one is used.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    folders = checkpoint_folders(folder)
    for candidate in folders:
        try:
            return read(candidate)
        except CheckpointError as error:
            _logger.warning(
                "checkpoint %s is unusable, trying an older one: %s", candidate.name, error
            )
    if folders:
        raise CheckpointError(
            f"all {len(folders)} checkpoints in {folder} are damaged; nothing was deleted. "
            "Restore one, or train into another --out"
        )
    return None


def rotate(folder: Path, *, newest: int, keep: int, keep_every_steps: int | None) -> None:
    """Deletes all but the newest `keep` checkpoints (and the first at or after each multiple of
    `keep_every_steps`), and what interrupted writes left behind.

    Args:
        folder: the run's `checkpoints` folder.
        newest: the step just written. Later ones do not count: they are damaged, else the run
            would have gone on from them.
        keep: how many to keep, `newest` included.
        keep_every_steps: None deletes all older ones.
    """
    _sweep(folder)
    steps = {path: int(path.name.removeprefix(PREFIX)) for path in checkpoint_folders(folder)}
    past = [path for path, step in steps.items() if step <= newest]
    # newest first, so that the oldest of a stretch is the one that stays in the table
    every = keep_every_steps
    firsts = {steps[path] // every: path for path in past if steps[path] >= every} if every else {}
    for path in past[keep:]:
        if path not in firsts.values():
            _remove(path)
