"""Files that cannot be used: known once, written down with the reason, never decoded again."""

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ijepa_fast.errors import TooManyBadFiles

__all__ = ["Quarantine"]

logger = logging.getLogger(__name__)


class Quarantine:
    """The known bad files of a run, kept in ``quarantine.jsonl``.

    One JSON object a line: ``file`` (relative to the data's root), ``reason``, ``id`` (row of the
    index, null if it has none), ``epoch`` and ``position`` where it was met (null if before
    training). Several ranks may share the file: each line is one appending write, and the others'
    lines are read before one is added. Undecodable bytes in names are kept as JSON escapes of lone
    surrogates.

    Attributes:
        files: file -> reason, in the order in which they became known.
        ids: file -> row of the index that it was met in; files that the index left out have none.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, limit_share: float, num_images: int
    ) -> None:
        """Reads what an earlier part of the run, or another rank, found.

        Args:
            path: the file, made when there is something to write; None keeps the list in memory.
            limit_share: share of the files that may be bad, 0..1; one file may always be.
            num_images: files of the data set, good and bad.

        Raises:
            TooManyBadFiles: the file already holds more than the limit.
        """
        self.path = None if path is None else Path(path)
        # 0.29 * 100 is a hair below 29.
        self.limit = max(1, math.floor(limit_share * num_images + 1e-9))
        self.num_images = num_images
        self.files: dict[str, str] = {}
        self.ids: dict[str, int] = {}
        self._read_to = 0
        self._read()
        self._check()

    def __contains__(self, file: str) -> bool:
        """Whether a file is known to be bad."""
        return file in self.files

    def add(
        self,
        file: str,
        reason: str,
        *,
        sample_id: int | None = None,
        epoch: int | None = None,
        position: int | None = None,
    ) -> None:
        """Records one bad file; a known one is not recorded twice.

        Args:
            file: path relative to the data's root.
            reason: what is wrong with it.
            sample_id: its row in the index.
            epoch: where it was met.
            position: its position in that epoch.

        Raises:
            TooManyBadFiles: the limit is passed (the file is recorded all the same).
        """
        self._read()
        if file not in self.files:
            self.files[file] = reason
            if sample_id is not None:
                self.ids[file] = sample_id
            place = {"id": sample_id, "epoch": epoch, "position": position}
            self._keep([{"file": file, "reason": reason, **place}])
            logger.warning("unusable file %r: %s", file, reason)
        self._check()

    def add_known(self, bad: Iterable[tuple[str, str]], *, write: bool = True) -> None:
        """Records the files that the index found, before training.

        Args:
            bad: (file, reason) pairs.
            write: False keeps them in memory only (every rank knows them; one writes).

        Raises:
            TooManyBadFiles: the limit is passed.
        """
        new = {file: reason for file, reason in bad if file not in self.files}
        self.files.update(new)
        if new and write:
            empty = {"id": None, "epoch": None, "position": None}
            self._keep([{"file": file, "reason": why, **empty} for file, why in new.items()])
            logger.warning(
                "%d unusable files are left out, the first: %r", len(new), next(iter(new))
            )
        self._check()

    def _check(self) -> None:
        if len(self.files) > self.limit:
            file, reason = next(reversed(self.files.items()))
            where = f"; all are listed in {self.path}" if self.path else ""
            raise TooManyBadFiles(
                f"unusable files must be at most {self.limit} of {self.num_images} "
                f"(data.max_bad_share), got {len(self.files)}; "
                f"the last: {file!r}: {reason}{where}"
            )

    def _keep(self, entries: Sequence[Mapping[str, object]]) -> None:
        """Records that the disk refuses are known in this process alone: the file is met again."""
        if self.path is None:
            return
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode("ascii")
        try:
            with self.path.open("a+b", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                # After a kill the last line may be torn: it must not swallow this one.
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    data = b"\n" + data
                # One write, so that lines of several ranks do not mix.
                if file.write(data) != len(data):
                    raise OSError("a record was not written whole")
                os.fsync(file.fileno())
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error)

    def _read(self) -> None:
        """Takes over what was appended since the last call, by this process or another."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        # A last line without its end is torn, or being written just now: the next call looks again.
        whole = data.rfind(b"\n") + 1
        self._read_to += whole
        for line in data[:whole].splitlines():
            entry = _parse(line)
            if entry is not None:
                name, reason, sample_id = entry
                self.files.setdefault(name, reason)
                if sample_id is not None:
                    self.ids.setdefault(name, sample_id)
            elif line.strip():
                logger.warning("%s: a torn line is skipped", self.path)


def _parse(line: bytes) -> tuple[str, str, int | None] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        return None
    sample_id = entry.get("id")
    known = isinstance(sample_id, int) and not isinstance(sample_id, bool)
    return entry["file"], str(entry.get("reason")), sample_id if known else None
