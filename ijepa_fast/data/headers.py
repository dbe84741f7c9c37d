"""Looks into files: header and end marker of an image, members of a tar shard.

Nothing is extracted, unpickled or followed: a member is a byte range, whatever it is called.
"""

import io
import json
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ijepa_fast.data.index import FORMATS, MARKED, mark, open_regular, stamp
from ijepa_fast.data.objects import ImageSource, item_of, label_of, read_item
from ijepa_fast.data.pixels import (
    EXTENSIONS,
    check_mode,
    check_pixels,
    check_scans,
    describe,
    is_complete,
    is_plain,
    open_image,
)
from ijepa_fast.data.sources import OUT_OF_FILES, Bad, settled

__all__ = ["Image", "Inspected", "inspect_file", "inspect_item", "inspect_shard"]

logger = logging.getLogger(__name__)

# A file that ends in its format's end marker is whole; some writers pad or append a little.
_END_MARKER = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_LONGEST = 2**32 - 1
_LONGEST_LABEL = 1 << 20
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a link",
    tarfile.DIRTYPE: "a folder",
    **dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), "a device or FIFO"),
}
_LABEL_KEYS = ("label", "cls", "class")


class Image(NamedTuple):
    """What the header of a usable image says."""

    member: str
    label: str | None
    offset: int
    length: int
    width: int
    height: int
    format: int
    plain: bool
    verified: bool
    mark: int


class Inspected(NamedTuple):
    """One file, or one shard: its images, what in it is unusable, its stamp (0: not known)."""

    path: str
    images: list[Image]
    bad: list[Bad]
    stamp: int
    ignored: int = 0


# the bytes from a place on, so many
_Bytes = Callable[[int, int], bytes]


def _of_file(descriptor: int, offset: int = 0) -> _Bytes:
    return lambda size, at: os.pread(descriptor, size, offset + at)


class _Range(io.RawIOBase):
    """Bytes as a file; `read` asks for no more than there is."""

    def __init__(self, bytes_from: _Bytes, length: int) -> None:
        super().__init__()
        self._bytes_from, self._length, self._at = bytes_from, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("a position must be at least 0")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        data = self._bytes_from(left if size < 0 else min(size, left), self._at)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def inspect_file(root: str, path: str, label: str | None, *, verify: bool) -> Inspected:
    """Reads the header of one file; the pixels only if the end marker is missing, or to verify.

    Args:
        root: absolute folder.
        path: relative to it.
        label: class of the image, if it has one.
        verify: decode the whole image.
    """
    opened = _open(root, path)
    if isinstance(opened, Inspected):
        return opened
    descriptor, status = opened
    known = _stamp(status)
    try:
        found = _inspect(_of_file(descriptor), status.st_size, verify=verify)
    finally:
        os.close(descriptor)
    if isinstance(found, str):
        return Inspected(path, [], [Bad(path, found)], known)
    return Inspected(path, [found._replace(label=label)], [], known)


def inspect_item(source: ImageSource, path: str, *, verify: bool) -> Inspected:
    """Reads one item of an object.

    Args:
        source: the object.
        path: the item's name, see `item_name`.
        verify: decode the whole image.

    Returns:
        The stamp is 0 where another start may find the item readable.
    """
    item = item_of(path)
    try:
        encoded, label = read_item(source, item), label_of(source, item)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        return Inspected(path, [], [Bad(path, describe(error))], int(error.errno is None))
    found = _inspect(lambda size, at: encoded[at : at + size], len(encoded), verify=verify)
    if isinstance(found, str):
        return Inspected(path, [], [Bad(path, found)], 1)
    return Inspected(path, [found._replace(label=label)], [], 1)


def _open(root: str, path: str) -> tuple[int, os.stat_result] | Inspected:
    """A regular file, or what is wrong with it."""
    where = os.path.join(root, path)
    try:
        return open_regular(where)
    except OSError as error:
        if error.errno in OUT_OF_FILES:
            raise
        broken = isinstance(error, FileNotFoundError) and os.path.islink(where)
        reason = "a broken symbolic link" if broken else describe(error)
        return Inspected(path, [], [Bad(path, reason)], 0)


def _inspect(bytes_from: _Bytes, length: int, *, verify: bool) -> Image | str:
    """What is known of a usable image, or why it is not usable."""
    try:
        return _header(bytes_from, length, verify=verify)
    except MemoryError:
        raise
    # Pillow raises nearly anything on a hostile file; all of it means that the file is not usable.
    except Exception as error:  # noqa: BLE001
        return describe(error)


def _header(bytes_from: _Bytes, length: int, *, verify: bool) -> Image:
    if length == 0:
        raise ValueError("the file is empty")
    if length > _LONGEST:
        raise ValueError(f"an image must have at most {_LONGEST} bytes, got {length}")
    # Pillow reads a header in small pieces
    file = io.BufferedReader(_Range(bytes_from, length))
    with open_image(file) as image:
        width, height = image.size
        check_pixels(width, height)
        check_mode(image)
        name = "JPEG" if image.format == "MPO" else image.format
        plain = is_plain(image, bytes_from(min(32, length), 0))
        size = min(MARKED, length)
        tail = bytes_from(size, length - size)
        marker = _END_MARKER.get(image.format or "")
        verified = verify or (marker is not None and marker not in tail)
        if verified:
            if name == "JPEG":
                encoded = bytes_from(length, 0)
                check_scans(encoded, width, height)
                plain = plain and (not image.info.get("progressive") or is_complete(encoded))
            image.load()
    return Image(
        member="",
        label=None,
        offset=0,
        length=length,
        width=width,
        height=height,
        format=FORMATS.index(name or ""),
        plain=plain,
        verified=verified,
        mark=mark(tail, length),
    )


def _stamp(status: os.stat_result) -> int:
    return stamp(status) if settled(status) else 0


def inspect_shard(
    root: str,
    path: str,
    label: str | None,
    *,
    verify: bool,
    stop: threading.Event | None = None,
) -> Inspected:
    """Lists a tar shard in the WebDataset layout and reads the headers of its images.

    A sample is what shares a name up to the first dot behind the last slash; its class is the
    text of ``.cls``, or `label`, `cls` or `class` of ``.json``. A damaged shard keeps what comes
    before the damage.

    Args:
        root: absolute folder.
        path: relative to it.
        label: class of the samples that do not say one.
        verify: decode the whole images.
        stop: set when nobody wants the answer any more.
    """
    images: list[Image] = []
    bad: list[Bad] = []
    ignored = unread = 0
    labels: dict[str, str] = {}
    keys: list[str] = []
    seen: set[str] = set()
    opened = _open(root, path)
    if isinstance(opened, Inspected):
        return opened
    descriptor, status = opened
    known = _stamp(status)
    with os.fdopen(descriptor, "rb"):
        members = _members(_Range(_of_file(descriptor), status.st_size))
        while not (stop and stop.is_set()):
            try:
                member = next(members, None)
            # tarfile raises several kinds of errors, and a few by mistake, on a damaged archive.
            except Exception as error:  # noqa: BLE001
                bad.append(Bad(path, f"the shard is damaged: {describe(error)}"))
                break
            if member is None:
                break
            key, extension = _split(member.name)
            full = f"{path}/{member.name}"
            if extension in EXTENSIONS:
                if not member.isreg() or member.issparse():
                    kind = _KINDS.get(member.type, "a sparse or unknown one")
                    bad.append(Bad(full, f"must be a plain member of the tar, got {kind}"))
                    continue
                if key in seen:
                    bad.append(Bad(full, f"the shard holds the key {key!r} twice"))
                    continue
                seen.add(key)
                if member.offset_data + member.size > status.st_size:
                    bad.append(Bad(path, f"the shard is damaged: it ends within {member.name!r}"))
                    break
                inside = _of_file(descriptor, member.offset_data)
                found = _inspect(inside, member.size, verify=verify)
                if isinstance(found, str):
                    bad.append(Bad(full, found))
                    continue
                images.append(found._replace(member=member.name, offset=member.offset_data))
                keys.append(key)
            elif extension in (".cls", ".json") and member.isreg() and not member.issparse():
                text = _label(descriptor, member, extension)
                unread += text is None
                if text and (extension == ".cls" or key not in labels):
                    labels[key] = text
            elif member.isdir():
                continue
            else:
                ignored += 1
    if unread:
        logger.warning("%r: %d .cls or .json members hold no class", path, unread)
    labelled = [
        image._replace(label=labels.get(key, label))
        for image, key in zip(images, keys, strict=True)
    ]
    return Inspected(path, labelled, bad, known, ignored)


def _members(file: Any) -> Iterator[tarfile.TarInfo]:
    """Members one after the other, none kept.

    Raises:
        Exception: whatever tarfile raises on a damaged archive.
    """
    with tarfile.open(
        fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
    ) as archive:
        before = -1
        while (member := archive.next()) is not None:
            # a header with a negative size leads back to where one was already
            if member.size < 0 or member.offset <= before:
                raise tarfile.ReadError("a member's size must be at least 0")
            before = member.offset
            archive.members.clear()  # type: ignore[attr-defined]
            yield member
        # tarfile takes a damaged header for the end; the end is a block of zeros
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end marker at byte {archive.offset}")


def _split(name: str) -> tuple[str, str]:
    """`dir/key.part.jpg` -> (`dir/key`, `.jpg`), as WebDataset names samples."""
    folder, slash, base = name.rpartition("/")
    if base.startswith("."):
        return name, ""
    key = base.partition(".")[0]
    return f"{folder}{slash}{key}", os.path.splitext(base)[1].lower()


def _label(descriptor: int, member: tarfile.TarInfo, extension: str) -> str | None:
    """The class that a `.cls` or `.json` member names; None if it names none."""
    if member.size > _LONGEST_LABEL:
        return None
    try:
        text = os.pread(descriptor, member.size, member.offset_data).decode("utf-8")
        if extension == ".cls":
            label: object = text.strip()
        else:
            tree = json.loads(text)
            label = next((tree[key] for key in _LABEL_KEYS if key in tree), None)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip():
        return None
    text = str(label).strip()
    return text if text.isprintable() and len(text) <= 255 else None
