"""Plain arrays in one safetensors file that is mapped into memory, not read.

All processes of a machine that open a table share its pages.
"""

import json
import mmap
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.atomic import atomic_write

__all__ = ["TableError", "read_table", "write_table"]

# names of the safetensors format
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
}
_LONGEST_HEADER = 1 << 20


class TableError(ValueError):
    """A file is no table, or a damaged one."""


def write_table(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], meta: Mapping[str, str]
) -> None:
    """Writes a table: a file of this name is whole.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(path) as own:
            whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            save_file(whole, own, dict(meta))
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def read_table(path: Path) -> tuple[dict[str, NDArray[np.generic]], dict[str, str]]:
    """Maps a table; its arrays can be read only.

    Returns:
        The arrays and the texts that were written with them.

    Raises:
        TableError: it is damaged.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise TableError(f"{path} must have at least 8 bytes, got {size}")
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise TableError(f"{path} must begin with the length of its header, got {length}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise TableError(f"{path} must have a JSON header: {error}") from None
        block = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        meta = header.pop("__metadata__", {})
        arrays = {name: _array(block, 8 + length, entry) for name, entry in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path} must have a header of safetensors: {error!r}") from None
    if not isinstance(meta, dict) or not all(isinstance(text, str) for text in meta.values()):
        raise TableError(f"{path} must hold texts as metadata")
    return arrays, meta


def _array(block: mmap.mmap, start: int, entry: Any) -> NDArray[np.generic]:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    shape = tuple(int(side) for side in entry["shape"])
    begin, end = (int(place) for place in entry["data_offsets"])
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(block) - start:
        raise ValueError(f"an array must lie in the file, got {entry}")
    count = prod(shape)
    if count * dtype.itemsize != end - begin:
        raise ValueError(f"an array must be as long as its shape says, got {entry}")
    if not count:
        return np.empty(shape, dtype)
    return np.frombuffer(block, dtype, count, start + begin).reshape(shape)
