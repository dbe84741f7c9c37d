"""Weights as read from a file, whoever wrote it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError

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
            one encoder has it as `target_encoder`;
        only: which of the two that one is, None where the file does not tell.
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
    only: Which | None = "target"
    config: Config | None = None
    step: int | None = None
    images: int | None = None

    def kind(self, which: Which = "target") -> Which | None:
        """Which encoder `encoder(which)` gives: the one that is there, where it is the only one;
        None where that is not known.
        """
        return which if "encoder" in self.networks else self.only

    def title(self, which: Which = "target") -> str:
        """The same for a person: `target encoder`, `context encoder`, or `encoder`."""
        kind = self.kind(which)
        return f"{kind} encoder" if kind else "encoder"

    def with_normalisation(
        self, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
    ) -> "Pretrained":
        """With these instead of what the file tells; None keeps it.

        Raises:
            UsageError: not one number a channel, not finite, or a std not above 0.
        """
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and (
                len(values) != len(self.mean)
                or not all(map(math.isfinite, values))
                or (name == "std" and min(values) <= 0)
            ):
                rule = "finite numbers above 0" if name == "std" else "finite numbers"
                raise UsageError(f"{name} must be {len(self.mean)} {rule}, got {values}")
        return replace(self, mean=mean or self.mean, std=std or self.std)

    def doubt(self) -> str | None:
        """A warning where mean and std look like another library's default."""
        if {*self.mean, *self.std} != {0.5}:
            return None
        return (
            f"mean and std are 0.5 in {self.source}, the default of transformers' processor; "
            "I-JEPA was trained with ImageNet's: --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225"
        )

    def encoder(self, which: Which = "target") -> Mapping[str, Tensor]:
        """One encoder's weights; `target` also gives the one of a file that has only one.

        Raises:
            UsageError: there is no such encoder.
        """
        name = "target_encoder" if which in ("target", self.only) else "encoder"
        if name not in self.networks:
            there = ", ".join(sorted(self.networks))
            raise UsageError(f"encoder must be in the weights, got {which}: {self.source}: {there}")
        return self.networks[name]
