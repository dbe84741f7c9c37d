"""The folder of a run: one owner at a time, its configuration, its log."""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from ijepa_fast.config import (
    Config,
    DataConfig,
    as_dict,
    dump_yaml,
    flatten,
    load_yaml,
)
from ijepa_fast.errors import UsageError
from ijepa_fast.state.checkpoint import checkpoint_folders

__all__ = ["RunFolder", "recipe_difference"]

_logger = logging.getLogger(__name__)

# what may change between two starts of one run: where and how it runs, not what is computed
NOT_RECIPE = (
    "version",
    "out",
    "max_steps",
    "device",
    "path",
    "attention",
    "compile",  # of runs begun with version 0.1
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
# what it was before it was a setting, where that is not the default of today
BEFORE = {"target_precision": "same"}


def recipe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Recipe entries that differ, as "key: old -> new".

    Args:
        old, new: nested settings as `as_dict` gives them; what `old` does not name is what such
            runs began with: it was no setting then.
    """
    flat_new = flatten(dict(new))
    defaults = {**flatten(as_dict(Config(data=DataConfig(root="")))), **BEFORE}
    flat_old = {key: defaults[key] for key in flat_new if key in defaults} | flatten(dict(old))
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
            self._lock = self._take()
        except OSError as error:
            raise UsageError(
                f"out must be a folder that can be written, got {config.out}: {error}"
            ) from None
        try:
            self._changed = self._compare()
        except BaseException:
            self._lock.close()
            raise
        self._start_log()

    def _take(self) -> IO[str]:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(
                f"out must not be in use: another run is training in {self.path}"
            ) from None
        self._status = self.path.stat()
        return lock

    def begin_anew(self) -> bool:
        """Makes OUT again if it was moved or deleted while the run writes to it; returns whether it
        was.

        Raises:
            OSError: it cannot, or another folder stands there.
        """
        try:
            if os.path.samestat(self.path.stat(), self._status):
                return False
        except FileNotFoundError:
            pass
        if self.path.exists() and any(self.path.iterdir()):
            raise OSError(f"{self.path} is another folder now than the one that the run began in")
        gone, self._lock = self._lock, self._take()
        gone.close()
        self.write_config()
        logger, log = logging.getLogger("ijepa_fast"), self._log_file()
        logger.removeHandler(self._handlers[0])
        self._handlers[0].close()
        self._handlers[0] = log
        logger.addHandler(log)
        _logger.warning("%s was moved or deleted, and is made anew with all metrics", self.path)
        return True

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def _compare(self) -> bool:
        """Whether the recipe is allowed to differ from the folder's, and does."""
        path, config = self.path / "config.yaml", self._config
        if not path.exists():
            return False
        try:
            old = load_yaml(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} must be YAML, got: {' '.join(str(error).split())}") from None
        if not isinstance(old, dict):
            raise UsageError(f"{path} must hold a mapping, got {type(old).__name__}")
        changed = recipe_difference(old or {}, as_dict(config))
        # without checkpoints an earlier start came to nothing (a mistyped path, say)
        if not changed or not checkpoint_folders(self.checkpoints):
            return False
        if not config.allow_changed_recipe:
            raise UsageError(
                f"the recipe differs from the one in {path} ({'; '.join(changed)}); train into "
                "another --out, or add --allow-changed-recipe"
            )
        return True

    def require_same_recipe(self, meta: Mapping[str, Any]) -> None:
        """Compares the recipe with that of a checkpoint.

        Raises:
            UsageError: it is another run's, and `allow_changed_recipe` is not set.
        """
        old = meta.get("config")
        if self._config.allow_changed_recipe or not isinstance(old, dict):
            return
        if changed := recipe_difference(old, as_dict(self._config)):
            raise UsageError(
                f"the recipe differs from that of the checkpoints in {self.checkpoints} "
                f"({'; '.join(changed)}); train into another --out, or add --allow-changed-recipe"
            )

    def write_config(self) -> None:
        """Writes `config.yaml`, once the run is known to belong here."""
        path = self.path / "config.yaml"
        if self._changed and path.exists():
            # a copy: a kill between here and the end leaves no folder without config.yaml
            shutil.copyfile(path, self._spare("config", ".yaml"))
        self._changed = False
        temporary = self.path / ".config.yaml.tmp"
        temporary.write_text(dump_yaml(self._config))
        temporary.replace(path)

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
        console: logging.Handler
        if sys.stdout.isatty():
            from rich.logging import RichHandler

            # times stand in the file: a line has room for what it says
            console = RichHandler(show_time=False, show_path=False, show_level=False, markup=False)
        else:
            console = logging.StreamHandler(sys.stdout)
        console.setFormatter(_Plain("%(message)s"))
        # a terminal or a pipe that has gone is no reason to lose a run
        console.handleError = lambda record: None  # type: ignore[method-assign]  # noqa: ARG005
        self._handlers.append(console)
        self._handlers[1].setLevel(logging.INFO)
        for handler in self._handlers:
            logger.addHandler(handler)

    def _log_file(self) -> logging.Handler:
        file = _LogFile(self.path / "train.log")
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
