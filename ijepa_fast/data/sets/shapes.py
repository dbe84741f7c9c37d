"""The embedded data set `shapes`, written once as JPEG files into a cache folder.

The scenes are those of `scenes.py`; the files go through the same path as any folder of images. The
bytes are the same on every machine with the same version of Pillow.
"""

import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.data.sets.scenes import CLASSES, SIZES, Split, render

__all__ = ["CLASSES", "SIZES", "cache_folder", "render", "write_shapes"]

_VERSION = 1
_QUALITY = 90
_MANIFEST = "manifest.json"
_OURS = re.compile(rf"(train|test)/({'|'.join(CLASSES)})/\d{{5}}\.jpg|{re.escape(_MANIFEST)}")
_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache."""
    # The XDG specification asks for relative values to be ignored.
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


def _files(train: int, test: int) -> Iterator[tuple[Split, int, str]]:
    """(split, number, path relative to the set's folder) of every image."""
    counts: dict[Split, int] = {"train": train, "test": test}
    for split, count in counts.items():
        for number in range(count):
            yield split, number, f"{split}/{CLASSES[number % len(CLASSES)]}/{number:05d}.jpg"


def _digest(parts: dict[str, str]) -> str:
    """One SHA-256 for a set, from those of its files."""
    lines = "".join(f"{path} {parts[path]}\n" for path in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def _write(folder: Path, train: int, test: int) -> None:
    """Renders the set into an empty folder; the manifest comes last."""
    # Imported here: naming the data set must not ask for Pillow.
    from PIL import Image
    from PIL import __version__ as pillow_version

    def save(job: tuple[str, NDArray[np.uint8]]) -> tuple[str, str]:
        path, pixels = job
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
        (folder / path).write_bytes(buffer.getbuffer())
        return path, hashlib.sha256(buffer.getbuffer()).hexdigest()

    for split in SIZES:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
    jobs, parts = _files(train, test), dict[str, str]()
    # One thread renders and one writes: rendering is many small array operations, which several
    # threads would slow down (they take the interpreter lock from each other).
    with ThreadPoolExecutor(1) as writer:
        pending: Iterator[tuple[str, str]] = iter(())
        while chunk := [(path, render(split, n)) for split, n, path in islice(jobs, 128)]:
            parts.update(pending)
            pending = writer.map(save, chunk)
        parts.update(pending)
    manifest = {
        "format": "ijepa-fast shapes",
        "version": _VERSION,
        "train": train,
        "test": test,
        "classes": CLASSES,
        "pillow": pillow_version,
        "sha256": _digest(parts),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _is_intact(folder: Path, train: int, test: int) -> bool:
    """Whether a folder holds exactly the set: every file, each byte, and no other file."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        expected = {path for _, _, path in _files(train, test)}
        found = {path for path in _contents(folder) if not Path(path).name.startswith(".")}
        if found != expected | {_MANIFEST}:
            return False
        parts = {p: hashlib.sha256((folder / p).read_bytes()).hexdigest() for p in expected}
    except (OSError, ValueError):
        return False
    ours = isinstance(manifest, dict) and manifest.get("version") == _VERSION
    return ours and manifest.get("sha256") == _digest(parts)


def _contents(folder: Path) -> Iterator[str]:
    """Relative paths of everything below a folder that is not a folder; links are not followed."""
    for where, folders, files in os.walk(folder):
        inside = Path(where).relative_to(folder)
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        yield from ((inside / name).as_posix() for name in files + links)


def _set_aside(final: Path, spare: Path) -> None:
    """Moves a damaged set away and deletes it, unless it holds something that we did not write."""
    # Not `not is_dir()`: another process may just have moved it away.
    if final.is_symlink() or final.is_file():
        raise NotADirectoryError(f"{final} is there and is not a folder")
    try:
        final.rename(spare)
    except FileNotFoundError:
        return
    foreign = [path for path in _contents(spare) if not _OURS.fullmatch(path)]
    if foreign:
        _LOG.warning("%s held a file of someone else's (%s): kept as %s", final, foreign[0], spare)
    else:
        shutil.rmtree(spare)


def _install(own: Path, final: Path, train: int, test: int) -> None:
    """Renames a finished set to its place, unless another process's intact one is there by now."""
    for attempt in range(5):
        if os.path.lexists(final):
            if _is_intact(final, train, test):
                return
            _LOG.warning("%s is damaged or incomplete: written again", final)
            _set_aside(final, own.with_name(f"{own.name}.replaced{attempt}"))
        try:
            own.rename(final)
            return
        except OSError as error:
            # Another process has just put its own there; look at that.
            failed = error
    raise failed


def write_shapes(
    cache: Path | None = None, *, train: int = SIZES["train"], test: int = SIZES["test"]
) -> Path:
    """Writes the data set once and returns its folder, `<cache>/ijepa-fast/shapes-v1`.

    Images are `{train,test}/<class>/<number>.jpg`. A set that is there is read through and used if
    every byte is as written; a damaged one is replaced. Several processes may call this at once:
    each writes to a folder of its own and renames it, and the later ones use the first one's.

    Args:
        cache: parent folder; by default $XDG_CACHE_HOME, or ~/.cache.
        train: training images; other counts than the default go to a folder named after them.
        test: test images.

    Returns:
        The folder; `<folder>/train` and `<folder>/test` are labelled folders of images.

    Raises:
        ValueError: a count outside 1..100000.
        OSError: the cache folder cannot be written.
    """
    for split, count in (("train", train), ("test", test)):
        if not 1 <= count <= 100_000:
            raise ValueError(f"{split} must be in 1..100000, got {count}")
    cache = cache or cache_folder()
    plain = {"train": train, "test": test} == SIZES
    final = cache / "ijepa-fast" / f"shapes-v{_VERSION}{'' if plain else f'-{train}-{test}'}"
    if _is_intact(final, train, test):
        return final
    own = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
    _LOG.info("writing the data set shapes (%d images) to %s", train + test, final)
    try:
        own.mkdir(parents=True)
        _write(own, train, test)
        _install(own, final, train, test)
    except OSError as error:
        raise OSError(
            f"cannot write the data set shapes to {final} ({error}); "
            "set XDG_CACHE_HOME to choose another cache folder"
        ) from error
    finally:
        shutil.rmtree(own, ignore_errors=True)
    return final
