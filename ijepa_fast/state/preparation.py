"""What a run does beside its steps: named while it takes long; and its seconds before the first."""

import logging
import threading
import time

__all__ = ["Preparation"]

_logger = logging.getLogger(__name__)

# seconds after which work that lasts is named for the first time; then after twice as many
_LONG = 5.0


class Preparation:
    """The parts of a start, one after the other, and whatever takes time later; a context manager.

    Attributes:
        done: whether the first step is done.
        seconds: part -> what it has taken, before the first step.
    """

    def __init__(self) -> None:
        self.done = False
        self.seconds: dict[str, float] = {}
        self._part, self._since = "", time.monotonic()
        self._told = _LONG
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="ijepa-start", daemon=True)

    def __enter__(self) -> "Preparation":
        """Watches the time from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Says nothing more."""
        self._over.set()
        self._thread.join()

    def begin(self, part: str) -> None:
        """Ends the part before and begins another, named by a noun, or none ("").

        Does nothing in the middle of the same one.
        """
        if part == self._part:
            return
        now = time.monotonic()
        if self._part and not self.done:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since, self._told = part, now, _LONG

    def finish(self, loss: float) -> None:
        """The first step is done, with this loss: says what took longest."""
        self.begin("")
        self.done = True
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{part} {taken:.1f} s" for part, taken in longest)
        whole = sum(self.seconds.values())
        _logger.info("first step done after %.1f s (%s), loss %.5f", whole, parts, loss)

    def _tell(self) -> None:
        while not self._over.wait(_LONG / 5):
            taken = time.monotonic() - self._since
            if self._part and taken >= self._told:
                _logger.info("%s: %.0f s so far", self._part, taken)
                self._told *= 2
