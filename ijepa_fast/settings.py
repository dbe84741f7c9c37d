"""Settings that neither a preset nor the user gives: looks at the data and the machine for the rule
in `config/choose.py`, or takes those that the run began with.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ijepa_fast import estimate
from ijepa_fast.config import (
    ARCHITECTURES,
    Config,
    Facts,
    Invocation,
    choose,
    describe,
    parse,
    read_yaml,
)
from ijepa_fast.data import Index, open_index
from ijepa_fast.evaluation import labelled_data
from ijepa_fast.masks import check_masks
from ijepa_fast.ranks import distributed
from ijepa_fast.state import Console, checkpoint_folders
from ijepa_fast.weights import read_weights

__all__ = ["settle"]

_logger = logging.getLogger(__name__)

# with fewer labelled images an accuracy says nothing
MIN_LABELLED, MIN_OF_A_CLASS = 100, 5


def settle(argv: list[str] | None, invocation: Invocation, ranks: distributed.Ranks) -> Invocation:
    """The invocation with all settings, on every rank; its notes say what was chosen.

    Args:
        argv: the command line that was parsed.
        invocation: of it, with settings left open.
        ranks: this rank.

    Raises:
        ValueError: the data set cannot be used.
    """
    config, lines = invocation.config, list[str]()
    # masks that are given on a grid that is given are refused before the data are read
    check_masks(config.masks, config.grid)

    def decide() -> dict[str, Any]:
        recorded = Path(config.out) / "config.yaml"
        if checkpoint_folders(Path(config.out) / "checkpoints") and recorded.is_file():
            old = read_yaml(recorded)
            assert isinstance(old, dict), "no released trainer's file"
            lines.append(f"settings that are not given are those of {recorded}")
            return {key: old[key] for key in invocation.open_ if key in old}
        _logger.info("looking at the images in %s", ", ".join(config.data.sources))
        facts = _facts(config, ranks)
        choices = choose(facts, invocation.given, invocation.open_)
        lines.extend(describe(facts, choices))
        return choices

    with _shown(sys.stderr if invocation.print_config else sys.stdout):
        choices = distributed.on_main(ranks, decide)
    text = np.frombuffer(json.dumps(choices).encode(), np.uint8)
    told = distributed.broadcast_arrays({"json": text} if ranks.is_main else None)
    settled = parse(argv, json.loads(told["json"].tobytes()))
    return replace(settled, notes=(*settled.notes, *lines))


@contextlib.contextmanager
def _shown(stream: Any) -> Iterator[None]:
    """Shows what the package logs before a run's folder does: a large data set takes minutes."""
    logger, handler = logging.getLogger("ijepa_fast"), Console(stream)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _facts(config: Config, ranks: distributed.Ranks) -> Facts:
    index, _ = open_index(config.data.sources, allow_missing=config.data.allow_missing)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Facts(
        images=len(index),
        height=int(np.median(index.height)),
        width=int(np.median(index.width)),
        device=ranks.device.type,
        memory=estimate.device_memory(ranks.device, ranks.local_world),
        cores=max((cores or 1) // ranks.local_world, 1),
        bfloat16=not distributed.slow_bfloat16(ranks.device),
        world=ranks.world,
        labelled=_labelled(config, index, ranks.device),
        network=_network(config.init) if config.init and Path(config.init).exists() else None,
    )


def _network(init: str) -> dict[str, Any]:
    """Settings of the network that these weights are of."""
    read = read_weights(init)
    shape, predictor = read.shape, read.networks.get("predictor")
    dims = {name: getattr(shape, name) for name in ("width", "depth", "heads", "mlp_hidden")}
    named = [name for name, a in ARCHITECTURES.items() if dims.items() <= vars(a).items()]
    settings: dict[str, Any] = {"name": named[0]} if named else {"name": "vit_base", **dims}
    if predictor:
        blocks = {key.split(".")[1] for key in predictor if key.startswith("predictor_blocks.")}
        width = len(predictor["predictor_embed.weight"])
        settings |= {"predictor_width": width, "predictor_depth": len(blocks)}
    settings["patch_size"] = shape.patch_size
    return {f"model.{name}": value for name, value in settings.items()}


def _labelled(config: Config, index: Index, device: torch.device) -> str | None:
    """The images as a labelled data set, if they are one and large enough."""
    sources, labels = config.data.sources, int((index.label >= 0).sum())
    if len(sources) > 1 or labels < max(MIN_LABELLED, MIN_OF_A_CLASS * len(index.classes)):
        return None
    try:
        labelled_data(sources[0], config.data, device)
    except ValueError:
        return None
    return sources[0]
