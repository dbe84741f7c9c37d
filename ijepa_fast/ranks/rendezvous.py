"""A name for one life of a job, that all its ranks agree on.

torchrun keeps one store through all restarts of a job, and what the ranks of the life before have
left in it, addresses above all, sends those of the next one to processes that are gone. Everything
of a life therefore goes under a name of its own. How often torchrun has restarted is no such name:
its agents on several machines count differently.
"""

import json
import time
import uuid
from datetime import timedelta
from typing import Any

__all__ = ["agree_on_life"]

_POLL = 0.02


def agree_on_life(store: Any, rank: int, world: int, *, timeout: timedelta) -> str:
    """Waits for all ranks of this life and returns its name.

    Every rank leaves a token of its own. Rank 0 proposes a name for the tokens that it finds; who
    finds its own among them agrees; where one belongs to a process that is gone, its successor
    replaces it and rank 0 proposes anew.

    Args:
        store: of the process group, shared by all ranks; may hold what earlier lives have left.
        rank: this rank.
        world: number of ranks.
        timeout: how long to wait for the others.

    Raises:
        RuntimeError: they have not come.
    """
    token = uuid.uuid4().hex
    base = "ijepa-life"
    store.set(f"{base}/token/{rank}", token)
    deadline = time.monotonic() + timeout.total_seconds()
    life = ""
    proposed: list[str] = []
    while time.monotonic() < deadline:
        if rank == 0:
            names = [f"{base}/token/{r}" for r in range(world)]
            if store.check(names):
                tokens = [value.decode() for value in store.multi_get(names)]
                if tokens != proposed:
                    life, proposed = uuid.uuid4().hex, tokens
                    store.set(f"{base}/proposal", json.dumps([life, tokens]))
                if store.check([f"{base}/{life}/agreed/{r}" for r in range(1, world)]):
                    store.set(f"{base}/{life}/go", "1")
                    return life
        elif store.check([f"{base}/proposal"]):
            name, tokens = json.loads(store.get(f"{base}/proposal"))
            if len(tokens) == world and tokens[rank] == token:
                if name != life:
                    life = name
                    store.set(f"{base}/{life}/agreed/{rank}", "1")
                if store.check([f"{base}/{life}/go"]):
                    return life
        time.sleep(_POLL)
    raise RuntimeError(f"the {world} ranks have not met within {timeout.total_seconds():.0f} s")
