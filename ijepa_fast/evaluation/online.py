"""Evaluation of a run's features while it trains: kNN on a labelled set, and monitors without
labels.

Monitors are of `monitors.py`, on the same few training images every time: feature std and RankMe
of the target encoder's patch features, LiDAR over random crops, and the cosine between prediction
and target.
"""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.data import Index
from ijepa_fast.evaluation import monitors
from ijepa_fast.evaluation.features import encoder_of, untrained
from ijepa_fast.evaluation.labelled import Split, labelled_data
from ijepa_fast.evaluation.scores import final_table, knn_scores
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import Masks, sample_masks
from ijepa_fast.model import Predictor, VisionTransformer, build_models
from ijepa_fast.reference import latent_targets, normalise, predict

__all__ = ["UNTRAINED", "OnlineEvaluation", "evaluation_interval"]

_Network = TypeVar("_Network", VisionTransformer, Predictor)
UNTRAINED = "untrained network"
IMAGES = 64
VIEWS = 4
# patches of each image whose features enter RankMe: 2,048 rows, a singular value decomposition of
# some hundred milliseconds at the largest width
PATCHES = 32
# of the labelled set, unless all of it is asked for
TRAIN_ROWS, TEST_ROWS = 2048, 512
# views are crops of these shares of an image, whatever the recipe's are: without crops all views
# were the same
VIEW_SCALE, VIEW_RATIO = (0.3, 1.0), (3 / 4, 4 / 3)
# not below so many test images
_FEWEST = 64
SHARE = 0.004
_MOST_BETWEEN = 50
# a step's forward and backward passes of both encoders and the predictor, in forward passes of one
FORWARDS = 4


def evaluation_interval(config: Config, steps: int, world: int = 1) -> int:
    """Steps between two evaluations; 0 where there are none. `eval.every`, or as often as 0.4 % of
    the run's work pays for, those at the start and the end included, at most 50 times between them.
    It is counted in forward passes and comes to 0.6 % of the time on a CPU (docs/speed.md).

    Args:
        config: of the run.
        steps: of the whole run.
        world: ranks: one evaluates while the others wait.
    """
    if config.eval.every is not None:
        return config.eval.every
    if not config.eval.data:
        return 0
    images = IMAGES * (1 + VIEWS) + TRAIN_ROWS + TEST_ROWS
    paid = int(SHARE * FORWARDS * config.batch.global_ * steps / (images * world))
    between = min(max(paid - 2, 0), _MOST_BETWEEN)
    return math.ceil(steps / (between + 1))


class OnlineEvaluation:
    """Computes rows for `metrics.jsonl` on one rank.

    Args:
        config: of the run.
        index: its training images.
        device: where to compute.
        steps: of the run.
        world: ranks.

    Attributes:
        part: training and test images of an evaluation that is not of all; None until the first.
    """

    def __init__(
        self, config: Config, index: Index, device: torch.device, *, steps: int, world: int
    ) -> None:
        self.config, self.index, self.device = config, index, device
        self.steps, self.world = steps, world
        self.part: tuple[int, int] | None = None

    def networks(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[VisionTransformer, VisionTransformer, Predictor]:
        """Context encoder, target encoder and predictor of a run's whole weights, on the device."""

        def filled(name: str, network: _Network) -> _Network:
            prefix = f"{name}."
            network.to_empty(device=self.device).load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
            return network.eval().requires_grad_(False)

        # without memory and without drawing weights that are replaced
        with torch.device("meta"):
            context, predictor = build_models(self.config.model, self.config.data.crop_size)
            target = copy.deepcopy(context)
        return (
            filled("encoder", context),
            filled("target_encoder", target),
            filled("predictor", predictor),
        )

    def row(
        self, weights: Mapping[str, Tensor], name: str, *, whole: bool, first: bool
    ) -> dict[str, Any]:
        """One row, without its step; an empty one where the run is too short for an evaluation.

        Args:
            weights: `encoder.*`, `target_encoder.*` and `predictor.*`, whole.
            name: of the target encoder at this step.
            whole: the table, on all of the labelled set, not a part of it; not for the first.
            first: also kNN of raw pixels and of the untrained network.

        Returns:
            `monitors`; if there is a labelled set `data`, `knn`, on a part of it `images`, and on
            all of it `table`, see `final_table`; `timing`.
        """
        started = time.perf_counter()
        context, target, predictor = self.networks(weights)
        if self.part is None:
            self.part = self._affordable(target)
        if not all(self.part):
            return {}
        row: dict[str, Any] = {"monitors": self.monitors(context, target, predictor)}
        if self.config.eval.data:
            splits = self._labelled
            if not whole:
                every = [len(split.rows) for split in splits]
                splits = (_part(splits[0], self.part[0]), _part(splits[1], self.part[1]))
                taken = [len(split.rows) for split in splits]
                if taken != every:
                    row["images"] = taken
            row["data"] = self.config.eval.data
            encoders = {name: encoder_of(self.config, target)}
            if name != UNTRAINED and (first or whole):
                encoders = {UNTRAINED: untrained(self.config).to(self.device), **encoders}
            precision = self.config.optim.precision
            if whole:
                row["table"] = final_table(encoders, splits, precision=precision)
                row["knn"] = {name: row["table"][name]["kNN"]}
            else:
                row["knn"] = knn_scores(encoders, splits, precision=precision, with_pixels=first)
        seconds = time.perf_counter() - started
        return {**row, "timing": {"evaluation_seconds": round(seconds, 3)}}

    @torch.no_grad()
    def _affordable(self, encoder: VisionTransformer) -> tuple[int, int]:
        """Training and test images that `eval.seconds` pays for, by one forward pass that is
        measured: none where the run's steps take less.
        """
        asked, part = self.config.eval, (TRAIN_ROWS, TEST_ROWS)
        limit = asked.seconds
        if not limit or asked.whole or asked.every is not None:
            return part
        mean, std = (torch.zeros(3, device=self.device), torch.ones(3, device=self.device))
        x = normalise(self._images[0].to(self.device), mean, std)
        half, seconds = self.config.optim.precision == "bfloat16", 0.0
        # the first pass pays for what is made once
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                encoder(x).float().sum().item()
            seconds = (time.perf_counter() - started) / len(x)
        forwards = FORWARDS * self.config.batch.global_ * self.steps / self.world
        if forwards * seconds < limit:
            return 0, 0
        while sum(part) * seconds > limit and part[1] > _FEWEST:
            part = part[0] // 2, part[1] // 2
        return part

    @cached_property
    def _labelled(self) -> tuple[Split, Split]:
        return labelled_data(
            str(self.config.eval.data), self.config.data, self.device, name="eval.data"
        )

    @cached_property
    def _images(self) -> tuple[Tensor, list[Tensor]]:
        """The images of every evaluation: whole, and a few random crops of each."""
        # a reader of its own, so that nothing is quarantined on behalf of the run
        split = Split(
            index=self.index,
            rows=_spread(len(self.index), IMAGES),
            data=replace(self.config.data, threads=1),
            device=self.device,
        )
        images, _, rows = split.load()
        scattered = replace(split.data, scale=VIEW_SCALE, ratio=VIEW_RATIO)
        crops = replace(split, rows=rows, data=scattered)
        views = [
            torch.cat([part.images.cpu() for part in crops.crops(self.config.seed, view)])
            for view in range(VIEWS)
        ]
        return images, views

    @cached_property
    def untrained(self) -> dict[str, float]:
        """The monitors of the network that a run without `init` starts from."""
        generator = torch_generator(self.config.seed, Stream.INIT)
        encoder, predictor = build_models(self.config.model, self.config.data.crop_size, generator)
        encoder, predictor = encoder.to(self.device).eval(), predictor.to(self.device).eval()
        return self.monitors(encoder, encoder, predictor)

    @torch.no_grad()
    def monitors(
        self, context: VisionTransformer, target: VisionTransformer, predictor: Predictor
    ) -> dict[str, float]:
        """Numbers about the features of the run's own images; see `monitors`."""
        config = self.config
        images, views = self._images
        mean, std = (
            torch.tensor(values, device=self.device)
            for values in (config.data.mean, config.data.std)
        )
        half = config.optim.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            x = normalise(images.to(self.device), mean, std)
            features = target(x).float()
            masks = self._masks(len(images))
            prediction = predict(context, predictor, x, masks).float()
            pooled = [
                target(normalise(view.to(self.device), mean, std)).float().mean(dim=1)
                for view in views
            ]
        goal = latent_targets(features, masks)[:, None].expand(prediction.shape)
        # of image after image, so that `shuffled` pairs different images
        by_image = (2, 0, 1, 3, 4)
        patch_rows = _spread(features.shape[1], PATCHES)
        rows = features[:, torch.from_numpy(patch_rows).to(self.device)].flatten(0, 1)
        numbers = {
            "feature_std": monitors.feature_std(rows),
            "rankme": monitors.rankme(rows),
            **monitors.prediction_cosine(
                prediction.permute(by_image).flatten(0, 3), goal.permute(by_image).flatten(0, 3)
            ),
        }
        if len(images) > 1:
            numbers["lidar"] = monitors.lidar(torch.stack(pooled, dim=1))
        return {key: round(value, 6) for key, value in numbers.items()}

    def _masks(self, images: int) -> Masks:
        """Always the same, whole contexts."""
        whole = replace(self.config.masks, truncation_group=1)
        masks = sample_masks(
            whole,
            grid=self.config.grid,
            seed=self.config.seed,
            step=0,
            positions=np.arange(images),
        )
        return masks.to(self.device)


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """At most so many of the numbers 0..count-1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def _part(split: Split, most: int) -> Split:
    """Evenly spread rows: all classes in their shares, as the rows are sorted by class."""
    return replace(split, rows=split.rows[_spread(len(split.rows), most)])
