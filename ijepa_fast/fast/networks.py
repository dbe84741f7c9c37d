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
needs, S context sequences, and C, M, T as in `layout.py`.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.fast.attention import Pair
from ijepa_fast.fast.block import PackedBlock, Settings, linear, norm, operands
from ijepa_fast.fast.layout import Layout
from ijepa_fast.model import Block, Predictor, VisionTransformer
from ijepa_kernels import gather_tokens, patchify, predictor_tokens, take_targets

__all__ = ["ContextEncoder", "PackedPredictor", "TargetEncoder", "repack"]

Take = Callable[[Tensor], Tensor]


class _PackedEncoder(VisionTransformer):
    settings: Settings

    def rows(self, images: Tensor, mean: Tensor, std: Tensor, index: Tensor | None) -> Tensor:
        """Pixels to the embedding's rows, in the dtype of products: (B, height, width, C) uint8 to
        (R, D), without positions.
        """
        dtype, proj = self.settings.dtype, self.patch_embed.proj
        height, width = proj.kernel_size
        pixels = patchify(images, (height, width), index, mean, std, dtype, layout="BHWC")
        weight, bias = operands(proj, dtype)
        flat = weight.flatten(1)
        if pixels.shape[1] != flat.shape[1]:
            flat = F.pad(flat, (0, pixels.shape[1] - flat.shape[1]))
        return F.linear(pixels, flat, bias)


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
        settings = self.settings
        embedded = self.rows(images, mean, std, layout.masks.context_index)
        positions = self.pos_embed[0].index_select(0, layout.context_patch)
        x = (embedded + positions).to(settings.residual)
        for block in self.blocks:
            x = block(x, layout.context)
        return norm(self.norm, x, settings.dtype)


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
        x = self.embedded(images, mean, std)
        for block in self._all_but_last():
            x = block(x, grid)
        take = _needed(layout)
        return self._normed(self._last(x, layout.last_target, take))

    def embedded(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Position-coded rows of all patches (B * N, D)."""
        rows = self.rows(images, mean, std, None).unflatten(0, (len(images), -1))
        return (rows + self.pos_embed).to(self.settings.residual).flatten(0, 1)

    @torch.no_grad()
    def trunk(
        self, images: Tensor, mean: Tensor, std: Tensor, grid: Pair
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part whose shapes never change: the last block's input, normalised rows, and keys and
        values, of all rows.
        """
        x = self.embedded(images, mean, std)
        for block in self._all_but_last():
            x = block(x, grid)
        normed, keys_values = self._last.keys_values(x)
        return x, normed, keys_values

    @torch.no_grad()
    def head(self, x: Tensor, normed: Tensor, keys_values: Tensor, layout: Layout) -> Tensor:
        """The rest, after `trunk`: what `forward` returns."""
        take = _needed(layout)
        rows = self._last.finish(take(x), normed, keys_values, layout.last_target, take)
        return self._normed(rows)

    @property
    def _last(self) -> PackedBlock:
        block = self.blocks[-1]
        assert isinstance(block, PackedBlock)
        return block

    def _all_but_last(self) -> Iterable[nn.Module]:
        return list(self.blocks)[:-1]

    def _normed(self, rows: Tensor) -> Tensor:
        return norm(self.norm, rows, torch.float32)


def _needed(layout: Layout) -> Take:
    return lambda rows: gather_tokens(rows, layout.needed, unique=True)


class PackedPredictor(Predictor):
    """The predictor over packed sequences."""

    settings: Settings

    def forward(self, context_z: Tensor, layout: Layout) -> Tensor:  # type: ignore[override]
        """Predicted features.

        Args:
            context_z: context features (R, D), in the dtype of products.
            layout: of these images.

        Returns:
            (M * C * B * T, D), in the dtype of products.
        """
        settings, masks = self.settings, layout.masks
        table = self.predictor_pos_embed[0]
        context = linear(self.predictor_embed, context_z, settings.dtype)
        x, cu = predictor_tokens(
            context,
            self.mask_token,
            table,
            masks.context_index,
            masks.target_index,
            masks.context_cu,
            out_dtype=settings.residual,
        )
        placed = context + table.index_select(0, layout.context_patch)
        rows = torch.cat([placed, self.mask_token[0] + table]).to(settings.residual)
        length = layout.target_length

        def take(rows: Tensor) -> Tensor:
            return take_targets(rows, cu, length)

        last = len(self.predictor_blocks) - 1
        for number, block in enumerate(self.predictor_blocks):
            x = block(
                x,
                layout.last_predictor if number == last else layout.predictor,
                take if number == last else None,
                (rows, layout.source) if number == 0 else None,
            )
        return linear(
            self.predictor_proj, norm(self.predictor_norm, x, settings.dtype), settings.dtype
        )


# --- from plain networks -------------------------------------------------------------------------

Network = TypeVar("Network", ContextEncoder, TargetEncoder, PackedPredictor)


def repack(plain: nn.Module, kind: type[Network], settings: Settings) -> Network:
    """One of the above with the parameters and buffers of a plain network: the same objects.

    Args:
        plain: a `VisionTransformer` or a `Predictor`, as `kind` is one.
        kind: the class wanted.
        settings: how it computes.
    """
    shared = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    network, parts = copy.deepcopy(plain, shared), settings.parts()
    for module in network.modules():
        if isinstance(module, Block):
            module.__class__ = PackedBlock
            module.__dict__ |= {"settings": settings, "parts": parts}
    assert issubclass(kind, type(plain))
    network.__class__ = kind
    assert isinstance(network, kind)
    network.settings = settings
    return network
