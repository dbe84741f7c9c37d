"""A small conditional diffusion model of square pictures, in plain PyTorch.

Noise: x = a x0 + s e with a = cos(pi t / 2), s = sin(pi t / 2), t in 0..1, e standard normal (the
cosine schedule of Nichol and Dhariwal, arXiv 2102.09672, in its continuous form). The network
predicts v = a e - s x0 (Salimans and Ho, arXiv 2202.00512), from which x0 = a x - s v and e = s x +
a v. Samples are drawn by DDIM (Song et al., arXiv 2010.02502), deterministic given the first noise.

The network is a U-Net of two resolutions on 2x2 pixels a position. Every residual block is scaled
and shifted (FiLM, Perez et al., arXiv 1709.07871) by an embedding of time, block position and the
condition vector. It sees no pixels but the noisy ones of the block itself.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Denoiser", "Told", "add_noise", "ddim", "fourier", "noise_levels", "velocity"]

TIME_FREQUENCIES = 8
PLACE_FREQUENCIES = 4
GROUPS = 8


class Told(NamedTuple):
    """What a denoiser is told about n pictures.

    Attributes:
        vector: float32 (n, D), standardised.
        known: float32 (n, 1), 1 where the vector is told and 0 where it is kept back.
        place: float32 (n, 4), top, left, height and width as shares of the grid.
    """

    vector: Tensor
    known: Tensor
    place: Tensor

    def rows(self, which: slice | Tensor) -> "Told":
        """What these rows are told."""
        return Told(self.vector[which], self.known[which], self.place[which])

    def kept_back(self) -> "Told":
        """The same places, without the vectors."""
        return Told(self.vector, torch.zeros_like(self.known), self.place)


def noise_levels(t: Tensor) -> tuple[Tensor, Tensor]:
    """Shares a and s of picture and noise at times (n,), each (n, 1, 1, 1)."""
    angle = t.view(-1, 1, 1, 1) * (math.pi / 2)
    return angle.cos(), angle.sin()


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) with noise of the same shape at times (n,)."""
    a, s = noise_levels(t)
    return a * x0 + s * noise


def velocity(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What the network has to predict, (n, 3, h, w)."""
    a, s = noise_levels(t)
    return a * noise - s * x0


@torch.no_grad()
def ddim(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, *, steps: int) -> Tensor:
    """Pictures from noise.

    Args:
        predict: noisy pictures (n, 3, h, w) and times (n,) to v.
        noise: (n, 3, h, w), standard normal: the pictures at t = 1.
        steps: evaluations of `predict`.

    Returns:
        (n, 3, h, w) in -1..1.

    Raises:
        ValueError: steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    x, n = noise, len(noise)
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for now, later in pairwise(times):
        t = now.expand(n)
        v = predict(x, t)
        a, s = noise_levels(t)
        x0 = (a * x - s * v).clamp(-1, 1)
        # the noise that belongs to the clamped picture
        noise_now = (x - a * x0) / s
        x = add_noise(x0, noise_now, later.expand(n))
    return x.clamp(-1, 1)


def fourier(x: Tensor, frequencies: int) -> Tensor:
    """Numbers in 0..1, (n, k), to sines and cosines of 1, 2, 4 ... half turns: (n, 2 k f)."""
    angle = x[..., None] * (math.pi * 2.0 ** torch.arange(frequencies, device=x.device))
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)


class _Block(nn.Module):
    """Norm, 3x3 convolution, norm, FiLM, 3x3 convolution, on a residual stream."""

    def __init__(self, width: int, told: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, affine=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(told, 2 * width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Denoiser(nn.Module):
    """Predicts v of noisy squares.

    Args:
        side: of the squares, a multiple of 4.
        vector: width D of the condition vector.
        width: channels at the finer of the two resolutions, a multiple of 8.

    Raises:
        ValueError: side or width is not such a multiple.
    """

    def __init__(self, *, side: int, vector: int, width: int = 32) -> None:
        super().__init__()
        for name, value, multiple in (("side", side, 4), ("width", width, GROUPS)):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, got {value}")
        self.side, self.width = side, width
        told = 4 * width
        given = vector + 1 + 2 * 4 * PLACE_FREQUENCIES + 2 * TIME_FREQUENCIES
        self.tell = nn.Sequential(nn.Linear(given, told), nn.SiLU(), nn.Linear(told, told))
        self.enter = nn.Conv2d(12, width, 3, padding=1)
        self.down = nn.ModuleList(_Block(width, told) for _ in range(2))
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.middle = nn.ModuleList(_Block(2 * width, told) for _ in range(3))
        self.grow = nn.Conv2d(2 * width, 4 * width, 1)
        self.up = nn.ModuleList(_Block(width, told) for _ in range(2))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.leave = nn.Conv2d(width, 12, 3, padding=1)
        # where a middle position lies: convolutions over 3 to 6 positions hardly know
        self.where = nn.Parameter(torch.zeros(1, 2 * width, side // 4, side // 4))

    def initialise(self, generator: torch.Generator) -> None:
        """Draws the weights in place; the last convolution starts at zero, so that v does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5, generator=generator)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.where)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x: Tensor, t: Tensor, told: Told) -> Tensor:
        """Noisy squares (n, 3, side, side) at times (n,) to v of the same shape."""
        known = [told.vector * told.known, told.known]
        given = [fourier(told.place, PLACE_FREQUENCIES), fourier(t[:, None], TIME_FREQUENCIES)]
        film = F.silu(self.tell(torch.cat([*known, *given], dim=1)))
        h = self.enter(F.pixel_unshuffle(x, 2))
        for block in self.down:
            h = block(h, film)
        low = self.shrink(h) + self.where
        for block in self.middle:
            low = block(low, film)
        h = h + F.pixel_shuffle(self.grow(low), 2)
        for block in self.up:
            h = block(h, film)
        return F.pixel_shuffle(self.leave(F.silu(self.norm(h))), 2)
