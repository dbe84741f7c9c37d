"""Commands that draw data, masks, curves and features."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError
from ijepa_fast.visualize import curves, feature_pictures, inputs, masks
from ijepa_fast.visualize.figure import check_out

__all__ = [
    "CurvePicture",
    "MaskPicture",
    "NeighbourPicture",
    "PcaPicture",
    "Picture",
    "RunFolderArgument",
    "at_least",
    "source_of",
]

RunFolderArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
RunOrWeights = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]


def at_least(low: float, **values: float | None) -> None:
    """Refuses values below a bound; None is no value.

    Raises:
        UsageError: names the argument.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise UsageError(f"{name} must be at least {low:g}, got {value:g}")


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


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What every picture is told: the file to write, and whether it may replace another."""

    out: Path
    """PNG file to write."""
    overwrite: bool = False
    """Replace the file if it is there."""


@dataclass(frozen=True, kw_only=True)
class MaskPicture(Picture):
    """Context and target blocks over real images, in both geometries."""

    data: str | None = None
    """Folder of images, or a named set; by default the configuration's."""
    preset: str | None = None
    """Named recipe, as for training."""
    config: Path | None = None
    """YAML file, or a run's folder."""
    images: int = 4
    """Images shown."""
    seed: int = 0
    """Which images, and their masks."""
    step: int = 0
    """Training step whose masks are shown."""

    def do(self) -> None:
        """Draws the picture and writes `out`."""
        check_out(self.out, ".png", overwrite=self.overwrite)
        at_least(1, images=self.images)
        config = inputs.read_config(self.config, self.preset)
        root = source_of(self.data or next(iter(config.data.sources), None), config)
        pictures = inputs.load_pictures(
            inputs.open_parts(root, config.data)[1], self.images, seed=self.seed
        )
        images, keys = pictures.images.numpy(), {"seed": self.seed, "step": self.step}
        masks.draw_geometries(self.out, images, config.masks, config.grid, **keys)
        print(f"{self.out}: masks of {len(pictures.images)} images of {root}")


@dataclass(frozen=True, kw_only=True)
class CurvePicture(Picture):
    """Loss, schedules, speed and scores of one or several runs over the step."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs."""

    def do(self) -> None:
        """Draws the picture and writes `out`."""
        check_out(self.out, ".png", overwrite=self.overwrite)
        if not self.runs:
            raise UsageError("RUN must be given: at least one folder of a run")
        runs = curves.read_runs(self.runs)
        titles = curves.draw_curves(self.out, runs)
        print(f"{self.out}: {', '.join(titles)} of {', '.join(runs)}")


@dataclass(frozen=True, kw_only=True)
class PcaPicture(Picture):
    """First three principal components of patch features as colours, beside the images."""

    run: RunOrWeights
    """A run, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str | None = None
    """Folder of images (its test part), or a named set; by default the run's."""
    images: int = 12
    """Images shown; one PCA over all of them."""
    size: int | None = None
    """Height of the images in pixels, a multiple of the patch size; by default the crop's. The
    width follows. The encoder's positions are interpolated."""
    seed: int = 0
    """Chooses the images; the same seed, the same images."""

    def do(self) -> None:
        """Draws the picture and writes `out`."""
        check_out(self.out, ".png", overwrite=self.overwrite)
        at_least(1, images=self.images, size=self.size)
        encoder, data, config, name = inputs.open_weights(self.run)
        height, width = data.crop_size
        patch = encoder.patch_size
        if self.size:
            other = patch * max(1, round(self.size * width / height / patch))
            data = replace(data, crop=(self.size, other))
        root = source_of(self.data, config)
        pictures = inputs.load_pictures(
            inputs.open_parts(root, data)[1], self.images, seed=self.seed
        )
        found = feature_pictures.patch_features(encoder, pictures.images)
        grid = (data.crop_size[0] // patch, data.crop_size[1] // patch)
        colours = feature_pictures.pca_colours(found).reshape(len(found), *grid, 3)
        title = f"{name}: principal components 1-3 of {grid[0]}x{grid[1]} patch features"
        feature_pictures.draw_pca(self.out, pictures, colours, title)
        print(f"{self.out}: {len(found)} images of {root}, {name}")


@dataclass(frozen=True, kw_only=True)
class NeighbourPicture(Picture):
    """Images and those nearest to them by cosine of centred pooled features."""

    run: RunOrWeights
    """A run, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str | None = None
    """Folder of images (its test part), or a named set; by default the run's."""
    pool: int = 2000
    """Images among which neighbours are looked for."""
    queries: int = 6
    """Images whose neighbours are shown."""
    k: int = 8
    """Neighbours of each."""
    seed: int = 0
    """Chooses the images; the same seed, the same images."""

    def do(self) -> None:
        """Draws the picture and writes `out`."""
        check_out(self.out, ".png", overwrite=self.overwrite)
        at_least(1, queries=self.queries, k=self.k)
        at_least(2, pool=self.pool)
        encoder, data, config, name = inputs.open_weights(self.run)
        root = source_of(self.data, config)
        pictures = inputs.load_pictures(inputs.open_parts(root, data)[1], self.pool, seed=self.seed)
        found = feature_pictures.pooled_features(encoder, pictures.images)
        queries = inputs.choose(len(found), self.queries, seed=self.seed + 1)
        near = feature_pictures.nearest(found, queries, self.k)
        same = [
            pictures.labels[query] == pictures.labels[int(row)]
            for query, rows in zip(queries, near.rows, strict=True)
            for row in rows
            if pictures.label(int(query))
        ]
        words = f"; {int(sum(same))} of {len(same)} have the query's class" if same else ""
        title = f"{name}: nearest of {len(found)} images, cosine of centred pooled features{words}"
        feature_pictures.draw_neighbours(self.out, pictures, queries, near, title)
        print(f"{self.out}: {root}, {title}")
