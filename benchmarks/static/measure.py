"""Compiles kernels ahead of time and counts what their machine code (SASS) does."""

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static.occupancy import SMS, occupancy
from benchmarks.static.record import Launch

__all__ = ["Counts", "Numbers", "count", "machine_code", "measure"]


@dataclass(frozen=True)
class Numbers:
    """One row of the table."""

    warps: int  # of a program
    tile: int  # elements of a program's pass
    registers: int  # of a thread
    spills: int  # bytes of local memory or, if more, instructions that access it
    shared: int  # bytes of a program
    occupancy: float  # percent of an SM's warps that can be resident
    wide_loads: float | None  # percent of bytes loaded by instructions of 128 bits or more
    wide_stores: float | None
    instructions: float  # a thread's in the listing, times threads, over the tile


@dataclass(frozen=True)
class Counts:
    """What is in a listing; bytes are those of one thread, each instruction counted once."""

    instructions: int
    local_accesses: int
    loaded: int
    loaded_wide: int
    stored: int
    stored_wide: int


def measure(launches: Iterable[Launch]) -> dict[Launch, Numbers]:
    """Compiles each of them, two at a time, and measures it."""
    distinct = list(dict.fromkeys(launches))
    with ThreadPoolExecutor(2) as pool:
        kernels = dict(zip(distinct, pool.map(_compile, distinct), strict=True))
    numbers = {}
    for sm in {launch.sm for launch in distinct}:
        of_sm = [launch for launch in distinct if launch.sm == sm]
        listings = _disassemble(sm, [machine_code(kernels[k].asm["cubin"]) for k in of_sm])
        for launch, listing in zip(of_sm, listings, strict=True):
            numbers[launch] = _numbers(launch, kernels[launch], count(listing))
    return numbers


def _compile(launch: Launch) -> Any:
    source = ASTSource(launch.fn, launch.signature, launch.constants, launch.attributes)
    target = GPUTarget("cuda", launch.sm, 32)
    try:
        return triton.compile(source, target=target, options=launch.options)
    except Exception as error:
        error.add_note(f"while compiling {launch.kernel} for sm_{launch.sm}: {launch.identity}")
        raise


def _numbers(launch: Launch, kernel: Any, counts: Counts) -> Numbers:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
    # several functions if one was not inlined
    registers = max(map(int, re.findall(r"\bREG:(\d+)", usage)))
    local = sum(map(int, re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage)))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    return Numbers(
        warps=warps,
        tile=launch.tile,
        registers=registers,
        spills=max(local, counts.local_accesses),
        shared=shared,
        occupancy=round(100 * occupancy(SMS[launch.sm], warps, registers, shared), 1),
        wide_loads=_percent(counts.loaded_wide, counts.loaded),
        wide_stores=_percent(counts.stored_wide, counts.stored),
        instructions=round(counts.instructions * warps * 32 / launch.tile, 2),
    )


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 1) if whole else None


# --- machine code --------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
# global memory, or any memory through a generic address; LDGSTS copies to shared memory
_LOADS = {"LDG", "LD", "LDGSTS"}
_STORES = {"STG", "ST"}
_LOCAL = {"LDL", "STL"}
_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def count(listing: str) -> Counts:
    """Counts the instructions of an nvdisasm listing, without the padding after the code."""
    instructions = local = loaded = loaded_wide = stored = stored_wide = 0
    for address, mnemonic, operands in _INSTRUCTION.findall(listing):
        name, *modifiers = mnemonic.split(".")
        target = re.fullmatch(r"\s*0x([0-9a-f]+)\s*", operands)
        to_itself = name == "BRA" and target and int(target[1], 16) == int(address, 16)
        if name == "NOP" or to_itself:
            continue
        instructions += 1
        width = next((_BYTES[m] for m in modifiers if m in _BYTES), 4)
        if name in _LOCAL:
            local += 1
        elif name in _LOADS:
            loaded += width
            loaded_wide += width * (width >= 16)
        elif name in _STORES:
            stored += width
            stored_wide += width * (width >= 16)
    return Counts(instructions, local, loaded, loaded_wide, stored, stored_wide)


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin: the .text sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(number)]
    start_of_names = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", start_of_names + name)
    )


def _disassemble(sm: int, codes: list[bytes]) -> list[str]:
    """A listing of each. One run for all: starting nvdisasm takes longer than compiling."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(b"".join(codes))
        lines = _tool("nvdisasm", "--binary", f"SM{sm}", file.name).splitlines()
    instructions = [line for line in lines if _INSTRUCTION.search(line)]
    lengths = [len(code) // 16 for code in codes]
    assert sum(lengths) == len(instructions), "instructions are not of 16 bytes"
    starts = accumulate(lengths, initial=0)
    return [
        "\n".join(instructions[start : start + length])
        for start, length in zip(starts, lengths, strict=False)
    ]


def _tool(name: str, *arguments: str) -> str:
    """Runs one of the tools that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    result = subprocess.run([path, *arguments], check=True, capture_output=True, text=True)
    return result.stdout
