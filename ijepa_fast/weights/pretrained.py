"""Weights as read from a file, whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError
from ijepa_fast.model import VisionTransformer

__all__ = [
    "METADATA",
    "NETWORKS",
    "EncoderKind",
    "Pretrained",
    "Shape",
    "channel_values",
    "network_of",
]

EncoderKind = Literal["target", "context"]
# the entry of a safetensors file's metadata in which our exports tell what shapes do not
METADATA = "ijepa_fast"
NETWORKS = ("encoder", "target_encoder", "predictor")
_MOST_CHANNEL = 1e6


def channel_values(name: str, values: object, where: str) -> tuple[float, float, float]:
    """The mean or std of the image channels.

    Args:
        name: `mean` or `std`.
        values: whatever a file or a flag has.
        where: the end of the error.

    Raises:
        UsageError: not three numbers, or a std not above 0.
    """
    least = 0.0 if name == "std" else -_MOST_CHANNEL
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(type(v) in (int, float) and least < v < _MOST_CHANNEL for v in values)
    ):
        rule = "3 numbers above 0" if name == "std" else "3 numbers"
        raise UsageError(f"{name} must be {rule}, got {values!r}{where}")
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What `VisionTransformer` is built from.

    Attributes:
        image_size: height and width in pixels.
        patch_size: side of a patch, pixels.
        width, depth, heads, mlp_hidden: D, blocks, H and F.
        in_channels: image channels.
    """

    image_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int
    in_channels: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


def network_of(shape: Shape) -> VisionTransformer:
    """A network of these dimensions, its weights not yet set."""
    return VisionTransformer(**vars(shape))


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights as read, under our names, float32.

    Attributes:
        networks: of `encoder`, `target_encoder` and `predictor` those that are there. A file with
            one encoder has it as `target_encoder`;
        only: which of the two that one is, None where the file does not tell.
        shape: of the encoders.
        mean, std: of the image channels, in 0-1 units.
        source: what this is, for a person.
        run: its folder, where it was read from the folder of a run of our own.
        config: of our own runs.
        step: of our own runs.
        images: of our own runs: how many it trained on.

    Example:
        >>> weights = ijepa_fast.read_weights("runs/mine")
        >>> weights.step, weights.shape.width, sorted(weights.networks)
        (3, 32, ['encoder', 'predictor', 'target_encoder'])
    """

    networks: Mapping[str, Mapping[str, Tensor]]
    shape: Shape
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    only: EncoderKind | None = "target"
    run: Path | None = None
    config: Config | None = None
    step: int | None = None
    images: int | None = None

    def kind(self, which: EncoderKind = "target") -> EncoderKind | None:
        """Which encoder `encoder(which)` gives: the one that is there, where it is the only one;
        None where that is not known.
        """
        return which if "encoder" in self.networks else self.only

    def title(self, which: EncoderKind = "target") -> str:
        """The same for a person: `target encoder`, `context encoder`, or `encoder`."""
        kind = self.kind(which)
        return f"{kind} encoder" if kind else "encoder"

    def with_normalisation(self, mean: object = None, std: object = None) -> "Pretrained":
        """With these instead of what the file tells; None keeps it.

        Raises:
            UsageError: see `channel_values`.
        """
        return replace(
            self,
            mean=self.mean if mean is None else channel_values("mean", mean, ""),
            std=self.std if std is None else channel_values("std", std, ""),
        )

    def doubt(self) -> str | None:
        """A warning where mean and std look like another library's default."""
        if {*self.mean, *self.std} != {0.5}:
            return None
        return (
            f"mean and std are 0.5 in {self.source}, the default of transformers' processor; "
            "I-JEPA was trained with ImageNet's: --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )

    def encoder(self, which: EncoderKind = "target") -> Mapping[str, Tensor]:
        """One encoder's weights; `target` also gives the one of a file that has only one.

        Raises:
            UsageError: there is no such encoder.
        """
        name = "target_encoder" if which in ("target", self.only) else "encoder"
        if name not in self.networks:
            there = ", ".join(sorted(self.networks))
            raise UsageError(f"encoder must be in the weights, got {which}: {self.source}: {there}")
        return self.networks[name]
