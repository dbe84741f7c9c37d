"""The folder of a run: one owner at a time, its configuration, its log."""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from ijepa_fast.atomic import atomic_write
from ijepa_fast.config import Config, as_dict, completed, dump_yaml, load_yaml
from ijepa_fast.errors import UsageError
from ijepa_fast.state.checkpoint import checkpoint_folders, recipe_of

__all__ = ["Console", "RunFolder", "recipe_difference"]

_logger = logging.getLogger(__name__)

# what may change between two starts of one run: where and how it runs, not what is computed
NOT_RECIPE = (
    "out",
    "max_steps",
    "device",
    "path",
    "attention",
    "graphs",
    "memory",
    "shard",
    "rank_timeout",
    "allow_changed_recipe",
    "batch.device",
    "data.decoder",
    "data.threads",
    "data.prefetch",
    "data.timeout",
    "data.max_bad_share",
    "data.allow_missing",
    "log.",
    "checkpoint.",
    "eval.",
)


def recipe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Recipe entries that differ, as "key: old -> new".

    Args:
        old, new: nested settings as `as_dict` gives them.
    """
    flat_old, flat_new = completed(old), completed(new)
    return [
        f"{key}: {flat_old.get(key)} -> {flat_new.get(key)}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if not key.startswith(NOT_RECIPE) and flat_old.get(key) != flat_new.get(key)
    ]


class _Plain(logging.Formatter):
    """Control characters, which a file name may hold, are shown escaped: they could rewrite what a
    terminal shows.
    """

    _ESCAPES: ClassVar = {
        code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"
    }

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(self._ESCAPES)


class Console(logging.StreamHandler[Any]):
    """A terminal or pipe that may go or fill up: the run goes on, and its log with it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Of an error that is not the stream's own, what logging does."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger = logging.getLogger("ijepa_fast")
        logger.removeHandler(self)
        logger.warning("stdout must be writable, got %s: nothing more is shown", error)


class _LogFile(logging.FileHandler):
    """What a full disk refuses waits for the next line, and is no reason to lose a run."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802
        """Says so once."""
        if not self._failed:
            self._failed = True
            _logger.warning("train.log cannot be written for now: %s", sys.exception())

    def close(self) -> None:
        """Loses what is waiting if the disk is full still."""
        with contextlib.suppress(OSError):
            super().close()


def _unwritable(config: Config, error: OSError) -> UsageError:
    return UsageError(f"out must be a folder that can be written, got {config.out}: {error}")


class RunFolder:
    """Owns OUT while a run is alive; only rank 0 makes one.

    Args:
        config: the run's configuration.

    Raises:
        UsageError: OUT cannot be written, another run holds it, or its recipe differs.
    """

    def __init__(self, config: Config) -> None:
        self.path, self._config = Path(config.out), config
        self._handlers: list[logging.Handler] = []
        try:
            self._lock = self._begin()
        except OSError as error:
            raise _unwritable(config, error) from None
        self._start_log()

    def _begin(self) -> IO[str]:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._locked(self._config)
        try:
            self._write_config(self._config)
        except BaseException:
            lock.close()
            raise
        self._status = self.path.stat()
        return lock

    def begin_anew(self) -> None:
        """Makes OUT again if it was moved or deleted while the run writes to it.

        Raises:
            OSError: it cannot, or another folder stands there.
        """
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(), self._status):
                return
            # what a try before left, as on a full disk, is ours
            if {path.name for path in self.path.iterdir()} - {".lock"}:
                raise OSError(f"{self.path} is another folder now than the run began in")
        gone, self._lock = self._lock, self._begin()
        gone.close()
        logger, log = logging.getLogger("ijepa_fast"), self._log_file()
        logger.removeHandler(self._handlers[0])
        self._handlers[0].close()
        self._handlers[0] = log
        logger.addHandler(log)
        _logger.warning("%s was moved or deleted, and is made anew with all metrics", self.path)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses what a run would be refused for, and leaves nothing.

        Raises:
            UsageError: as of the class.
        """
        path = Path(config.out)
        try:
            there = next(folder for folder in (path, *path.parents) if folder.exists())
            with tempfile.TemporaryFile(dir=there):
                pass
            if (path / ".lock").exists():
                cls._locked(config).close()
        except OSError as error:
            raise _unwritable(config, error) from None
        cls._changes(config)

    @staticmethod
    def _locked(config: Config) -> IO[str]:
        lock = (Path(config.out) / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(
                f"out must not be in use: another run is training in {config.out}"
            ) from None
        return lock

    @staticmethod
    def _changes(config: Config) -> list[str]:
        """What of the recipe is to change in a run that has begun: against its `config.yaml`, and
        against its newest checkpoint, which may be another run's.
        """
        path = Path(config.out) / "config.yaml"
        recipes: dict[Path, Any] = {}
        if path.exists():
            try:
                recipes[path] = load_yaml(path.read_text(encoding="utf-8"))
            except ValueError as error:
                text = " ".join(str(error).split())
                raise UsageError(f"{path} must be YAML, got: {text}") from None
            if not isinstance(recipes[path], dict):
                raise UsageError(f"{path} must hold a mapping, got {type(recipes[path]).__name__}")
        # without checkpoints an earlier start came to nothing (a mistyped path, say)
        newest = checkpoint_folders(path.parent / "checkpoints")[:1]
        if not newest:
            return []
        recipes |= {folder: recipe for folder in newest if (recipe := recipe_of(folder))}
        changes = {where: recipe_difference(old, as_dict(config)) for where, old in recipes.items()}
        for where, changed in changes.items():
            if changed and not config.allow_changed_recipe:
                raise UsageError(
                    f"the recipe differs from the one in {where} ({'; '.join(changed)}); train "
                    "into another --out, or add --allow-changed-recipe"
                )
        return changes.get(path, [])

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def _write_config(self, config: Config) -> None:
        path = self.path / "config.yaml"
        if self._changes(config) and path.exists():
            # a copy: a kill between here and the end leaves no folder without config.yaml
            shutil.copyfile(path, self._spare("config", ".yaml"))
        with atomic_write(path) as temporary:
            temporary.write_text(dump_yaml(config), encoding="utf-8")

    def _spare(self, stem: str, suffix: str) -> Path:
        """The first of STEM-1, STEM-2, ... that is free."""
        names = (self.path / f"{stem}-{n}{suffix}" for n in itertools.count(1))
        return next(path for path in names if not path.exists())

    def set_aside_records(self) -> None:
        """Before a start from step 0: keeps what an earlier one recorded under other names."""
        for stem in ("metrics", "quarantine"):
            path = self.path / f"{stem}.jsonl"
            if path.exists() and path.stat().st_size:
                spare = self._spare(stem, ".jsonl")
                path.rename(spare)
                _logger.warning(
                    "no checkpoint in %s: starting at step 0, the earlier %s is kept as %s",
                    self.checkpoints,
                    path.name,
                    spare.name,
                )

    def _start_log(self) -> None:
        logger = logging.getLogger("ijepa_fast")
        self._logger_was = (logger.level, logger.propagate)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        self._handlers.append(self._log_file())
        if sys.stdout.isatty():
            from rich.logging import RichHandler

            # times stand in the file: a line has room for what it says
            rich = RichHandler(show_time=False, show_path=False, show_level=False, markup=False)
            rich.setFormatter(_Plain("%(message)s"))
            self._handlers.append(rich)
        else:
            plain = Console(sys.stdout)
            plain.setFormatter(_Plain("%(message)s"))
            self._handlers.append(plain)
        self._handlers[1].setLevel(logging.INFO)
        for handler in self._handlers:
            logger.addHandler(handler)

    def _log_file(self) -> logging.Handler:
        file = _LogFile(self.path / "train.log", encoding="utf-8")
        file.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
        return file

    def close(self) -> None:
        """Gives the folder back."""
        logger = logging.getLogger("ijepa_fast")
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        logger.setLevel(self._logger_was[0])
        logger.propagate = self._logger_was[1]
        self._lock.close()
