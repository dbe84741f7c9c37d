"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP: finish the step, save, then stop."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType

__all__ = ["Signals"]


class Signals:
    """Remembers SIGTERM, SIGINT, SIGUSR1 or SIGHUP until the step is over; a second one ends the
    process at once, and so does the first while there is nothing to save (`patient` is False). What
    is ignored already, as SIGHUP by nohup, stays ignored. Outside of the main thread, where Python
    allows no handlers, none are heard.

    Ctrl-C reaches a worker from the terminal and again from torchrun, so whatever comes within a
    second of the first counts as the same.

    Args:
        ends_process: what comes while nothing can be saved, or again, ends the process; otherwise
            it is left to the handlers from before, which for Ctrl-C raise KeyboardInterrupt.
    """

    SAME_SECONDS = 1.0
    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    patient = False
    received = 0
    at = 0.0

    def __init__(self, *, ends_process: bool = True) -> None:
        self._ends_process = ends_process

    def __enter__(self) -> "Signals":
        left = (signal.SIG_IGN, None)  # None is a handler that is not Python's
        main = threading.current_thread() is threading.main_thread()
        heard = [s for s in self.HANDLED if main and signal.getsignal(s) not in left]
        self._old = {s: signal.signal(s, self._remember) for s in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if not self.patient and not self.received:
            self._leave(number)
        elif not self.received:
            self.received, self.at = number, time.monotonic()
            # the terminal may be gone already
            with contextlib.suppress(OSError):
                os.write(2, b"stopping: this step is finished and saved first\n")
        elif time.monotonic() - self.at > self.SAME_SECONDS:
            self._leave(number)

    def _leave(self, number: int) -> None:
        signal.signal(
            number, signal.SIG_DFL if self._ends_process else self._old[signal.Signals(number)]
        )
        signal.raise_signal(number)
