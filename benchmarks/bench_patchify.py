"""Decoded images to normalised bfloat16 patch rows: those of the contexts, and all."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.patchify import _patchify_fwd, patchify, patchify_bytes, patchify_ref

U8, F32, BF16, I32 = torch.uint8, torch.float32, torch.bfloat16, torch.int32
# of ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS = len(MEAN)


def _all_inputs(
    model: Model, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, int, Tensor | None, Tensor, Tensor]:
    shape = (model.batch, model.side, model.side, CHANNELS)
    images = torch.randint(0, 256, shape, dtype=U8, generator=generator).to(device)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    return images, model.patch, None, mean, std


def _context_inputs(
    model: Model, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, int, Tensor, Tensor, Tensor]:
    """`context` patches of each image, in ascending order, as the trainer packs them."""
    images, patch, _, mean, std = _all_inputs(model, device, generator)
    order = torch.rand((model.batch, model.patches), generator=generator).argsort(1)
    kept = order[:, : model.context].sort(1).values
    index = (torch.arange(model.batch)[:, None] * model.patches + kept).flatten()
    return images, patch, index.to(device, I32), mean, std


def _reference(
    images: Tensor, patch: int, index: Tensor | None, mean: Tensor, std: Tensor
) -> Tensor:
    return patchify_ref(images, (patch, patch), index, mean, std, BF16, layout="BHWC")


def _ours(images: Tensor, patch: int, index: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    return patchify(images, patch, index, mean, std, BF16, layout="BHWC")


def _context_bytes(model: Model, _: bool) -> int:
    patch = (model.patch, model.patch)
    rows = model.batch * model.context
    return patchify_bytes(rows, CHANNELS, patch, U8, BF16, index_dtype=I32)


def _all_bytes(model: Model, _: bool) -> int:
    rows = model.batch * model.patches
    return patchify_bytes(rows, CHANNELS, (model.patch, model.patch), U8, BF16)


CONTEXT = Bench(
    name="patchify",
    inputs=_context_inputs,
    providers={"reference": _reference, "ours": _ours},
    bytes=_context_bytes,
)
ALL = Bench(
    name="patchify_all",
    inputs=_all_inputs,
    providers={"reference": _reference, "ours": _ours},
    bytes=_all_bytes,
)
bench_patchify = measured(CONTEXT)
bench_patchify_all = measured(ALL)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of the kernel at its production configurations, on meta tensors."""
    size = (model.batch, CHANNELS, model.side, model.side)
    index = torch.empty(model.batch * model.context, dtype=I32, device="meta")
    mean, std = (torch.empty(CHANNELS, device="meta") for _ in range(2))
    packed = torch.empty(size, dtype=U8, device="meta", memory_format=torch.channels_last)
    planar = torch.empty(size, device="meta")
    launch = partial(_patchify_fwd, mean=mean, std=std, ph=model.patch, pw=model.patch)
    return {
        "fwd uint8 BHWC context bf16": partial(launch, packed, index, out_dtype=BF16),
        "fwd uint8 BHWC all bf16": partial(launch, packed, None, out_dtype=BF16),
        "fwd uint8 BHWC all fp32": partial(launch, packed, None, out_dtype=F32),
        "fwd fp32 BCHW context bf16": partial(launch, planar, index, out_dtype=BF16),
        "fwd fp32 BCHW all bf16": partial(launch, planar, None, out_dtype=BF16),
    }
