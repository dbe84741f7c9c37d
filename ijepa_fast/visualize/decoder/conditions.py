"""What a decoder is told about a hidden block, and the pixels that it should paint.

For each target block: the predictor's output averaged over the block's patches, and where the block
is. The computation is that of a training step (`reference.predict`): context encoder on the context
patches, predictor with mask tokens at the block's patches; in float32, over whole contexts (no
truncation to the shortest of a group), the first context block of each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.masks import Masks, reachable_sizes, sample_masks
from ijepa_fast.reference import normalise, pad_contexts, predict
from ijepa_fast.visualize.inputs import Networks

__all__ = ["Conditions", "block_pixels", "block_side", "conditions", "paste"]

# images of one forward pass: one draw of block sizes
BATCH = 64
LONGEST_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """n target blocks.

    Attributes:
        pooled: float32 (n, D), the predictor's output averaged over the block's patches.
        box: int64 (n, 4), top, left, height and width in patches.
        pixels: uint8 (n, side, side, 3), the block's own pixels, resized.
        image: int64 (n,), which of the given images.
        context: bool (n, N), the patches that the context encoder saw.
        grid: rows and columns of patches.
    """

    pooled: Tensor
    box: Tensor
    pixels: Tensor
    image: Tensor
    context: Tensor
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.pooled)

    def rows(self, which: Tensor) -> "Conditions":
        """The conditions of these rows."""
        names = ("pooled", "box", "pixels", "image", "context")
        return replace(self, **{name: getattr(self, name)[which] for name in names})


def block_side(config: Config) -> int:
    """Side in pixels of the square that blocks are resized to: about a block's own size, a
    multiple of 4, at most 64.
    """
    sizes = reachable_sizes(config.masks, config.grid, "target")
    patches = np.mean([np.sqrt(height * width) for height, width in sizes])
    own = 4 * round(float(patches) * config.model.patch_size / 4)
    return min(LONGEST_SIDE, max(8, own))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (n, h, w, 3) to uint8 (n, *size, 3)."""
    x = images.permute(0, 3, 1, 2).float()
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def block_pixels(images: Tensor, box: Tensor, side: int) -> Tensor:
    """Pixels of a block of each image, resized to a square.

    Args:
        images: uint8 (n, height, width, 3).
        box: int64 (n, 4), top, left, height and width in pixels.
        side: of the square.

    Returns:
        uint8 (n, side, side, 3).
    """
    crops = []
    for image, (top, left, height, width) in zip(images, box.tolist(), strict=True):
        crops.append(_resize(image[None, top : top + height, left : left + width], (side, side)))
    return torch.cat(crops)


def paste(images: Tensor, box: Tensor, pixels: Tensor) -> Tensor:
    """The images with a block replaced by pixels, resized to the block: uint8, a copy.

    Args:
        images: uint8 (n, height, width, 3).
        box: int64 (n, 4) in pixels.
        pixels: uint8 (n, side, side, 3).
    """
    result = images.clone()
    for row, (top, left, height, width) in enumerate(box.tolist()):
        part = _resize(pixels[row : row + 1], (height, width))[0]
        result[row, top : top + height, left : left + width] = part
    return result


def _boxes(targets: Tensor, columns: int) -> Tensor:
    """Raster-ordered patches (..., T) of rectangles to (..., 4) top, left, height, width."""
    first, last = targets[..., 0].long(), targets[..., -1].long()
    top, left = first // columns, first % columns
    return torch.stack([top, left, last // columns - top + 1, last % columns - left + 1], dim=-1)


def _seen(masks: Masks, images: int, patches: int) -> Tensor:
    """Patches of the first context block of each image: bool (images, N)."""
    _, context, _valid = pad_contexts(masks, patches)
    context = context[:images]
    seen = torch.zeros(images, patches, dtype=torch.bool)
    # padding repeats a patch that is there
    return seen.scatter_(1, context, torch.ones_like(context, dtype=torch.bool))


@torch.no_grad()
def conditions(
    networks: Networks,
    images: Tensor,
    *,
    side: int,
    passes: int = 1,
    first_step: int = 0,
    blocks: Sequence[int] | None = None,
) -> Conditions:
    """Predictions of the target blocks of some images.

    Args:
        networks: context encoder and predictor.
        images: uint8 (B, height, width, 3), of the training crop's size.
        side: of the squares that blocks are resized to.
        passes: times that each image gets masks.
        first_step: masks are those of the run's seed at this step and the following ones, one for
            each pass and 64 images, position = image.
        blocks: which of an image's target blocks; all by default.

    Returns:
        passes * B * len(blocks) conditions, ordered [pass, image, block].

    Raises:
        ValueError: the images are not of the training crop's size.
    """
    config = networks.config
    if tuple(images.shape[1:3]) != config.data.crop_size:
        raise ValueError(
            f"images must be of the training crop's size {config.data.crop_size}, "
            f"got {tuple(images.shape[1:3])}"
        )
    where = networks.encoder.pos_embed.device
    mean = torch.tensor(config.data.mean, device=where)
    std = torch.tensor(config.data.std, device=where)
    whole = replace(config.masks, truncation_group=1)
    patch, grid = config.model.patch_size, config.grid
    chosen = list(range(config.masks.num_targets) if blocks is None else blocks)
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("pooled", "box", "pixels", "image", "context")
    }
    step = first_step
    for _ in range(passes):
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            positions = np.arange(start, start + len(part))
            masks = sample_masks(whole, grid=grid, seed=config.seed, step=step, positions=positions)
            step += 1
            x = normalise(part.to(where), mean, std)
            predicted = predict(networks.encoder, networks.predictor, x, masks.to(where))
            # (M, C, B, T, D): first context block, mean over the block's patches
            pooled = predicted[chosen, 0].mean(dim=2).transpose(0, 1).flatten(0, 1)
            box = _boxes(masks.target_index[:, chosen], grid[1]).flatten(0, 1)
            repeated = part.repeat_interleave(len(chosen), dim=0)
            parts["pooled"].append(pooled.float().cpu())
            parts["box"].append(box)
            parts["pixels"].append(block_pixels(repeated, box * patch, side))
            image = torch.from_numpy(positions)
            parts["image"].append(image.repeat_interleave(len(chosen)))
            seen = _seen(masks, len(part), grid[0] * grid[1])
            parts["context"].append(seen.repeat_interleave(len(chosen), dim=0))
    return Conditions(grid=grid, **{name: torch.cat(values) for name, values in parts.items()})
