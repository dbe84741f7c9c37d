"""Time that work beside the steps may take: a share of the run's."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Allowance"]


class Allowance:
    """Counts what saves, pictures and evaluations take, and says what more fits in.

    Saves keep to `checkpoint.minutes`; the others get what saves leave. Any thread may spend.

    Attributes:
        spent: seconds so far.
        last: kind of work -> seconds that it took the last time.

    Args:
        share: of the time since now.
        doing: is told the kind of work in the main thread, and "" when it is done.
    """

    def __init__(self, share: float = 0.01, doing: Callable[[str], object] = str) -> None:
        self.share, self.spent = share, 0.0
        self._doing = doing
        self.last: dict[str, float] = {}
        self._started = time.monotonic()
        self._lock = threading.Lock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def covers(self, kind: str) -> bool:
        """Whether such work may be done now, if it takes as long as the last time."""
        return self.spent + self.last.get(kind, 0.0) <= self.share * self.elapsed

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Counts the time of what is done inside."""
        started = time.perf_counter()
        main = threading.current_thread() is threading.main_thread()
        if main:
            self._doing(kind)
        try:
            yield
        finally:
            if main:
                self._doing("")
            seconds = time.perf_counter() - started
            with self._lock:
                self.spent += seconds
                self.last[kind] = seconds
