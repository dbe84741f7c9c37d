"""Tar shards of resized JPEG files: what full-size photographs cost to decode is paid once.

Images keep their order and their classes. What is written is what a run would see of the whole
image: the same conversion to RGB, EXIF orientation and profiles ignored (see `pixels`).
`OUT.partial` becomes OUT when the last shard is whole; after a kill the same call goes on behind
the last whole shard, and writes the same bytes.
"""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import shutil
import tarfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ijepa_fast.data.build import lost_parts
from ijepa_fast.data.index import Index
from ijepa_fast.data.pillow_decoder import default_threads
from ijepa_fast.data.pixels import check_pixels, check_scans, describe, open_image, to_rgb
from ijepa_fast.data.progress import progress
from ijepa_fast.data.quarantine import Quarantine
from ijepa_fast.data.reading import Reader, thread_pool
from ijepa_fast.errors import TooManyBadFiles, UsageError, require

__all__ = ["Packed", "pack", "packed_image"]

logger = logging.getLogger(__name__)

MANIFEST = "pack.json"
_VERSION = 1
# what tells one packing from another
_SETTINGS = ("version", "digest", "side", "quality", "shard_bytes")
# images that tell how much room all will need
_SAMPLE = 32
# headers and padding of an image and its class in a tar
_TAR_BYTES = 2048
_LONGEST_CLASS = 255


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a packing has come to.

    Attributes:
        images: packed; `copied` of them as they were.
        shards: tar files.
        bytes: of the shards; `source_bytes` of the images that they were made of.
        left_out: (name, reason) of the images that cannot be decoded.
        done: images that this call has looked at, in `seconds`.
    """

    images: int
    copied: int
    shards: int
    bytes: int
    source_bytes: int
    left_out: tuple[tuple[str, str], ...]
    done: int
    seconds: float


def packed_image(encoded: bytes, *, side: int, quality: int) -> bytes:
    """One image, decoded wholly, as a JPEG whose shorter side has at most `side` pixels.

    A JPEG that is no larger is returned as it is. Grey stays grey. Photographs are decoded at the
    smallest scale of the DCT that keeps twice the size, and resized by Lanczos.

    Raises:
        Exception: anything that Pillow raises on a file that it cannot read.
    """
    from PIL import Image

    with open_image(encoded) as image:
        width, height = image.size
        check_pixels(width, height)
        # MPO: several JPEGs, of which the first is taken
        is_jpeg, shorter = image.format in ("JPEG", "MPO"), min(width, height)
        if is_jpeg:
            check_scans(encoded, width, height)
        if shorter <= side:
            image.load()
            if is_jpeg:
                return encoded
            small = image if image.mode == "L" else to_rgb(image)
        else:
            size = (round(width * side / shorter), round(height * side / shorter))
            drafted = image.draft(None, (2 * size[0], 2 * size[1]))
            pixels = image if image.mode == "L" else to_rgb(image)
            # of a scaled picture the last row and column may stand for a part of a pixel
            box = drafted[1] if drafted else None
            small = pixels.resize(size, Image.Resampling.LANCZOS, box=box)
        buffer = io.BytesIO()
        # a comment would be taken over
        small.save(buffer, "JPEG", quality=quality, comment=b"")
    return buffer.getvalue()


def pack(
    index: Index,
    out: str | os.PathLike[str],
    *,
    side: int = 256,
    quality: int = 95,
    shard_bytes: int = 10**9,
    threads: int | None = None,
    max_bad_share: float = 0.001,
) -> Packed:
    """Writes a data set as tar shards of resized JPEG files; goes on where an earlier call ended.

    Args:
        index: the images.
        out: a new folder; `data.root` takes it.
        side: the longest that a shorter side may be, pixels; smaller images are not enlarged.
        quality: of the JPEG files, 1 to 100.
        shard_bytes: a shard ends with the image that brings it to this size.
        threads: that read, decode and encode; by default one a core, at most 16.
        max_bad_share: share of the files that may be unusable; one always may.

    Raises:
        UsageError: OUT holds something else, or was begun from other images or settings; a class
            cannot be written; there is too little room.
        TooManyBadFiles: more images than allowed cannot be used, or a shard or folder is not whole.
        OSError: a file cannot be read or written; whole shards are kept.
    """
    final = Path(os.path.abspath(out))
    require(16 <= side <= 65_535, "side", "16 to 65535 pixels", side)
    require(1 <= quality <= 100, "quality", "1 to 100", quality)
    require(shard_bytes >= 1, "shard size", "positive", shard_bytes)
    _check_source(index, final)
    values = (_VERSION, index.digest(), side, quality, shard_bytes)
    manifest: dict[str, Any] = dict(zip(_SETTINGS, values, strict=True))
    manifest |= {"sources": list(index.roots), "shards": [], "left_out": []}
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        manifest = _begun(final, manifest)
        logger.info("%s is packed already", final)
        return _result(manifest, 0, 0.0)
    partial = final.with_name(f"{final.name}.partial")
    with _owned(partial):
        # hidden ones were not whole when an earlier call was killed
        if any(path.name[0] != "." for path in partial.iterdir()):
            manifest = _begun(partial, manifest)
        else:
            _write_manifest(partial, manifest)
        work = _Work(index, partial, manifest, side, quality, max_bad_share)
        started, first = time.monotonic(), work.next_row
        try:
            work.run(threads or 2 * default_threads())
        except (KeyboardInterrupt, OSError):
            kept = len(manifest["shards"])
            logger.warning(
                "%d whole shards are kept in %s; the same command goes on behind them",
                kept,
                partial,
            )
            raise
        partial.replace(final)
        _fsync(final.parent)
    return _result(manifest, len(index) - first, time.monotonic() - started)


def _check_source(index: Index, final: Path) -> None:
    lost = lost_parts(index)
    if lost:
        name, reason = next(entry for entry in index.bad if entry[0] in lost)
        raise TooManyBadFiles(f"shards and folders must be whole, got {name!r}: {reason}")
    for source in index.sources:
        apart = not Path(source).is_dir() or not final.is_relative_to(source)
        require(apart, "OUT", f"outside of the images in {source}", str(final))
    rule = f"printable, without spaces around it, at most {_LONGEST_CLASS} characters"
    for name in index.classes:
        fits = name.isprintable() and name == name.strip() and len(name) <= _LONGEST_CLASS
        require(fits, "the name of a class", rule, name)


def _begun(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier call.

    Raises:
        UsageError: it is missing, of other images or settings, or its shards are.
    """
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        differ = [key for key in _SETTINGS if found[key] != wanted[key]]
        sizes = {shard["name"]: shard["bytes"] for shard in found["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"OUT must be a new folder, got {folder}, which holds something else"
        ) from None
    if differ:
        key = differ[0]
        what = "images" if key == "digest" else f"{key} ({found[key]} -> {wanted[key]})"
        raise UsageError(f"OUT must be a new folder for other {what}, got {folder}; delete it")
    for name, size in sizes.items():
        path = folder / name
        has = path.stat().st_size if path.is_file() else 0
        require(has == size, f"{path}", f"a shard of {size} bytes (delete {folder})", has)
    return dict(found)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"OUT must be a folder that can be written, got {error}") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"OUT must not be in use: another process packs into {folder}") from None
    finally:
        os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(path: Path, file: IO[bytes], temporary: Path) -> None:
    """Gives a file that was written under another name its own, on the disk."""
    file.flush()
    os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f".{MANIFEST}"
    with temporary.open("wb") as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
        _put(folder / MANIFEST, file, temporary)


def _result(manifest: dict[str, Any], done: int, seconds: float) -> Packed:
    shards = manifest["shards"]
    totals = {
        key: sum(shard[key] for shard in shards)
        for key in ("images", "copied", "bytes", "source_bytes")
    }
    left_out = tuple((name, reason) for name, reason in manifest["left_out"])
    return Packed(shards=len(shards), left_out=left_out, done=done, seconds=seconds, **totals)


class _Made(NamedTuple):
    """A packed image, the length of its file, and whether it is that very file."""

    encoded: bytes
    length: int
    copied: bool


class _Work:
    """Rows that are not packed yet, shard after shard."""

    def __init__(
        self,
        index: Index,
        folder: Path,
        manifest: dict[str, Any],
        side: int,
        quality: int,
        max_bad_share: float,
    ) -> None:
        self._index, self._folder, self._manifest = index, folder, manifest
        self._side, self._quality = side, quality
        self._stop = threading.Event()
        self._reader = Reader(index, self._stop)
        self._bad = Quarantine(None, max_bad_share, len(index) + len(index.bad))
        self._bad.add_known([*index.bad, *map(tuple, manifest["left_out"])])
        self.next_row = manifest["shards"][-1]["end"] if manifest["shards"] else 0

    def run(self, threads: int) -> None:
        """Writes all shards that are missing."""
        with warnings.catch_warnings(), thread_pool(threads, "ijepa-pack", self._stop) as pool:
            # Pillow's, of metadata that is not used here
            warnings.simplefilter("ignore")
            total, done = len(self._index), self.next_row
            if done < total:
                self._require_room(pool)
            made = self._in_order(pool, range(done, total), 4 * threads)
            with contextlib.closing(progress(made, "packed", total, bar=True, done=done)) as shown:
                while self.next_row < total:
                    self._write_shard(shown)

    def _made(self, row: int) -> _Made | str:
        """A packed image, or what is wrong with it."""
        encoded = self._reader.read(row)
        if isinstance(encoded, str):
            return encoded
        try:
            made = packed_image(encoded, side=self._side, quality=self._quality)
        except MemoryError:
            raise
        # Pillow raises nearly anything on a hostile file; all of it is the file's fault.
        except Exception as error:  # noqa: BLE001
            return describe(error)
        return _Made(made, len(encoded), made is encoded)

    def _in_order(
        self, pool: ThreadPoolExecutor, rows: range, ahead: int
    ) -> Iterator[tuple[int, _Made | str]]:
        """Rows and what `_made` says of them, so many in work at a time."""
        waiting: deque[tuple[int, Future[_Made | str]]] = deque()
        for row in rows:
            waiting.append((row, pool.submit(self._made, row)))
            if len(waiting) >= ahead:
                first, task = waiting.popleft()
                yield first, task.result()
        for row, task in waiting:
            yield row, task.result()

    def _require_room(self, pool: ThreadPoolExecutor) -> None:
        rows = np.unique(np.linspace(self.next_row, len(self._index) - 1, _SAMPLE).astype(int))
        found = pool.map(self._made, rows.tolist())
        sizes = [len(made.encoded) for made in found if isinstance(made, _Made)]
        need = int(np.mean(sizes or [0]) + _TAR_BYTES) * (len(self._index) - self.next_row)
        free = shutil.disk_usage(self._folder).free
        rule = f"on a disk with room for about {need / 1e9:.2f} GB more"
        require(need <= free, "OUT", rule, f"{self._folder} with {free / 1e9:.2f} GB")

    def _write_shard(self, made: Iterator[tuple[int, _Made | str]]) -> None:
        index, manifest = self._index, self._manifest
        name = f"{len(manifest['shards']):06d}.tar"
        temporary = self._folder / f".{name}"
        counts = {"images": 0, "copied": 0, "source_bytes": 0}
        left_out: list[tuple[str, str]] = []
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for row, found in made:
                    self.next_row = row + 1
                    if isinstance(found, str):
                        left_out.append((index.name(row), found))
                        self._bad.add(*left_out[-1])
                        continue
                    _add(archive, index, row, found.encoded)
                    counts["images"] += 1
                    counts["copied"] += found.copied
                    counts["source_bytes"] += found.length
                    if file.tell() >= manifest["shard_bytes"]:
                        break
            # those behind the last image may be looked at twice
            known = {name for name, _ in manifest["left_out"]}
            manifest["left_out"] += [bad for bad in left_out if bad[0] not in known]
            if counts["images"]:
                _put(self._folder / name, file, temporary)
                size = {"bytes": (self._folder / name).stat().st_size}
                manifest["shards"].append({"name": name, "end": self.next_row, **size, **counts})
            else:
                # behind the last image were none that can be used
                temporary.unlink()
        _write_manifest(self._folder, manifest)


def _add(archive: tarfile.TarFile, index: Index, row: int, encoded: bytes) -> None:
    """An image, and its class beside it, under its number and what is left of its name."""
    stem = os.path.splitext(index.name(row).rpartition("/")[2])[0]
    key = f"{row:09d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:60]}"
    label = int(index.label[row])
    members = [(f"{key}.jpg", encoded)]
    if label >= 0:
        members.append((f"{key}.cls", index.classes[label].encode()))
    for name, data in members:
        # no owner, no time: the same bytes from every machine
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
