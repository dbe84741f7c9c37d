"""The folder of a run: one owner at a time, its configuration, its log."""

import fcntl
import itertools
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from ijepa_fast.config import (
    Config,
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
    "log.",
    "checkpoint.",
    "eval.",
)
# what runs began with that do not name it
BEFORE = {"target_precision": "same"}


def recipe_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Recipe entries that differ, as "key: old -> new".

    Args:
        old, new: nested settings as `as_dict` gives them.
    """
    flat_old, flat_new = ({**BEFORE, **flatten(dict(tree))} for tree in (old, new))
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


class RunFolder:
    """Owns OUT while a run is alive; only rank 0 makes one.

    Args:
        config: the run's configuration.

    Raises:
        UsageError: OUT cannot be written, another run holds it, or its recipe differs.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.out)
        self._handlers: list[logging.Handler] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.path / ".lock").open("a")
        except OSError as error:
            raise UsageError(
                f"out must be a folder that can be written, got {config.out}: {error}"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UsageError(
                f"out must not be in use: another run is training in {config.out}"
            ) from None
        try:
            self._write_config(config)
        except BaseException:
            self._lock.close()
            raise
        self._start_log()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    def _write_config(self, config: Config) -> None:
        path = self.path / "config.yaml"
        new = as_dict(config)
        if path.exists():
            try:
                old = load_yaml(path.read_text())
            except ValueError as error:
                raise UsageError(
                    f"{path} must be YAML, got: {' '.join(str(error).split())}"
                ) from None
            if not isinstance(old, dict):
                raise UsageError(f"{path} must hold a mapping, got {type(old).__name__}")
            changed = recipe_difference(old or {}, new)
            if changed and not checkpoint_folders(self.checkpoints):
                # an earlier start came to nothing (a mistyped path, say)
                changed = []
            if changed and not config.allow_changed_recipe:
                raise UsageError(
                    f"the recipe differs from the one in {path} ({'; '.join(changed)}); train into "
                    "another --out, or add --allow-changed-recipe"
                )
            if changed:
                # a copy: a kill between here and the end leaves no folder without config.yaml
                shutil.copyfile(path, self._spare("config", ".yaml"))
        temporary = self.path / ".config.yaml.tmp"
        temporary.write_text(dump_yaml(config))
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
        file = logging.FileHandler(self.path / "train.log")
        file.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
        self._handlers.append(file)
        if sys.stdout.isatty():
            from rich.logging import RichHandler

            # times stand in the file: a line has room for what it says
            rich = RichHandler(show_time=False, show_path=False, show_level=False, markup=False)
            rich.setFormatter(_Plain("%(message)s"))
            self._handlers.append(rich)
        else:
            plain = logging.StreamHandler(sys.stdout)
            plain.setFormatter(_Plain("%(message)s"))
            self._handlers.append(plain)
        self._handlers[1].setLevel(logging.INFO)
        for handler in self._handlers:
            logger.addHandler(handler)

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
