"""What the launchers would launch: kernels with the very specialisation of a real call.

Each `benchmarks/bench_<op>.py` has a function `static_cases(model)` whose cases call the op's
launchers on meta tensors. Here Triton is given a driver of a GPU that does not exist, and a hook
that takes every compilation away from it. So Triton itself decides on argument types, alignment
(fresh allocations have it) and constants, and a changed launch table shows at once.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import ijepa_kernels
from benchmarks.shapes import Model

__all__ = ["Launch", "kernel_names", "op_names", "record", "recording"]

BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Launch:
    """A kernel and all that decides its machine code; equal if these are."""

    identity: str
    sm: int
    kernel: str = field(compare=False)
    fn: Any = field(compare=False)
    signature: dict[str, Any] = field(compare=False)
    constants: dict[tuple[int, ...], Any] = field(compare=False)
    attributes: dict[tuple[int, ...], Any] = field(compare=False)
    options: dict[str, Any] = field(compare=False)

    @property
    def tile(self) -> int:
        """Elements one pass of a program covers: the product of its constants named BLOCK*."""
        names = [parameter.name for parameter in self.fn.params]
        return prod(
            value
            for (position, *_), value in self.constants.items()
            if names[position].startswith("BLOCK")
        )


class _Absent:
    """The driver of a GPU of this architecture that is not there."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> str:
        # no device of this name exists, so that Triton mixes nothing up with a real one
        return f"absent sm_{self.sm}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


@contextmanager
def recording(sm: int) -> Iterator[list[Launch]]:
    """Within it kernels are not compiled or run but added to the list, as for an sm_`sm`."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels were made for the interpreter: unset TRITON_INTERPRET")
    launches: list[Launch] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        identity = compile["specialization_data"]
        options = json.loads(identity)["options"]
        launches.append(
            Launch(
                identity=identity,
                sm=sm,
                kernel=fn.jit_function.__name__,
                fn=fn.jit_function,
                signature=compile["signature"],
                constants=compile["constants"],
                attributes=compile["configs"][0],
                # the rest are lists, which the launch cannot change
                options={k: v for k, v in options.items() if not isinstance(v, list | dict)},
            )
        )
        return True  # "do not compile"

    before = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(_Absent(sm))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield launches
    finally:
        driver._active, triton.knobs.runtime.jit_cache_hook = before


def record(
    models: Sequence[Model], sms: Sequence[int], ops: Sequence[str]
) -> dict[int, dict[str, Launch]]:
    """For every architecture, what the cases of these ops' bench files launch.

    A row stands for all cases of an op that launch the very same thing. Its name is "op | case |
    models | kernel", with the first such case and all such models. If that is not unique, the
    second is called "kernel #2".
    """
    found: dict[int, dict[str, Launch]] = {sm: {} for sm in sms}
    for op in ops:
        path = BENCHMARKS / f"bench_{op}.py"
        if not path.exists() or "def static_cases" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"benchmarks.bench_{op}")
        users: dict[int, dict[Launch, list[tuple[str, str]]]] = {sm: {} for sm in sms}
        for model in models:
            for case, call in module.static_cases(model).items():
                for sm in sms:
                    with recording(sm) as launches:
                        call()
                    for launch in launches:
                        if sm < 89 and any("fp8" in str(t) for t in launch.signature.values()):
                            continue  # Triton has no casts to float8 there
                        users[sm].setdefault(launch, []).append((case, model.name))
        for sm in sms:
            for launch, cases in users[sm].items():
                names = " ".join(dict.fromkeys(name for _, name in cases))
                row = f"{op} | {cases[0][0]} | {names} | {launch.kernel}"
                same = sum(other.partition(" #")[0] == row for other in found[sm])
                found[sm][f"{row} #{same + 1}" if same else row] = launch
    return found


def _modules() -> list[str]:
    found = pkgutil.walk_packages(ijepa_kernels.__path__, "ijepa_kernels.")
    return [module.name for module in found]


def op_names() -> list[str]:
    """Modules of `ijepa_kernels`, and what else bench files are named after."""
    modules = {name.rpartition(".")[2] for name in _modules()}
    benches = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    return sorted(modules | benches)


def kernel_names(ops: Sequence[str]) -> set[str]:
    """The kernels that these ops' modules define."""
    names = set()
    for module in _modules():
        if module.rpartition(".")[2] in ops:
            names |= {
                name
                for name, value in vars(importlib.import_module(module)).items()
                if isinstance(value, JITFunction)
                and value.__module__ == module
                and name.endswith("_kernel")
            }
    return names
