"""The host's time of a training step, held to limits without a GPU; see `host/proxy.py`.

The limits are of ViT-B/16's depth: calls of Python functions and of built-in ones in one step, and
for a replayed step CPU milliseconds. Counts are the same every time on one version of Python and
torch; `proxy.py` checks that. Times depend on the machine, so only one of them has a limit, and a
wide one.
"""

import functools
import json
import shutil
import subprocess
import sys

import pytest
from torch.utils import cpp_extension

LIMITS = {"eager": (2400, 3400), "captured": (300, 300)}
CAPTURED_MS = 2.0
KINDS = {"cudnn": ("reference", "eager", "captured"), "varlen": ("eager",)}


@functools.cache
def _obstacle() -> str | None:
    """Why the null kernels cannot be built here."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"host time is not measured: there is no C++ compiler ({compiler})"
    if not cpp_extension.is_ninja_available():
        return "host time is not measured: there is no ninja"
    return None


@pytest.mark.parametrize("attention", list(KINDS))
def bench_host(attention: str, capsys: pytest.CaptureFixture[str]) -> None:
    if obstacle := _obstacle():
        pytest.skip(obstacle)
    # of its own, for its kernels replace torch's
    command = [sys.executable, "-m", "benchmarks.host.proxy", attention, *KINDS[attention]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n\nhost, ViT-B/16's depth, {attention} where lengths are equal")
        for kind, row in rows.items():
            print(
                f"{kind:<10} {row['python']:>5} Python and {row['c']:>5} C calls, "
                f"{row['nodes']:>4} nodes, {row['ms']:.2f} ms of CPU"
            )
    for kind, (python, c) in LIMITS.items():
        if kind in rows:
            assert rows[kind]["python"] <= python, f"{kind}: Python calls, limit {python}"
            assert rows[kind]["c"] <= c, f"{kind}: C calls, limit {c}"
            assert rows[kind]["not held"] == 0, f"{kind}: launches through Triton's own wrapper"
    if "captured" in rows:
        assert rows["captured"]["ms"] <= CAPTURED_MS, f"captured: limit {CAPTURED_MS} ms"
