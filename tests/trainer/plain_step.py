"""A second opinion on the training step: written from the paper's formulas, one sequence at a time.

Every image, every context block and every (context block, target block) pair is a forward pass of
its own, without batch, padding or packing, in float64, out of elementary operations. Slow, and
sharing no code with the package. Weights are dictionaries under the state-dict names.

Shape letters: L tokens of a sequence, D width, E head dim, C image channels, N patches.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]
# [block][image] -> patch indices
Indices = list[list[list[int]]]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class PlainNetworks:
    """The three networks, in float64."""

    heads: int
    patch_size: int
    grid: tuple[int, int]
    encoder: Weights
    predictor: Weights
    target: Weights = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encoder = {k: v.detach().double().clone() for k, v in self.encoder.items()}
        self.predictor = {k: v.detach().double().clone() for k, v in self.predictor.items()}
        given = self.target or self.encoder
        self.target = {k: v.detach().double().clone() for k, v in given.items()}


@dataclass(kw_only=True)
class PlainResult:
    """Both sides of the loss as lists in the order [target, context, image], and the loss."""

    predictions: list[Tensor]
    targets: list[Tensor]
    loss: Tensor


def position_table(width: int, grid: tuple[int, int]) -> Tensor:
    """(N, width): column in the first half, row in the second; each half [sin | cos]."""
    quarter = width // 4
    table = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            entry = []
            for position in (column, row):
                angles = [position / 10000 ** (i / quarter) for i in range(quarter)]
                entry += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(entry)
    return torch.tensor(table, dtype=torch.float64).float().double()


def layer_norm(x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(L, D), biased variance over channels."""
    centred = x - x.sum(dim=1, keepdim=True) / x.shape[1]
    variance = (centred * centred).sum(dim=1, keepdim=True) / x.shape[1]
    normal = centred / (variance + eps) ** 0.5
    if weight is not None and bias is not None:
        normal = normal * weight + bias
    return normal


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    """(L, D), one head after the other, explicit softmax."""
    width = x.shape[1]
    size = width // heads
    qkv = linear(x, weights, f"{name}.qkv")
    outputs = []
    for head in range(heads):
        # rows of the qkv matrix: three parts, in each part one run of E rows a head
        q, k, v = (qkv[:, p * width + head * size :][:, :size] for p in range(3))
        scores = (q @ k.T) / math.sqrt(size)
        odds = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        outputs.append((odds / odds.sum(dim=1, keepdim=True)) @ v)
    return linear(torch.cat(outputs, dim=1), weights, f"{name}.proj")


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def blocks(x: Tensor, weights: Weights, prefix: str, heads: int) -> Tensor:
    """(L, D) through all blocks under ``prefix``."""
    depth = len({k.split(".")[1] for k in weights if k.startswith(f"{prefix}.")})
    for i in range(depth):
        name = f"{prefix}.{i}"
        norm = [weights[f"{name}.norm1.weight"], weights[f"{name}.norm1.bias"]]
        x = x + attention(layer_norm(x, 1e-6, *norm), weights, f"{name}.attn", heads)
        norm = [weights[f"{name}.norm2.weight"], weights[f"{name}.norm2.bias"]]
        hidden = gelu(linear(layer_norm(x, 1e-6, *norm), weights, f"{name}.mlp.fc1"))
        x = x + linear(hidden, weights, f"{name}.mlp.fc2")
    return x


def patch_vectors(image: Tensor, patch: int) -> Tensor:
    """uint8 (C, height, width) to normalised patches (N, C * patch * patch), row after row."""
    rows = []
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            part = image[:, top : top + patch, left : left + patch].double() / 255
            channels = [(part[c] - MEAN[c]) / STD[c] for c in range(3)]
            rows.append(torch.stack(channels).flatten())
    return torch.stack(rows)


def embed(image: Tensor, weights: Weights, networks: PlainNetworks) -> Tensor:
    """Position-coded patches of one image (N, D)."""
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    tokens = patch_vectors(image, networks.patch_size) @ kernel.T + weights["patch_embed.proj.bias"]
    return tokens + position_table(kernel.shape[0], networks.grid)


def encode(tokens: Tensor, weights: Weights, heads: int) -> Tensor:
    x = blocks(tokens, weights, "blocks", heads)
    return layer_norm(x, 1e-6, weights["norm.weight"], weights["norm.bias"])


def predict(
    z: Tensor, context: Sequence[int], target: Sequence[int], networks: PlainNetworks
) -> Tensor:
    """One target block from one context: (K, D) to (T, D)."""
    weights = networks.predictor
    context_rows = linear(z, weights, "predictor_embed")
    table = position_table(context_rows.shape[1], networks.grid)
    rows = [context_rows[i] + table[patch] for i, patch in enumerate(context)]
    rows += [weights["mask_token"][0, 0] + table[patch] for patch in target]
    x = blocks(torch.stack(rows), weights, "predictor_blocks", networks.heads)
    x = layer_norm(x, 1e-6, weights["predictor_norm.weight"], weights["predictor_norm.bias"])
    return linear(x[len(context) :], weights, "predictor_proj")


def distance_sum(difference: Tensor, kind: str) -> Tensor:
    size = difference.abs()
    if kind == "l1":
        return size.sum()
    if kind == "l2":
        return (difference * difference).sum()
    quadratic, straight = difference * difference / 2, size - 0.5
    return torch.where(size < 1, quadratic, straight).sum()


def forward(
    networks: PlainNetworks, images: Tensor, contexts: Indices, targets: Indices, kind: str
) -> PlainResult:
    """All sequences one by one.

    Args:
        networks: the networks.
        images: uint8 (B, C, height, width).
        contexts, targets: patch indices, [block][image].
        kind: loss.
    """
    features = []
    for image in images:
        with torch.no_grad():
            tokens = embed(image, networks.target, networks)
            h = encode(tokens, networks.target, networks.heads)
            features.append(layer_norm(h, 1e-5, None, None))
    predictions, expected = [], []
    for target in targets:
        for context in contexts:
            for number, image in enumerate(images):
                tokens = embed(image, networks.encoder, networks)[context[number]]
                z = encode(tokens, networks.encoder, networks.heads)
                predictions.append(predict(z, context[number], target[number], networks))
                expected.append(features[number][target[number]])
    total = torch.zeros((), dtype=torch.float64)
    for prediction, truth in zip(predictions, expected, strict=True):
        total = total + distance_sum(prediction - truth, kind)
    return PlainResult(
        predictions=predictions,
        targets=expected,
        loss=total / sum(p.numel() for p in predictions),
    )


def gradients(
    networks: PlainNetworks, images: Tensor, contexts: Indices, targets: Indices, kind: str
) -> tuple[PlainResult, dict[str, Tensor]]:
    """Forward and all gradients, under ``encoder.*`` and ``predictor.*``."""
    leaves = {f"encoder.{k}": v for k, v in networks.encoder.items()}
    leaves |= {f"predictor.{k}": v for k, v in networks.predictor.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    result = forward(networks, images, contexts, targets, kind)
    grads = torch.autograd.grad(result.loss, list(leaves.values()))
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    return result, dict(zip(leaves, grads, strict=True))


@dataclass
class PlainAdamW:
    """AdamW with decoupled decay, one tensor after the other."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)

    def update_(
        self, weights: Mapping[str, Tensor], grads: Mapping[str, Tensor], lr: float, decay: float
    ) -> None:
        self.count += 1
        for name, p in weights.items():
            g = grads[name]
            m = self.first.get(name, torch.zeros_like(p))
            v = self.second.get(name, torch.zeros_like(p))
            m = self.beta1 * m + (1 - self.beta1) * g
            v = self.beta2 * v + (1 - self.beta2) * g * g
            self.first[name], self.second[name] = m, v
            # norms and biases do not decay; the mask token, (1, 1, P), does
            decays = not (name.endswith(".bias") or "norm" in name)
            shrunk = p * (1 - lr * decay) if decays else p
            m_hat = m / (1 - self.beta1**self.count)
            v_hat = v / (1 - self.beta2**self.count)
            p.copy_(shrunk - lr * m_hat / (v_hat.sqrt() + self.eps))


def plain_schedules(case: Mapping[str, Any]) -> Iterator[tuple[float, float, float]]:
    """Learning rate, weight decay and momentum of step 1, 2, 3, ... without end."""
    ipe, epochs, stretch = case["ipe"], case["epochs"], case["ipe_scale"]
    end = math.floor(stretch * epochs * ipe)
    ramp = math.floor(case["warmup"] * ipe)
    increment = (case["ema"][1] - case["ema"][0]) / (ipe * epochs * stretch)
    s = 0
    while True:
        s = min(s + 1, end)
        if s < ramp:
            lr = case["start_lr"] + (case["lr"] - case["start_lr"]) * s / ramp
        else:
            turn = math.pi * (s - ramp) / (end - ramp) if end > ramp else 0.0
            middle, swing = case["lr"] + case["final_lr"], case["lr"] - case["final_lr"]
            lr = middle / 2 + swing / 2 * math.cos(turn)
        w0, w1 = case["weight_decay"], case["final_weight_decay"]
        decay = (w0 + w1) / 2 + (w0 - w1) / 2 * math.cos(math.pi * s / end)
        yield lr, decay, case["ema"][0] + (s - 1) * increment


def record(
    path: Path,
    case: Mapping[str, Any],
    networks: PlainNetworks,
    batches: Sequence[tuple[Tensor, Indices, Indices]],
) -> None:
    """Trains ``case["steps"]`` steps in float64 and writes them as a golden file.

    Args:
        path: file to write.
        case: the metadata, schedule included.
        networks: initial weights, float32-representable; trained in place.
        batches: of each step images uint8 (B, C, height, width), contexts and targets, of one
            length each.
    """
    tensors: dict[str, Tensor] = {}
    for name, initial in (("encoder", networks.encoder), ("predictor", networks.predictor)):
        tensors |= {f"init.{name}.{k}": v.clone() for k, v in initial.items()}
    table = position_table(case["dim"], networks.grid)
    tensors["init.encoder.pos_embed"] = table[None]
    table = position_table(case["pdim"], networks.grid)
    tensors["init.predictor.predictor_pos_embed"] = table[None]
    optimizer = PlainAdamW()
    values: dict[str, list[float]] = {"loss": [], "lr": [], "wd": [], "momentum": []}
    for step, (images, contexts, targets), (lr, decay, momentum) in zip(
        range(case["steps"]), batches, plain_schedules(case), strict=False
    ):
        result, grads = gradients(networks, images, contexts, targets, case["loss"])
        if step == 0:
            tensors["step0.prediction"] = torch.stack(result.predictions)
            tensors["step0.latent_target"] = torch.stack(result.targets)
            tensors |= {f"step0.grad.{k}": v for k, v in grads.items()}
        weights = {f"encoder.{k}": v for k, v in networks.encoder.items()}
        weights |= {f"predictor.{k}": v for k, v in networks.predictor.items()}
        optimizer.update_(weights, grads, lr, decay)
        for key, ema in networks.target.items():
            ema.copy_(momentum * ema + (1 - momentum) * networks.encoder[key])
        for entry, value in zip(values, (result.loss.item(), lr, decay, momentum), strict=True):
            values[entry].append(value)
        tensors[f"step{step}.images_uint8"] = images
        for kind, blocks_ in (("context", contexts), ("target", targets)):
            for i, block in enumerate(blocks_):
                tensors[f"step{step}.{kind}{i}"] = torch.tensor(block, dtype=torch.int32)
    final = {
        "encoder": networks.encoder,
        "predictor": networks.predictor,
        "target_encoder": networks.target,
    }
    for name, weights in final.items():
        tensors |= {f"final.{name}.{k}": v for k, v in weights.items()}
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    tensors |= {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, path, metadata={"case": json.dumps(case)}
    )


def random_weights(
    case: Mapping[str, Any],
    grid: tuple[int, int],
    generator: torch.Generator,
    spread: float = 0.15,
) -> PlainNetworks:
    """Float32-representable weights, norms and biases off their usual start so that all matter."""

    def draw(*shape: int, base: float = 0.0, spread: float = spread) -> Tensor:
        return base + spread * torch.randn(shape, generator=generator)

    def block(name: str, width: int) -> Weights:
        result = {}
        for norm in ("norm1", "norm2"):
            result[f"{name}.{norm}.weight"] = draw(width, base=1.0)
            result[f"{name}.{norm}.bias"] = draw(width)
        for layer, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            result[f"{name}.{layer}.weight"] = draw(rows, columns)
            result[f"{name}.{layer}.bias"] = draw(rows)
        return result

    dim, pdim, patch = case["dim"], case["pdim"], case["patch"]
    encoder = {
        "patch_embed.proj.weight": draw(dim, 3, patch, patch, spread=1 / patch),
        "patch_embed.proj.bias": draw(dim),
        "norm.weight": draw(dim, base=1.0),
        "norm.bias": draw(dim),
    }
    for i in range(case["depth"]):
        encoder |= block(f"blocks.{i}", dim)
    predictor = {
        "predictor_embed.weight": draw(pdim, dim),
        "predictor_embed.bias": draw(pdim),
        "mask_token": draw(1, 1, pdim),
        "predictor_norm.weight": draw(pdim, base=1.0),
        "predictor_norm.bias": draw(pdim),
        "predictor_proj.weight": draw(dim, pdim),
        "predictor_proj.bias": draw(dim),
    }
    for i in range(case["pdepth"]):
        predictor |= block(f"predictor_blocks.{i}", pdim)
    return PlainNetworks(
        heads=case["heads"], patch_size=patch, grid=grid, encoder=encoder, predictor=predictor
    )


def random_batch(
    case: Mapping[str, Any],
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    context: int | None,
    target: int,
) -> tuple[Tensor, Indices, Indices]:
    """Images and patch indices in raster order.

    Args:
        case: batch size and numbers of blocks.
        grid: rows and columns of patches.
        generator: CPU generator.
        context: patches of every context; None gives each its own length.
        target: patches of every target block.
    """
    patches, side = grid[0] * grid[1], case["patch"]
    shape = (case["B"], 3, grid[0] * side, grid[1] * side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def pick(count: int) -> list[int]:
        return sorted(torch.randperm(patches, generator=generator)[:count].tolist())

    def length() -> int:
        if context is not None:
            return context
        return int(torch.randint(1, patches // 2, (1,), generator=generator))

    contexts = [[pick(length()) for _ in range(case["B"])] for _ in range(case["nenc"])]
    targets = [[pick(target) for _ in range(case["B"])] for _ in range(case["npred"])]
    return images, contexts, targets
