"""What pictures are made of: a run's networks and real images."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast import evaluation
from ijepa_fast.config import Config, DataConfig, as_dict, parse
from ijepa_fast.errors import UsageError
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import Predictor, VisionTransformer, build_models
from ijepa_fast.state import load_latest
from ijepa_fast.weights import Encoder, load_encoder, read_weights

__all__ = [
    "Networks",
    "OpenedWeights",
    "ShownImages",
    "choose",
    "device",
    "load_networks",
    "load_pictures",
    "open_parts",
    "open_weights",
    "read_config",
    "shown_images",
    "source_of",
    "untrained_networks",
]


@dataclass(frozen=True, kw_only=True)
class ShownImages:
    """Decoded images.

    Attributes:
        images: uint8 (n, height, width, 3), on the CPU.
        labels: int64 (n,), -1 where an image has none.
        classes: names of the labels; empty where there are none.
        names: of the files.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: tuple[str, ...]

    def label(self, row: int) -> str:
        """The class of an image in words, or nothing."""
        number = int(self.labels[row])
        return self.classes[number] if 0 <= number < len(self.classes) else ""


class OpenedWeights(NamedTuple):
    """A target encoder on its device, how images are made for it, its run's configuration if it is
    of a run, and what it is in words.
    """

    encoder: Encoder
    data: DataConfig
    config: Config | None
    name: str


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Context encoder and predictor of one checkpoint, frozen.

    Attributes:
        encoder, predictor: as saved, in float32.
        config: of the run.
        step: of the checkpoint; 0 is the untrained network.
        digest: SHA-256 of the weights and of all settings that the predictor's output depends on.
    """

    encoder: VisionTransformer
    predictor: Predictor
    config: Config
    step: int
    digest: str


def device() -> torch.device:
    """Where pictures are computed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_config(path: Path | None, preset: str | None) -> Config:
    """The configuration of a YAML file, of a run's folder, or of a preset.

    Raises:
        UsageError: both are given, or the file or preset is not there.
    """
    if path is not None and preset is not None:
        raise UsageError(f"either --config or --preset must be given, got {path} and {preset}")
    if path is None:
        return parse(["--preset", preset or "demo"]).config
    if path.is_dir():
        path = path / "config.yaml"
    return parse(["--config", str(path)]).config


def open_weights(source: Path) -> OpenedWeights:
    """The target encoder that RUN_OR_WEIGHTS names, on the device.

    Raises:
        UsageError: no such weights, or no checkpoint.
        CheckpointError: all checkpoints are damaged.
    """
    weights = read_weights(source)
    config = weights.config
    data = replace(config.data if config else DataConfig(), crop=weights.shape.image_size)
    name = source.name if weights.step is None else f"{source.name}, step {weights.step}"
    return OpenedWeights(load_encoder(weights).to(device()), data, config, name)


def source_of(data: str | None, config: Config | None) -> str:
    """The data set to show: as given, else the run's labelled one, else its own.

    Raises:
        UsageError: there is none.
    """
    named = data
    if config and not data:
        named = config.eval.data or next(iter(config.data.sources), None)
    if named is None:
        raise UsageError("data must be given (--data DIR): the configuration names none")
    return named


def load_networks(run: Path) -> Networks:
    """Context encoder and predictor of the newest usable checkpoint of a run.

    Raises:
        UsageError: not a run's folder, or it has no checkpoint.
        CheckpointError: all checkpoints are damaged.
    """
    if not (run / "config.yaml").is_file():
        raise UsageError(f"RUN must be the folder of a run (with config.yaml), got {run}")
    config = read_config(run, None)
    state = load_latest(run / "checkpoints")
    if state is None:
        raise UsageError(f"RUN must have a checkpoint, got none in {run}")
    encoder, predictor = build_models(config.model, config.data.crop_size)
    for network, prefix in ((encoder, "encoder."), (predictor, "predictor.")):
        named = {k: v for k, v in state.tensors.items() if k.startswith(prefix)}
        network.load_state_dict({k.removeprefix(prefix): v for k, v in named.items()})
    return _networks(encoder, predictor, config, state.step)


def untrained_networks(config: Config) -> Networks:
    """The networks that a run of this configuration starts from."""
    generator = torch_generator(config.seed, Stream.INIT)
    encoder, predictor = build_models(config.model, config.data.crop_size, generator)
    return _networks(encoder, predictor, config, 0)


def _networks(
    encoder: VisionTransformer, predictor: Predictor, config: Config, step: int
) -> Networks:
    weights = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    weights |= {f"predictor.{k}": v for k, v in predictor.state_dict().items()}
    where = device()
    return Networks(
        encoder=encoder.to(where).requires_grad_(False),
        predictor=predictor.to(where).requires_grad_(False),
        config=config,
        step=step,
        digest=_digest(weights, config),
    )


def _digest(weights: Mapping[str, Tensor], config: Config) -> str:
    masks = as_dict(config.masks)
    # contexts are taken whole
    del masks["truncation_group"]
    data = {name: as_dict(config.data)[name] for name in ("crop", "mean", "std")}
    settings = {"model": as_dict(config.model), "masks": masks, "data": data}
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].contiguous().cpu().numpy().data)
    return found.hexdigest()


def open_parts(root: str, data: DataConfig) -> tuple[evaluation.Split, evaluation.Split]:
    """Training and test part of any data set, labelled or not; see `evaluation.parts_of`."""
    return evaluation.parts_of(root, data, device())


def shown_images(root: str, data: DataConfig, limit: int, *, seed: int = 0) -> ShownImages:
    """Up to `limit` images of a data set: of its held-out part if that is a folder, else of all."""
    return load_pictures(evaluation.shown_part(root, data, device()), limit, seed=seed)


def choose(count: int, limit: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Up to `limit` of the numbers 0..count-1, keyed by the seed: int64, in random order."""
    generator = torch_generator(seed, Stream.PICTURE)
    return torch.randperm(count, generator=generator)[:limit].numpy()


def load_pictures(part: evaluation.Split, limit: int, *, seed: int = 0) -> ShownImages:
    """Decodes up to `limit` images of a part, drawn by the seed, under central windows; what cannot
    be decoded is named in the log and left out.

    Raises:
        ValueError: not one image can be decoded.
    """
    drawn = replace(part, rows=part.rows[choose(len(part.rows), limit, seed=seed)])
    found, index = drawn.load(), part.index
    return ShownImages(
        images=found.images,
        labels=found.labels,
        classes=index.classes,
        names=tuple(index.name(int(row)) for row in found.rows),
    )
