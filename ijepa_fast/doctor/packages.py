"""Which packages are there, which versions, and which of them are the wrong ones. Nothing is
imported to find out.
"""

import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import ijepa_fast
from ijepa_fast.doctor.findings import Finding

__all__ = ["versions", "wrong_packages"]

# distribution -> the extra that brings it ("" is every install)
NEEDED = {
    "torch": "",
    "numpy": "",
    "tyro": "train",
    "pyyaml": "train",
    "rich": "train",
    "safetensors": "train",
    "pillow": "train",
}
OPTIONAL = {
    "xformers": ("gpu", "attention on CUDA uses PyTorch's own kernels"),
    "tensorboard": ("log", "no --log.tensorboard"),
    "matplotlib": ("viz", "no pictures of masks and curves"),
}
DALI = re.compile(r"nvidia-dali(?:-(cuda)(\d+))?")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _minimum() -> dict[str, str]:
    """Oldest versions that the installed package asks for, by name."""
    try:
        lines = metadata.requires("ijepa-fast") or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)>=([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


def _found(name: str) -> Finding | None:
    """A package that is there, and whether it is new enough."""
    version, least = _version(name), _minimum().get(name)
    if version is None:
        return None
    if least and _numbers(version) < _numbers(least):
        return Finding(
            section="versions",
            name=name,
            level="problem",
            text=f"{version}, at least {least} is needed",
            advice=f"pip install -U '{name}>={least}'",
        )
    return Finding(section="versions", name=name, level="ok", text=version)


def _install(extra: str) -> str:
    return f"pip install 'ijepa-fast[{extra}]'" if extra else "pip install ijepa-fast"


def dali_packages() -> dict[str, str]:
    """Installed distributions that are called DALI, and their versions."""
    found = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if DALI.fullmatch(name):
            found[name] = distribution.version
    return found


def versions() -> list[Finding]:
    """Ours, Python's, the system's, and those of every package that is or may be used."""

    def line(name: str, text: str) -> Finding:
        return Finding(section="versions", name=name, level="ok", text=text)

    python = f"{platform.python_version()} ({platform.python_implementation()})"
    # not platform.platform() nor uname: no name of the machine
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    found = [line("ijepa-fast", ijepa_fast.__version__), line("Python", python)]
    found.append(line("system", system))
    needed = {**NEEDED, **({"triton": ""} if sys.platform == "linux" else {})}
    for name, extra in needed.items():
        found.append(
            _found(name)
            or Finding(
                section="versions",
                name=name,
                level="problem",
                text=f"not installed; {f'the extra [{extra}]' if extra else 'every install'} "
                "brings it",
                advice=_install(extra),
            )
        )
    for name, (extra, without) in OPTIONAL.items():
        absent = f"not installed; the extra [{extra}] brings it ({without})"
        found.append(
            _found(name) or Finding(section="versions", name=name, level="note", text=absent)
        )
    dali = dali_packages()
    found += [line("DALI", f"{version} ({name})") for name, version in dali.items()]
    if not dali:
        absent = "not installed; the extra [train] brings it (Pillow decodes)"
        found.append(Finding(section="versions", name="DALI", level="note", text=absent))
    return found


def wrong_packages(cuda: str | None) -> list[Finding]:
    """Packages that are not what their name promises, or not for this machine.

    Args:
        cuda: torch's CUDA version, None where it has none.
    """
    return [_apex(), *_dali(cuda), _torchvision()]


def _finding(name: str, text: str, advice: str = "") -> Finding:
    level = "problem" if advice else "ok"
    return Finding(section="packages", name=name, level=level, text=text, advice=advice)  # type: ignore[arg-type]


def _apex() -> Finding:
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # a half-made module
        spec = None
    if spec is None:
        return _finding("apex", "not installed, not needed")
    # NVIDIA's has fused optimisers; the package of that name on PyPI is a web toolkit
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    nvidia = any((folder / "optimizers").is_dir() for folder in folders)
    if nvidia or importlib.util.find_spec("amp_C"):
        return _finding("apex", "NVIDIA's, used by benchmarks only")
    return _finding(
        "apex",
        "not NVIDIA's but the unrelated package of that name on PyPI",
        "pip uninstall apex (nothing here needs either)",
    )


def _dali(cuda: str | None) -> list[Finding]:
    found = dali_packages()
    major = cuda.partition(".")[0] if cuda else None
    # the wheels are named after a CUDA version without its dot: cuda130
    majors = {name: match[2][:-1] for name in found if (match := DALI.fullmatch(name)) and match[2]}
    right = f"nvidia-dali-cuda{major or '13'}0"
    if "nvidia-dali" in found:
        return [
            _finding(
                "DALI",
                "the package nvidia-dali, without a CUDA version in its name, is a placeholder",
                f"pip uninstall nvidia-dali; pip install {right}",
            )
        ]
    if len(found) > 1:
        names = " and ".join(sorted(found))
        return [
            _finding(
                "DALI",
                f"{names} write to the same folder",
                f"pip uninstall {' '.join(sorted(found))}; pip install {right}",
            )
        ]
    for name, theirs in majors.items():
        if major and theirs != major:
            return [
                _finding(
                    "DALI",
                    f"{name} is for CUDA {theirs}, torch for CUDA {major}",
                    f"pip uninstall {name}; pip install {right}",
                )
            ]
        fits = f"as torch's {cuda}" if major else "torch has no CUDA: it decodes on the CPU"
        return [_finding("DALI", f"{name}: for CUDA {theirs}, {fits}")]
    return []


def _torchvision() -> Finding:
    version = _version("torchvision")
    return _finding("torchvision", f"{version or 'not installed'}, not needed")
