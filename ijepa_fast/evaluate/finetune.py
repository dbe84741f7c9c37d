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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import VisionTransformer
from ijepa_fast.reference import normalise
from ijepa_fast.schedules import Schedules

__all__ = ["Batches", "Classifier", "FinetuneResult", "LayerGroup", "finetune", "layer_groups"]

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""Epoch, from 0 -> batches of images uint8 (b, height, width, 3) and labels (b,) in 0..C-1."""

HEAD_STD = 0.01
FINAL_LR = 1e-6


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
class LayerGroup:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        name: for people.
        parameters: their names in the classifier.
        scale: factor of the learning rate.
        decays: whether weight decay applies: to matrices, not to biases and norms.
    """

    name: str
    parameters: tuple[str, ...]
    scale: float
    decays: bool


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What came out.

    Attributes:
        accuracy: share of the test images that are right, after the last epoch.
        losses: mean training loss of each epoch, label smoothing included.
        images: training images seen, over all epochs.
        test_images: test images.
        steps: optimiser steps.
        classifier: the trained network, in evaluation mode.
    """

    accuracy: float
    losses: tuple[float, ...]
    images: int
    test_images: int
    steps: int
    classifier: Classifier


def layer_groups(classifier: Classifier, layer_decay: float) -> list[LayerGroup]:
    """Every parameter in exactly one group, from the first layer to the last.

    Layer 0 is the patch embedding (positions are fixed), layer i + 1 is block i, and the last
    layer, depth + 1, is the final norm and the head. The scale of a layer is
    layer_decay ** (depth + 1 - layer).

    Raises:
        ValueError: layer_decay is not in 0..1.
    """
    if not 0 <= layer_decay <= 1:
        raise ValueError(f"layer_decay must be between 0 and 1, got {layer_decay}")
    last = len(classifier.encoder.blocks) + 1
    names: dict[tuple[int, bool], list[str]] = {}
    for name, parameter in classifier.named_parameters():
        names.setdefault((_layer(name, last), parameter.ndim >= 2), []).append(name)
    return [
        LayerGroup(
            name=f"layer {layer} of {last}",
            parameters=tuple(members),
            scale=layer_decay ** (last - layer),
            decays=decays,
        )
        for (layer, decays), members in sorted(names.items())
    ]


def _layer(name: str, last: int) -> int:
    if name.startswith("encoder.patch_embed."):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return last


def finetune(
    encoder: VisionTransformer,
    classes: int,
    train: Batches,
    test: Batches,
    *,
    epochs: int,
    steps_per_epoch: int,
    mean: Sequence[float],
    std: Sequence[float],
    lr: float = 1e-3,
    layer_decay: float = 0.75,
    label_smoothing: float = 0.1,
    weight_decay: float = 0.05,
    warmup_epochs: float = 5.0,
    seed: int = 0,
    precision: Literal["bfloat16", "float32"] = "float32",
    progress: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Trains a copy of the encoder with a new head, then scores it on the test images once.

    AdamW (betas 0.9 and 0.999); weights, moments and loss in float32. The learning rate rises from
    0 over the warm-up and falls along a cosine to 1e-6, step by step. Layers whose rate is 0 get
    no gradients: with layer_decay 0 the final norm and the head alone learn.

    Args:
        encoder: on the device to train on; it is not changed.
        classes: C.
        train: called with each epoch; its labels must be in 0..C-1.
        test: called once, with 0; other labels count as wrong.
        epochs: passes over the training images.
        steps_per_epoch: batches of `train` in one epoch; where it yields more, the schedule waits
            at the end of the epoch.
        mean, std: of the image channels, in 0-1 units.
        lr: peak learning rate of the last layer; not scaled to the batch.
        layer_decay: factor from each layer to the one before, 0..1.
        label_smoothing: share of the target spread over all classes, 0 <= share < 1.
        weight_decay: of matrices.
        warmup_epochs: at most `epochs`.
        seed: of the head's weights.
        precision: `bfloat16` autocasts matrix products.
        progress: gets a line after each epoch.

    Raises:
        ValueError: an argument is out of range, a training label is, a batch does not fit, or there
            are no images.
        FloatingPointError: the loss is not finite.
    """
    _check(classes, epochs, steps_per_epoch, lr, label_smoothing, weight_decay, warmup_epochs)
    if precision not in ("bfloat16", "float32"):
        raise ValueError(f"precision must be bfloat16 or float32, got {precision!r}")
    device = encoder.pos_embed.device
    half = precision == "bfloat16"
    means, stds = (torch.tensor(tuple(values), device=device) for values in (mean, std))
    copied = copy.deepcopy(encoder).requires_grad_(True)
    classifier = Classifier(copied, classes, torch_generator(seed, Stream.INIT)).train()
    optimizer = _optimizer(classifier, layer_groups(classifier, layer_decay), weight_decay)
    schedules = Schedules(
        steps_per_epoch=steps_per_epoch,
        epochs=epochs,
        warmup=warmup_epochs,
        ipe_scale=1.0,
        start_lr=0.0,
        lr=lr,
        final_lr=min(lr, FINAL_LR),
        weight_decay=weight_decay,
        final_weight_decay=weight_decay,
        momentum=0.0,
        final_momentum=0.0,
    )

    def logits(images: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            outputs = classifier(normalise(images.to(device), means, stds))
        return outputs.float()

    losses, seen, steps = [], 0, 0
    for epoch in range(epochs):
        total, count = 0.0, 0
        for number, (images, labels) in enumerate(train(epoch)):
            _check_batch(images, labels, classes)
            step = epoch * steps_per_epoch + min(number, steps_per_epoch - 1) + 1
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * schedules.at(step).lr
            target = labels.to(device, torch.int64)
            loss = F.cross_entropy(logits(images), target, label_smoothing=label_smoothing)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss must be finite, got {value} in epoch {epoch + 1}, batch "
                    f"{number + 1}: lower lr ({lr:g}) or look at the data"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total, count, steps = total + value * len(images), count + len(images), steps + 1
        if not count:
            raise ValueError(f"train must yield images in every epoch, got none in {epoch + 1}")
        losses.append(total / count)
        seen += count
        if progress is not None:
            progress(f"epoch {epoch + 1}/{epochs}  loss {losses[-1]:.4f}  {count} images")
    classifier.eval()
    correct, tested = _score(logits, test(0))
    return FinetuneResult(
        accuracy=correct / tested,
        losses=tuple(losses),
        images=seen,
        test_images=tested,
        steps=steps,
        classifier=classifier,
    )


def _optimizer(
    classifier: Classifier, groups: Sequence[LayerGroup], weight_decay: float
) -> torch.optim.AdamW:
    parameters = dict(classifier.named_parameters())
    learning = []
    for group in groups:
        members = [parameters[name] for name in group.parameters]
        if group.scale == 0:
            for member in members:
                member.requires_grad_(False)
        else:
            decay = weight_decay if group.decays else 0.0
            learning.append({"params": members, "scale": group.scale, "weight_decay": decay})
    return torch.optim.AdamW(learning, lr=0.0)


@torch.no_grad()
def _score(
    logits: Callable[[Tensor], Tensor], batches: Iterator[tuple[Tensor, Tensor]]
) -> tuple[int, int]:
    """Right ones and all of them."""
    correct, tested = 0, 0
    for images, labels in batches:
        guess = logits(images).argmax(dim=1)
        correct += int((guess == labels.to(guess.device)).sum())
        tested += len(images)
    if not tested:
        raise ValueError("test must yield images, got none")
    return correct, tested


def _check(
    classes: int,
    epochs: int,
    steps_per_epoch: int,
    lr: float,
    label_smoothing: float,
    weight_decay: float,
    warmup_epochs: float,
) -> None:
    if classes < 2:
        raise ValueError(f"classes must be at least 2, got {classes}")
    for name, number in (("epochs", epochs), ("steps_per_epoch", steps_per_epoch)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(
            f"warmup_epochs must be between 0 and epochs ({epochs}), got {warmup_epochs}"
        )


def _check_batch(images: Tensor, labels: Tensor, classes: int) -> None:
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be one an image ({images.shape[0]}), got {tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"training labels must be in 0..{classes - 1}, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
