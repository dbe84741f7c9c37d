"""ijepa_kernels on its own: with torch and triton only, and its README's examples as written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ijepa_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

INSTALLED = """
import sys
from importlib import metadata
sys.path.insert(0, {folder!r})
import torch, ijepa_kernels, ijepa_kernels.optim
assert ijepa_kernels.__file__.startswith({folder!r}), ijepa_kernels.__file__
assert ijepa_kernels.gelu(torch.zeros(2, 3)).shape == (2, 3)
assert metadata.version("ijepa-kernels") == ijepa_kernels.__version__
print(*[name.partition(">")[0] for name in metadata.requires("ijepa-kernels")])
"""

PROBE = """
import sys
import torch, triton, triton.language
import torch.distributed.tensor  # torch's own, loaded on first use
before = set(sys.modules)
import ijepa_kernels, ijepa_kernels.optim, ijepa_kernels.testing
new = {name.partition(".")[0] for name in set(sys.modules) - before}
allowed = {"ijepa_kernels", "torch", "triton", *sys.stdlib_module_names}
assert new <= allowed, new - allowed
assert "ijepa_fast" not in sys.modules
"""


def _run(code, cwd):
    """In a folder of its own, with the kernels and nothing else of the repository on the path."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_needs_torch_and_triton_only(tmp_path):
    assert _run(PROBE, tmp_path) == ""


def test_the_readmes_examples_run(tmp_path):
    """Each in a namespace of its own."""
    names = [f"example {number}: {code.splitlines()[1]}" for number, code in enumerate(EXAMPLES)]
    parts = [
        f"print({name!r}); exec(compile({code!r}, {name!r}, 'exec'), {{}})"
        for name, code in zip(names, EXAMPLES, strict=True)
    ]
    assert _run("\n".join(parts), tmp_path).splitlines() == names


def test_is_a_distribution_of_its_own(tmp_path):
    """Built without a network from a copy, which a build writes to; imported where nothing else of
    the repository is.
    """
    source, wheels, folder = (tmp_path / name for name in ("source", "wheels", "installed"))
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    alone = ["--no-index", "--no-deps"]
    build = ["wheel", *alone, "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"ijepa_kernels-{ijepa_kernels.__version__}-py3-none-any.whl"
    subprocess.run([*pip, "install", *alone, "--target", str(folder), str(wheel)], check=True)
    kernels, installed = (
        {path.relative_to(base) for path in base.glob("ijepa_kernels/**/*.py")}
        for base in (ROOT / "kernels", folder)
    )
    assert installed == kernels
    code = INSTALLED.format(folder=str(folder))
    command = [sys.executable, "-I", "-c", code]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["torch", "triton"]
