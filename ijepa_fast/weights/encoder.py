"""Pretrained weights to use: ``ijepa_fast.load_encoder(path)``, and a run that starts from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError
from ijepa_fast.model import VisionTransformer
from ijepa_fast.reference import normalise
from ijepa_fast.weights.fit import fit_to, resample_positions
from ijepa_fast.weights.pretrained import EncoderKind, Pretrained, network_of
from ijepa_fast.weights.read import read_weights

__all__ = ["Encoder", "load_encoder", "start_weights"]


class Encoder(nn.Module):
    """A ViT with what goes with it: the normalisation of images, and images of any size.

    Args:
        network: the ViT.
        patch_size: side of a patch, pixels.
        mean, std: of the image channels, in 0-1 units.

    Attributes:
        width: D.
        grid: rows and columns of patches at the size it was trained at.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: VisionTransformer,
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        self.width = network.width
        self.grid = network.grid
        self.register_buffer("mean", torch.tensor(tuple(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)), persistent=False)

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
        """One feature vector an image: the mean over patches (paper, section 4)."""
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


def load_encoder(
    path: str | Path | Pretrained,
    *,
    encoder: EncoderKind = "target",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
) -> Encoder:
    """A frozen encoder in evaluation mode on the CPU.

    Args:
        path: a run's folder, a checkpoint, a Hugging Face folder, or a file of weights; see
            `ijepa_fast.weights`.
        encoder: which of a run's two.
        image_size, heads: for files that do not tell, see `read_weights`.

    Raises:
        UsageError: no such file, not an I-JEPA encoder, or incomplete.
        CheckpointError: a checkpoint is damaged.
    """
    if not isinstance(path, Pretrained):
        path = read_weights(path, image_size=image_size, heads=heads)
    # without memory, until its shapes are seen to be those of the weights
    with torch.device("meta"):
        network = network_of(path.shape)
    grid = path.shape.grid
    state = fit_to(
        path.encoder(encoder), network.state_dict(), old=grid, new=grid, source=path.source
    )
    network.to_empty(device="cpu").load_state_dict(state)
    loaded = Encoder(network, patch_size=path.shape.patch_size, mean=path.mean, std=path.std)
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
