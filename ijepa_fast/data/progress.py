"""How far a long pass over images is."""

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

__all__ = ["progress"]

logger = logging.getLogger(__name__)

_SAID_EVERY = 10.0
_T = TypeVar("_T")


def progress(
    parts: Iterable[_T],
    what: str,
    total: int,
    *,
    bar: bool,
    images: Callable[[_T], int] = lambda _: 1,
    done: int = 0,
) -> Generator[_T, None, None]:
    """The same parts, and how far they are: in a bar on a terminal, if it is wanted, or in a line
    every ten seconds.

    Args:
        parts: what is passed through.
        what: its name, for the line.
        total: images in all.
        bar: whether a bar is wanted.
        images: of a part.
        done: images that were done before.
    """
    if bar and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as shown:
            task = shown.add_task(what, total=total, completed=done)
            for part in parts:
                yield part
                shown.advance(task, images(part))
        return
    said = time.monotonic()
    for part in parts:
        yield part
        done += images(part)
        if time.monotonic() - said >= _SAID_EVERY:
            said = time.monotonic()
            logger.info("%s: %d of %d images", what, done, total)
