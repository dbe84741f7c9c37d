"""Ranks: process group, reductions, broadcast of plain arrays. One process without torchrun is
rank 0 of 1.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast._torch import cpu_has, foreach_copy_
from ijepa_fast.errors import MainRankError, UsageError
from ijepa_fast.ranks.heartbeat import Heartbeat
from ijepa_fast.ranks.rendezvous import agree_on_life

__all__ = [
    "Agreement",
    "MainRankError",
    "Ranks",
    "all_reduce_max_",
    "all_reduce_sum_",
    "anyone",
    "barrier",
    "broadcast_arrays",
    "heartbeat",
    "leave",
    "on_main",
    "slow_bfloat16",
    "start",
    "stop",
]

T = TypeVar("T")

# for waiting until rank 0 has read the headers of a large data set, say: a patient group on the CPU
_waiting: dict[str, dist.ProcessGroup] = {}

CPU_BFLOAT16 = ("avx512_bf16", "amx_tile")

# one flat buffer of so many elements is reduced at a time, which bounds the extra memory
BUCKET_ELEMENTS = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process: rank r of n, its place on its machine, the device it trains on, and the name of
    this life of the job (another one after a restart).
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    life: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


def start(device: str) -> Ranks:
    """Joins torchrun's process group where there is one.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` is CUDA where there is one.

    Returns:
        Rank, number of ranks, device (cuda:LOCAL_RANK, or cpu).

    Raises:
        UsageError: CUDA is asked for and missing, or there is a process group already.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device must be cpu or auto where torch sees no CUDA device, got 'cuda'")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    current = torch.cuda.current_device() if use_cuda else 0
    local = int(os.environ.get("LOCAL_RANK", current))
    chosen = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(chosen)
    else:
        # read by oneDNN at its first product: it compiles a kernel for each shape and keeps 1024 of
        # them, and row counts change from step to step
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if "WORLD_SIZE" not in os.environ:
        return Ranks(rank=0, world=1, local_rank=0, local_world=1, device=chosen)
    if dist.is_initialized():
        raise UsageError("the process group must be left to the run, got one that is there already")
    backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(minutes=10)
    store, life = _join(rank, world, timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=chosen if use_cuda else None,
    )
    _waiting["group"] = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        local_rank=local,
        local_world=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=chosen,
        life=life,
    )


def _join(rank: int, world: int, timeout: timedelta) -> tuple[Any, str]:
    """The store of this life of the job, and the life's name."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent has one already
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *address, is_master=hosts, timeout=timeout, wait_for_workers=False
    )
    life = agree_on_life(store, rank, world, timeout=timeout)
    return dist.PrefixStore(f"ijepa-fast/{life}", store), life  # type: ignore[attr-defined]


def heartbeat(ranks: Ranks, limit: float, known: tuple[type[BaseException], ...]) -> Heartbeat:
    """The watch that ranks keep over each other, see `Heartbeat`.

    Args:
        ranks: this rank.
        limit: seconds without a sign of life of another rank.
        known: errors that all ranks meet together, besides `MainRankError`.
    """
    return Heartbeat(
        rank=ranks.rank,
        world=ranks.world,
        address=(os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))),
        life=ranks.life,
        limit=limit,
        known=(*known, MainRankError),
    )


def slow_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are emulated here."""
    known = [cpu_has(name) for name in CPU_BFLOAT16]
    return device.type == "cpu" and None not in known and not any(known)


def stop(*, failed: bool = False) -> None:
    """Leaves the process group, if any.

    Args:
        failed: the other ranks may not be there to take part; the group ends with the process.
    """
    _waiting.clear()
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter's finalisation: threads of a process group that
    want the interpreter's lock meanwhile abort it, once in some hundred runs, and a thread that
    hangs in a read would be waited for.
    """
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _active() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Sums tensors of one dtype over all ranks, in place, a flat bucket at a time."""
    if not _active():
        return
    bucket: list[Tensor] = []
    size = 0
    for tensor in [*tensors, None]:
        full = tensor is None or size + tensor.numel() > BUCKET_ELEMENTS
        if bucket and full:
            flat = torch.cat([t.reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            pieces = flat.split([t.numel() for t in bucket])
            foreach_copy_(bucket, [p.view_as(t) for p, t in zip(pieces, bucket, strict=True)])
            bucket, size = [], 0
        if tensor is not None:
            bucket.append(tensor)
            size += tensor.numel()


def all_reduce_max_(tensor: Tensor) -> None:
    """Maximum over all ranks, in place."""
    if _active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def anyone(wish: bool) -> bool:
    """Whether any rank says yes; all ranks must ask."""
    if not _active():
        return wish
    said = torch.tensor([int(wish)])
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=_waiting.get("group"))
    return bool(said[0])


def barrier() -> None:
    """Waits for all ranks."""
    if _active():
        dist.barrier(group=_waiting.get("group"))


def on_main(ranks: Ranks, body: Callable[[], T]) -> T | None:
    """Runs something on rank 0 alone; if it raises there, all ranks leave.

    Returns:
        What `body` returns on rank 0, None on the others.

    Raises:
        MainRankError: on the other ranks, after an error on rank 0 (where that error is raised).
    """
    result, error = None, None
    if ranks.is_main:
        try:
            result = body()
        except Exception as caught:  # noqa: BLE001  # raised again below, once the others know
            error = caught
    if _active():
        failed = torch.tensor([int(error is not None)])
        dist.broadcast(failed, 0, group=_waiting.get("group"))
        if failed[0] and not ranks.is_main:
            raise MainRankError
    if error is not None:
        raise error
    return result


def broadcast_arrays(
    arrays: Mapping[str, NDArray[np.generic]] | None,
) -> dict[str, NDArray[np.generic]]:
    """Rank 0's arrays on every rank, as bytes behind a small JSON header: nothing is pickled.

    Args:
        arrays: named arrays on rank 0, None elsewhere.
    """
    if not _active():
        assert arrays is not None
        return dict(arrays)
    if dist.get_rank() == 0:
        assert arrays is not None
        header = json.dumps([(k, v.dtype.str, v.shape) for k, v in arrays.items()]).encode()
    size = torch.tensor([len(header) if dist.get_rank() == 0 else 0])
    dist.broadcast(size, 0, group=_waiting.get("group"))
    text = np.zeros(int(size[0]), dtype=np.uint8)
    if dist.get_rank() == 0:
        text[:] = np.frombuffer(header, dtype=np.uint8)
    dist.broadcast(torch.from_numpy(text), 0, group=_waiting.get("group"))
    result = {}
    for name, dtype, shape in json.loads(text.tobytes()):
        value = np.empty(shape, dtype=np.dtype(dtype))
        if arrays is not None:
            value[...] = arrays[name]
        if value.size:
            dist.broadcast(
                torch.from_numpy(value.reshape(-1).view(np.uint8)), 0, group=_waiting.get("group")
            )
        result[name] = value
    return result


class Agreement:
    """Lets all ranks act on one rank's wish at the same step, without waiting on the device.

    Each step every rank hands in its wishes; what it gets back is the maximum over ranks of the
    step before, whose reduction has had a whole step to finish.

    Attributes:
        delay: steps from a wish to its agreement: 1, or 0 with one rank.
    """

    def __init__(self) -> None:
        self.delay = int(_active())
        self._values: Tensor | None = None
        self._work: dist.Work | None = None

    def exchange(self, wishes: Sequence[int]) -> list[int]:
        """Hands in this rank's wishes and returns the agreed ones of the step before (0 at
        first).
        """
        if not _active():
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._work is not None and self._values is not None:
            self._work.wait()
            agreed = [int(v) for v in self._values]
        self._values = torch.tensor(list(wishes))
        self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, async_op=True)
        return agreed

    def finish(self) -> None:
        """Waits for the reduction under way."""
        if self._work is not None:
            self._work.wait()
            self._work = None
