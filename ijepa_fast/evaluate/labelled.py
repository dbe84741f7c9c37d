"""k-nearest-neighbour accuracy of frozen features, beside raw pixels and the untrained network.

``python -m ijepa_fast.evaluate RUN --data DIR`` works on any run's folder and any labelled folder.
Features are the target encoder's last layer averaged over patches (paper, section 4, uses the
target encoder); images are cropped centrally.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.checkpoint import CheckpointError, load_latest
from ijepa_fast.cli import UsageError, parse
from ijepa_fast.config import Config, DataConfig
from ijepa_fast.data import Decoder, Index, make_decoder, open_index
from ijepa_fast.data.decoders import DecodeError
from ijepa_fast.data.shapes import write_shapes
from ijepa_fast.keyed_random import Stream, torch_generator, uniform
from ijepa_fast.knn import knn_accuracy
from ijepa_fast.model import VisionTransformer, build_models
from ijepa_fast.reference import normalise

__all__ = ["Split", "encoder_features", "knn_scores", "labelled_data", "load_run", "main", "pixels"]

TRAIN_SHARE = 0.8
BATCH = 256
PIXEL_SIDE = 64
_logger = logging.getLogger(__name__)


class Images(NamedTuple):
    """Decoded images uint8 (n, height, width, 3) and their labels int64 (n,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Split:
    """One part of a labelled data set, decoded a batch at a time.

    Attributes:
        index: the images.
        rows: int64 (n,), the rows of the index in this part.
        data: crop and decoder.
        device: where the decoder puts the images.
    """

    index: Index
    rows: NDArray[np.int64]
    data: DataConfig
    device: torch.device

    def load(self) -> Images:
        """All of it at once, on the CPU: for small sets."""
        parts = list(self.batches())
        return Images(
            torch.cat([p.images.cpu() for p in parts]), torch.cat([p.labels for p in parts])
        )

    def batches(self) -> Iterator[Images]:
        """Decodes batch after batch; what cannot be decoded is named in the log and left out.

        Raises:
            ValueError: not one image can be decoded.
        """
        decoder, _ = make_decoder(self.data, self.device, max_batch=BATCH)
        found = False
        try:
            for start in range(0, len(self.rows), BATCH):
                images, rows = _decode(
                    self.index, self.rows[start : start + BATCH], self.data, decoder
                )
                if len(rows):
                    found = True
                    yield Images(images, torch.from_numpy(self.index.label[rows].astype(np.int64)))
        finally:
            decoder.close()
        if not found:
            raise ValueError(
                f"data must hold images that can be decoded, got none in {self.index.roots[0]}"
            )


def central_windows(
    index: Index, rows: NDArray[np.int64], crop: tuple[int, int]
) -> NDArray[np.int32]:
    """The largest central window of the crop's shape in each image: int32 (n, 4) top, left,
    height, width.
    """
    height, width = index.height[rows].astype(np.int64), index.width[rows].astype(np.int64)
    inner_height = np.minimum(height, np.maximum(1, width * crop[0] // crop[1]))
    inner_width = np.minimum(width, np.maximum(1, height * crop[1] // crop[0]))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return np.stack([top, left, inner_height, inner_width], axis=1).astype(np.int32)


def _decode(
    index: Index, rows: NDArray[np.int64], data: DataConfig, decoder: Decoder
) -> tuple[Tensor, NDArray[np.int64]]:
    """The decodable images of these rows, and their rows."""
    while len(rows):
        try:
            encoded = [index.read(int(row)) for row in rows]
            windows = central_windows(index, rows, data.crop_size)
            return decoder.decode(encoded, windows, index.plain[rows]), rows
        except DecodeError as error:
            for row, reason in error.failures.items():
                _logger.warning("left out %s: %s", index.name(int(rows[row])), reason)
            rows = np.delete(rows, list(error.failures))
    return torch.empty(0), rows


def labelled_data(root: str, data: DataConfig, device: torch.device) -> tuple[Split, Split]:
    """Training and test part of a labelled folder.

    Args:
        root: `shapes`, or a folder with one sub-folder a class. With sub-folders `train` and
            `test` (or `val`) those are the split, else a keyed 80 % / 20 % split of the images.
        data: crop and decoder.
        device: the training device.

    Raises:
        ValueError: the folder has no images, fewer than two classes, or an empty part.
    """
    folder = write_shapes() if root == "shapes" else Path(root)
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out:
        parts = [open_index(folder / name)[0] for name in ("train", held_out)]
        if parts[0].classes != parts[1].classes:
            raise ValueError(
                f"classes of train and {held_out} must be the same, got "
                f"{list(parts[0].classes)[:5]}... and {list(parts[1].classes)[:5]}... in {root}"
            )
        chosen = [np.arange(len(part)) for part in parts]
    else:
        index = open_index(folder)[0]
        parts = [index, index]
        draws = uniform(0, Stream.SPLIT, 0, np.arange(len(index)), 1)[:, 0]
        chosen = [np.flatnonzero(draws < TRAIN_SHARE), np.flatnonzero(draws >= TRAIN_SHARE)]
    if len(parts[0].classes) < 2:
        raise ValueError(
            "data must have at least 2 classes (sub-folders), "
            f"got {len(parts[0].classes)} in {root}"
        )
    # images beside the class folders carry no label
    chosen = [c[p.label[c] >= 0] for p, c in zip(parts, chosen, strict=True)]
    if min(len(c) for c in chosen) == 0:
        raise ValueError(
            f"data must leave images for training and test, got an empty part in {root}"
        )
    train, test = (
        Split(index=part, rows=rows, data=data, device=device)
        for part, rows in zip(parts, chosen, strict=True)
    )
    return train, test


def pixels(images: Tensor, side: int = PIXEL_SIDE) -> Tensor:
    """Raw pixels as features, averaged down to at most side x side: float32 (n, h * w * 3)."""
    x = images.permute(0, 3, 1, 2)
    size = (min(x.shape[2], side), min(x.shape[3], side))
    parts = [F.adaptive_avg_pool2d(part.float(), size).flatten(1) for part in x.split(256)]
    return torch.cat(parts)


def _pixel_side(images: int) -> int:
    """64, or less where so many images would take more than 4 GiB."""
    return min(PIXEL_SIDE, max(8, int((2**32 / (12 * images)) ** 0.5)))


@torch.no_grad()
def encoder_features(
    encoder: VisionTransformer, images: Tensor, data: DataConfig, *, precision: str
) -> Tensor:
    """Average-pooled features of the last layer.

    Args:
        encoder: on the device to compute on.
        images: uint8 (n, height, width, 3).
        data: mean and std.
        precision: `bfloat16` autocasts matrix products.

    Returns:
        float32 (n, D) on the CPU.
    """
    device = next(encoder.parameters()).device
    mean, std = torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)
    pooled = []
    for part in images.split(128):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            features = encoder(normalise(part.to(device), mean, std))
        pooled.append(features.float().mean(dim=1).cpu())
    return torch.cat(pooled)


def knn_scores(
    encoders: Mapping[str, VisionTransformer],
    splits: tuple[Split, Split],
    config: Config,
    *,
    k: int = 20,
    with_pixels: bool = True,
) -> dict[str, float]:
    """kNN accuracy (cosine, centred) of raw pixels and of each encoder.

    Args:
        encoders: name -> encoder.
        splits: training and test images.
        config: data settings and precision.
        k: neighbours.
        with_pixels: also score raw pixels.

    Returns:
        name -> accuracy in 0..1, `raw pixels` first.
    """
    networks = dict(encoders)
    names = [*(["raw pixels"] if with_pixels else []), *networks]
    side = _pixel_side(len(splits[0].rows))
    features: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    for split in splits:
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        classes = []
        for images, label in split.batches():
            classes.append(label)
            for name in names:
                parts[name].append(
                    encoder_features(
                        networks[name], images, config.data, precision=config.optim.precision
                    )
                    if name in networks
                    else pixels(images.cpu(), side)
                )
        features.append({name: torch.cat(values) for name, values in parts.items()})
        labels.append(torch.cat(classes))
    k = min(k, len(labels[0]))
    return {
        name: knn_accuracy(features[0][name], labels[0], features[1][name], labels[1], k=k)
        for name in names
    }


def table(scores: Mapping[str, float]) -> str:
    """The scores for a person."""
    width = max(len(name) for name in scores)
    lines = [f"  {name:<{width}}  {100 * value:5.1f} %" for name, value in scores.items()]
    return "\n".join(["kNN accuracy (cosine, centred)", *lines])


def untrained(config: Config) -> VisionTransformer:
    """The encoder that the run started from."""
    generator = torch_generator(config.seed, Stream.INIT)
    return build_models(config.model, config.data.crop_size, generator)[0]


def load_run(
    run: Path, encoder: Literal["target", "context"] = "target"
) -> tuple[VisionTransformer, Config, int]:
    """The newest usable checkpoint of a run.

    Returns:
        Encoder on the CPU, the run's configuration, and the step.

    Raises:
        UsageError: not a run's folder, or it has no checkpoint.
        CheckpointError: all checkpoints are damaged.
    """
    if not (run / "config.yaml").is_file():
        raise UsageError(f"RUN must be the folder of a run (with config.yaml), got {run}")
    config = parse(["--config", str(run / "config.yaml")]).config
    state = load_latest(run / "checkpoints")
    if state is None:
        raise UsageError(f"RUN must have a checkpoint, got none in {run}")
    network = build_models(config.model, config.data.crop_size)[0]
    prefix = "target_encoder." if encoder == "target" else "encoder."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.tensors.items() if k.startswith(prefix)}
    )
    return network, config, state.step


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """kNN accuracy of a run's features on a labelled folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    data: str | None = None
    """Folder with one sub-folder a class, or `shapes`; by default the run's own eval.data."""
    encoder: Literal["target", "context"] = "target"
    """Which of the two encoders."""
    k: int = 20
    """Neighbours."""
    json: bool = False
    """Print JSON instead of the table."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = tyro.cli(EvaluateArgs, args=argv, prog="python -m ijepa_fast.evaluate")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if args.k < 1:
            raise UsageError(f"k must be at least 1, got {args.k}")
        encoder, config, step = load_run(args.run, args.encoder)
        root = args.data or config.eval.data
        if root is None:
            raise UsageError("data must be given (--data DIR): the run has no eval.data")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        splits = labelled_data(root, config.data, device)
        if args.k > len(splits[0].rows):
            raise UsageError(
                f"k must be at most the number of training images ({len(splits[0].rows)}), "
                f"got {args.k}"
            )
        encoders = {
            "untrained network": untrained(config).to(device),
            f"{args.encoder} encoder, step {step}": encoder.to(device),
        }
        scores = knn_scores(encoders, splits, config, k=args.k)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = (len(splits[0].rows), len(splits[1].rows))
    if args.json:
        result: dict[str, Any] = {"run": str(args.run), "data": root, "step": step, "k": args.k}
        print(json.dumps({**result, "images": counts, "knn": scores}, indent=1))
    else:
        print(table(scores))
        print(f"k = {args.k}, {counts[0]} training and {counts[1]} test images of {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
