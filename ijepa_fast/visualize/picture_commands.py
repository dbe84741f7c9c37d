"""Commands that draw data, masks, curves and features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ijepa_fast.errors import UsageError
from ijepa_fast.visualize import curves, feature_pictures, inputs, masks, report
from ijepa_fast.visualize.figure import check_out

__all__ = [
    "CurvePicture",
    "MaskPicture",
    "NeighbourPicture",
    "PcaPicture",
    "Picture",
    "Report",
    "RunFolderArgument",
    "at_least",
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
        root = inputs.source_of(self.data or next(iter(config.data.sources), None), config)
        pictures = inputs.shown_images(root, config.data, self.images, seed=self.seed)
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
class Report:
    """One page about a run: settings, curves, accuracies, and the pictures in its folder."""

    run: RunFolderArgument
    """Folder of a run."""
    out: Path | None = None
    """HTML file to write; by default RUN/report.html, which is replaced."""
    overwrite: bool = False
    """Replace the file if it is there."""

    def do(self) -> None:
        """Writes the page."""
        if not (self.run / "config.yaml").is_file():
            raise UsageError(f"RUN must be the folder of a run (with config.yaml), got {self.run}")
        out = self.out or self.run / "report.html"
        check_out(out, ".html", overwrite=self.overwrite or not self.out)
        report.write_report(out, self.run)
        print(out)


@dataclass(frozen=True, kw_only=True)
class PcaPicture(Picture):
    """First three principal components of patch features as colours, beside the images."""

    run: RunOrWeights
    """A run, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str | None = None
    """Folder of images (its sub-folder test or val if there is one), or a named set; by default the
    run's."""
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
        opened = inputs.open_weights(self.run)
        root = inputs.source_of(self.data, opened.config)
        shown = feature_pictures.pca(
            self.out, opened, root, images=self.images, size=self.size, seed=self.seed
        )
        print(f"{self.out}: {shown}")


@dataclass(frozen=True, kw_only=True)
class NeighbourPicture(Picture):
    """Images and those nearest to them by cosine of centred pooled features."""

    run: RunOrWeights
    """A run, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str | None = None
    """Folder of images (its sub-folder test or val if there is one), or a named set; by default the
    run's."""
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
        opened = inputs.open_weights(self.run)
        root = inputs.source_of(self.data, opened.config)
        keys = {"pool": self.pool, "queries": self.queries, "k": self.k, "seed": self.seed}
        print(f"{self.out}: {feature_pictures.neighbours(self.out, opened, root, **keys)}")
