"""Fine-tuning: encoder, average pool and linear head trained together on labelled images.

The usual recipe for ViTs pretrained without labels (Bao et al., "BEiT", 2022; He et al., "Masked
autoencoders are scalable vision learners", 2022, appendix A.1): AdamW, learning rates that fall
from the last layer to the first, label smoothing, linear warm-up and cosine. With a low-shot set
(`subsets.low_shot_rows`) it is the paper's low-shot evaluation (section 5). There is no drop
path, mixup or random erasing: the network has no place for the first, images are the caller's.

Shape letters: b images of a batch, N patches, D encoder width, C classes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.errors import UsageError
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import VisionTransformer
from ijepa_fast.schedules import Schedules
from ijepa_fast.weights import Encoder

__all__ = ["Batches", "Classifier", "FinetuneResult", "FinetuneSettings", "finetune"]

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Epoch, from 0 -> batches of images uint8 (b, height, width, 3) and labels (b,) in 0..C-1."""

HEAD_STD = 0.01
FINAL_LR = 1e-6
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
WARMUP_EPOCHS = 5.0


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Fine-tuning: layer decay 0.75, label smoothing 0.1, AdamW.

    Example:
        >>> few = ijepa_fast.FinetuneSettings(per_class=5, epochs=1, batch=8)
        >>> result = ijepa_fast.evaluate("runs/mine", "images", methods=["finetune"], finetune=few)
        >>> result["accuracy"]["target encoder, step 3"].keys()
        dict_keys(['fine-tuned, 5 a class'])
    """

    share: float = 0.01
    """Share of the labelled training images, the same ones always; 1 is full fine-tuning."""
    per_class: int | None = None
    """Instead of a share: so many images of each class."""
    epochs: int = 50
    """Passes over them."""
    batch: int = 64
    """Images of one step."""
    lr: float = 1e-3
    """Learning rate of the last layer."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each layer to the one before."""

    @property
    def title(self) -> str:
        """Of a table's column."""
        if self.per_class is not None:
            return f"fine-tuned, {self.per_class} a class"
        return f"fine-tuned, {100 * self.share:g} %"

    def check(self) -> None:
        """Raises:
        UsageError: a setting is out of range.
        """
        for name in ("epochs", "batch", "per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"finetune.{name} must be at least 1, got {value}")
        if not 0 <= self.lr < math.inf:
            raise UsageError(f"finetune.lr must be at least 0 and finite, got {self.lr}")
        if not 0 <= self.layer_decay <= 1:
            raise UsageError(
                f"finetune.layer-decay must be between 0 and 1, got {self.layer_decay}"
            )
        if not 0 < self.share <= 1:
            raise UsageError(f"finetune.share must be above 0 and at most 1, got {self.share}")


class Classifier(nn.Module):
    """Encoder, average over patches of its final norm's output, linear head.

    Args:
        encoder: its weights are used as they are, not copied.
        classes: C.
        generator: CPU generator of the head's weights, normal(0, 0.01); biases are zero.
    """

    def __init__(
        self, encoder: VisionTransformer, classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.encoder = encoder
        head = nn.Linear(encoder.width, classes)
        nn.init.normal_(head.weight, std=HEAD_STD, generator=generator)
        nn.init.zeros_(head.bias)
        self.head = head.to(encoder.pos_embed.device)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (b, 3, height, width) to logits (b, C)."""
        return self.head(self.encoder(images).mean(dim=1))


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What came out.

    Attributes:
        accuracy: share of the test images that are right, after the last epoch.
        losses: mean training loss of each epoch, label smoothing included.
        steps: optimiser steps.
        classifier: the trained network, in evaluation mode.
    """

    accuracy: float
    losses: tuple[float, ...]
    steps: int
    classifier: Classifier


def finetune(
    encoder: Encoder,
    classes: int,
    train: Batches,
    test: Iterator[tuple[Tensor, Tensor]],
    settings: FinetuneSettings,
    *,
    steps_per_epoch: int,
    seed: int = 0,
    half: bool = False,
    progress: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Trains a copy of the encoder with a new head, then scores it on the test images once.

    AdamW (betas 0.9 and 0.999); weights, moments and loss in float32. The learning rate rises from
    0 over the warm-up (5 epochs, or a tenth) and falls along a cosine to 1e-6, step by step. Layers
    whose rate is 0 get no gradients: with layer_decay 0 the final norm and the head alone learn.

    Args:
        encoder: on the device to train on; it is not changed.
        classes: C.
        train: called with each epoch.
        test: labels that are none of the training ones count as wrong.
        settings: epochs, learning rate and its decay from layer to layer.
        steps_per_epoch: batches of `train` in one epoch.
        seed: of the head's weights.
        half: bfloat16 in matrix products.
        progress: gets a line after each epoch.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = encoder.mean.device
    copied = copy.deepcopy(encoder.network).requires_grad_(True)
    classifier = Classifier(copied, classes, torch_generator(seed, Stream.INIT)).train()
    groups = _parameter_groups(classifier, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    schedules = Schedules(
        steps_per_epoch=steps_per_epoch,
        epochs=settings.epochs,
        warmup=min(WARMUP_EPOCHS, settings.epochs / 10),
        ipe_scale=1.0,
        start_lr=0.0,
        lr=settings.lr,
        final_lr=min(settings.lr, FINAL_LR),
        weight_decay=WEIGHT_DECAY,
        final_weight_decay=WEIGHT_DECAY,
        momentum=0.0,
        final_momentum=0.0,
    )

    def logits(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            outputs = classifier(encoder.normalise(images))
        return outputs.float()

    losses, steps = [], 0
    for epoch in range(settings.epochs):
        total, count = 0.0, 0
        for number, (images, labels) in enumerate(train(epoch)):
            lr = schedules.at(epoch * steps_per_epoch + number + 1).lr
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * lr
            loss = F.cross_entropy(
                logits(images), labels.to(device), label_smoothing=LABEL_SMOOTHING
            )
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss must be finite, got {value} in epoch {epoch + 1}, batch "
                    f"{number + 1}: lower finetune.lr ({settings.lr:g}) or check the data"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count, steps = total + value * len(images), count + len(images), steps + 1
        losses.append(total / count)
        if progress is not None:
            progress(f"epoch {epoch + 1}/{settings.epochs}  loss {losses[-1]:.4f}  {count} images")
    classifier.eval()
    correct, tested = 0, 0
    with torch.no_grad():
        for images, labels in test:
            correct += int((logits(images).argmax(dim=1) == labels.to(device)).sum())
            tested += len(images)
    return FinetuneResult(
        accuracy=correct / tested, losses=tuple(losses), steps=steps, classifier=classifier
    )


def _parameter_groups(classifier: Classifier, layer_decay: float) -> list[dict[str, Any]]:
    """For the optimiser: the learning rate of a group is `scale` times that of the last layer, and
    matrices decay, not biases and norms.

    Layer 0 is the patch embedding (positions are fixed), layer i + 1 is block i, and the last
    layer, depth + 1, is the final norm and the head. The scale of a layer is
    layer_decay ** (depth + 1 - layer).
    """
    last = len(classifier.encoder.blocks) + 1
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        layer = last
        if name.startswith("encoder.patch_embed."):
            layer = 0
        elif name.startswith("encoder.blocks."):
            layer = int(name.split(".")[2]) + 1
        scale = layer_decay ** (last - layer)
        if scale:
            members.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
        else:
            parameter.requires_grad_(False)
    return [
        {"params": group, "scale": scale, "weight_decay": WEIGHT_DECAY if decays else 0.0}
        for (scale, decays), group in members.items()
    ]
