"""ViT encoder and predictor: the one definition of the weights, used by both paths.

Pre-norm ViTs without class token, registers, dropout or drop path (paper, section 3; Dosovitskiy et
al., 2021). State-dict names are timm's. Shape letters: S sequences, L tokens of a sequence, B
images, N grid patches, D encoder width, P predictor width, H heads, E head dim, F MLP width.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.config import ModelConfig

__all__ = [
    "Attention",
    "Block",
    "Mlp",
    "PatchEmbed",
    "Predictor",
    "VisionTransformer",
    "attend",
    "build_models",
    "matrix_layers",
    "sincos_position_embedding",
]

NORM_EPS = 1e-6
INIT_STD = 0.02


def sincos_position_embedding(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine table.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin | cos] of position / 10000**(i / (width/4)), i = 0 .. width/4 - 1.

    Args:
        width: channels, a multiple of 4.
        grid: rows and columns of the patch grid.

    Returns:
        float32 (1, rows * columns, width), rounded from float64.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}")
    rows, columns = grid
    omega = 1.0 / 10000.0 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angle_x = np.tile(np.arange(columns, dtype=np.float64), rows)[:, None] * omega
    angle_y = np.repeat(np.arange(rows, dtype=np.float64), columns)[:, None] * omega
    table = np.concatenate(
        [np.sin(angle_x), np.cos(angle_x), np.sin(angle_y), np.cos(angle_y)], axis=1
    )
    return torch.from_numpy(table).float().unsqueeze(0)


def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """Full softmax attention inside each sequence, scale E**-0.5.

    Args:
        q, k, v: (S, H, L, E); q may have another length than k and v.
        valid: bool (S, L), True where a key is a real token; None where all are.

    Returns:
        (S, H, L, E).
    """
    mask = None if valid is None else valid[:, None, None, :]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # PyTorch's CPU backward in bfloat16 takes 6 times as long as in float32, so under autocast the
    # attention itself stays in float32 there
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    return out.to(q.dtype)


class PatchEmbed(nn.Module):
    """Image to patch rows: a convolution with kernel = stride = patch, patch index = row * W +
    column.
    """

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, height, width) to rows (B, N, D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; the qkv rows are laid out (3, H, E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width must be divisible by the number of heads ({heads}), got {width}"
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Full attention inside each sequence.

        Args:
            x: (S, L, D).
            valid: bool (S, L), True where a key is a real token; None where all are.

        Returns:
            (S, L, D).
        """
        sequences, length, width = x.shape
        qkv = self.qkv(x).reshape(sequences, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v, valid)
        return self.proj(out.transpose(1, 2).reshape(sequences, length, width))


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(S, L, D) to (S, L, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, width: int, heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, mlp_hidden)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(S, L, D) to (S, L, D); `valid` as in `Attention`."""
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The encoder, for context and target alike.

    Args:
        image_size: height and width in pixels, each a multiple of patch_size.
        patch_size: side of a square patch, pixels.
        width, depth, heads, mlp_hidden: dimensions D, blocks, H and F.
        in_channels: image channels.

    Raises:
        ValueError: image_size is not a multiple of patch_size, or width not of the heads.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size[0] % patch_size or image_size[1] % patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size ({patch_size}), got {image_size}"
            )
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.width = width
        self.patch_embed = PatchEmbed(patch_size, in_channels, width)
        # a buffer, not a parameter: never trained, decayed or averaged
        self.register_buffer("pos_embed", sincos_position_embedding(width, self.grid))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, height, width) to position-coded patch rows (B, N, D)."""
        return self.patch_embed(images) + self.pos_embed

    def encode(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Position-coded rows (S, L, D) through all blocks and the final norm."""
        for block in self.blocks:
            x = block(x, valid)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, height, width) to features (B, N, D)."""
        return self.encode(self.embed(images))


class Predictor(nn.Module):
    """Guesses the features of hidden patches from context features (paper, section 3).

    Args:
        grid: rows and columns of the patch grid.
        encoder_width: D.
        width, depth, heads, mlp_hidden: the predictor's own P, blocks, H and F.
    """

    predictor_pos_embed: Tensor

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_hidden: int,
    ) -> None:
        super().__init__()
        self.predictor_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("predictor_pos_embed", sincos_position_embedding(width, grid))
        self.predictor_blocks = nn.ModuleList(Block(width, heads, mlp_hidden) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.predictor_proj = nn.Linear(width, encoder_width)

    def forward(
        self,
        context_z: Tensor,
        context_patches: Tensor,
        target_patches: Tensor,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        """Predicts one target block of each sequence.

        Args:
            context_z: context features (S, K, D).
            context_patches: their patch indices (S, K).
            target_patches: patch indices of the block to predict (S, T).
            context_valid: bool (S, K), False on padding; None where nothing is padded.

        Returns:
            Predicted features (S, T, D).
        """
        table = self.predictor_pos_embed[0]
        context = self.predictor_embed(context_z) + table[context_patches]
        targets = self.mask_token + table[target_patches]
        x = torch.cat([context, targets], dim=1)
        valid = None
        if context_valid is not None:
            valid = F.pad(context_valid, (0, targets.shape[1]), value=True)
        for block in self.predictor_blocks:
            x = block(x, valid)
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :]))


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draws the initial weights in place: normal(0, 0.02) for Linear and convolution weights and
    the mask token, zero biases, unit norms. Depth scaling is absent on purpose: it has no effect
    in the published runs.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.normal_(child.weight, std=INIT_STD, generator=generator)
            assert child.bias is not None
            nn.init.zeros_(child.bias)
        elif isinstance(child, Predictor):
            nn.init.normal_(child.mask_token, std=INIT_STD, generator=generator)


def build_models(
    config: ModelConfig, image_size: tuple[int, int], generator: torch.Generator | None = None
) -> tuple[VisionTransformer, Predictor]:
    """Encoder and predictor of a configuration.

    Args:
        config: dimensions.
        image_size: height and width of the crops, pixels.
        generator: CPU generator of the initial weights; None leaves torch's defaults, for weights
            that are loaded anyway (or for the meta device).
    """
    a = config.architecture
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=config.patch_size,
        width=a.width,
        depth=a.depth,
        heads=a.heads,
        mlp_hidden=a.mlp_hidden,
    )
    predictor = Predictor(
        grid=encoder.grid,
        encoder_width=a.width,
        width=config.predictor_width,
        depth=a.predictor_depth,
        heads=a.heads,
        mlp_hidden=4 * config.predictor_width,
    )
    if generator is not None:
        initialise(encoder, generator)
        initialise(predictor, generator)
    return encoder, predictor


def matrix_layers(network: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    """Layers whose product runs in the step's dtype."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield layer
