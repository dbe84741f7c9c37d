"""One training step as the host sees it, on a machine without a GPU.

Networks of ViT-B/16's full depth with negligible widths, on CPU tensors. Matrix products,
attention, torch's fused AdamW and norms are replaced by kernels that only allocate what they return
(`null_kernels.cpp`); our own ops take the path of CUDA tensors up to Triton's C launcher, which is
replaced by a function that ignores what it is given. So what is left is what the host does: Python,
the dispatcher, autograd, allocations. What torch does besides (a concatenation, a cast) runs as it
is, on a few rows.

On a GPU the host does a little more: a launch takes some microseconds in the driver.

    python -m benchmarks.host.proxy      # the numbers of every step, as JSON
"""

import functools
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.cpp_extension import load
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ijepa_fast.model
from ijepa_fast.config import BatchConfig, Config
from ijepa_fast.config.presets import preset
from ijepa_fast.fast import block, capture
from ijepa_fast.fast import step as fast_step
from ijepa_fast.fast.attention import BACKENDS, CUDNN, Attention
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules
from ijepa_kernels import _launch
from ijepa_kernels._op import LAUNCHERS, ON_CPU

__all__ = ["Proxy", "measure", "pretend"]

WIDTH, SMALL, LARGE = 48, 2, 128
STEPS, ROUNDS = 8, 15


# --- a machine that is not there -----------------------------------------------------------------

# a built-in function that takes anything, and does nothing
_nothing: Callable[..., object] = "".format
# Triton's own launches: of each kernel and each kind of arguments the first
own_launches = [0]


class CudaLauncher:
    """What `_launch` knows of Triton's launcher of this name."""

    launch = staticmethod(_nothing)
    launch_cooperative_grid = launch_pdl = False
    global_scratch_size = profile_scratch_size = 0
    arg_annotations = kernel_signature = None


def _run(*_: Any, **__: Any) -> Any:
    own_launches[0] += 1
    return SimpleNamespace(run=CudaLauncher(), function=0, packed_metadata=())


def _same_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class _Trunk:
    """As `step._TrunkGraph`, with outputs that never change."""

    def __init__(self, trunk: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> None:
        self.images, self.outputs = images.clone(), trunk(images)
        self.replay = _nothing

    def fits(self, images: Tensor) -> bool:
        return images.shape == self.images.shape

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        self.images.copy_(images)
        self.replay()
        return self.outputs


def pretend(attention: str) -> None:
    """Makes CPU tensors pass for a GPU's, in this process and for good.

    Args:
        attention: back end where all lengths are equal; `varlen` elsewhere.
    """
    load(
        "ijepa_null_kernels",
        [str(Path(__file__).with_name("null_kernels.cpp"))],
        extra_cflags=["-O1"],
        is_python_module=False,
    )
    device: Any = SimpleNamespace(get_current_device=lambda: None, get_current_stream=_nothing)
    driver.set_active(device)
    JITFunction.run = _run
    ON_CPU.update(LAUNCHERS)
    _launch.HELD_ON.add("cpu")
    block._writes_float32 = functools.cache(lambda device, dtype: True)
    ijepa_fast.model.attend = _same_attention
    fast_step.TRUNK_GRAPHS_ON.add("cpu")
    fast_step._TrunkGraph = _Trunk  # type: ignore[misc, assignment]
    dense = CUDNN if attention == "cudnn" else BACKENDS[attention]
    chosen = Attention(BACKENDS["varlen"], dense, "pretended")
    fast_step.choose_attention = lambda *_: chosen  # type: ignore[attr-defined]
    capture._record = lambda body, pool: _nothing  # type: ignore[assignment, return-value]


# --- one step ------------------------------------------------------------------------------------


def config_of(batch: int) -> Config:
    """The published recipe of ViT-B/16 on a small network, its grid of 14 x 14 included."""
    base = preset("vitb16_in1k")
    return replace(
        base,
        model=replace(base.model, width=WIDTH, predictor_width=WIDTH, patch_size=2),
        data=replace(base.data, crop=28),
        masks=replace(base.masks, truncation_group=batch),
        batch=BatchConfig(global_=batch, device=batch),
        device="cpu",
    )


class Proxy:
    """A step and what it is given.

    Args:
        kind: `reference`, `eager` or `captured`.
    """

    def __init__(self, kind: str) -> None:
        # all that depends on the rows of a batch is done before a replay
        batch = LARGE if kind == "captured" else SMALL
        config, generator = config_of(batch), torch.Generator().manual_seed(0)
        networks = build_models(config.model, config.data.crop_size, generator)
        given: Any = {"mean": config.data.mean, "std": config.data.std}
        steps: dict[str, Any] = {
            "reference": ReferenceStep,
            "eager": fast_step.FastStep,
            "captured": capture.CapturedStep,
        }
        self.step = steps[kind](*networks, config.optim, **given)
        if kind == "captured":
            # every key was seen once already
            self.step._graphs._seen = _Everything()
        height, width = config.data.crop_size
        self.images = torch.zeros((batch, height, width, 3), dtype=torch.uint8)
        positions = np.arange(batch)
        self.masks = [
            sample_masks(config.masks, grid=config.grid, seed=0, step=n, positions=positions)
            for n in range(STEPS)
        ]
        schedules = Schedules.of(config.optim, global_batch=batch, steps_per_epoch=1000)
        self.values = schedules.at(1)
        for _ in range(2):
            self.round()

    def one(self, number: int) -> None:
        """A step with the masks of this number."""
        masks = self.masks[number]
        batch = self.step.prepare(masks)
        self.step.accumulate(self.images, batch, masks.target_index.numel() * WIDTH)
        self.step.update(self.values)

    def round(self) -> float:
        """CPU milliseconds of a step, mean over one with every mask."""
        began = time.process_time()
        for number in range(STEPS):
            self.one(number)
        return (time.process_time() - began) / STEPS * 1e3

    def calls(self) -> dict[str, int]:
        """Of one step: Python functions and built-in ones called, launches by Triton itself."""
        counts = {"call": 0, "c_call": 0}

        def count(frame: object, event: str, argument: object) -> None:
            if event in counts:
                counts[event] += 1

        before = own_launches[0]
        gc.disable()
        sys.setprofile(count)
        self.one(0)
        sys.setprofile(None)
        gc.enable()
        own = own_launches[0] - before
        # `setprofile` itself
        return {"python": counts["call"], "c": counts["c_call"] - 1, "not held": own}

    def nodes(self) -> int:
        """Of autograd, in one step."""
        found: set[Any] = set()
        backward = Tensor.backward

        def counted(loss: Tensor, *rest: Any, **options: Any) -> None:
            waiting = [loss.grad_fn]
            while waiting:
                node = waiting.pop()
                if node is not None and node not in found:
                    found.add(node)
                    waiting += [following for following, _ in node.next_functions]
            backward(loss, *rest, **options)

        Tensor.backward = counted  # type: ignore[assignment, method-assign]
        self.one(0)
        Tensor.backward = backward  # type: ignore[method-assign]
        return len(found)


class _Everything(set[Any]):
    def __contains__(self, key: object) -> bool:
        return True


def measure(attention: str, kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Numbers of a step of every kind; CPU time is the least of some rounds, taken in turn."""
    torch.set_num_threads(1)
    pretend(attention)
    proxies = {kind: Proxy(kind) for kind in kinds}
    rows: dict[str, dict[str, float]] = {}
    for kind, proxy in proxies.items():
        first, again = proxy.calls(), proxy.calls()
        assert first == again, f"{kind}: {first} and {again} calls in the same step"
        rows[kind] = {**first, "nodes": proxy.nodes()}
    times = [[proxy.round() for proxy in proxies.values()] for _ in range(ROUNDS)]
    for row, of_kind in zip(rows.values(), zip(*times, strict=True), strict=True):
        row["ms"] = min(of_kind)
    return rows


if __name__ == "__main__":
    name, *kinds = sys.argv[1:]
    print(json.dumps(measure(name, tuple(kinds))))
