"""Files and folders that have their name only when they are whole."""

import contextlib
import fcntl
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_write"]

_PREFIX = ".ijepa-fast-"
_LOCK = f"{_PREFIX}lock"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write a file or folder that becomes `path` at the end.

    It has the same name and lies in a hidden folder beside its place. After an error nothing is
    left of it; after a kill, until the next write into the same folder.

    Args:
        path: the file, which is replaced, or the folder, which must not exist, or be empty; in a
            folder that exists, as a run's folder that was deleted must not come back by itself.

    Raises:
        OSError: it cannot be written.
    """
    _remove_abandoned(path.parent)
    hidden = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}")
    # not yet locked, so under a name that nobody takes for abandoned
    young = hidden.with_suffix(".new")
    young.mkdir()
    try:
        with (young / _LOCK).open("wb") as lock:
            # where files cannot be locked, none is taken for abandoned
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            young.rename(hidden)
            yield hidden / path.name
            (hidden / path.name).replace(path)
    finally:
        for folder in (young, hidden):
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Removes what killed writers left here: nobody holds the locks of their folders."""
    for hidden in parent.glob(_PREFIX + "[0-9a-f]" * 32):
        with contextlib.suppress(OSError):
            # for writing: NFS locks nothing that is only read
            with (hidden / _LOCK).open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(hidden)
