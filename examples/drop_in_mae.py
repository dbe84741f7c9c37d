"""A small masked autoencoder (He et al., 2021), trained with plain torch or, with ``--ours``, with
`ijepa_kernels` in four places: token gather, mask-token scatter, loss, and optimiser with EMA.

    python examples/drop_in_mae.py            # plain torch
    python examples/drop_in_mae.py --ours     # the same losses

The pictures are random smooth colour fields; on a GPU everything runs there.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_kernels import gather_tokens, latent_loss, scatter_tokens
from ijepa_kernels.optim import AdamWEMA

SIZE, PATCH, KEEP = 32, 4, 16
PATCHES, PIXELS = (SIZE // PATCH) ** 2, 3 * PATCH**2


class MaskedAutoencoder(nn.Module):
    """ViT encoder on the visible patches, a shallow decoder on all of them."""

    def __init__(self, ours: bool, width: int = 96, decoder_width: int = 64) -> None:
        super().__init__()
        self.ours = ours
        self.embed = nn.Linear(PIXELS, width)
        self.position = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        self.encoder = self._blocks(width, 3)
        self.to_decoder = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_width))
        self.decoder_position = nn.Parameter(0.02 * torch.randn(PATCHES, decoder_width))
        self.decoder = self._blocks(decoder_width, 1)
        self.to_pixels = nn.Linear(decoder_width, PIXELS)

    @staticmethod
    def _blocks(width: int, depth: int) -> nn.Module:
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        return nn.TransformerEncoder(block, depth, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, patches: Tensor, keep: Tensor) -> Tensor:
        """Patches (B, N, pixels) and visible patch numbers (B, K) to predictions (B, N, pixels)."""
        tokens = self.embed(patches)
        if self.ours:
            visible = gather_tokens(tokens, keep, self.position)
        else:
            index = keep[:, :, None].expand(-1, -1, tokens.shape[2])
            visible = torch.gather(tokens + self.position, 1, index)

        z = self.to_decoder(self.encoder(visible))
        if self.ours:
            full = scatter_tokens(z, keep, PATCHES, self.mask_token, self.decoder_position)
        else:
            index = keep[:, :, None].expand(-1, -1, z.shape[2])
            full = self.mask_token.repeat(len(z), PATCHES, 1).scatter(1, index, z)
            full = full + self.decoder_position
        return self.to_pixels(self.decoder(full))


def loss_of(model: MaskedAutoencoder, patches: Tensor, order: Tensor, ours: bool) -> Tensor:
    """Mean squared error of the hidden patches, each normalised by its own mean and deviation."""
    prediction = model(patches, order[:, :KEEP].contiguous())
    hidden = (
        order[:, KEEP:] + PATCHES * torch.arange(len(order), device=order.device)[:, None]
    ).flatten()
    prediction = prediction.flatten(0, 1)[hidden]
    if ours:
        return latent_loss(prediction, patches, hidden, kind="l2", eps=1e-6)
    target = F.layer_norm(patches, patches.shape[-1:], eps=1e-6).flatten(0, 1)[hidden]
    return F.mse_loss(prediction, target)


def pictures(batch: int, generator: torch.Generator) -> Tensor:
    """Random smooth colour fields as patches (B, N, pixels)."""
    coarse = torch.randn((batch, 3, 5, 5), generator=generator)
    images = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)
    rows = F.unfold(images, PATCH, stride=PATCH)
    return rows.transpose(1, 2).contiguous()


def train(steps: int, ours: bool, device: str = "cpu", batch: int = 16) -> list[float]:
    """Trains from a fixed seed; returns the loss of every step, and at last the EMA model's."""
    torch.manual_seed(0)
    model = MaskedAutoencoder(ours).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}
    if ours:
        optimizer: torch.optim.Optimizer = AdamWEMA(model.parameters(), **settings, momentum=0.99)
        optimizer.track(model, average)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings)

    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        patches = pictures(batch, generator).to(device)
        order = torch.rand((batch, PATCHES), generator=generator).argsort(1).to(device)
        loss = loss_of(model, patches, order, ours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not ours:
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 1 - 0.99)
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(loss_of(average, patches, order, ours).item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ours", action="store_true", help="with ijepa_kernels")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be positive, got {args.steps}")
    result = train(args.steps, args.ours, "cuda" if torch.cuda.is_available() else "cpu")
    for step in range(0, args.steps, max(1, args.steps // 10)):
        print(f"step {step + 1:4d}  loss {result[step]:.6f}")
    print(f"averaged model  {result[-1]:.6f}")
