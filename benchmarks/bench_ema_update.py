"""Average of a ViT's weights: one update of the target encoder."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.optim import EMA
from ijepa_kernels.optim._table import Table
from ijepa_kernels.optim.ema_update import BLOCK, ema_update_bytes, launch

F32, BF16 = torch.float32, torch.bfloat16
MOMENTUM = 0.75  # far from 1: an update left out has to show when results are verified


def encoder_shapes(model: Model) -> list[tuple[int, ...]]:
    """Parameters of the encoder, in order."""
    width = model.width
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    patch = [(width, 3, model.patch, model.patch), (width,)]
    return [*patch, *(block * model.depth), (width,), (width,)]


def _elements(model: Model) -> int:
    return sum(torch.Size(shape).numel() for shape in encoder_shapes(model))


class _Weights(nn.Module):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(tensors)


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
    # large ones are drawn on the device, from the same seed
    seed = int(torch.randint(2**31, (), generator=generator))
    generator = torch.Generator(device).manual_seed(seed)
    shapes = encoder_shapes(model)
    targets, sources = (
        [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        for _ in range(2)
    )
    module = _Weights(sources)
    ema = EMA(module)
    for mine, target in zip(ema.module.weights, targets, strict=True):
        mine.data = target
    return targets, sources, module, ema


def _reference(targets: list[Tensor], sources: list[Tensor], *_: Any) -> list[Tensor]:
    for target, source in zip(targets, sources, strict=True):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)
    return targets


def _foreach(targets: list[Tensor], sources: list[Tensor], *_: Any) -> list[Tensor]:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)
    return targets


def _ours(
    targets: list[Tensor], sources: list[Tensor], module: nn.Module, ema: EMA
) -> list[Tensor]:
    ema.update(module, MOMENTUM)
    return targets


BENCH = Bench(
    name="ema_update_",
    inputs=_inputs,
    providers={"reference": _reference, "foreach": _foreach, "ours": _ours},
    bytes=lambda model, _: ema_update_bytes(_elements(model), F32),
    compile=False,  # of in-place updates of 400 tensors: minutes, and slower than foreach
)
bench_ema_update_ = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of the kernel at its production configurations, on meta tensors."""

    def table(source: torch.dtype, copy: bool) -> Table:
        columns = [
            [torch.empty(shape, dtype=dtype, device="meta") for shape in encoder_shapes(model)]
            for dtype in ((F32, BF16, source) if copy else (F32, source))
        ]
        return Table(columns, BLOCK)

    momentum = torch.empty((), dtype=torch.float64, device="meta")
    return {
        "fp32": lambda: launch(table(F32, False), F32, None, 0.5),
        "fp32 + bf16 copy": lambda: launch(table(F32, True), F32, BF16, 0.5),
        "bf16 source + bf16 copy": lambda: launch(table(BF16, True), BF16, BF16, 0.5),
        "fp32, momentum on device": lambda: launch(table(F32, False), F32, None, momentum),
    }
