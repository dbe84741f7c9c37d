"""The networks of `model.py` over packed rows: same weights and names, other forward passes.

Rows of all sequences lie one after the other, (rows, D); attention alone knows where a sequence
ends. Work that cannot reach the loss is left out, without changing a result:

- the context encoder embeds kept patches only;
- the target encoder's last block computes queries, and everything behind attention, only for rows
  that some target needs;
- the predictor's last block does so only for target rows;
- the first norm and QKV product of the predictor see every context row once instead of once for
  each target block, and every position of the grid's mask tokens once instead of once for each
  image: the sequences' queries, keys and values are copies of these.

Shape letters: R packed rows, D encoder width, B images, N grid patches, U rows that some target
needs, and C, M, T as in `layout.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ijepa_fast.fast.attention import Pair
from ijepa_fast.fast.block import Branch, PackedBlock, Settings, add_norm, close, linear
from ijepa_fast.fast.layout import Layout
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_kernels import patchify
from ijepa_kernels.gather_tokens import Gather, gather_rows

__all__ = ["ContextEncoder", "PackedPredictor", "TargetEncoder"]


class _PackedEncoder(VisionTransformer):
    """An encoder over packed rows.

    Args:
        plain: whose layers these are: the same objects.
        settings: how they compute.
        block: the class of the blocks.
    """

    def __init__(
        self, plain: VisionTransformer, settings: Settings, block: type[PackedBlock] = PackedBlock
    ) -> None:
        nn.Module.__init__(self)
        self.grid, self.width, self.settings = plain.grid, plain.width, settings
        self.patch_embed = plain.patch_embed
        self.register_buffer("pos_embed", plain.pos_embed)
        self.blocks = nn.ModuleList(block(each, settings) for each in plain.blocks)
        self.norm = plain.norm

    def rows(self, images: Tensor, mean: Tensor, std: Tensor, index: Tensor | None) -> Branch:
        """Pixels to the embedding's rows, in the dtype of products: (B, height, width, C) uint8 to
        (R, D), without positions.
        """
        proj = self.patch_embed.proj
        height, width = proj.kernel_size
        dtype = self.settings.dtype
        pixels = patchify(images, (height, width), index, mean, std, dtype, layout="BHWC")
        return Branch(linear(proj, pixels, own_bias=False), proj)


class ContextEncoder(_PackedEncoder):
    """The encoder over the kept patches."""

    def forward(self, images: Tensor, mean: Tensor, std: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """Features of the context rows.

        Args:
            images: uint8 (B, height, width, C).
            mean, std: (C,), in 0-1 units.
            layout: of these images.

        Returns:
            (R, D) after the final norm, in the dtype of products.
        """
        f = self.rows(images, mean, std, layout.context_index)
        x = gather_rows(self.pos_embed[0], layout.context_patch).to(self.settings.residual)
        for block in self.blocks:
            x, f = block(x, f, layout.context)
        return close(self.norm, x, f, self.settings.dtype)


class TargetEncoder(_PackedEncoder):
    """The encoder over whole images, up to the rows that targets need; without gradients."""

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self, images: Tensor, mean: Tensor, std: Tensor, layout: Layout, grid: Pair
    ) -> Tensor:
        """Features of the needed rows.

        Args:
            images: uint8 (B, height, width, C).
            mean, std: (C,), in 0-1 units.
            layout: of these images.
            grid: attention within whole images.

        Returns:
            float32 (U, D) after the final norm.
        """
        x, f = self._until_last(images, mean, std, grid)
        # without gradients nobody asks what became of a row
        take = Gather(layout.needed, layout.needed, None)
        x, f = self.blocks[-1](x, f, layout.last_target, take)
        return add_norm(self.norm, x, f, torch.float32)

    def _until_last(
        self, images: Tensor, mean: Tensor, std: Tensor, grid: Pair
    ) -> tuple[Tensor, Branch | None]:
        rows = self.rows(images, mean, std, None).rows
        x = (rows.unflatten(0, (len(images), -1)) + self.pos_embed).flatten(0, 1)
        x, f = x.to(self.settings.residual), None
        for block in list(self.blocks)[:-1]:
            x, f = block(x, f, grid)
        return x, f

    @torch.no_grad()
    def trunk(
        self, images: Tensor, mean: Tensor, std: Tensor, grid: Pair
    ) -> tuple[Tensor, Any, Tensor]:
        """The part whose shapes never change: the last block's input, normalised rows, and keys and
        values, of all rows.
        """
        x, f = self._until_last(images, mean, std, grid)
        last = self.blocks[-1]
        assert isinstance(last, PackedBlock)
        return last.keys_values(x, f, grid)

    @torch.no_grad()
    def head(self, x: Tensor, normed: Any, keys_values: Tensor, layout: Layout) -> Tensor:
        """The rest, after `trunk`: what `forward` returns. For weights that are not sharded."""
        last = self.blocks[-1]
        assert isinstance(last, PackedBlock)
        rows, f = last.finish(x, normed, keys_values, layout.last_target, layout.needed)
        return add_norm(self.norm, rows, f, torch.float32)


class PackedPredictor(Predictor):
    """The predictor over packed sequences; arguments as of the encoders."""

    def __init__(self, plain: Predictor, settings: Settings) -> None:
        nn.Module.__init__(self)
        self.settings = settings
        self.predictor_embed, self.mask_token = plain.predictor_embed, plain.mask_token
        self.register_buffer("predictor_pos_embed", plain.predictor_pos_embed)
        self.predictor_blocks = nn.ModuleList(
            PackedBlock(each, settings) for each in plain.predictor_blocks
        )
        self.predictor_norm, self.predictor_proj = plain.predictor_norm, plain.predictor_proj

    def forward(self, context_z: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """Predicted features.

        Args:
            context_z: context features (R, D), in the dtype of products.
            layout: of these images.

        Returns:
            (M * C * B * T, D), in the dtype of products; with fillers, a row of each too.
        """
        settings, table = self.settings, self.predictor_pos_embed[0]
        context = linear(self.predictor_embed, context_z)
        placed = context + gather_rows(table, layout.context_patch)
        # the sequences are copies of these rows, which the first block makes
        x = torch.cat([placed, self.mask_token[0] + table]).to(settings.residual)
        f: Any = None
        last = len(self.predictor_blocks) - 1
        for number, block in enumerate(self.predictor_blocks):
            x, f = block(
                x,
                f,
                layout.last_predictor if number == last else layout.predictor,
                layout.taken if number == last else None,
                layout.source if number == 0 else None,
            )
        return linear(self.predictor_proj, close(self.predictor_norm, x, f, settings.dtype))
