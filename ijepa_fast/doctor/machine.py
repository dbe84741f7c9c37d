"""What the machine has: processor, memory, GPUs and their driver, room on disks."""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ijepa_fast.data import cache_folder
from ijepa_fast.doctor.findings import Finding, first_line
from ijepa_fast.ranks import slow_bfloat16

__all__ = ["gpus", "processor", "room", "shared_memory"]

GIB = 2**30
SHARED = Path("/dev", "shm")
# bytes free below which something is said, and below which a run will fail: tables and the set
# named sets in the cache; checkpoints in a run's folder
CACHE_ROOM = GIB, 100 * 2**20
RUN_ROOM = 50 * GIB, GIB
# NCCL's buffers of the ranks of a machine; Docker gives 64 MiB
SHARED_MEMORY = 512 * 2**20


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor() -> Iterator[Finding]:
    """CPU and memory, and how much of them a container may use."""
    names = re.findall(r"model name\s*: (.+)", _text("/proc/cpuinfo")) or ["unknown model"]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{names[0]}, {usable} of {os.cpu_count()} cores usable"
    quota = re.match(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max"))
    if quota:
        text += f", a container's limit of {int(quota[1]) / int(quota[2]):.1f}"
    yield Finding("CPU", text)
    if slow_bfloat16(torch.device("cpu")):
        text = "emulated by this CPU (no AVX-512 BF16 or AMX): train on it with --optim.precision"
        yield Finding("bfloat16 on the CPU", f"{text} float32", "note")
    else:
        yield Finding("bfloat16 on the CPU", "native")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    text = _gib(total) + (f", {_gib(int(free[1]) * 1024)} available" if free else "")
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) < total:
        yield Finding("memory", f"{text}, a container's limit of {_gib(int(limit))}", "note")
    else:
        yield Finding("memory", text)


def _driver() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    said = _text("/proc/driver/nvidia/version")
    # not in every container
    command = shutil.which("nvidia-smi")
    if command and not said:
        arguments = ["--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(  # noqa: S603  # fixed words
                [command, *arguments], check=True, capture_output=True, text=True, timeout=10
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found[0] if found else None


def gpus() -> Iterator[Finding]:
    """Driver, CUDA, and a line for every GPU."""
    driver, cuda = _driver(), torch.version.cuda
    yield Finding("NVIDIA driver", driver or "none")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    why = "".join(f" ({first_line(w.message)})" for w in said if isinstance(w.message, Warning))
    if there:
        yield Finding("CUDA", str(cuda))
        yield from map(_gpu, range(torch.cuda.device_count()))
    elif not driver:
        yield Finding("CUDA", f"no GPU{why}: everything runs on the CPU", "note")
    elif cuda is None:
        text = f"torch {torch.__version__} is a build without it"
        advice = "install torch for CUDA, as pytorch.org says for this driver"
        yield Finding("CUDA", text, "problem", advice)
    else:
        advice = "update the driver, or install torch for the CUDA version that it supports"
        yield Finding("CUDA", f"{cuda} in torch, which sees no GPU{why}", "problem", advice)


def _gpu(number: int) -> Finding:
    properties = torch.cuda.get_device_properties(number)
    name = f"GPU {number}"
    free = torch.cuda.mem_get_info(number)[0]
    text = (
        f"{properties.name}, {_gib(properties.total_memory)}, {_gib(free)} free, compute "
        f"capability {properties.major}.{properties.minor}"
    )
    if properties.major < 8:
        advice = "train with --optim.precision float32, or on compute capability 8.0 or more"
        return Finding(name, f"{text}: no bfloat16 products", "problem", advice)
    return Finding(name, text)


def room(out: Path | None) -> list[Finding]:
    """Free space in the cache folder and in the one for a run, by default the working folder.

    Only the first is named, and only where it is the usual one: folders may be named after people
    and projects.
    """
    cache = cache_folder()
    where = "~/.cache" if cache == Path.home() / ".cache" else "XDG_CACHE_HOME"
    runs = "a checkpoint of ViT-H/14 takes 10.4 GB, three are kept"
    return [
        _space(f"cache folder ({where})", cache, CACHE_ROOM, "tables of data sets are kept there"),
        _space("folder of --out" if out else "working folder", out or Path.cwd(), RUN_ROOM, runs),
    ]


def _space(name: str, folder: Path, wanted: tuple[int, int], use: str) -> Finding:
    folder = folder.absolute()
    part = next(part for part in (folder, *folder.parents) if part.is_dir())
    free = shutil.disk_usage(part).free
    text = f"{_gib(free)} free"
    if not os.access(part, os.W_OK | os.X_OK):
        text, advice = f"{text}; it cannot be written", "name a folder that can be written"
        return Finding(name, text, "problem", advice)
    if free >= wanted[0]:
        return Finding(name, text)
    if free >= wanted[1]:
        return Finding(name, f"{text} ({use})", "note")
    return Finding(name, f"{text} ({use})", "problem", "make room, or name another folder")


def shared_memory() -> Iterator[Finding]:
    """What the ranks of NCCL exchange goes through it."""
    if not SHARED.is_dir():
        return
    size = shutil.disk_usage(SHARED).total
    text = f"{size / 2**20:.0f} MiB" if size < GIB else _gib(size)
    if size >= SHARED_MEMORY:
        yield Finding(str(SHARED), text)
    elif torch.cuda.device_count() > 1:
        advice = "docker run --shm-size=1g, or --ipc=host"
        yield Finding(str(SHARED), f"{text}, too little for several ranks", "problem", advice)
    else:
        yield Finding(str(SHARED), f"{text}, too little for several ranks on GPUs", "note")
