"""What happens before the first step is done: said while it takes long, and its seconds after."""

import logging
import threading
import time

__all__ = ["Preparation"]

_logger = logging.getLogger(__name__)

# how often work that lasts is named, seconds
_SAID_EVERY = 5.0


class Preparation:
    """The parts of a start, one after the other; a context manager.

    Attributes:
        seconds: part -> what it has taken.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = "", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="ijepa-start", daemon=True)

    def __enter__(self) -> "Preparation":
        """Watches the time from now on."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Says nothing more."""
        self._done.set()
        self._thread.join()

    @property
    def done(self) -> bool:
        """Whether the first step is done."""
        return self._done.is_set()

    def begin(self, part: str) -> None:
        """Ends the part before and begins another, named by a noun; does nothing in the middle of
        the same one, or once all is done.
        """
        if self.done or part == self._part:
            return
        now = time.monotonic()
        if self._part:
            self.seconds[self._part] = now - self._since
        self._part, self._since = part, now

    def finish(self) -> None:
        """The first step is done: says what took how long."""
        self.begin("")
        self._done.set()
        parts = ", ".join(f"{part} {taken:.1f} s" for part, taken in self.seconds.items())
        _logger.info("the first step is done after %.1f s: %s", sum(self.seconds.values()), parts)

    def _tell(self) -> None:
        while not self._done.wait(_SAID_EVERY):
            taken = time.monotonic() - self._since
            if self._part and taken >= _SAID_EVERY:
                _logger.info("%s: %.0f s so far", self._part, taken)
