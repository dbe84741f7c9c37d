"""What the predictor believes is behind a block: completions of real images (paper, section 6)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ijepa_fast.visualize.decoder.conditions import Conditions, conditions, paste
from ijepa_fast.visualize.figure import panel, patch_pixels, pyplot, save
from ijepa_fast.visualize.inputs import Networks, ShownImages
from ijepa_fast.visualize.masks import outline

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
    plt = pyplot()
    count, seeds = len(pictures.images), len(completions)
    box = given.box * patch_size
    pasted = [paste(pictures.images, box, pixels).numpy() for pixels in completions]
    side = 1.35
    ratios = [1, 1, 0.12, *[1] * seeds]
    figure, axes = plt.subplots(
        count,
        seeds + 3,
        figsize=(side * sum(ratios), (side + 0.06) * count + 0.75),
        squeeze=False,
        gridspec_kw={"width_ratios": ratios},
    )
    seen = given.context.view(-1, *given.grid).numpy()
    for row in range(count):
        image = pictures.images[row].numpy()
        context = np.where(patch_pixels(seen[row], image.shape), image, np.uint8(GREY))
        heads = ["original", "context", *(f"seed {number}" for number in range(seeds))]
        shown = [image, context, *(images[row] for images in pasted)]
        axes[row, 2].set_axis_off()
        top, left, height, width = box[row].tolist()
        for axis, head, drawn in zip(
            axes[row, [0, 1, *range(3, seeds + 3)]], heads, shown, strict=True
        ):
            panel(axis, drawn, head if row == 0 else "")
            if head != "original":
                outline(axis, (top, left, height, width), "#00e060")
    total = figure.get_figheight()
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.5 / total))
    figure.suptitle(title, fontsize=8, y=1 - 0.08 / total, va="top")
    save(figure, path, dpi=120)


def spread(completions: list[Tensor]) -> Tensor:
    """How much completions of a block differ from seed to seed: the standard deviation of each
    value over seeds, averaged over the block; float32 (n,), in 0-255 units.
    """
    stacked = torch.stack([pixels.float() for pixels in completions])
    return stacked.std(dim=0).flatten(1).mean(dim=1)
