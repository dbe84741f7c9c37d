"""Which packages are there, which versions, and which of them are the wrong ones. Nothing but torch
is imported to find out.
"""

import importlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import ijepa_fast
from ijepa_fast.doctor.findings import Finding

__all__ = ["dali", "versions"]

# distribution -> the extra that brings it ("": every install), and what goes on without it
PACKAGES = {
    "torch": ("", None),
    "triton": ("", None),
    "numpy": ("", None),
    "tyro": ("train", None),
    "pyyaml": ("train", None),
    "rich": ("train", None),
    "safetensors": ("train", None),
    "pillow": ("train", None),
    "xformers": ("gpu", "attention on CUDA uses PyTorch's own kernels"),
    "tensorboard": ("log", "no --log.to tensorboard"),
    "wandb": ("wandb", "no --log.to wandb"),
    "mlflow-skinny": ("mlflow", "no --log.to mlflow"),
    "matplotlib": ("viz", "no pictures of masks and curves"),
    "onnxruntime": ("onnx", "no `export --format onnx`"),
    "huggingface_hub": ("hub", "no `export --push`"),
}
DALI = re.compile(r"nvidia-dali(?:-cuda(\d+)\d)?")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]


def _oldest() -> dict[str, str]:
    """Oldest versions that the installed package asks for, by name."""
    try:
        lines = metadata.requires("ijepa-fast") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def versions() -> Iterator[Finding]:
    """Ours, Python's, the system's, and those of every package that is or may be used."""
    yield Finding("ijepa-fast", ijepa_fast.__version__)
    yield Finding("Python", f"{platform.python_version()} ({platform.python_implementation()})")
    # not platform.platform() nor uname: no name of the machine
    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    oldest = _oldest()
    for name, (extra, without) in PACKAGES.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            brings = f"the extra [{extra}]" if extra else "every install"
            absent = f"not installed; {brings} brings it"
            if without:
                yield Finding(name, f"{absent} ({without})", "note")
            else:
                ours = f"'ijepa-fast[{extra}]'" if extra else "ijepa-fast"
                yield Finding(name, absent, "problem", f"pip install {ours}")
            continue
        least = oldest.get(name, "0")
        if _numbers(version) < _numbers(least):
            text, advice = f"{version}, at least {least} is needed", f"'{name}>={least}'"
            yield Finding(name, text, "problem", f"pip install -U {advice}")
        else:
            yield Finding(name, version)


def dali() -> list[Finding]:
    """The one DALI, if it is for torch's CUDA version."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if DALI.fullmatch(name):
            found[name] = distribution.version
    if not found:
        text = "not installed; the extra [train] brings it (Pillow decodes)"
        return [Finding("DALI", text, "note")]
    try:
        cuda = importlib.import_module("torch").version.cuda
    except Exception:  # noqa: BLE001  # whatever is wrong with torch is said elsewhere
        cuda = None
    major = cuda.partition(".")[0] if cuda else None
    name = min(found)
    match = DALI.fullmatch(name)
    # the wheels are named after a CUDA version without its dot: cuda130
    theirs = match[1] if match else None
    if theirs is None:
        wrong = f"the package {name}, without a CUDA version in its name, is a placeholder"
    elif len(found) > 1:
        wrong = f"{' and '.join(sorted(found))} write to the same folder"
    elif major and theirs != major:
        wrong = f"{name} is for CUDA {theirs}, torch for CUDA {major}"
    else:
        fits = f"as torch's {cuda}" if major else "torch has no CUDA: it decodes on the CPU"
        return [Finding("DALI", f"{found[name]} ({name}): for CUDA {theirs}, {fits}")]
    right = f"pip install nvidia-dali-cuda{major or 13}0"
    return [Finding("DALI", wrong, "problem", f"pip uninstall {' '.join(sorted(found))}; {right}")]
