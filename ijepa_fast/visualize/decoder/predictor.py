"""What the predictor believes is behind a block: completions of real images (paper, section 6)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.visualize.decoder.conditions import Conditions, conditions, paste
from ijepa_fast.visualize.figure import Frame, Panel, draw_sheet, patch_pixels
from ijepa_fast.visualize.inputs import Networks, ShownImages

__all__ = ["FIRST_STEP", "draw_predictor", "held_out", "spread"]

# masks of held-out images: of other steps than those that decoders are trained with
FIRST_STEP = 1 << 20
GREY = 128


def held_out(networks: Networks, images: Tensor, *, side: int, seed: int = 0) -> Conditions:
    """The first target block of each held-out image: one condition an image."""
    first = FIRST_STEP * (1 + seed)
    return conditions(networks, images, side=side, first_step=first, blocks=[0])


def draw_predictor(
    path: Path,
    pictures: ShownImages,
    given: Conditions,
    completions: list[Tensor],
    *,
    patch_size: int,
    title: str,
) -> None:
    """Writes a PNG. A row an image: original, what the context encoder sees of it (all else grey),
    and one completion of the block (green) for each seed, pasted into the original.

    Args:
        path: the PNG file.
        pictures: n images.
        given: one condition of each image.
        completions: for each seed uint8 (n, side, side, 3).
        patch_size: side of a patch, pixels.
        title: above everything.
    """
    box = given.box * patch_size
    pasted = [paste(pictures.images, box, pixels).numpy() for pixels in completions]
    seen = given.context.view(-1, *given.grid).numpy()
    sheet = []
    for row, original in enumerate(pictures.images.numpy()):
        context = np.where(patch_pixels(seen[row], original.shape), original, np.uint8(GREY))
        frame = [Frame(box[row].tolist(), "#00e060")]
        painted = [Panel(images[row], f"seed {n}", frame) for n, images in enumerate(pasted)]
        sheet.append(
            [Panel(original, "original"), Panel(context, "context", frame), None, *painted]
        )
    draw_sheet(path, sheet, title, side=1.35)


def spread(completions: list[Tensor]) -> Tensor:
    """How much completions of a block differ from seed to seed: the standard deviation of each
    value over seeds, averaged over the block; float32 (n,), in 0-255 units.
    """
    stacked = torch.stack([pixels.float() for pixels in completions])
    return stacked.std(dim=0).flatten(1).mean(dim=1)
