"""Weights as read from a file, whoever wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ijepa_fast.cli import UsageError
from ijepa_fast.config import Config

__all__ = ["METADATA", "NETWORKS", "Pretrained", "Shape", "Which"]

Which = Literal["target", "context"]
# the entry of a safetensors file's metadata in which our exports tell what shapes do not
METADATA = "ijepa_fast"
NETWORKS = ("encoder", "target_encoder", "predictor")


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


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights as read, under our names, float32.

    Attributes:
        networks: of `encoder`, `target_encoder` and `predictor` those that are there. A file with
            one encoder has it as `target_encoder`.
        shape: of the encoders.
        mean, std: of the image channels, in 0-1 units.
        source: what this is, for a person.
        config: of our own runs.
        step: of our own runs.
        images: of our own runs: how many it trained on.
    """

    networks: Mapping[str, Mapping[str, Tensor]]
    shape: Shape
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    config: Config | None = None
    step: int | None = None
    images: int | None = None

    def encoder(self, which: Which = "target") -> Mapping[str, Tensor]:
        """One encoder's weights.

        Raises:
            UsageError: there is no such encoder.
        """
        name = "target_encoder" if which == "target" else "encoder"
        if name not in self.networks:
            there = ", ".join(sorted(self.networks))
            raise UsageError(f"encoder must be in the weights, got {which}: {self.source}: {there}")
        return self.networks[name]
