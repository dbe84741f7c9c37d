"""ijepa_kernels on its own: with torch and triton only, and its README's examples as written."""

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ijepa_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

INSTALLED = """
import torch, ijepa_kernels, ijepa_kernels.optim
assert ijepa_kernels.gelu(torch.zeros(2, 3)).shape == (2, 3)
try:
    import yaml
except ImportError:
    print(ijepa_kernels.__version__, ijepa_kernels.__file__)
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


def _needed(*names):
    """Distributions of these names and all that they need, as installed here."""
    found = {}
    pending = list(names)
    while pending:
        name = canonicalize_name(pending.pop())
        if name not in found:
            found[name] = metadata.distribution(name)
            for line in found[name].requires or ():
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    pending.append(requirement.name)
    return found.values()


def test_its_wheel_runs_where_only_torch_and_triton_are(tmp_path):
    """Built without a network from a copy, which a build writes to; pip finds all that it needs in
    an environment with torch, triton and what these need.
    """
    source, wheels, environment = (tmp_path / name for name in ("source", "wheels", "environment"))
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*pip, *build, str(source)], check=True)
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"ijepa_kernels-{ijepa_kernels.__version__}-py3-none-any.whl"
    venv.create(environment)
    (site,) = environment.glob("lib/python*/site-packages")
    parts = {
        path.parts[0]: distribution.locate_file(path.parts[0])
        for distribution in _needed("torch", "triton")
        for path in distribution.files or ()
    }
    for name in parts.keys() - {"..", "__pycache__"}:
        (site / name).symlink_to(parts[name])
    python = str(environment / "bin" / "python")
    there = [*pip, "--python", python]
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # no PYTHONPATH
    subprocess.run([*there, "install", "--no-index", str(wheel)], check=True, env=alone)
    kernels, installed = (
        {path.relative_to(base) for path in base.glob("ijepa_kernels/**/*.py")}
        for base in (ROOT / "kernels", site)
    )
    assert installed == kernels
    command = [python, "-I", "-c", INSTALLED]
    child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    file = site / "ijepa_kernels" / "__init__.py"
    assert child.stdout.split() == [ijepa_kernels.__version__, str(file)]
