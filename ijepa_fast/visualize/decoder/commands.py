"""Commands around the decoder: its training, what the predictor believes, and the proof."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_fast import evaluation
from ijepa_fast.data import NAMES
from ijepa_fast.errors import UsageError
from ijepa_fast.state import write_file
from ijepa_fast.visualize import inputs
from ijepa_fast.visualize.decoder import predictor, proof
from ijepa_fast.visualize.decoder.conditions import block_side, conditions
from ijepa_fast.visualize.decoder.decoder import (
    Budget,
    Decoder,
    check_free,
    load_decoder,
    require_match,
    save_decoder,
    train_decoder,
)
from ijepa_fast.visualize.figure import check_out
from ijepa_fast.visualize.picture_commands import Picture, RunFolderArgument, at_least

__all__ = ["PredictorPicture", "Prove", "TrainDecoder"]

_logger = logging.getLogger(__name__)


def _train(
    networks: inputs.Networks,
    root: str,
    budget: Budget,
    *,
    images: int,
    passes: int,
    width: int,
    seed: int,
    run: str,
) -> Decoder:
    """A decoder from the training part of a data set."""
    config = networks.config
    pictures = inputs.load_pictures(inputs.open_parts(root, config.data)[0], images, seed=seed)
    side = block_side(config)
    given = conditions(networks, pictures.images, side=side, passes=passes)
    _logger.info(
        "%d blocks of %d images of %s, painted at %dx%d pixels",
        *(len(given), len(pictures.images), root, side, side),
    )
    about = {
        "run": run,
        "step": networks.step,
        "digest": networks.digest,
        "data": _named(root),
        "images": images,
        "passes": passes,
        "width": width,
    }
    return train_decoder(given, budget, about=about, seed=seed, width=width)


def _named(root: str) -> str:
    return root if root in NAMES else str(Path(root).resolve())


@dataclass(frozen=True, kw_only=True)
class TrainDecoder:
    """Trains what `predictor` and `prove` need: a decoder from predictions to pixels, on the
    training part of the data. I-JEPA is frozen.
    """

    run: RunFolderArgument
    """Folder of a run."""
    out: Path
    """New folder for the decoder."""
    data: str | None = None
    """Folder of images, or a named set; by default the run's."""
    minutes: float | None = None
    """Training time; by default 5 where no --steps are given."""
    steps: int | None = None
    """Training steps of 64 blocks: reproducible, where minutes are not."""
    images: int = 6000
    """Images that blocks are taken from, drawn by the seed."""
    passes: int = 2
    """Times that each image gets masks, with all its target blocks."""
    width: int = 32
    """Channels of the decoder, a multiple of 8."""
    seed: int = 0
    """Of images, initial weights and noise."""
    untrained: bool = False
    """Of the network that the run started from: the control of `prove`."""

    def do(self) -> None:
        """Trains and writes it."""
        check_free(self.out)
        at_least(1, steps=self.steps, images=self.images, passes=self.passes)
        if self.width < 8 or self.width % 8:
            raise UsageError(f"width must be a multiple of 8, got {self.width}")
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"minutes must be above 0, got {self.minutes:g}")
        networks = inputs.load_networks(self.run)
        if self.untrained:
            networks = inputs.untrained_networks(networks.config)
        minutes = 5.0 if self.minutes is None and self.steps is None else self.minutes
        decoder = _train(
            networks,
            inputs.source_of(self.data, networks.config),
            Budget(minutes, self.steps),
            images=self.images,
            passes=self.passes,
            width=self.width,
            seed=self.seed,
            run=str(self.run),
        )
        save_decoder(self.out, decoder)
        print(f"{self.out}: {decoder.about['steps']} steps, loss {decoder.about['loss']:.4f}")


@dataclass(frozen=True, kw_only=True)
class PredictorPicture(Picture):
    """What the predictor believes is behind a block: samples of the block from its prediction."""

    run: RunFolderArgument
    """Folder of a run."""
    decoder: Path
    """Folder of its decoder (train-decoder)."""
    data: str | None = None
    """Folder of images (its test part), or a named set; by default the run's."""
    images: int = 6
    """Images shown."""
    seeds: int = 5
    """Completions of each."""
    guidance: float = 1.0
    """Above 1 exaggerates what the prediction says (classifier-free guidance)."""
    sampling_steps: int = 30
    """Steps of the sampler."""
    seed: int = 0
    """Which images and blocks."""

    def do(self) -> None:
        """Draws the picture and writes `out`."""
        check_out(self.out, ".png", overwrite=self.overwrite)
        at_least(1, images=self.images, seeds=self.seeds, sampling_steps=self.sampling_steps)
        networks = inputs.load_networks(self.run)
        decoder = load_decoder(self.decoder)
        require_match(decoder, networks, self.decoder)
        config, root = networks.config, inputs.source_of(self.data, networks.config)
        pictures = inputs.load_pictures(
            inputs.open_parts(root, config.data)[1], self.images, seed=self.seed
        )
        given = predictor.held_out(networks, pictures.images, side=decoder.side, seed=self.seed)
        completions = [
            decoder.sample(given, seed=seed, steps=self.sampling_steps, guidance=self.guidance)
            for seed in range(self.seeds)
        ]
        guided = "" if self.guidance == 1 else f", guidance {self.guidance:g}"
        title = (
            f"{self.run.name}, step {networks.step}: completions (green) painted from the averaged "
            f"prediction\nand the block's place alone; held-out images, contexts whole{guided}"
        )
        predictor.draw_predictor(
            self.out,
            pictures,
            given,
            completions,
            patch_size=config.model.patch_size,
            title=title,
        )
        print(f"{self.out}: {len(given)} blocks of {root}, {self.seeds} completions each")


@dataclass(frozen=True, kw_only=True)
class Prove:
    """Measures on held-out blocks whether completions show the hidden class."""

    run: RunFolderArgument
    """Folder of a run."""
    decoder: Path
    """Folder of its decoder (train-decoder)."""
    out: Path
    """JSON file to write."""
    data: str | None = None
    """Labelled folder or named set: the one that the decoder was trained on; by default the
    run's."""
    control: Path | None = None
    """Folder of a decoder of the untrained network (train-decoder --untrained), trained as long; by
    default it is trained now, with the decoder's own settings."""
    blocks: int = 500
    """Held-out images, one block each."""
    seeds: int = 3
    """Completions of each."""
    guidance: float = 1.0
    """Of sampling; 1 is none."""
    sampling_steps: int = 30
    """Steps of the sampler."""
    overwrite: bool = False
    """Replace the file if it is there."""

    def do(self) -> None:
        """Measures, prints and writes."""
        check_out(self.out, ".json", overwrite=self.overwrite)
        at_least(2, blocks=self.blocks)
        at_least(1, seeds=self.seeds, sampling_steps=self.sampling_steps)
        networks = inputs.load_networks(self.run)
        decoder = load_decoder(self.decoder)
        require_match(decoder, networks, self.decoder)
        config, root = networks.config, inputs.source_of(self.data, networks.config)
        about = decoder.about
        if about["data"] != _named(root):
            raise UsageError(
                f"data must be what the decoder was trained on ({about['data']}), so that the rest "
                f"is held out, got {_named(root)}"
            )
        untrained = inputs.untrained_networks(config)
        parts = evaluation.labelled_data(root, config.data, inputs.device())
        held_out = inputs.load_pictures(parts[1], self.blocks)
        control = self._control(untrained, root, about)
        train = inputs.load_pictures(parts[0], int(about["images"]), seed=int(about["seed"]))
        side, passes = decoder.side, int(about["passes"])
        crops = conditions(untrained, train.images, side=side, passes=passes)
        _logger.info("training the classifier on %d real crops", len(crops))
        classifier = proof.train_classifier(
            crops.pixels, train.labels[crops.image], len(train.classes)
        )
        given = predictor.held_out(networks, held_out.images, side=side)
        _logger.info("painting 3 x %d x %d blocks", len(given), self.seeds)
        result = proof.prove(
            given,
            held_out.labels,
            decoder,
            (predictor.held_out(untrained, held_out.images, side=side), control),
            classifier,
            seeds=self.seeds,
            steps=self.sampling_steps,
            guidance=self.guidance,
        )
        whole = {
            "run": str(self.run),
            "step": networks.step,
            "data": root,
            "classes": list(train.classes),
            "real_crops": len(crops),
            **result,
            "decoder": dict(about),
            "control": dict(control.about),
        }
        self.out.unlink(missing_ok=True)
        write_file(self.out, [(json.dumps(whole, indent=1) + "\n").encode()])
        print(proof.as_text(result))
        print(f"written to {self.out}")

    def _control(self, untrained: inputs.Networks, root: str, about: Mapping[str, Any]) -> Decoder:
        names = ("data", "images", "passes", "steps", "width", "seed")
        if self.control:
            control = load_decoder(self.control)
            require_match(control, untrained, self.control)
            for name in names:
                if control.about[name] != about[name]:
                    raise UsageError(
                        f"control must be trained as the decoder was ({name} {about[name]}), "
                        f"got {control.about[name]} in {self.control}"
                    )
            return control
        _logger.info("training the control: a decoder of the untrained network")
        settings = {name: int(about[name]) for name in ("images", "passes", "width", "seed")}
        budget = Budget(None, int(about["steps"]))
        return _train(untrained, root, budget, run=str(self.run), **settings)
