"""The same tests in every lane: CPU implementations, Triton's interpreter (a process started with
TRITON_INTERPRET=1), and CUDA.
"""

import os
from collections.abc import Iterator

import pytest
import torch
import triton
from hypothesis import HealthCheck, settings

from ijepa_kernels.testing import launch_on_cpu, nan_filled
from tests.ops.checked_memory import checked_memory
from tests.ops.interpreted_float8 import interpreted_float8

INTERPRETED = bool(triton.knobs.runtime.interpret)
LANE = "interpreter" if INTERPRETED else "cuda" if torch.cuda.is_available() else "cpu"

if LANE == "cuda":
    # or a matrix product warns that it is not deterministic, and warnings are errors
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile(
    "ops",
    # on a GPU a new width is a new kernel to compile
    max_examples=100 if LANE != "cuda" else 15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ops")


def pytest_report_header() -> str:
    return f"ijepa_kernels lane: {LANE}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests of ops put their tensors."""
    return torch.device("cuda" if LANE == "cuda" else "cpu")


@pytest.fixture(scope="session")
def kernels() -> bool:
    """True where Triton kernels run, False where the CPU implementations do."""
    return LANE != "cpu"


@pytest.fixture(autouse=True)
def _lane() -> Iterator[None]:
    """Fresh memory is NaN; under the interpreter CPU tensors reach the Triton kernels, whose
    accesses are checked.
    """
    with nan_filled():
        if INTERPRETED:
            with launch_on_cpu(), checked_memory(), interpreted_float8():
                yield
        else:
            yield
