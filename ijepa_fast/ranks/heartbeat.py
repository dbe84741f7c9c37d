"""Ranks that watch each other, so that none waits for ever for one that has stopped.

A rank that is killed is noticed by torchrun on its machine; one that is stopped, hangs or is cut
off by the network is not, and the others wait in a reduction. A thread of every rank counts up in
the process group's store; rank 0 watches all, the others watch rank 0 and read its verdict.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

__all__ = ["LOST", "Heartbeat"]

LOST = 6
"""Exit code of a rank that leaves because another one is gone."""

_DONE = "done"
_REPLY = timedelta(seconds=5)
# A thread that comes back so late, in seconds, was asleep itself.
_ASLEEP = 10.0


class Heartbeat:
    """A context manager around the life of a rank.

    Args:
        rank: this rank.
        world: number of ranks.
        address: host and port of the store, as torchrun sets them.
        life: tells a restarted job's counts from those of the one before.
        limit: seconds without a sign of another rank after which this one leaves.
        known: errors that all ranks meet together.
        leave: called with a message and then never returned from; by default the process ends with
            exit code `LOST`.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        address: tuple[str, int],
        life: str,
        limit: float,
        known: tuple[type[BaseException], ...] = (),
        leave: Callable[[str], None] | None = None,
    ) -> None:
        self._rank, self._world, self._limit = rank, world, limit
        self._address, self._life = address, life
        self._leave = leave or (lambda message: _leave(f"on rank {rank}: {message}"))
        self._stop = threading.Event()
        self._store: Any = None
        self._beats, self._last, self._known = 0, "", known
        # rank -> what it said last, and when that was new
        watched = range(1, world) if rank == 0 else range(1)
        self._heard: dict[int, tuple[bytes, float]] = {r: (b"", time.monotonic()) for r in watched}
        self._reached, self._why, self._beaten = time.monotonic(), "", time.monotonic()
        self._threads = [
            threading.Thread(target=target, name="ijepa-heartbeat", daemon=True)
            for target in (self._run, self._watch_store)
        ]

    def __enter__(self) -> "Heartbeat":
        if self._world > 1:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Says that this rank has come to its end and need not be watched, or that it has failed
        and the others need not wait for it.
        """
        if kind is not None and not issubclass(kind, self._known):
            self._last = f"rank {self._rank} has failed ({kind.__name__})"
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(_REPLY.total_seconds())

    def _key(self, name: object) -> str:
        return f"ijepa-heartbeat/{self._life}/{name}"

    def _run(self) -> None:
        interval = min(2.0, self._limit / 5)
        while not self._stop.is_set():
            try:
                self._beat(str(self._beats))
                self._beats += 1
                self._reached, self._why = time.monotonic(), ""
            # whatever the store raises: what counts is for how long
            except Exception as error:  # noqa: BLE001
                self._store, self._why = None, " ".join(str(error).split())[:200]
            self._stop.wait(interval)
        if self._store is not None:
            with contextlib.suppress(Exception):
                if self._last:
                    self._store.set(self._key("lost"), self._last)
                self._store.set(self._key(self._rank), _DONE)

    def _watch_store(self) -> None:
        """In a thread of its own: a question to a store that is cut off may never return."""
        looked = time.monotonic()
        while not self._stop.wait(1.0):
            now, before = time.monotonic(), looked
            looked = now
            if now - before > _ASLEEP:
                # this process itself was stopped, and goes on
                self._reached = now
            elif time.monotonic() - self._reached > self._limit:
                text = f"the store of the ranks has not answered for {self._limit:g} s"
                self._leave(f"{text}: {self._why}" if self._why else text)
                return

    def _beat(self, count: str) -> None:
        if self._store is None:
            host, port = self._address
            # a client of the server that the process group was made with
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, timeout=_REPLY, wait_for_workers=False
            )
        store = self._store
        store.set(self._key(self._rank), count)
        lost = self._key("lost")
        if store.check([lost]):
            self._leave(store.get(lost).decode())
        now = time.monotonic()
        if now - self._beaten > _ASLEEP:
            self._heard = {rank: (said, now) for rank, (said, _) in self._heard.items()}
        self._beaten = now
        for rank, (said, at) in list(self._heard.items()):
            key = self._key(rank)
            says = store.get(key) if store.check([key]) else b""
            if says != said:
                self._heard[rank] = (says, now)
            elif said != _DONE.encode() and now - at > self._limit:
                message = f"rank {rank} has given no sign of life for {self._limit:g} s"
                if self._rank == 0:
                    store.set(lost, message)
                self._leave(message)


def _leave(message: str) -> None:
    try:
        print(
            f"error {message}; leaving, so that the job can be started again from the last "
            "checkpoint (rank_timeout sets the time)",
            file=sys.stderr,
            flush=True,
        )
    finally:
        os._exit(LOST)
