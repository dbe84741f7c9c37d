"""Pretrained weights to use: ``ijepa_fast.load_encoder(path)``, and a run that starts from them."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ijepa_fast.config import Config, one_word, require_choices
from ijepa_fast.data import Picture, central_picture
from ijepa_fast.errors import UsageError, require
from ijepa_fast.model import VisionTransformer
from ijepa_fast.reference import normalise
from ijepa_fast.weights.fit import fit_to, resample_positions
from ijepa_fast.weights.pretrained import EncoderKind, Pretrained, Shape, network_of
from ijepa_fast.weights.read import read_weights

__all__ = ["Encoder", "Weights", "as_pretrained", "load_encoder", "start_weights"]


class Encoder(nn.Module):
    """A ViT with what goes with it: the crop and normalisation of images, and images of any size.

    Args:
        network: the ViT.
        patch_size: side of a patch, pixels.
        mean, std: of the image channels, in 0-1 units.
        origin: what it was read from; its weights are not kept.

    Attributes:
        width: D.
        grid: rows and columns of patches at the size it was trained at.

    Example:
        >>> encoder = ijepa_fast.load_encoder("runs/mine")
        >>> encoder(encoder.preprocess("image.jpg")).shape  # (D,)
        torch.Size([32])
    """

    mean: Tensor
    std: Tensor
    # torch's gives anything
    __call__: Callable[..., Tensor]

    def __init__(
        self,
        network: VisionTransformer,
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        origin: Pretrained | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        self.width = network.width
        self.grid = network.grid
        self.origin = replace(origin, networks={}) if origin else None
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that it was trained at."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def preprocess(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Images to what the encoder takes, as `evaluate` and `embed` make them: the largest
        central window of the trained shape, resized to the trained size (bilinear, antialiased),
        normalised.

        Args:
            images: one image, or a list of them: a file's path, a PIL image, or a uint8 tensor or
                array (height, width, 3), of any size.

        Returns:
            float32 (3, H, W) for one, (B, 3, H, W) for a list, on the encoder's device.

        Raises:
            UsageError: something is no image, or a list is empty.
            OSError: a file cannot be read.

        Example:
            >>> encoder = ijepa_fast.load_encoder("runs/mine")
            >>> encoder.preprocess(["image.jpg", torch.zeros(48, 64, 3, dtype=torch.uint8)]).shape
            torch.Size([2, 3, 32, 32])
        """
        if not isinstance(images, list | tuple):
            one: Any = images
            return self.preprocess([one])[0]
        require(len(images) > 0, "images", "at least one", images)
        return self.normalise(torch.stack([central_picture(i, self.image_size) for i in images]))

    def normalise(self, images: Tensor) -> Tensor:
        """Images uint8 (B, height, width, 3) to what the other methods take: float32
        (B, 3, height, width).

        Raises:
            ValueError: another dtype or shape.
        """
        channels = len(self.mean)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != channels:
            raise ValueError(
                f"images must be uint8 (B, height, width, {channels}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        return normalise(images.to(self.mean.device), self.mean, self.std)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        channels = len(self.mean)
        if images.ndim != 4 or images.shape[1] != channels or not images.is_floating_point():
            raise ValueError(
                f"images must be float (B, {channels}, height, width), as preprocess gives them, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images must have sides that are multiples of {self.patch_size} pixels, "
                f"got {height} x {width}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        table = resample_positions(self.network.pos_embed, self.grid, grid)
        return self.network.patch_embed(images) + table, grid

    def forward_features(self, images: Tensor) -> Tensor:
        """Features of all patches, after the final norm.

        Args:
            images: normalised (B, 3, height, width), sides multiples of the patch size; at another
                size than the trained one the position table is interpolated.

        Returns:
            (B, N, D), row by row.
        """
        return self.network.encode(self._embed(images)[0])

    def forward(self, images: Tensor) -> Tensor:
        """One feature vector an image: the mean over patches (paper, section 4).

        Args:
            images: as in `forward_features`, or one image (3, height, width).

        Returns:
            (B, D), or (D,) for one image.
        """
        given: object = images
        rule = "a tensor, as preprocess gives it"
        require(isinstance(given, Tensor), "images", rule, type(given).__name__)
        if images.ndim == 3:
            return self.forward(images[None])[0]
        return self.forward_features(images).mean(dim=1)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        norm: bool = True,
    ) -> list[Tensor]:
        """Outputs of several blocks.

        Args:
            images: as in `forward_features`.
            n: the last so many blocks, or their numbers from 0.
            reshape: give maps instead of rows.
            norm: apply the final norm to each.

        Returns:
            In the order of the blocks, (B, N, D) each, or (B, D, rows, columns).

        Raises:
            ValueError: there are no such blocks.
        """
        depth = len(self.network.blocks)
        wanted = range(depth - n, depth) if isinstance(n, int) else sorted(set(n))
        if not wanted or min(wanted) < 0 or max(wanted) >= depth:
            raise ValueError(f"n must name blocks in 0..{depth - 1}, or count 1..{depth}, got {n}")
        x, grid = self._embed(images)
        outputs = []
        for number, block in enumerate(self.network.blocks):
            x = block(x)
            if number in wanted:
                out = self.network.norm(x) if norm else x
                outputs.append(out.transpose(1, 2).unflatten(2, grid) if reshape else out)
        return outputs


Weights = Annotated[str | os.PathLike[str] | Pretrained | Encoder, one_word("RUN_OR_WEIGHTS")]
"""The path of a run, a checkpoint, a folder or a file of weights, or what was read from one."""


def as_pretrained(
    weights: Weights,
    *,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Pretrained:
    """Weights of any kind as they are now; a doubt about a file's goes to stderr.

    Args:
        weights: see `Weights`.
        image_size, heads: for files that do not tell, see `read_weights`.
        mean, std: instead of what is told, see `Pretrained.with_normalisation`.

    Raises:
        UsageError: no such weights, or a wrong option.
        CheckpointError: a checkpoint is damaged.
    """
    if isinstance(weights, str | os.PathLike):
        read = read_weights(weights, image_size=image_size, heads=heads)
        read = read.with_normalisation(mean, std)
        if doubt := read.doubt():
            print(doubt, file=sys.stderr)
        return read
    for name, value in (("image_size", image_size), ("heads", heads)):
        require(value is None, name, "left out where the weights are no file", value)
    if isinstance(weights, Encoder):
        weights = _as_it_is(weights)
    require(isinstance(weights, Pretrained), "weights", "a path, or what was read", weights)
    return weights.with_normalisation(mean, std)


def _as_it_is(encoder: Encoder) -> Pretrained:
    network = encoder.network
    state = {key: value.detach().cpu() for key, value in network.state_dict().items()}
    if encoder.origin:
        # what the run measured need not hold for weights that were trained further
        return replace(encoder.origin, networks={"target_encoder": state}, run=None)
    first: Any = network.blocks[0]
    shape = Shape(
        image_size=encoder.image_size,
        patch_size=encoder.patch_size,
        width=encoder.width,
        depth=len(network.blocks),
        heads=first.attn.heads,
        mlp_hidden=first.mlp.fc1.out_features,
    )
    mean, std = ((float(v[0]), float(v[1]), float(v[2])) for v in (encoder.mean, encoder.std))
    return Pretrained(
        networks={"target_encoder": state},
        shape=shape,
        mean=mean,
        std=std,
        source="an encoder in memory",
        only=None,
    )


def load_encoder(
    path: Weights,
    *,
    encoder: EncoderKind = "target",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Encoder:
    """A frozen encoder in evaluation mode on the CPU.

    Args:
        path: a run's folder, a checkpoint, a Hugging Face folder, or a file of weights; see
            `ijepa_fast.weights`.
        encoder: which of a run's two; the target encoder has the better features.
        image_size: height and width in pixels that the weights were trained at, where their file
            does not tell.
        heads: attention heads, where the file does not tell.
        mean: of the image channels in 0-1 units, instead of what the file tells.
        std: their standard deviation, likewise.

    Raises:
        UsageError: no such file, not an I-JEPA encoder, or incomplete.
        CheckpointError: a checkpoint is damaged.

    Example:
        >>> encoder = ijepa_fast.load_encoder("runs/mine", encoder="context")
        >>> encoder.width, encoder.image_size
        (32, (32, 32))
    """
    require_choices(load_encoder, locals())
    path = as_pretrained(path, image_size=image_size, heads=heads, mean=mean, std=std)
    # without memory, until its shapes are seen to be those of the weights
    with torch.device("meta"):
        network = network_of(path.shape)
    grid = path.shape.grid
    state = fit_to(
        path.encoder(encoder), network.state_dict(), old=grid, new=grid, source=path.source
    )
    network.to_empty(device="cpu").load_state_dict(state)
    loaded = Encoder(
        network,
        patch_size=path.shape.patch_size,
        mean=path.mean,
        std=path.std,
        origin=replace(path, only=path.kind(encoder)),
    )
    return loaded.eval().requires_grad_(False)


def start_weights(path: str, config: Config, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Weights to start a run from, at the run's resolution.

    Args:
        path: see `read_weights`.
        config: of the run.
        shapes: of its checkpoints' tensors `encoder.*`, `target_encoder.*`, `predictor.*`.

    Returns:
        Tensors of these names; those of the predictor only if the file has one.

    Raises:
        UsageError: the weights do not fit the configuration.
        CheckpointError: a checkpoint is damaged.
    """
    size = config.data.crop_size
    read = _read_for(path, config)
    networks = dict(read.networks)
    networks.setdefault("encoder", networks["target_encoder"])
    if read.shape.heads != config.model.architecture.heads:
        raise UsageError(
            f"init must have model.heads ({config.model.architecture.heads}) attention heads, "
            f"got {read.shape.heads} in {read.source}"
        )
    new = (size[0] // config.model.patch_size, size[1] // config.model.patch_size)
    start: dict[str, Tensor] = {}
    for name, given in networks.items():
        prefix = f"{name}."
        wanted = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
        fitted = fit_to(given, wanted, old=read.shape.grid, new=new, source=read.source)
        start |= {prefix + key: tensor for key, tensor in fitted.items()}
    return start


def _read_for(path: str, config: Config) -> Pretrained:
    """Reads weights whose file may tell neither heads nor a rectangular grid: as many patches as
    the run's are taken for its grid, others for a square. What the file tells goes first.
    """
    heads, size = config.model.architecture.heads, config.data.crop_size
    for image_size in (size, None) if size[0] != size[1] else (None,):
        try:
            return read_weights(path, heads=heads, image_size=image_size)
        except UsageError:
            continue
    return read_weights(path)
