"""A few seconds of work with a known result: steps of both paths, ops, a decoded image, a file.

``python -m ijepa_fast.doctor.self_test FOLDER`` prints a JSON line for each finding as it comes.
The doctor runs it in a process of its own: a driver or a library that kills a process is a finding
too, and so is one that never returns.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ijepa_fast.doctor.findings import Finding, Level, first_line

__all__ = ["SECONDS", "child", "main"]

# for the work; a process that imports torch for the first time may take as long again before it
SECONDS = 20
IMPORTS = 120
STEPS = 3
# relative, of a loss: float32 paths differ by rounding, bfloat16 ones by 2**-8 a product
FLOAT32, BFLOAT16 = 1e-5, 2e-2


def _finding(name: str, text: str, level: Level = "ok", advice: str = "") -> Finding:
    return Finding(section="self test", name=name, level=level, text=text, advice=advice)


# --- the work ------------------------------------------------------------------------------------


def _losses(kind: type, precision: str, device: Any) -> list[float]:
    """Losses of a tiny network's first steps on one path."""
    import numpy as np
    import torch

    from ijepa_fast.config import MaskConfig, ModelConfig, OptimConfig
    from ijepa_fast.masks import sample_masks
    from ijepa_fast.model import build_models
    from ijepa_fast.schedules import StepValues

    model = ModelConfig(
        name="vit_tiny", patch_size=8, depth=2, predictor_width=48, predictor_depth=2
    )
    recipe = MaskConfig(min_keep=4, truncation_group=4)
    images, side = 8, 64
    networks = build_models(model, (side, side), torch.Generator().manual_seed(0))
    step = kind(
        *(network.to(device) for network in networks),
        OptimConfig(precision=precision),  # type: ignore[arg-type]
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    losses = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (images, side, side, 3), generator=generator)
        masks = sample_masks(recipe, grid=(8, 8), seed=0, step=number, positions=np.arange(images))
        _, blocks, length = masks.target_index.shape
        elements = images * blocks * length * model.architecture.width
        batch = step.prepare(masks)
        loss, _ = step.accumulate(pixels.to(torch.uint8).to(device), batch, elements)
        step.update(StepValues(lr=1e-3, weight_decay=0.05, momentum=0.99))
        losses.append(float(loss))
    return losses


def _steps() -> list[Finding]:
    """Both paths, in float32 and in bfloat16."""
    import numpy as np

    from ijepa_fast.doctor.backends import device
    from ijepa_fast.fast import FastStep
    from ijepa_fast.reference import ReferenceStep

    found, expected = [], None
    for kind, precision, limit in (
        (ReferenceStep, "float32", 0.0),
        (FastStep, "float32", FLOAT32),
        (FastStep, "bfloat16", BFLOAT16),
    ):
        losses = _losses(kind, precision, device())
        if expected is None:
            expected = losses
            continue
        errors = np.abs(np.array(losses) / np.array(expected) - 1)
        # NaN if any is
        error = float(errors.max())
        text = (
            f"losses of {STEPS} steps differ from the reference path's by {error:.0e} relative "
            f"(limit {limit:.0e})"
        )
        name = f"fast path, {precision}"
        # not a number is no less
        if error <= limit:
            found.append(_finding(name, text))
        else:
            advice = "train with --path reference, and report this"
            found.append(_finding(name, text, "problem", advice))
    return found


def op_errors() -> dict[str, float]:
    """Relative error of each op on the device against its specification, in float32."""
    import torch
    from torch import Tensor

    import ijepa_kernels as kernels
    from ijepa_fast.doctor.backends import device
    from ijepa_kernels.add_layer_norm import add_layer_norm_ref
    from ijepa_kernels.gather_tokens import gather_tokens_ref
    from ijepa_kernels.latent_loss import latent_loss_ref
    from ijepa_kernels.optim.ema_update import ema_update_ref
    from ijepa_kernels.patchify import patchify_ref
    from ijepa_kernels.scatter_tokens import scatter_tokens_ref
    from ijepa_kernels.testing import relative_error

    generator, where = torch.Generator().manual_seed(0), device()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(where)

    rows, width, patches = 21, 96, 12
    x, residual, prediction = draw(rows, width), draw(rows, width), draw(rows, width)
    weight, bias, table = draw(width), draw(width), draw(patches, width)
    features = draw(2 * patches, width)
    index = torch.randperm(2 * patches, generator=generator)[:rows].to(where)
    images = torch.randint(0, 256, (2, 32, 24, 3), generator=generator, dtype=torch.uint8)
    images = images.to(where)

    def loss(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf = prediction.clone().requires_grad_()
        value = function(leaf, features, index)
        value.backward()
        assert leaf.grad is not None
        return [value.detach(), leaf.grad]

    def average(function: Callable[..., None]) -> list[Tensor]:
        targets = [x.clone(), weight.clone()]
        function(targets, [residual, bias], 0.9)
        return targets

    def norm(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        return list(function(residual, x, weight, bias))

    pairs: dict[str, tuple[list[Tensor], list[Tensor]]] = {
        "add_layer_norm": (norm(kernels.add_layer_norm), norm(add_layer_norm_ref)),
        "ema_update_": (average(kernels.ema_update_), average(ema_update_ref)),
        "gather_tokens": (
            [kernels.gather_tokens(features, index, table)],
            [gather_tokens_ref(features, index, table)],
        ),
        "latent_loss": (loss(kernels.latent_loss), loss(latent_loss_ref)),
        "patchify": (
            [kernels.patchify(images, 8, layout="BHWC")],
            [patchify_ref(images, (8, 8), layout="BHWC")],
        ),
        "scatter_tokens": (
            [kernels.scatter_tokens(x, index, 2 * patches)],
            [scatter_tokens_ref(x, index, 2 * patches)],
        ),
    }
    return {
        name: max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))
        for name, (ours, truth) in pairs.items()
    }


def _operations() -> list[Finding]:
    import triton

    from ijepa_fast.doctor.backends import device
    from ijepa_kernels.testing import launch_on_cpu

    # the kernels themselves, where the interpreter is there for them
    interpreted = triton.knobs.runtime.interpret and device().type == "cpu"
    with launch_on_cpu() if interpreted else nullcontext():
        errors = op_errors()
    wrong = {name: error for name, error in errors.items() if not error <= FLOAT32}
    if wrong:
        names = ", ".join(f"{name} ({error:.0e})" for name, error in wrong.items())
        text = f"differ from their specification by more than {FLOAT32:.0e}: {names}"
        advice = "train with --path reference, and report this"
        return [_finding("kernels", text, "problem", advice)]
    worst = max(errors.values())
    text = f"{', '.join(errors)} as specified, to {worst:.0e} relative (limit {FLOAT32:.0e})"
    return [_finding("kernels", text)]


def _decode() -> list[Finding]:
    """An image of known pixels through the decoder that training takes."""
    import numpy as np
    from PIL import Image

    from ijepa_fast.config import DataConfig
    from ijepa_fast.data import make_decoder
    from ijepa_fast.doctor.backends import device

    y, x = np.mgrid[0:80, 0:96]
    pixels = np.stack([2 * x, 3 * y, 200 - x - y], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0)
    decoder, why = make_decoder(DataConfig(crop=32), device(), max_batch=1)
    try:
        window = np.array([[8, 16, 64, 64]], dtype=np.int32)
        decoded = decoder.decode([buffer.getvalue()], window, np.array([True]))
        image = decoded.cpu().numpy()[0].astype(int)
    finally:
        decoder.close()
    # what was drawn, not what another decoder makes of it
    truth = pixels[8:72, 16:80].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    error = float(np.abs(image - truth).mean())
    name = why.removeprefix("decoder: ").partition(",")[0].partition(" (")[0]
    text = f"{name}: a JPEG comes out {error:.1f} of 255 from what was drawn (limit 3)"
    if error <= 3:
        return [_finding("decoder", text)]
    return [_finding("decoder", text, "problem", "train with --data.decoder pillow")]


def _write(folder: Path) -> list[Finding]:
    """A file that is written, forced to the disk, renamed and read again."""
    from ijepa_fast.state import fsync, write_file

    content = bytes(range(256)) * 4096
    part, final = (folder / f".ijepa-fast-doctor-{os.getpid()}{end}" for end in (".part", ""))
    began = time.perf_counter()
    try:
        write_file(part, [content])
        part.replace(final)
        fsync(folder)
        same = final.read_bytes() == content
    except OSError as error:
        text = f"a file cannot be written, forced to the disk and renamed: {first_line(error)}"
        return [_finding("files", text, "problem", "name another folder with --out")]
    finally:
        part.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    took = 1e3 * (time.perf_counter() - began)
    if not same:
        advice = "do not train into this folder: it does not keep what is written"
        return [_finding("files", "a file does not read back as written", "problem", advice)]
    return [_finding("files", f"1 MiB written, forced to the disk, renamed, read: {took:.0f} ms")]


def main(folder: Path) -> None:
    """All of it, a JSON line each."""
    works: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("steps", _steps),
        ("kernels", _operations),
        ("decoder", _decode),
        ("files", lambda: _write(folder)),
    )
    for name, work in works:
        try:
            found = work()
        except Exception as error:  # noqa: BLE001  # whatever is broken here, it is the finding
            text = f"does not run: {first_line(error)}"
            found = [_finding(name, text, "problem", "the lines above may say why; report it")]
        for finding in found:
            print(json.dumps(asdict(finding)), flush=True)


# --- the process ---------------------------------------------------------------------------------


def child(out: Path | None) -> list[Finding]:
    """Runs the self test in another process and ends it when its time is up.

    Args:
        out: a file is written there, or in the nearest folder above it that exists, and removed
            again; None is the working folder.
    """
    from ijepa_fast.doctor.machine import existing_part

    folder = existing_part(out or Path.cwd())
    command = [sys.executable, "-m", "ijepa_fast.doctor.self_test", str(folder)]
    late = None
    try:
        result = subprocess.run(  # noqa: S603  # this very module
            command, check=False, capture_output=True, timeout=IMPORTS, stdin=subprocess.DEVNULL
        )
        code, output, errors = result.returncode, result.stdout, result.stderr
    except subprocess.TimeoutExpired as error:
        late, code, output, errors = error, 0, error.stdout or b"", b""
    found = []
    for line in output.decode(errors="replace").splitlines():
        # libraries may print too
        if line.startswith('{"section": "self test"'):
            found.append(Finding(**json.loads(line)))
    if late:
        text = f"ended after {IMPORTS} s, which should have taken {SECONDS} s and the imports"
        advice = "a library or the driver hangs: the lines above may say which; report it"
        found.append(_finding("process", text, "problem", advice))
    elif code == -signal.SIGALRM:
        text = f"not finished in {SECONDS} s; what is not named above was not reached"
        found.append(_finding("time", text, "note"))
    elif code:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        text = f"the self test ended with {how}: {last[0] if last else 'nothing was printed'}"
        advice = "report it; --no-self-test leaves it out"
        found.append(_finding("process", text, "problem", advice))
    return found


def _limited() -> None:
    """Imports, then lets the kernel end this process after its time: work in a library that never
    returns does not see a Python signal handler.
    """
    importlib.import_module("ijepa_fast.fast")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    main(Path(sys.argv[1]))


if __name__ == "__main__":
    _limited()
