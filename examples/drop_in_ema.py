"""An ordinary supervised training loop whose weight averaging is `ijepa_kernels.optim.EMA`.

    python examples/drop_in_ema.py            # the usual loop over parameters
    python examples/drop_in_ema.py --ours     # one launch

Classifies the direction of random gratings; on a GPU everything runs there.
"""

import argparse
import copy

import torch
from torch import Tensor, nn

from ijepa_kernels.optim import EMA

CLASSES = 4
DECAY = 0.99


def build() -> nn.Module:
    """A small convolutional classifier; its BatchNorm has buffers that an average must follow."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


class LoopEMA:
    """What many training scripts write: a loop over the state dict."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average."""
        for old, new in zip(self.module.parameters(), model.parameters(), strict=True):
            old.lerp_(new, 1 - self.decay)
        for old, new in zip(self.module.buffers(), model.buffers(), strict=True):
            old.copy_(new)


def gratings(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy stripes in one of four directions: images (B, 1, 16, 16) and labels (B,)."""
    label = torch.randint(CLASSES, (batch,), generator=generator)
    angle = label * torch.pi / CLASSES
    phase = torch.rand((batch, 1, 1), generator=generator) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.cos(angle)[:, None, None] * x + torch.sin(angle)[:, None, None] * y
    noise = torch.randn((batch, 16, 16), generator=generator)
    return (torch.sin(wave + phase) + 2 * noise)[:, None], label


def train(steps: int, ours: bool, device: str = "cpu") -> tuple[list[float], float, nn.Module]:
    """Trains from a fixed seed; returns the losses, the averaged model's accuracy, and itself."""
    model = build().to(device)
    ema = EMA(model, decay=DECAY) if ours else LoopEMA(model, DECAY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        images, labels = (t.to(device) for t in gratings(64, generator))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        losses.append(loss.item())
    images, labels = (t.to(device) for t in gratings(1000, generator))
    accuracy = (ema.module(images).argmax(1) == labels).float().mean().item()
    return losses, accuracy, ema.module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ours", action="store_true", help="with ijepa_kernels")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be positive, got {args.steps}")
    losses, accuracy, _ = train(
        args.steps, args.ours, "cuda" if torch.cuda.is_available() else "cpu"
    )
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"averaged model: {accuracy:.1%} of 1000 gratings right (chance {1 / CLASSES:.0%})")
