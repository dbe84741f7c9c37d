"""One I-JEPA training step in plain PyTorch: the specification that everything faster is held
against.

Written to be read. Unequal context lengths are padded and masked, which is obviously right
rather than fast. Sources: Assran et al., "Self-Supervised Learning from Images with a
Joint-Embedding Predictive Architecture" (arXiv 2301.08243), section 3 and appendix A.

Shape letters: B images, N grid patches, M target blocks, T patches of a target block, C context
blocks, S = C * B context sequences, K context patches of the longest, D encoder width. Batches
of sequences are ordered [target block, context block, image], image fastest.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast._torch import foreach_add_, foreach_mul, foreach_mul_, foreach_norm
from ijepa_fast.config import OptimConfig
from ijepa_fast.masks import Masks
from ijepa_fast.model import Predictor, VisionTransformer
from ijepa_fast.ranks import all_reduce_max_, all_reduce_sum_
from ijepa_fast.schedules import StepValues

__all__ = [
    "ReferenceStep",
    "any_bad",
    "count_skip",
    "ema_update_",
    "feature_std",
    "latent_loss_sum",
    "latent_targets",
    "normalise",
    "pad_contexts",
    "parameter_groups",
    "predict",
    "set_rates",
]

TARGET_NORM_EPS = 1e-5


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images as decoded to images as the network sees them.

    Args:
        images: uint8 (B, height, width, 3).
        mean, std: (3,) of each channel, in 0-1 units, on the same device.

    Returns:
        float32 (B, 3, height, width), (images / 255 - mean) / std.
    """
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def pad_contexts(masks: Masks, num_patches: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Unpacks the context indices into a rectangle.

    Args:
        masks: packed indices of S = C * B context sequences.
        num_patches: N.

    Returns:
        rows (S, K) into the (B * N) patch rows of the batch; patches (S, K) in 0..N-1; valid (S,
        K), False on padding, or None where nothing is padded.
    """
    start, end = masks.context_cu[:-1].long(), masks.context_cu[1:].long()
    column = torch.arange(masks.max_context, device=start.device)
    valid = column < (end - start)[:, None]
    # padding repeats the sequence's first patch: finite, and masked out as a key everywhere
    rows = masks.context_index.long()[start[:, None] + torch.where(valid, column, 0)]
    padded = valid.numel() != masks.context_index.numel()
    return rows, rows % num_patches, valid if padded else None


def latent_targets(features: Tensor, masks: Masks) -> Tensor:
    """What the predictor has to guess (section 3, "Targets").

    A second LayerNorm without affine (eps 1e-5), on top of the encoder's own final norm, then
    the rows of each target block.

    Args:
        features: of all patches, from the target encoder (B, N, D).
        masks: target_index (B, M, T).

    Returns:
        float32 (M, B, T, D).
    """
    features = F.layer_norm(features.float(), features.shape[-1:], eps=TARGET_NORM_EPS)
    image = torch.arange(features.shape[0], device=features.device)[None, :, None]
    return features[image, masks.target_index.long().transpose(0, 1)]


def predict(
    encoder: VisionTransformer, predictor: Predictor, images: Tensor, masks: Masks
) -> Tensor:
    """Predicts every target block from every context block, each pair its own sequence.

    Args:
        encoder: the context encoder.
        predictor: the predictor.
        images: normalised (B, 3, height, width).
        masks: context and target indices.

    Returns:
        (M, C, B, T, D).
    """
    num_images = images.shape[0]
    tokens = encoder.embed(images)
    rows, patches, valid = pad_contexts(masks, tokens.shape[1])
    context_z = encoder.encode(tokens.flatten(0, 1)[rows], valid)

    _, num_targets, target_length = masks.target_index.shape
    num_contexts = rows.shape[0] // num_images
    targets = masks.target_index.long().transpose(0, 1)  # (M, B, T)
    targets = targets[:, None].expand(-1, num_contexts, -1, -1)  # (M, C, B, T)
    prediction = predictor(
        context_z.repeat(num_targets, 1, 1),
        patches.repeat(num_targets, 1),
        targets.reshape(-1, target_length),
        None if valid is None else valid.repeat(num_targets, 1),
    )
    return prediction.view(num_targets, num_contexts, num_images, target_length, -1)


def latent_loss_sum(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """Sum over all elements of the distance between prediction and target, in float32.

    Args:
        prediction: (M, C, B, T, D).
        target: (M, B, T, D), the same for every context block.
        kind: `smooth_l1` (beta 1), `l2` or `l1`.

    Raises:
        ValueError: unknown kind.
    """
    losses = {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss, "l1": F.l1_loss}
    if kind not in losses:
        raise ValueError(f"loss must be one of {', '.join(losses)}, got {kind!r}")
    prediction = prediction.float()
    target = target.unsqueeze(1).expand_as(prediction)
    return losses[kind](prediction, target, reduction="sum")


def feature_std(features: Tensor, masks: Masks) -> Tensor:
    """Standard deviation of the target encoder's features over the rows that some target needs,
    mean over channels: it goes to 0 when the representation collapses.

    Args:
        features: (B, N, D).
        masks: target_index (B, M, T).
    """
    index = masks.target_index.flatten(1).long()
    needed = features.new_zeros(features.shape[:2], dtype=torch.float32).scatter_(1, index, 1.0)
    weight, rows = needed.flatten()[:, None], features.float().flatten(0, 1)
    mean = (weight * rows).sum(dim=0) / weight.sum()
    variance = (weight * (rows - mean).square()).sum(dim=0) / (weight.sum() - 1)
    return variance.sqrt().mean()


def parameter_groups(modules: Iterable[nn.Module]) -> list[dict[str, object]]:
    """AdamW's two groups: parameters with two or more dimensions decay (mask token included),
    norms and biases do not. The flag `decays` marks the group whose weight decay follows the
    schedule.
    """
    parameters = [p for module in modules for p in module.parameters()]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "decays": True},
        {"params": [p for p in parameters if p.ndim < 2], "decays": False, "weight_decay": 0.0},
    ]


def ema_update_(targets: list[Tensor], sources: list[Tensor], keep: Tensor, take: Tensor) -> None:
    """targets = keep * targets + take * sources in place (section 3, "Targets").

    Args:
        targets, sources: weights of the target and the context encoder.
        keep, take: momentum and 1 - momentum, scalars on the device.
    """
    foreach_mul_(targets, keep)
    foreach_add_(targets, foreach_mul(sources, take))


def set_rates(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Sets what the schedules say for the next update; see `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = values.lr
        group["weight_decay"] = values.weight_decay if group["decays"] else 0.0
        if "momentum" in group:
            group["momentum"] = values.momentum


def any_bad(gradients: list[Tensor], loss: Tensor) -> Tensor:
    """1.0 where a gradient or the loss is not finite on any rank, else 0.0; not read back."""
    norms = torch.stack([*foreach_norm(gradients), loss])
    bad = (~torch.isfinite(norms).all()).float()
    all_reduce_max_(bad)
    return bad


def count_skip(skipped: Tensor, bad: Tensor) -> Tensor:
    """Counts one update.

    Args:
        skipped: int64 (4,): updates skipped because something was not finite: current run of them,
            longest run, total; and updates since the longest run ended (of two as long, the first).
        bad: 1 where this one is skipped, else 0.

    Returns:
        The numbers after it.
    """
    run, longest, total, since = skipped.unbind()
    run = (run + 1) * bad.long()
    since = (since + 1) * (run <= longest)
    return torch.stack([run, torch.maximum(run, longest), total + bad.long(), since])


class ReferenceStep:
    """The networks of a run, their optimiser, and one training step.

    Gradient accumulation and data parallelism change nothing: every loss is divided by the
    number of elements of the whole global batch, so gradients add up over micro-steps and ranks.

    Args:
        encoder: context encoder, with its initial weights, on the training device.
        predictor: predictor, likewise.
        config: loss, betas, eps and precision.
        mean, std: of the image channels, in 0-1 units.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        config: OptimConfig,
        *,
        mean: Iterable[float],
        std: Iterable[float],
    ) -> None:
        self.encoder = encoder
        self.predictor = predictor
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.config = config
        self.device = next(encoder.parameters()).device
        self.mean = torch.tensor(tuple(mean), device=self.device)
        self.std = torch.tensor(tuple(std), device=self.device)
        # lr and weight decay are set from the schedules before every update
        self.optimizer = torch.optim.AdamW(
            parameter_groups([encoder, predictor]),
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        # see `count_skip`
        self.skipped = torch.zeros(4, dtype=torch.int64, device=self.device)
        self._loss = torch.zeros((), device=self.device)

    def describe(self) -> str:
        """How the step runs, in one line."""
        return "reference path: plain PyTorch, weights whole on every rank"

    def prepare(self, masks: Masks) -> Masks:
        """Masks as sampled, on the CPU, to what a step takes; does not wait for the device."""
        if self.device.type == "cuda":
            return masks.pin_memory().to(self.device, non_blocking=True)
        return masks

    def forward(self, images: Tensor, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides of the loss.

        Args:
            images: uint8 (B, height, width, 3) on the training device.
            masks: of these images, on the training device.

        Returns:
            Prediction (M, C, B, T, D), latent target (M, B, T, D), and the target encoder's
            features of all patches (B, N, D).
        """
        x = normalise(images, self.mean, self.std)
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            with torch.no_grad():
                features = self.target_encoder(x)
            target = latent_targets(features, masks)
            prediction = predict(self.encoder, self.predictor, x, masks)
        return prediction, target, features

    def accumulate(
        self, images: Tensor, masks: Masks, elements: int, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-step; gradients add to those already there.

        Args:
            images: uint8 (B, height, width, 3) on the training device.
            masks: of these images, on the training device.
            elements: elements of the predictions of the whole global batch, over all ranks and
                micro-steps; the loss is the mean over them.
            last: of its optimiser step; makes no difference here.

        Returns:
            This micro-step's share of the loss, and `feature_std`: scalars on the device.
        """
        prediction, target, features = self.forward(images, masks)
        loss = latent_loss_sum(prediction, target, self.config.loss) / elements
        loss.backward()
        self._loss = self._loss + loss.detach()
        return loss.detach(), feature_std(features, masks)

    @torch.no_grad()
    def update(self, values: StepValues) -> None:
        """Reduces the gradients over ranks, then AdamW, then the EMA with the updated weights.

        A step with a non-finite loss or gradient, on any rank, changes neither weights, moments,
        Adam's step count nor the target encoder; ``skipped`` counts it. Nothing is read back to
        the host.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "update() before accumulate()"
        all_reduce_sum_(gradients)
        bad = any_bad(gradients, self._loss)
        set_rates(self.optimizer, values)
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by the fused kernel
        self.optimizer.step()
        ema_update_(
            list(self.target_encoder.parameters()),
            list(self.encoder.parameters()),
            keep=values.momentum * (1.0 - bad) + bad,
            take=(1.0 - values.momentum) * (1.0 - bad),
        )
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = torch.zeros_like(self._loss)
        self.skipped = count_skip(self.skipped, bad)

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights and tables of all three networks, by name."""
        networks = {
            "encoder": self.encoder,
            "predictor": self.predictor,
            "target_encoder": self.target_encoder,
        }
        return {
            f"{name}.{key}": value
            for name, network in networks.items()
            for key, value in network.state_dict().items()
        }

    def round(self) -> None:
        """Nothing to do after something else than `update` changed the masters: there are no
        rounded weights.
        """
