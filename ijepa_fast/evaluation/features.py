"""Features of labelled images, computed once for all that is made of them."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.data import progress
from ijepa_fast.evaluation.labelled import Images, Split
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import VisionTransformer, build_models
from ijepa_fast.weights import Encoder

__all__ = [
    "LAST",
    "LAST_FOUR",
    "PIXELS",
    "SMALL",
    "Features",
    "encoder_of",
    "extract",
    "pixels",
    "pooled_layers",
    "shown",
    "untrained",
]

PIXELS = "raw pixels"
LAST = "last"
LAST_FOUR = "last 4"
SMALL = "small"
_PIXEL_SIDE = 64
# of those that regressions get: their time grows with the cube of the width
_SMALL_SIDE = 32
# of the pixels of all training images
_MOST_BYTES = 2**32


def encoder_of(config: Config, network: VisionTransformer) -> Encoder:
    """A network of a run with its images' normalisation, on the network's device."""
    data, device = config.data, network.pos_embed.device
    encoder = Encoder(network, patch_size=config.model.patch_size, mean=data.mean, std=data.std)
    return encoder.to(device)


def untrained(config: Config) -> Encoder:
    """The encoder that a run without `init` starts from, on the CPU."""
    generator = torch_generator(config.seed, Stream.INIT)
    return encoder_of(config, build_models(config.model, config.data.crop_size, generator)[0])


def pixels(images: Tensor, side: int = _PIXEL_SIDE) -> Tensor:
    """Raw pixels as features, averaged down to at most side x side: float32 (n, h * w * 3)."""
    x = images.permute(0, 3, 1, 2)
    size = (min(x.shape[2], side), min(x.shape[3], side))
    parts = [F.adaptive_avg_pool2d(part.float(), size).flatten(1) for part in x.split(256)]
    return torch.cat(parts)


def _pixel_side(images: int) -> int:
    """64, or less where so many images would take more than 4 GiB."""
    return min(_PIXEL_SIDE, max(8, int((_MOST_BYTES / (12 * images)) ** 0.5)))


@torch.no_grad()
def pooled_layers(
    encoder: Encoder, images: Tensor, *, four: bool, half: bool, at_once: int = 128
) -> dict[str, Tensor]:
    """Average-pooled features of the last layer, and of the last four one after the other, each
    after the final norm.
    """
    parts: dict[str, list[Tensor]] = {LAST: [], LAST_FOUR: []}
    count = min(4, len(encoder.network.blocks)) if four else 1
    for part in images.split(at_once):
        x = encoder.normalise(part)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            layers = encoder.get_intermediate_layers(x, count)
        pooled = [layer.float().mean(dim=1).cpu() for layer in layers]
        parts[LAST].append(pooled[-1])
        if four:
            parts[LAST_FOUR].append(torch.cat(pooled, dim=1))
    return {name: torch.cat(values) for name, values in parts.items() if values}


def shown(parts: Iterable[Images], what: str, total: int, *, bar: bool) -> Iterator[Images]:
    """The same batches, and how far they are: in a bar on a terminal, if it is wanted, or in a line
    every ten seconds.
    """
    return progress(parts, what, total, bar=bar, images=lambda part: len(part.rows))


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of one part of a labelled data set.

    Attributes:
        sets: subject -> feature set -> float32 (n, width) on the CPU.
        labels: int64 (n,).
    """

    sets: Mapping[str, Mapping[str, Tensor]]
    labels: Tensor


def extract(
    encoders: Mapping[str, Encoder],
    split: Split,
    *,
    training_images: int,
    precision: str,
    four: bool = False,
    with_pixels: bool = True,
    bar: bool = False,
) -> Features:
    """Decodes a part once and computes the features of every subject.

    Args:
        encoders: name -> encoder, on the device to compute on.
        split: the part.
        training_images: of the training part: how large pixels may be.
        precision: `bfloat16` autocasts matrix products.
        four: also the last four layers, and smaller pixels: what regressions take.
        with_pixels: also raw pixels, as the first subject.
        bar: see `shown`.

    Raises:
        ValueError: not one image can be decoded.
    """
    names = [*([PIXELS] if with_pixels else []), *encoders]
    parts: dict[str, dict[str, list[Tensor]]] = {name: {} for name in names}
    labels = []
    side = _pixel_side(training_images)
    for images, label, _ in shown(split.batches(), "features", len(split.rows), bar=bar):
        labels.append(label)
        for name in names:
            if name in encoders:
                half = precision == "bfloat16"
                computed = pooled_layers(encoders[name], images, four=four, half=half)
            else:
                computed = {LAST: pixels(images.cpu(), side)}
                if four:
                    computed[SMALL] = pixels(images.cpu(), min(side, _SMALL_SIDE))
            for key, value in computed.items():
                parts[name].setdefault(key, []).append(value)
    sets = {
        name: {key: torch.cat(values) for key, values in of.items()} for name, of in parts.items()
    }
    return Features(sets=sets, labels=torch.cat(labels))
