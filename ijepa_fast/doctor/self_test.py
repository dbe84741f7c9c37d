"""A few seconds of work with a known result: training steps on both paths.

``python -m ijepa_fast.doctor.self_test`` prints a JSON line for each finding as it comes. The
doctor runs it in a process of its own: a driver or a library that kills a process is a finding
too, and so is one that never returns.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch

from ijepa_fast.config import MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.doctor.backends import device
from ijepa_fast.doctor.findings import Finding
from ijepa_fast.fast import FastStep
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues

__all__ = ["child"]

# a few of them for the work; the rest for the first imports of torch and the compilation of kernels
SECONDS = 120
STEPS = 3
# relative, of a loss: float32 paths differ by rounding, bfloat16 ones by 2**-8 a product
FLOAT32, BFLOAT16 = 1e-5, 2e-2
# begins each line that is a finding: libraries may print too
MARK = "finding: "


def _losses(kind: type, precision: str) -> list[float]:
    """Losses of a tiny network's first steps on one path."""
    model = ModelConfig(
        name="vit_tiny", patch_size=8, depth=2, predictor_width=48, predictor_depth=2
    )
    recipe = MaskConfig(min_keep=4, truncation_group=4)
    images, side = 8, 64
    networks = build_models(model, (side, side), torch.Generator().manual_seed(0))
    step = kind(
        *(network.to(device()) for network in networks),
        OptimConfig(precision=precision),  # type: ignore[arg-type]
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    losses = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (images, side, side, 3), generator=generator)
        masks = sample_masks(recipe, grid=(8, 8), seed=0, step=number, positions=np.arange(images))
        elements = masks.elements(images, model.architecture.width)
        batch = step.prepare(masks)
        loss, _ = step.accumulate(pixels.to(torch.uint8).to(device()), batch, elements)
        step.update(StepValues(lr=1e-3, weight_decay=0.05, momentum=0.99))
        losses.append(float(loss))
    return losses


def steps() -> Iterator[Finding]:
    """The fast path in float32 and in bfloat16 against the reference path."""
    expected = _losses(ReferenceStep, "float32")
    for precision, limit in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        losses = _losses(FastStep, precision)
        errors = [abs(ours / true - 1) for ours, true in zip(losses, expected, strict=True)]
        text = (
            f"losses of {STEPS} steps differ from the reference path's by {max(errors):.0e} "
            f"relative (limit {limit:.0e})"
        )
        # not a number is no less
        if all(error <= limit for error in errors):
            yield Finding(f"fast path, {precision}", text)
        else:
            advice = "train with --path reference, and report this"
            yield Finding(f"fast path, {precision}", text, "problem", advice)


def child() -> Iterator[Finding]:
    """Runs the self test in another process and ends it when its time is up."""
    command = [sys.executable, "-m", "ijepa_fast.doctor.self_test"]
    code: int | None = None
    try:
        result = subprocess.run(  # noqa: S603  # this very module
            command, check=False, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
        code, output, errors = result.returncode, result.stdout, result.stderr
    except subprocess.TimeoutExpired as error:
        output, errors = error.stdout or b"", b""
    for line in output.decode(errors="replace").splitlines():
        if line.startswith(MARK):
            yield Finding(*json.loads(line.removeprefix(MARK)))
    if code is None:
        text = f"ended after {SECONDS} s: what is not named above was not reached"
        advice = "run it again; if that does not help, a library or the driver hangs: report it"
        yield Finding("process", text, "problem", advice)
    elif code:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        advice = "report it; --no-self-test leaves it out"
        yield Finding("process", f"the self test ended with {how}: {last}", "problem", advice)


if __name__ == "__main__":
    for line in steps():
        print(MARK + json.dumps(line), flush=True)
