"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP: finish the step, save, then stop."""

import contextlib
import os
import signal
import time
from types import FrameType

__all__ = ["Signals"]


class Signals:
    """Remembers SIGTERM, SIGINT, SIGUSR1 or SIGHUP until the step is over; a second one ends the
    process at once, and so does the first while there is nothing to save (`patient` is False). What
    is ignored already, as SIGHUP by nohup, stays ignored.

    Ctrl-C reaches a worker from the terminal and again from torchrun, so whatever comes within a
    second of the first counts as the same.
    """

    SAME_SECONDS = 1.0
    HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    patient = False
    received = 0
    at = 0.0

    def __enter__(self) -> "Signals":
        heard = [s for s in self.HANDLED if signal.getsignal(s) is not signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._remember) for s in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if not self.patient and not self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.received:
            self.received, self.at = number, time.monotonic()
            # the terminal may be gone already
            with contextlib.suppress(OSError):
                os.write(2, b"stopping: this step is finished and saved first\n")
        elif time.monotonic() - self.at > self.SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
