"""AdamW for a ViT's encoder, the average of its weights, and that average in bfloat16."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_ema_update import encoder_shapes
from benchmarks.harness import Bench, measured
from benchmarks.shapes import Model
from ijepa_kernels.optim import AdamWEMA
from ijepa_kernels.optim._adam_step import SCALARS, launch_step
from ijepa_kernels.optim._table import EmaForm, Table
from ijepa_kernels.optim.adamw_ema import BLOCK, adamw_ema_bytes, launch

F32, BF16 = torch.float32, torch.bfloat16
# coarse: an update, decay or average left out has to show when results are verified
MOMENTUM = 0.75
OPTIONS = {"lr": 0.1, "weight_decay": 0.5}


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


class _Case:
    """Weights with gradients, and what a provider builds on them in its first call."""

    def __init__(self, model: Model, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.params = []
        for shape in encoder_shapes(model):
            p = nn.Parameter(torch.randn(shape, generator=generator, device=device))
            p.grad = torch.randn(shape, generator=generator, device=device)
            self.params.append(p)
        self.optimizer: torch.optim.Optimizer | None = None
        self.averages: list[Tensor] = []
        # of another size than the weights: all providers' averages start at them
        self.targets = [(3 * p.detach()).to(BF16) for p in self.params]

    def results(self) -> list[Tensor]:
        # bfloat16 copies differ by one rounding where the averages differ in their last bit
        assert self.optimizer is not None
        state = self.optimizer.state
        moments = [state[p][name] for p in self.params for name in ("exp_avg", "exp_avg_sq")]
        return [*[p.detach() for p in self.params], *moments, *self.targets]


def _inputs(model: Model, device: torch.device, generator: torch.Generator) -> tuple[_Case]:
    seed = int(torch.randint(2**31, (), generator=generator))
    return (_Case(model, device, seed),)


def _separate(case: _Case, build: Callable[..., torch.optim.Optimizer]) -> list[Tensor]:
    if case.optimizer is None:
        case.optimizer = build(_groups(case.params), **OPTIONS)
        case.averages = [target.float() for target in case.targets]
    case.optimizer.step()
    torch._foreach_lerp_(case.averages, [p.detach() for p in case.params], 1 - MOMENTUM)
    torch._foreach_copy_(case.targets, case.averages)
    return case.results()


def _reference(case: _Case) -> list[Tensor]:
    return _separate(case, lambda *args, **kw: torch.optim.AdamW(*args, fused=True, **kw))


def _apex() -> Callable[[_Case], list[Tensor]] | None:
    """NVIDIA's FusedAdam where it is installed; PyPI's apex is another project."""
    try:
        optimizers = importlib.import_module("apex.optimizers")
        importlib.import_module("amp_C").multi_tensor_adam  # noqa: B018
    except (ImportError, AttributeError):
        return None
    return lambda case: _separate(case, optimizers.FusedAdam)


def _ours(case: _Case) -> list[Tensor]:
    if case.optimizer is None:
        case.optimizer = AdamWEMA(_groups(case.params), momentum=MOMENTUM, **OPTIONS)
        case.optimizer.track(case.params, case.targets)
    case.optimizer.step()
    return case.results()


BENCH = Bench(
    name="adamw_ema_",
    inputs=_inputs,
    providers={"reference": _reference, "apex": _apex(), "ours": _ours},
    bytes=lambda model, _: adamw_ema_bytes(
        sum(torch.Size(shape).numel() for shape in encoder_shapes(model)), F32, ema_copy=BF16
    ),
    compile=False,  # the reference is an optimiser
)
bench_adamw_ema_ = measured(BENCH)


def static_cases(model: Model) -> dict[str, Callable[[], object]]:
    """Launches of both kernels at their production configurations, on meta tensors."""
    shapes = encoder_shapes(model)

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    def update(
        grad: torch.dtype, ema: bool, param_copy: bool, ema_copy: bool, form: EmaForm = "lerp"
    ) -> None:
        steps = [torch.empty((), device="meta") for _ in shapes]
        columns = [tensors(F32), tensors(F32), tensors(F32), steps]
        columns += [tensors(F32)] * ema + [tensors(BF16)] * (param_copy + ema_copy)
        table = Table(columns, BLOCK)
        scalars = torch.empty((len(shapes), SCALARS), device="meta")
        grads = torch.empty(len(shapes), dtype=torch.int64, device="meta")
        copies = [BF16 if flag else None for flag in (param_copy, ema_copy)]
        launch(table, len(columns), grads, 0, scalars, grad, ema, *copies, ema_form=form)

    def step(on_device: bool) -> None:
        columns = [
            tensors(F32),
            tensors(F32),
            tensors(F32),
            [torch.empty((), device="meta")] * len(shapes),
        ]
        value = torch.empty((), device="meta") if on_device else None
        number = 0.5 if value is None else value
        launch_step(
            Table(columns, BLOCK),
            torch.empty((len(shapes), SCALARS), device="meta"),
            0,
            len(shapes),
            lr=number,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=number,
            momentum=number,
            grad_scale=value,
            found_inf=torch.empty((), device="meta"),
        )

    return {
        "fp32 grads, ema": lambda: update(F32, True, False, False),
        "fp32 grads, ema + bf16 copy": lambda: update(F32, True, False, True),
        "fp32 grads, ema + both bf16 copies": lambda: update(F32, True, True, True),
        "fp32 grads, ema as sum + both bf16 copies": lambda: update(F32, True, True, True, "sum"),
        "bf16 grads, ema + bf16 copy": lambda: update(BF16, True, False, True),
        "fp32 grads, no ema": lambda: update(F32, False, False, False),
        "step": lambda: step(False),
        "step, values on device": lambda: step(True),
    }
