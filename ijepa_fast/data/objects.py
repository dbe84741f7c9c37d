"""Images from a Python object instead of a path: while it is given, `data.root` calls it
`object:NAME`.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ijepa_fast.errors import UsageError, require

__all__ = [
    "PREFIX",
    "Data",
    "Given",
    "ImageSource",
    "data_roots",
    "find_object",
    "item_name",
    "item_of",
    "label_of",
    "read_item",
]

PREFIX = "object:"
_T = TypeVar("_T")


class ImageSource(Protocol):
    """Encoded images from anywhere: Hugging Face `datasets`, parquet, LMDB, a database.

    Both methods are called from several threads at once, and item i must be the same bytes each
    time: every item is read once when a run starts, for its size and a hash of its end, and a run
    goes on only with the same items. Each rank reads from its own object.

    An OSError (with its subclasses for time-outs and lost connections) is taken for storage that
    fails, and tried again; any other exception, and bytes that are no image, for an item that
    cannot be used: it is left out and named.

    An object may also have:

    - `label_at(i)`, its class: a str or an int, or None where it has none;
    - `name`, what it is called in messages and `config.yaml`, by default `images`;
    - `fingerprint`, a text that is another one whenever any item is: the table of its items is then
      kept, and a later start with the same text reads none of them.

    Example:
        >>> class Files:
        ...     paths = sorted(Path("images").rglob("*.jpg"))
        ...     def __len__(self): return len(self.paths)
        ...     def bytes_at(self, i): return self.paths[i].read_bytes()
        >>> ijepa_fast.embed("runs/mine", Files()).features.shape
        (40, 32)
    """

    def __len__(self) -> int:
        """Number of items."""
        ...

    def bytes_at(self, i: int, /) -> bytes:
        """Item i, 0 <= i < len: the bytes of a JPEG, PNG, BMP, WebP, TIFF or PPM file."""
        ...


Data = str | os.PathLike[str] | ImageSource
"""One source of images: a path or a name as `data.root` takes it, or an object."""


@dataclass(frozen=True, eq=False)
class Given:
    """An object that is given just now, and its fingerprint, if it has one."""

    source: ImageSource
    fingerprint: str | None


_GIVEN: dict[str, Given] = {}
_LOCK = threading.Lock()


@contextlib.contextmanager
def data_roots(data: Data | Sequence[Data]) -> Iterator[list[str]]:
    """What `data.root` is to be for some data; objects have their names within the block only.

    Args:
        data: a path, a name of a data set, an `ImageSource`, or several of these.

    Raises:
        UsageError: something is none of them, or the name or fingerprint of an object is no text.
    """
    several = data if isinstance(data, list | tuple) else [data]
    added: list[str] = []
    try:
        roots = []
        for each in several:
            if isinstance(each, str | os.PathLike):
                roots.append(os.fspath(each))
            else:
                roots.append(_give(each, added))
        yield roots
    finally:
        for root in added:
            del _GIVEN[root]


def _give(source: Any, added: list[str]) -> str:
    """The name of an object, which is added where it has none yet."""
    rule = "paths, or objects with __len__ and bytes_at(i)"
    whole = callable(getattr(source, "bytes_at", None)) and hasattr(source, "__len__")
    require(whole, "data", rule, type(source).__name__)
    name, fingerprint = getattr(source, "name", "images"), getattr(source, "fingerprint", None)
    rule = "1 to 64 letters, digits, dots, hyphens or underscores"
    require(bool(re.fullmatch(r"[\w.-]{1,64}", str(name))), "name of data", rule, name)
    require(isinstance(fingerprint, str | None), "fingerprint of data", "a text", fingerprint)
    with _LOCK:
        for root, given in _GIVEN.items():
            if given.source is source:
                return root
        root, number = f"{PREFIX}{name}", 1
        while root in _GIVEN:
            number += 1
            root = f"{PREFIX}{name}-{number}"
        _GIVEN[root] = Given(source, fingerprint)
        added.append(root)
    return root


def find_object(root: str) -> Given | None:
    """What a name in `data.root` stands for; None where it is no name of an object.

    Raises:
        UsageError: the object is not given just now.
    """
    if not root.startswith(PREFIX):
        return None
    if root not in _GIVEN:
        raise UsageError(
            f"data.root must be there to be read, got {root}: an object of the Python program that "
            "began the run; go on from there, with the same data"
        )
    return _GIVEN[root]


def item_name(root: str, item: int) -> str:
    """`object:NAME`, 17 -> `NAME[17]`."""
    return f"{root.removeprefix(PREFIX)}[{item}]"


def item_of(name: str) -> int:
    """The inverse of `item_name`."""
    return int(name[name.rindex("[") + 1 : -1])


def read_item(source: ImageSource, item: int) -> bytes:
    """The bytes of an item.

    Raises:
        OSError: with an error number where the storage fails; without one it is the item's fault.
    """
    data = _asked(source, "bytes_at", item)
    if not isinstance(data, bytes):
        raise OSError(f"bytes_at must return bytes, got {type(data).__name__}")
    return data


def label_of(source: ImageSource, item: int) -> str | None:
    """The class of an item.

    Raises:
        OSError: as of `read_item`.
    """
    label = _asked(source, "label_at", item) if hasattr(source, "label_at") else None
    return None if label is None else str(label)


def _asked(source: ImageSource, method: str, item: int) -> object:
    try:
        return getattr(source, method)(item)
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        raise
    except MemoryError:
        raise
    # other people's code raises anything
    except Exception as error:
        raise OSError(f"{method} raises {type(error).__name__}: {error}") from error
