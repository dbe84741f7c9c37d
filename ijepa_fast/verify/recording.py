"""Recorded steps of the published trainer: a safetensors file, read and checked.

The metadata entry ``case`` (JSON) holds dimensions and schedules. Tensors: initial weights
(``init.*``), each step's images and masks (``step{j}.*``, from 0), the first step's prediction,
latent target and gradients, losses and schedules of all steps, and the final weights of all three
networks (``final.*``).
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ijepa_fast.masks import Masks
from ijepa_fast.model import NORM_EPS, Predictor, VisionTransformer
from ijepa_fast.schedules import Schedules
from ijepa_fast.state import misfit

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Recording"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class _Case(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise ValueError(f"FILE must name {key!r} in its case, got {sorted(self)}")


class Recording:
    """A recording that remembers which of its tensors were read.

    Args:
        path: file to read.

    Attributes:
        case: the metadata.
        unused: names of the tensors that nobody took yet.

    Raises:
        ValueError: the file is unreadable or has no case; methods raise it where an entry is
            missing or does not fit.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"FILE must be a readable safetensors file, got {path}: {error}"
            ) from None
        if "case" not in metadata:
            raise ValueError(
                f"FILE must have the metadata entry 'case', got {sorted(metadata)} in {path}"
            )
        try:
            self.case = _Case(json.loads(metadata["case"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"'case' of FILE must be a JSON object, got {error}") from None
        self.unused = set(self.tensors)

    def take(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self.tensors:
            raise ValueError(f"FILE must hold the tensor {name!r}, which is missing")
        self.unused.discard(name)
        return self.tensors[name]

    def networks(self) -> tuple[VisionTransformer, Predictor]:
        """Context encoder and predictor of the case, not yet with its weights."""
        case = self.case
        if case.get("norm_eps", NORM_EPS) != NORM_EPS:
            raise ValueError(f"norm_eps must be {NORM_EPS}, got {case['norm_eps']}")
        size = case["img"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        encoder = VisionTransformer(
            image_size=size,
            patch_size=case["patch"],
            width=case["dim"],
            depth=case["depth"],
            heads=case["heads"],
            mlp_hidden=4 * case["dim"],
            in_channels=self.take("step0.images_uint8").shape[1],
        )
        predictor = Predictor(
            grid=encoder.grid,
            encoder_width=case["dim"],
            width=case["pdim"],
            depth=case["pdepth"],
            heads=case["heads"],
            mlp_hidden=4 * case["pdim"],
        )
        return encoder, predictor

    def load(self, network: nn.Module, prefix: str) -> None:
        """Loads the initial weights under a prefix; names and shapes must match exactly."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.take(name) for name in names}
        if wrong := misfit(network.state_dict(), weights):
            raise ValueError(f"FILE must hold {prefix}* as its case says: {prefix}{wrong}")
        network.load_state_dict(weights)

    def schedules(self) -> Schedules:
        """Those of the case."""
        case = self.case
        return Schedules(
            steps_per_epoch=case["ipe"],
            epochs=case["epochs"],
            warmup=case["warmup"],
            ipe_scale=case["ipe_scale"],
            start_lr=case["start_lr"],
            lr=case["lr"],
            final_lr=case["final_lr"],
            weight_decay=case["weight_decay"],
            final_weight_decay=case["final_weight_decay"],
            momentum=case["ema"][0],
            final_momentum=case["ema"][1],
        )

    def images(self, step: int) -> Tensor:
        """Images of a step as decoders give them: uint8 (B, height, width, C)."""
        return self.take(f"step{step}.images_uint8").permute(0, 2, 3, 1).contiguous()

    def masks(self, step: int, num_patches: int) -> Masks:
        """Masks of a step, on the CPU."""
        case = self.case
        contexts = [self.take(f"step{step}.context{i}") for i in range(case["nenc"])]
        targets = [self.take(f"step{step}.target{i}") for i in range(case["npred"])]
        for index in (*contexts, *targets):
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < num_patches:
                raise ValueError(
                    f"mask indices of step {step} must be in 0..{num_patches - 1}, "
                    f"got {int(index.min())}..{int(index.max())}"
                )
        image = torch.arange(case["B"])[:, None] * num_patches
        lengths = torch.tensor([0] + [c.shape[1] for c in contexts for _ in range(case["B"])])
        return Masks(
            context_index=torch.cat([(c + image).flatten() for c in contexts]).int(),
            context_cu=lengths.cumsum(0).int(),
            max_context=int(lengths.max()),
            target_index=torch.stack(targets, dim=1).int(),
        )
