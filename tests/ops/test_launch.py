"""Held launches: what reaches Triton's C launcher, without a GPU. Kernels are compiled for an
sm_90; only loading them and the C launcher are stand-ins.
"""

import importlib
import random
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ijepa_kernels import _launch
from ijepa_kernels._launch import run
from ijepa_kernels._op import LAUNCHERS, ON_CPU
from ijepa_kernels.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward
from ijepa_kernels.gelu import gelu_backward
from tests.ops.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

STREAM = 77
OF_A_BLOCK = [
    getattr(importlib.import_module(f"ijepa_kernels.{module}"), f"_{name}_kernel")
    for module, name in (
        ("_layer_norm", "add_layer_norm_fwd"),
        ("_layer_norm", "add_layer_norm_bwd"),
        ("gelu", "gelu_bwd"),
        ("_sums", "column_sums"),
    )
]


@triton.jit(do_not_specialize=["rows", "scale"])
def _probe_kernel(x_ptr, out_ptr, rows, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < rows, other=0.0)
    tl.store(out_ptr + place, x * scale, mask=place < rows)


@triton.jit(do_not_specialize=["rows"])
def _special_kernel(x_ptr, rows, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + place, size, mask=place < rows)


@triton.jit(do_not_specialize=["rows"])
def _mixed_kernel(x_ptr, rows, out_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < rows, other=0.0)
    tl.store(out_ptr + place, x, mask=place < rows)


class _Device:
    """A driver of a GPU that is not there; the tensors are the CPU's, whose index is None."""

    launcher_cls: Any

    def __init__(self) -> None:
        self.runs = 0  # of Triton's own launches
        self.loaded: list[str] = []
        self.launched: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            launch=lambda *arguments: self.launched.append(arguments),
            load_binary=self._load,
            build_signature_metadata=tuple,
        )

    def _load(self, name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
        self.loaded.append(name)
        return "module", len(self.loaded), 32, 0, 1024  # the second is the function's handle

    def get_current_device(self) -> None:
        return None

    def get_current_stream(self, device: object) -> int:
        assert device is None
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu(monkeypatch) -> Any:
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    device = _Device()
    device.launcher_cls = nvidia.CudaLauncher
    monkeypatch.setattr(driver, "_active", device)
    # Triton 3.6 compiles a launcher for each signature, 3.7 has one that is told of arguments
    module = SimpleNamespace(launch=device.utils.launch)
    monkeypatch.setattr(nvidia, "compile_module_from_src", lambda **_: module)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
        value = dict if name == "PyKernelArg" else name
        monkeypatch.setattr(nvidia, name, value, raising=False)
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda _: 10**6)
    monkeypatch.setattr(_launch, "HELD_ON", {"cpu"})
    monkeypatch.setattr(_launch, "_kernels", {})
    shipped = JITFunction.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        device.runs += 1
        return shipped(*args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    for kernel in (_probe_kernel, _special_kernel, _mixed_kernel, *OF_A_BLOCK):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return device


def _flat(launched: tuple[Any, ...]) -> list[Any]:
    """Arguments of the C launcher: tensors as addresses, without hooks and what is told to them."""
    flat: list[Any] = []
    for value in launched:
        flat += value if isinstance(value, tuple) and value and launched[-1] is value else [value]
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    return [
        t.data_ptr()
        if isinstance(t, torch.Tensor)
        else None
        if t in hooks or type(t).__name__ == "LazyDict"
        else t
        for t in flat
    ]


def _same(gpu: Any, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> bool:
    """Launches both ways and compares what arrives; True if `run` did not go through Triton."""
    kernel[grid](*arguments, **options)
    expected = _flat(gpu.launched[-1])
    before = gpu.runs
    run(kernel, grid, *arguments, **options)
    assert _flat(gpu.launched[-1]) == expected
    return gpu.runs == before


OPTIONS = {"BLOCK": 64, "FLAG": True, "num_warps": 4}


@pytest.mark.parametrize("grid", [(3,), (3, 2), (3, 2, 5)])
def test_the_same_arguments_arrive(grid, gpu):
    x, out = torch.zeros(64), torch.zeros(64)
    first = _same(gpu, _probe_kernel, grid, x, out, 50, 0.5, **OPTIONS)
    second = _same(gpu, _probe_kernel, grid, x, out, 50, 0.5, **OPTIONS)
    assert (first, second) == (False, True)
    assert _flat(gpu.launched[-1])[:5] == [*(*grid, 1, 1)[:3], STREAM, 1]


def test_other_values_need_no_other_kernel(gpu):
    for rows, scale, size in ((1, 0.5, 64), (16, 1.0, 128), (17, 3e38, 64), (0, -1.0, 32)):
        tensors = torch.zeros(size), torch.zeros(size)
        held = _same(gpu, _probe_kernel, (1,), *tensors, rows, scale, **OPTIONS)
        assert held == (rows != 1)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64)[1:]},
        {"out": torch.zeros(64)[1:]},
        {"x": torch.zeros(64).bfloat16()},
        {"rows": 2**31},
        {"rows": -(2**31) - 1},
        {"scale": 1},
        {"scale": True},
        {"BLOCK": 32},
        {"FLAG": False},
        {"FLAG": None},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_triton_specialises_on_has_a_kernel_of_its_own(change, gpu):
    given = {"x": torch.zeros(64), "out": torch.zeros(64), "rows": 50, "scale": 0.5, **OPTIONS}

    def launched(values):
        values = dict(values)
        arguments = [values.pop(name) for name in ("x", "out", "rows", "scale")]
        return _same(gpu, _probe_kernel, (1,), *arguments, **values)

    assert [launched(given), launched(given)] == [False, True]
    changed = given | change
    wide = abs(changed["rows"]) >= 2**31
    # wide integers are not held at all
    assert [launched(changed), launched(changed)] == [False, not wide]
    assert launched(given)


def test_any_order_of_any_calls(gpu):
    """Whatever came before, the kernel and the arguments are those that Triton would take."""
    generator = random.Random(0)
    base = torch.zeros(256)
    for _ in range(300):
        x, out = (base[generator.choice([0, 1, 4, 8]) :] for _ in range(2))
        if generator.random() < 0.3:
            x = x.to(generator.choice([torch.float16, torch.bfloat16]))
        options = {
            "BLOCK": generator.choice([32, 64]),
            "FLAG": generator.choice([True, False, 1]),
            "num_warps": generator.choice([1, 4]),
        }
        rows = generator.choice([1, 16, 50, 2**31])
        scale = generator.choice([0.5, 1.0, 2])
        _same(gpu, _probe_kernel, (generator.randint(1, 9),), x, out, rows, scale, **options)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(hook, gpu, monkeypatch):
    arguments = torch.zeros(64), torch.zeros(64), 50, 0.5
    for _ in range(2):
        run(_probe_kernel, (1,), *arguments, **OPTIONS)
    before = gpu.runs
    monkeypatch.setattr(triton.knobs.runtime, hook, lambda *_: None)
    run(_probe_kernel, (1,), *arguments, **OPTIONS)
    assert gpu.runs == before + 1


def test_what_is_not_certain_goes_through_triton(gpu, monkeypatch):
    x = torch.zeros(64)
    for _ in range(2):
        # a size may become a constant; a scalar stands before an address
        assert not _same(gpu, _special_kernel, (1,), x, 50, 1, BLOCK=64, num_warps=4)
        assert not _same(gpu, _mixed_kernel, (1,), x, 50, x, BLOCK=64, num_warps=4)
    monkeypatch.setattr(_launch, "HELD_ON", {"cuda"})
    for _ in range(2):
        assert not _same(gpu, _probe_kernel, (1,), x, x, 50, 0.5, **OPTIONS)


def test_another_current_device_is_not_held(gpu):
    gpu.get_current_device = lambda: 1
    gpu.get_current_stream = lambda _: STREAM
    for _ in range(2):
        assert not _same(gpu, _probe_kernel, (1,), *[torch.zeros(8)] * 2, 5, 0.5, **OPTIONS)


def test_unknown_versions_and_scratch_memory_go_through_tritons_wrapper(gpu, monkeypatch):
    """Less is saved, and the same arrives."""
    monkeypatch.setattr(_launch, "_BARE_LAUNCHERS", {})
    arguments = torch.zeros(64), torch.zeros(64), 50, 0.5
    held = [_same(gpu, _probe_kernel, (2, 3), *arguments, **OPTIONS) for _ in range(2)]
    assert held == [False, True]


def test_a_blocks_kernels_are_held(gpu, monkeypatch):
    for name, launcher in LAUNCHERS.items():
        monkeypatch.setitem(ON_CPU, name, launcher)
    first, *others = [_block_kernels(gpu) for _ in range(3)]
    assert first == (5, 5)
    assert others == [(0, 5)] * 2


def _block_kernels(gpu: Any) -> tuple[int, int]:
    """Launches through Triton, and all."""
    runs, launched = gpu.runs, len(gpu.launched)
    x, weight, bias = torch.zeros(70, 64), torch.ones(64), torch.zeros(64)
    summed, normed, mean, rstd = add_layer_norm_forward(
        x, x.bfloat16(), weight, bias, 1e-6, torch.bfloat16
    )
    add_layer_norm_backward(normed, x, summed, mean, rstd, weight, bias, low_dtype=torch.bfloat16)
    gelu_backward(normed, normed)
    return gpu.runs - runs, len(gpu.launched) - launched
