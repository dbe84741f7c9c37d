"""A training step as most I-JEPA loops are written: the baseline that users run today.

Attention by its formula, with the matrix of weights in memory; autocast; AdamW and the average of
the weights one tensor after the other; masks copied from ordinary memory; the loss read by the host
in every step. The networks are those of `ijepa_fast.model`. Written from the method's description.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.config import OptimConfig
from ijepa_fast.masks import Masks
from ijepa_fast.model import Attention, Predictor, VisionTransformer
from ijepa_fast.reference import latent_targets, normalise, parameter_groups, predict
from ijepa_fast.schedules import StepValues

__all__ = ["ExplicitAttention", "ReleasedStyleStep"]


class ExplicitAttention(Attention):
    """softmax(q k^T / sqrt(E)) v, step by step."""

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        sequences, length, width = x.shape
        qkv = self.qkv(x).reshape(sequences, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None, None, :], float("-inf"))
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(sequences, length, width))


class ReleasedStyleStep:
    """The networks of a run, their optimiser, and one training step; called as `ReferenceStep`.

    One micro-step a step, smooth-L1 loss.

    Args:
        encoder, predictor: with their initial weights, on the training device. Their attention is
            replaced.
        config: betas, eps and precision.
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
        assert config.loss == "smooth_l1"
        for network in (encoder, predictor):
            for module in network.modules():
                if isinstance(module, Attention):
                    module.__class__ = ExplicitAttention
        self.encoder, self.predictor, self.config = encoder, predictor, config
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.device = next(encoder.parameters()).device
        self.mean = torch.tensor(tuple(mean), device=self.device)
        self.std = torch.tensor(tuple(std), device=self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups([encoder, predictor]),
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            foreach=False,
            fused=False,
        )
        self.loss = float("nan")
        self._loss = torch.zeros((), device=self.device)

    def prepare(self, masks: Masks) -> Masks:
        """Masks to the device."""
        return masks.to(self.device)

    def accumulate(self, images: Tensor, masks: Masks, elements: int) -> tuple[Tensor]:
        """Forward and backward; see `ReferenceStep.accumulate`."""
        x = normalise(images, self.mean, self.std)
        half = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            with torch.no_grad():
                features = self.target_encoder(x)
                target = latent_targets(features, masks)
            prediction = predict(self.encoder, self.predictor, x, masks)
        assert prediction.numel() == elements, "one micro-step only"
        # the latent targets once for each context block
        target = target.unsqueeze(1).repeat(1, prediction.shape[1], 1, 1, 1)
        loss = F.smooth_l1_loss(prediction.float(), target)
        loss.backward()
        self._loss = loss.detach()
        return (self._loss,)

    @torch.no_grad()
    def update(self, values: StepValues) -> None:
        """AdamW, then the average, then the host waits for the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
            group["weight_decay"] = values.weight_decay if group["decays"] else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        sources = self.encoder.parameters()
        for target, source in zip(self.target_encoder.parameters(), sources, strict=True):
            target.mul_(values.momentum).add_((1.0 - values.momentum) * source)
        self.loss = float(self._loss)

    def masters(self) -> dict[str, Tensor]:
        """As `ReferenceStep.masters`."""
        names = ("encoder", "predictor", "target_encoder")
        return {
            f"{name}.{key}": value
            for name in names
            for key, value in getattr(self, name).state_dict().items()
        }
