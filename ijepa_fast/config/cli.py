"""Command line and YAML to `Config`: flags over YAML over preset, one parser for both."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from ijepa_fast import __version__
from ijepa_fast.config.choose import CHOSEN, EVALUATION, EXAMPLE, choose
from ijepa_fast.config.command import parse_arguments
from ijepa_fast.config.presets import PRESETS, preset
from ijepa_fast.config.released_yaml import Conversion, convert, is_released
from ijepa_fast.config.schema import Config, DataConfig
from ijepa_fast.errors import UsageError, require

__all__ = [
    "Invocation",
    "TrainArguments",
    "as_arguments",
    "as_dict",
    "completed",
    "dump_yaml",
    "from_tree",
    "load_yaml",
    "parse",
    "read_yaml",
]

# read before the configuration's own flags
_LONGEST_YAML = 1 << 20
_DEEPEST_YAML = 20
# Settings that are younger than version 0.1.0 and whose default is not what was done before: a file
# without them means these values. One whose default changes nothing needs no line here.
BEFORE: dict[str, Any] = {}
# fitted to the global batch where it is not given
GROUP = "masks.truncation_group"
# what other trainers call them
SHORT = {
    "data": "data.root",
    "model": "model.name",
    "batch_size": "batch.global",
    "epochs": "optim.epochs",
    "lr": "optim.lr",
    "workers": "data.threads",
    "num_workers": "data.threads",
}
DESCRIPTION = "\n".join(
    textwrap.wrap(
        "Trains I-JEPA. Short names: "
        + ", ".join(f"--{short.replace('_', '-')} for --{name}" for short, name in SHORT.items()),
        100,
        break_on_hyphens=False,
    )
)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """The options of `train` that are no settings, and the settings."""

    preset: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Start from a named recipe: {', '.join(PRESETS)}. Without one the settings that "
            "are not given are chosen to fit the images and the machine, and printed."
        ),
    ] = None
    config: Path | None = None
    """YAML with the same nested names as the flags, or one of the released trainer's files, whose
    keys are converted and reported; flags win over it."""
    resume: Path | None = None
    """Go on with the run in this folder: short for --config RUN/config.yaml --out RUN."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the whole configuration as YAML and stop."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print parameters, FLOPs, token counts, memory and hours, and stop."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)


OWN = tuple(
    option.name for option in dataclasses.fields(TrainArguments) if option.name != "settings"
)
# where no preset is named: the published recipe, and data that must be given
_WITHOUT = Config(data=DataConfig(root=""))


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """A parsed command line."""

    config: Config
    print_config: bool
    dry_run: bool
    notes: tuple[str, ...] = ()
    """What the keys of a released trainer's file became, and what was fitted; a line each."""
    open_: tuple[str, ...] = ()
    """Settings that `choose` may set once the data are known: nothing else gives them."""
    given: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The words behind each flag, a file's settings as flags."""

    def as_yaml(self) -> str:
        """The whole configuration as YAML, the notes as comments."""
        return "".join(f"# {note}\n" for note in self.notes) + dump_yaml(self.config)


def _key(field: dataclasses.Field[Any]) -> str:
    return field.name.rstrip("_")


def as_dict(config: object) -> dict[str, Any]:
    """Nested plain values of a configuration, under the names that flags and YAML use."""
    assert dataclasses.is_dataclass(config)
    result = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = as_dict(value)
        result[_key(field)] = list(value) if isinstance(value, tuple) else value
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump_yaml(config: Config) -> str:
    """The configuration as YAML that `--config` reads back, with the version that wrote it."""
    tree = {"version": __version__, **as_dict(config)}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)


def completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings of a whole configuration that some version wrote: what did not exist then keeps
    the behaviour of then.
    """
    return {**_known(), **BEFORE, **_flat(tree)}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(dict(tree))
    flat.pop("version", None)
    # of version 0.1: blocks are not compiled any more, and what was selective is the rule
    flat.pop("compile", None)
    if flat.get("memory") == "selective":
        flat["memory"] = "none"
    # likewise: one of the names in log.to
    if "log.to" not in flat and isinstance(flat.get("log.tensorboard"), bool):
        flat["log.to"] = ["jsonl", *["tensorboard"] * flat.pop("log.tensorboard")]
    return flat


class _Loader(yaml.SafeLoader):
    """A key that stands twice is an error, not its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                again = f"{key.value!r} again in line {key.start_mark.line + 1}"
                if key.value in seen:
                    raise yaml.YAMLError(f"a key must stand once, got {again}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises:
        ValueError: it is no YAML, has aliases (few bytes of them stand for gigabytes), or is longer
            or deeper than any configuration, or has a key twice.
    """
    if len(text) > _LONGEST_YAML:
        raise ValueError(f"at most {_LONGEST_YAML} characters, got {len(text)}")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"no aliases, got *{event.anchor}")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST_YAML:
                raise ValueError(f"at most {_DEEPEST_YAML} levels")
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path, *, batch_given: bool = False) -> dict[str, Any] | Conversion:
    """Flat settings of a YAML file, keys checked; a released trainer's file as its conversion.

    Args:
        path: the file.
        batch_given: a flag gives the global batch, which a released file does not.

    Raises:
        UsageError: unreadable, not YAML, not a mapping, or an unknown key.
    """
    try:
        # so much of it that a longer file is noticed, a device file too
        with path.open(encoding="utf-8") as file:
            tree = load_yaml(file.read(_LONGEST_YAML + 1))
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"--config must be a readable YAML file, got {path}: {text}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"--config must hold a mapping, got {type(tree).__name__} in {path}")
    if is_released(tree):
        try:
            return convert(tree, batch_given=batch_given)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
    if not isinstance(tree.get("data", {}), dict):
        # short, as the flag --data is
        tree["data"] = {"root": tree["data"]}
    sections = {key for key, value in as_dict(Config()).items() if isinstance(value, dict)}
    for key in sections & tree.keys():
        if not isinstance(tree[key], dict):
            raise UsageError(f"{path}: {key} must hold a mapping, got {tree[key]!r}")
    return _checked(tree, path)


def _checked(tree: dict[str, Any], path: Path | str) -> dict[str, Any]:
    version = tree.get("version")
    flat = _flat(tree) if version is None else completed(tree)
    if None in (flat.get("out", ""), flat.get("data.root", "")):
        raise UsageError(f"{path}: out and data.root must be paths, got nothing")
    known = _known()
    for key in flat:
        if key not in known:
            other = version not in (None, __version__)
            by = f" (of version {version}, this is {__version__})" if other else ""
            raise UsageError(f"{path}: unknown key {key}{by}{_nearest(str(key), known)}")
    return flat


def from_tree(tree: object) -> Config:
    """A configuration of nested plain values, as `as_dict` gives them.

    Raises:
        UsageError: a key is unknown, or a value wrong.
    """
    if not isinstance(tree, dict):
        raise UsageError(f"a configuration must be a mapping, got {type(tree).__name__}")
    arguments = _as_arguments(_checked(tree, "the configuration"))
    return parse_arguments(Config, arguments, "train", default=Config())


def _known() -> dict[str, Any]:
    return flatten(as_dict(Config()))


def _nearest(key: str, known: Collection[str], form: Callable[[str], str] = str) -> str:
    # a section or a bare field name is as near as a misspelt full name
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
        name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"; did you mean {form(near[0])}?" if near else "; see --help for the valid ones"


def _as_arguments(flat: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for key, value in flat.items():
        flag = "--" + key
        if isinstance(value, bool):
            head, dot, tail = key.rpartition(".")
            arguments.append(flag if value else f"--{head}{dot}no-{tail}")
        elif isinstance(value, list | tuple):
            arguments += [flag, *(str(item) for item in value)]
        else:
            arguments += [flag, os.fspath(value) if isinstance(value, os.PathLike) else str(value)]
    return arguments


def as_arguments(
    config: Config | str | os.PathLike[str] | None, settings: Mapping[str, Any]
) -> list[str]:
    """The command line that says what `pretrain` is told.

    Args:
        config: a whole configuration, a preset's name, the path of a YAML file, or nothing.
        settings: options of the command by name, nested (`{"optim": {"lr": 1e-4}}`), as a part of
            a configuration, or with two underscores for a dot (`{"optim__lr": 1e-4}`).

    Raises:
        UsageError: there is no such preset or file.
    """
    start: list[str] = []
    if isinstance(config, Config):
        start = _as_arguments(flatten(as_dict(config)))
    elif config is not None:
        named = isinstance(config, str) and config in PRESETS
        rule = f"a Config, a YAML file, or one of {', '.join(PRESETS)}"
        known = isinstance(config, str | os.PathLike)
        require(named or (known and Path(config).is_file()), "config", rule, config)
        start = ["--preset" if named else "--config", os.fspath(config)]
    given = {name.replace("__", "."): _plain(value) for name, value in settings.items()}
    return [*start, *_as_arguments(flatten(given))]


def _plain(value: Any) -> Any:
    """Mappings and parts of a configuration as dictionaries."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    # a run's result is a path
    part = dataclasses.is_dataclass(value) and not isinstance(value, os.PathLike)
    return as_dict(value) if part else value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _setting(flag: str, known: Mapping[str, Any]) -> str:
    """What `--flag` sets: its own name, without `no-` where that switches a setting off."""
    name = flag.replace("-", "_")
    head, dot, tail = name.rpartition(".")
    positive = f"{head}{dot}{tail.removeprefix('no_')}"
    return positive if isinstance(known.get(positive), bool) else name


def _canonical(arguments: Sequence[str]) -> tuple[list[str], set[str]]:
    """Arguments with short names written out, and the names of all flags.

    Raises:
        UsageError: a flag is unknown.
    """
    known, written, names = _known(), [], set()
    for argument in arguments:
        if argument in ("-h", "--help"):
            names.add("help")
        elif argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag[2:].replace("-", "_")
            name = SHORT.get(name, name)
            if name not in OWN and _setting(name, known) not in known:
                near = _nearest(name, [*SHORT, *known, *OWN], _flag)
                raise UsageError(f"unknown option {flag}{near}")
            names.add(name)
            written.append(f"{_flag(name)}{equals}{value}")
            continue
        written.append(argument)
    return written, names


def _given(arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The words behind each flag, under the name of its setting."""
    known, given = _known(), dict[str, tuple[str, ...]]()
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument[2:].partition("=")
            name = _setting(flag, known)
            given[name] = (value,) if equals else ()
        elif name:
            given[name] += (argument,)
    return given


def _open(
    named: str | None, start: Config, given: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The settings that are chosen when the data are known."""
    if not named:
        return tuple(key for key in CHOSEN if key not in given)
    others = given.get("data.root", start.data.sources) != start.data.sources
    # what a preset evaluates on belongs to its own images
    alien = start.eval.data and others and "eval.data" not in given
    return tuple(key for key in EVALUATION if alien and key not in given)


def _own_folder(roots: Sequence[str]) -> str:
    """Where a run on these images goes by default."""
    names = "-".join(Path(os.path.abspath(root)).stem for root in roots[:4])
    name = re.sub(r"[^\w.-]+", "-", names)[:80].strip("-.")
    return f"runs/{name or 'images'}"


def parse(
    argv: Sequence[str] | None = None, choices: Mapping[str, Any] | None = None
) -> Invocation:
    """Command line to a validated configuration.

    Args:
        argv: the command line, by default this process's.
        choices: for the settings in `Invocation.open_`; by default what would be chosen for an
            example, so that everything that is given is checked before the data are known.

    Raises:
        UsageError: an unknown or contradictory value, in one line.
        SystemExit: after `--help`.
    """
    arguments, names = _canonical(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    try:
        files, _ = first.parse_known_args(arguments)
        start = preset(files.preset) if files.preset else _WITHOUT
    except (argparse.ArgumentError, ValueError) as error:
        raise UsageError(str(error)) from None
    group = start.masks.truncation_group
    if files.resume:
        _check_resume(files)
        files.config = files.resume / "config.yaml"
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    released = False
    if files.config:
        read = read_yaml(files.config, batch_given="batch.global" in names)
        if isinstance(read, Conversion):
            _refuse_preset(files, "a released trainer's file, which is a whole recipe")
            start = replace(_WITHOUT, out=f"runs/{files.config.stem}")
            settings, notes, released = dict(read.settings), read.notes, True
            # of its GPUs' batch, and as little asked for by the user as a preset's
            group = settings.pop(GROUP, start.masks.truncation_group)
        else:
            settings = read
    if files.resume:
        settings |= {"out": str(files.resume), "allow_changed_recipe": False}
    given, helps = _given([*_as_arguments(settings), *arguments]), "help" in names
    open_ = () if helps or released else _open(files.preset, start, given)
    roots = given.get("data.root", ())
    if open_ and roots and not files.preset:
        start = replace(start, out=_own_folder(roots))
    if choices is None:
        choices = choose(EXAMPLE, given, open_) if open_ else {}
    chosen = {key: choices[key] for key in open_ if key in choices}
    # fitted when the batch is known; until then the group is 1, which divides any
    fits = GROUP not in {*given, *chosen} and not helps
    start = replace(start, masks=replace(start.masks, truncation_group=1 if fits else group))
    parsed: TrainArguments = parse_arguments(
        TrainArguments,
        [*_as_arguments(chosen), *_as_arguments(settings), *arguments],
        "train",
        default=TrainArguments(settings=start),
        description=DESCRIPTION,
    )
    config = parsed.settings
    if not (files.preset or released or any(config.data.sources)):
        raise UsageError(
            "--data must name images where no --preset brings its own (as demo does), got neither"
        )
    if fits:
        batch = config.batch.global_
        fitted = next(n for n in range(min(batch, group), 0, -1) if batch % n == 0)
        config = replace(config, masks=replace(config.masks, truncation_group=fitted))
        if fitted != group:
            notes += (
                f"{GROUP} {fitted} instead of {group}: none is given, and it must divide "
                f"batch.global {batch}",
            )
    return Invocation(
        config=config,
        print_config=parsed.print_config,
        dry_run=parsed.dry_run,
        notes=notes,
        open_=open_,
        given=given,
    )


def _refuse_preset(files: argparse.Namespace, what: str) -> None:
    if files.preset:
        raise UsageError(f"--preset must be left out, got {files.preset}: {files.config} is {what}")


def _check_resume(files: argparse.Namespace) -> None:
    for name in ("preset", "config"):
        value = getattr(files, name)
        if value:
            raise UsageError(f"--{name} must be left out with --resume, got {value}")
    if not (files.resume / "config.yaml").is_file():
        raise UsageError(f"--resume must name the folder of a run, got {files.resume}")
