"""ijepa_kernels on its own: with torch and triton only, and its README's examples as written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ijepa_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

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


def test_the_readme_has_an_example_of_every_export():
    text = "\n".join(EXAMPLES)
    missing = [name for name in ijepa_kernels.__all__ if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_the_readmes_examples_run(tmp_path):
    """Each in a namespace of its own."""
    names = [f"example {number}: {code.splitlines()[1]}" for number, code in enumerate(EXAMPLES)]
    parts = [
        f"print({name!r}); exec(compile({code!r}, {name!r}, 'exec'), {{}})"
        for name, code in zip(names, EXAMPLES, strict=True)
    ]
    assert _run("\n".join(parts), tmp_path).splitlines() == names
