"""Tables of addresses, through which one launch works on any number of tensors of any sizes.

A table is one int64 array on the device of the tensors. With L tensors in each of C lists:

    sizes (L) | addresses of list 0 (L) | ... | addresses of list C - 1 (L) | places

and one place for every block of a launch: the number of its tensor in the upper 32 bits, the number
of the block within the tensor in the lower. Empty tensors have no blocks. A table is worth keeping:
building one costs 1 to 3 ms for a ViT-H, checking that it still fits about 60 ns a tensor.

Kernels treat tensors as flat memory, so all lists must hold the same shapes in the same dense
memory format. Addresses need no alignment: a kernel takes its wide loads where the addresses of a
tensor allow them.
"""

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import triton.language as tl
from torch import Tensor

__all__ = [
    "HALVES",
    "TRITON_DTYPES",
    "EmaForm",
    "Memory",
    "Table",
    "addresses",
    "cached_table",
    "capturing",
    "check_betas",
    "check_disjoint",
    "check_ema_form",
    "check_list",
    "check_scalar",
    "on",
    "upload",
]

EmaForm = Literal["lerp", "sum"]

# dtypes of rounded copies
HALVES = (torch.bfloat16, torch.float16)

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where the tensors are; 0 for tensors without memory."""
    return list(map(Tensor.data_ptr, tensors))


def current_stream(device: torch.device) -> Any:
    """On a CUDA device; None elsewhere."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Memory:
    """Device memory of the current stream, to be read on any.

    Args:
        data: the memory.
        source: memory to be kept as long.
    """

    def __init__(self, data: Tensor, source: Tensor | None = None) -> None:
        self._data, self._source, self._stream = data, source, current_stream(data.device)

    @property
    def data(self) -> Tensor:
        """For a launch on the current stream, which it outlives even if it is dropped at once."""
        if self._stream is not None:
            stream = current_stream(self._data.device)
            if stream != self._stream:
                self._data.record_stream(stream)
        return self._data


def upload(values: Tensor | list[int], device: torch.device) -> Memory:
    """Copies integers to the device without waiting for it.

    Pinned memory is new each time: torch's allocator hands it out again when the copy is done, so
    no copy under way is overwritten. It is kept with the copy, because a CUDA graph that captures
    this repeats it.
    """
    if not isinstance(values, Tensor):
        # three times as fast as torch.tensor
        values = torch.frombuffer(array("q", values), dtype=torch.int64)
    if device.type == "cuda":
        values = values.pin_memory()
    return Memory(values.to(device, non_blocking=True), values)


class Table:
    """The addresses of some lists of tensors, for launches of blocks of `block` elements.

    Args:
        columns: lists of the same length; None stands for address 0. The first is without None.
        block: elements of a block.
        keep: hold the memory of all tensors, so that the addresses stay valid whatever happens
            to the tensors.
    """

    def __init__(
        self, columns: Sequence[Sequence[Tensor | None]], block: int, *, keep: bool = True
    ) -> None:
        tensors = [t for column in columns for t in column]
        device = columns[0][0].device  # type: ignore[union-attr]
        self.length = len(columns[0])
        self.pointers = [0 if t is None else t.data_ptr() for t in tensors]
        self.memory = [t.detach() for t in tensors if t is not None] if keep else []
        sizes = torch.tensor([t.numel() for t in columns[0]])  # type: ignore[union-attr]
        blocks = (sizes + block - 1) // block
        self.blocks = int(blocks.sum())
        number = torch.repeat_interleave(torch.arange(self.length), blocks)
        first = torch.repeat_interleave(blocks.cumsum(0) - blocks, blocks)
        places = number << 32 | torch.arange(self.blocks) - first
        host = torch.cat([sizes, torch.tensor(self.pointers), places])
        self._addresses = upload(host, device)

    @property
    def data(self) -> Tensor:
        """The table itself, for a launch on the current stream."""
        return self._addresses.data


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured: its replays read what launches now are given."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Makes a CUDA device the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        yield
    else:
        with torch.cuda.device(device):
            yield


_CACHED = 16
_cache: dict[tuple[object, ...], Table] = {}
# tables that CUDA graphs captured; nobody knows how long graphs live
_captured: dict[int, Table] = {}


def cached_table(
    written: Sequence[Sequence[Tensor]], read: Sequence[Sequence[Tensor]], block: int
) -> Table:
    """The table of these lists, from a small cache. Its keys are the addresses and sizes of the
    tensors as they are now, so an entry is never out of date; it holds no memory of the tensors.

    Raises:
        ValueError: a tensor of the written lists shares memory with another.
    """
    columns = [*written, *read]
    flat = [t for column in columns for t in column]
    # dtypes and sizes give the extent of the memory that was checked for overlaps
    kinds = tuple([t.dtype for t in flat])
    sizes = tuple(map(Tensor.numel, columns[0]))
    key = (flat[0].device, len(written), block, sizes, kinds, tuple(addresses(flat)))
    table = _cache.pop(key, None)
    if table is None:
        check_disjoint(written, read)
        table = Table(columns, block, keep=False)
        while len(_cache) >= _CACHED:
            del _cache[next(iter(_cache))]
    _cache[key] = table
    if capturing(flat[0].device):
        _captured[id(table)] = table
    return table


def _is_dense(tensor: Tensor) -> bool:
    """No gaps and no overlaps."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def check_list(
    name: str | Sequence[str],
    tensors: Sequence[Tensor],
    like: Sequence[Tensor],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raises ValueError unless the list pairs with `like` tensor by tensor, on one device, in one
    dense memory format, and has only these dtypes (or float64, on the CPU). The name is that of the
    list, or there is one for each tensor.
    """
    if len(tensors) != len(like):
        raise ValueError(f"{name} must have {len(like)} tensors, got {len(tensors)}")
    device = like[0].device if like else None
    for number, (tensor, other) in enumerate(zip(tensors, like, strict=True)):
        where = f"{name}[{number}]" if isinstance(name, str) else name[number]
        if tensor.layout != torch.strided:
            raise ValueError(f"{where} must be dense, got layout {tensor.layout}")
        if tensor.dtype not in dtypes and not (
            tensor.dtype == torch.float64 and not tensor.is_cuda
        ):
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"{where} must be {names} (or float64 on the CPU), got {tensor.dtype} on "
                f"{tensor.device}"
            )
        if tensor.device != device:
            raise ValueError(f"{where} must be on {device}, got {tensor.device}")
        if tensor.shape != other.shape:
            raise ValueError(
                f"{where} must have shape {tuple(other.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.is_contiguous() and (tensor is other or other.is_contiguous()):
            continue
        if tensor.stride() != other.stride() or not _is_dense(tensor):
            raise ValueError(
                f"{where} must be dense and have the strides {other.stride()} of its counterpart, "
                f"got {tensor.stride()} for shape {tuple(tensor.shape)}; call .contiguous()"
            )


def check_scalar(
    name: str, value: float | Tensor, device: torch.device, high: float = math.inf
) -> None:
    """Raises ValueError unless it is a number in 0 .. high or one floating value on the device."""
    if not isinstance(value, Tensor):
        if not 0 <= value <= high:
            raise ValueError(f"{name} must lie in 0 .. {high:g}, got {value}")
    elif value.dtype not in (torch.float32, torch.float64) or value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or one float32 or float64 value, got {value.dtype} of shape "
            f"{tuple(value.shape)}"
        )
    elif value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_betas(betas: Sequence[float]) -> None:
    """Raises ValueError unless both are numbers in 0 .. 1, 1 excluded."""
    if len(betas) != 2 or not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in 0 .. 1, 1 excluded, got {betas}")


def check_ema_form(ema_form: object) -> None:
    """Raises ValueError unless it is one of the forms of an average."""
    if ema_form not in get_args(EmaForm):
        raise ValueError(f"ema_form must be lerp or sum, got {ema_form!r}")


def check_disjoint(
    written: Sequence[Sequence[Tensor | None]], read: Sequence[Sequence[Tensor]] = ()
) -> None:
    """Raises ValueError if a tensor of the written lists shares memory with any other tensor."""
    ranges = []
    for lists, is_written in ((written, True), (read, False)):
        for tensors in lists:
            for tensor in tensors:
                start = 0 if tensor is None else tensor.data_ptr()
                if tensor is not None and tensor.numel() and start:
                    end = start + tensor.numel() * tensor.element_size()
                    ranges.append((start, end, is_written, tuple(tensor.shape)))
    ranges.sort()
    # the furthest end so far, of all tensors and of the written ones
    last = last_written = 0
    for start, end, is_written, shape in ranges:
        if start < (last if is_written else last_written):
            raise ValueError(
                "no tensor may be written twice, or written and read under another name; one of "
                f"shape {shape} shares its memory with another"
            )
        last = max(last, end)
        if is_written:
            last_written = max(last_written, end)
