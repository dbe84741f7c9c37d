"""What the machine has: processor, memory, GPUs and their driver, room on disks, limits."""

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from ijepa_fast.data import cache_folder
from ijepa_fast.doctor.findings import Finding, Level, first_line
from ijepa_fast.ranks import slow_bfloat16

__all__ = ["existing_part", "limits", "processor_and_gpus", "room"]

GIB = 2**30
SHARED = Path("/dev", "shm")
# bytes free below which something is said, and below which a run will fail: tables and the set
# `shapes` in the cache; checkpoints in a run's folder
CACHE_ROOM = 2**30, 100 * 2**20
RUN_ROOM = 50 * GIB, GIB
# of one rank, besides its images: sockets, libraries, tar shards are opened for each read
OPEN_FILES = 1024, 256
# NCCL's buffers of the ranks of a machine; Docker gives 64 MiB
SHARED_MEMORY = 512 * 2**20


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _finding(name: str, text: str, level: Level = "ok", advice: str = "") -> Finding:
    return Finding(section="machine", name=name, level=level, text=text, advice=advice)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# --- processor and GPUs --------------------------------------------------------------------------


def processor_and_gpus() -> list[Finding]:
    """CPU, memory, driver, CUDA, and a line for every GPU."""
    return [*_processor(), *_memory(), *_gpus()]


def _processor() -> Iterator[Finding]:
    names = re.findall(r"model name\s*: (.+)", _text("/proc/cpuinfo"))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{usable} of {os.cpu_count()} cores usable"
    # cgroups, version 2 and 1
    quota = _text("/sys/fs/cgroup/cpu.max").split()
    if not quota:
        parts = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota = [_text(f"/sys/fs/cgroup/cpu/{part}").strip() for part in parts]
    if quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
        cores += f", a container's limit of {int(quota[0]) / int(quota[1]):.1f}"
    yield _finding("CPU", f"{names[0] if names else 'unknown model'}, {cores}")
    if slow_bfloat16(torch.device("cpu")):
        text = (
            "emulated by this CPU (no AVX-512 BF16 or AMX): train on it with --optim.precision "
            "float32"
        )
        yield _finding("bfloat16 on the CPU", text, "note")
    else:
        yield _finding("bfloat16 on the CPU", "native")


def _memory() -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    text = _gib(total) + (f", {_gib(int(free[1]) * 1024)} available" if free else "")
    files = ("memory.max", "memory/memory.limit_in_bytes")
    limits = [_text(f"/sys/fs/cgroup/{file}").strip() for file in files]
    held = [int(limit) for limit in limits if limit.isdigit() and int(limit) < total]
    if held:
        yield _finding("memory", f"{text}, a container's limit of {_gib(min(held))}", "note")
    else:
        yield _finding("memory", text)


def _driver() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    found = re.search(r"(\d+\.\d+(\.\d+)?)", _text("/proc/driver/nvidia/version"))
    if found:
        return found[1]
    # not in every container
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    try:
        result = subprocess.run(  # noqa: S603  # fixed words
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"\d+\.\d+(\.\d+)?", result.stdout)
    return found[0] if found and result.returncode == 0 else None


def _gpus() -> Iterator[Finding]:
    driver = _driver()
    yield _finding("NVIDIA driver", driver or "none")
    if torch.version.cuda is None:
        if driver:
            yield _finding(
                "CUDA",
                f"torch {torch.__version__} is a build without it",
                "problem",
                "install torch for CUDA, as pytorch.org says for this driver",
            )
        else:
            yield _finding("CUDA", "no GPU: everything runs on the CPU", "note")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = "; ".join(first_line(w.message) for w in said if isinstance(w.message, Warning))
        text = f"{torch.version.cuda} in torch, which sees no GPU{f' ({why})' if why else ''}"
        if driver:
            advice = "update the driver, or install torch for the CUDA version that it supports"
            yield _finding("CUDA", text, "problem", advice)
        else:
            yield _finding("CUDA", f"{text}: everything runs on the CPU", "note")
        return
    yield _finding("CUDA", torch.version.cuda)
    for number in range(torch.cuda.device_count()):
        yield _gpu(number)


def _gpu(number: int) -> Finding:
    properties = torch.cuda.get_device_properties(number)
    capability = f"{properties.major}.{properties.minor}"
    try:
        free = f", {_gib(torch.cuda.mem_get_info(number)[0])} free"
    except RuntimeError as error:
        return _finding(
            f"GPU {number}",
            f"{properties.name} cannot be used: {first_line(error)}",
            "problem",
            "free its memory (nvidia-smi shows who holds it), or hide it with CUDA_VISIBLE_DEVICES",
        )
    text = (
        f"{properties.name}, {_gib(properties.total_memory)}{free}, compute capability "
        f"{capability}, {properties.multi_processor_count} multiprocessors"
    )
    if properties.major < 8:
        return _finding(
            f"GPU {number}",
            f"{text}: no bfloat16 products",
            "problem",
            "train with --optim.precision float32, or on a GPU of compute capability 8.0 or more",
        )
    return _finding(f"GPU {number}", text)


# --- room and limits -----------------------------------------------------------------------------


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(part for part in (folder, *folder.parents) if part.is_dir())


def room(out: Path | None) -> list[Finding]:
    """Free space in the cache folder, the working folder, and the one for a run.

    Only the first is named, and only where it is the usual one: folders may be named after people
    and projects.
    """
    cache = cache_folder()
    usual = cache == Path.home() / ".cache"
    name = "cache folder (~/.cache)" if usual else "cache folder (XDG_CACHE_HOME)"
    found = [_space(name, cache, CACHE_ROOM, "tables of data sets are kept there")]
    runs = "a checkpoint of ViT-H/14 takes 10.4 GB, three are kept"
    if out is None:
        found.append(_space("working folder", Path.cwd(), RUN_ROOM, runs))
    else:
        found.append(_space("folder of --out", out, RUN_ROOM, runs))
    return found


def _space(name: str, folder: Path, wanted: tuple[int, int], use: str) -> Finding:
    part = existing_part(folder)
    try:
        free = shutil.disk_usage(part).free
    except OSError as error:
        return Finding(
            section="room",
            name=name,
            level="problem",
            text=f"cannot be looked at: {first_line(error)}",
            advice="name a folder that can be read and written",
        )
    may = os.access(part, os.W_OK | os.X_OK)
    level: Level = "ok" if free >= wanted[0] else "note" if free >= wanted[1] else "problem"
    advice = {"problem": "make room, or name another folder"}.get(level, "")
    text = f"{_gib(free)} free" + ("" if level == "ok" else f" ({use})")
    if not may:
        level, advice = "problem", "name a folder that can be written"
        text = f"{text}; it cannot be written"
    return Finding(section="room", name=name, level=level, text=text, advice=advice)


def limits() -> list[Finding]:
    """Shared memory and open files."""
    return [*_shared_memory(), _open_files()]


def _shared_memory() -> Iterator[Finding]:
    if not SHARED.is_dir():
        return
    size = shutil.disk_usage(SHARED).total
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    text = f"{size / 2**20:.0f} MiB" if size < GIB else _gib(size)
    level: Level = "ok"
    advice = ""
    if size < SHARED_MEMORY and gpus > 1:
        level, advice = "problem", "docker run --shm-size=1g, or --ipc=host"
        text += f", where NCCL keeps what {gpus} ranks exchange"
    elif size < SHARED_MEMORY:
        level = "note"
        text += ", enough for one GPU; several ranks of NCCL need more"
    yield Finding(section="room", name=str(SHARED), level=level, text=text, advice=advice)


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    text = "unlimited" if soft == unlimited else str(soft)
    level: Level = "ok"
    if soft != unlimited and soft < OPEN_FILES[0]:
        level = "problem" if soft < OPEN_FILES[1] else "note"
        text += f" (up to {'any number' if hard == unlimited else hard} may be asked for)"
    advice = "ulimit -n 4096" if level == "problem" else ""
    return Finding(section="room", name="open files", level=level, text=text, advice=advice)
