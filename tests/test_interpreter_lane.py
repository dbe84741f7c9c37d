"""All tests of the ops once more with the Triton kernels themselves, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_kernels_pass_the_tests_of_the_ops():
    """A process of its own: the interpreter is chosen when triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/ops", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed
    assert int(passed[1]) > 400
