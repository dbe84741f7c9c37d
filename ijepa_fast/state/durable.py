"""Files that are on the disk when they are said to be."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["fsync", "require_room", "safetensors_pieces", "sha256_of", "write_file"]

# bytes of one write: a thread that writes lets the others run in between
_PIECE = 1 << 24


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, straight from the tensors' memory.

    The library's writer copies every tensor and holds the interpreter's lock all the while, which
    stalls the steps that are trained meanwhile.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.float32, key
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.contiguous().view(-1).numpy().data.cast("B")


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file to the disk; its size and SHA-256, as a manifest says them."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            for begin in range(0, len(piece), _PIECE):
                part = memoryview(piece)[begin : begin + _PIECE]
                digest.update(part)
                size += len(part)
                while len(part):
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "sha256": digest.hexdigest()}


def require_room(folder: Path, nbytes: int) -> None:
    """Tries whether a checkpoint can be written, before hours of work depend on it.

    Args:
        folder: where checkpoints go; made if missing.
        nbytes: size of one.

    Raises:
        OSError: it cannot: a folder that may only be read, a full disk, a quota.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".tmp-probe-{os.getpid()}"
    try:
        probe.mkdir()
        path = probe / "bytes"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # reserves the blocks without writing them, where the file system can
            os.posix_fallocate(descriptor, 0, max(nbytes, 1))
            os.pwrite(descriptor, b"\0" * 4096, max(nbytes - 4096, 0))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(probe)
