"""Every command of the documents is run, on a tiny data set and network; links and names exist.

A command is handled by the rule of its program (`RULES`) or module (`MODULES`); one without a rule
fails, with its file and line. Paths that the documents make up are replaced by those of `INPUTS`.
What a command of the documents writes (an exported folder) is written before another reads it.
"""

import argparse
import ast
import builtins
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import tyro
import yaml
from torch.distributed import run as torchrun

from ijepa_fast import train
from ijepa_fast.bench import BenchArgs
from ijepa_fast.cli import OWN_OPTIONS, as_dict, flatten, parse
from ijepa_fast.config import Config
from ijepa_fast.faults import Faults
from ijepa_fast.pictures import Pictures
from ijepa_fast.presets import PRESETS
from tests import documents
from tests.documents import Command, Document, Place
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]
MARKDOWN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FILES = [
    *MARKDOWN,
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.sh")),
]
# its Python is run by test_kernels_alone.py, without the rest of the repository
TESTED_ELSEWHERE = {"kernels/README.md"}

# the network of tiny.RECIPE, whatever the preset's is; two steps of eight images
SMALL = (
    *("--model.width", "32", "--model.depth", "4", "--model.heads", "2"),
    *("--model.mlp-hidden", "128", "--model.predictor-width", "16", "--model.predictor-depth", "1"),
    *("--masks.min-keep", "1", "--masks.truncation-group", "4"),
    *("--batch.global", "8", "--batch.device", "8", "--max-steps", "2", "--log.interval", "1"),
    *("--data.threads", "1", "--data.decoder", "pillow"),
    # what a GPU would be needed for, or minutes of compilation
    *("--device", "cpu", "--attention", "auto", "--graphs", "off"),
)
# appended so that a command takes seconds, where its module and these words are in it
QUICK = (
    ("ijepa_fast.evaluate", "", ("--decoder", "pillow")),
    ("ijepa_fast.evaluate", "linear", ("--linear-epochs", "1")),
    ("ijepa_fast.evaluate", "finetune", ("--finetune.epochs", "1")),
    ("ijepa_fast.doctor", "", ("--no-self-test",)),
    ("ijepa_fast.visualize", "train-decoder", ("--steps", "2", "--images", "16", "--width", "8")),
    ("ijepa_fast.visualize", "predictor", ("--sampling-steps", "2", "--seeds", "2")),
    ("ijepa_fast.visualize", "prove", ("--sampling-steps", "2", "--blocks", "8", "--seeds", "2")),
)
# the doctor's 1 is about the machine, the replayed step is broken on purpose
CODES = {"ijepa_fast.doctor": {0, 1}, "ijepa_fast.replay": {1}}
COMMANDS = (
    *("ijepa_fast.data", "ijepa_fast.doctor", "ijepa_fast.evaluate", "ijepa_fast.export"),
    *("ijepa_fast.parity", "ijepa_fast.replay", "ijepa_fast.visualize"),
)

# what the documents call an input, and what of `World` stands for it
INPUTS = (
    (r"(/?[\w.-]+/)*runs/[\w-]+/checkpoints/step-\S+", "checkpoint"),
    (r"(\S*/)?replay-step-\S+\.safetensors", "broken_step"),
    (r"(\S*/)?config\.yaml", "settings"),
    # drawn beside `runs/mine`
    (r"runs/other", "other_run"),
    (r"(/?[\w.-]+/)*runs/[\w-]+/?|OUT|RUN", "run"),
    (r"(\S*/)?in1k_\w+\.yaml", "released"),
    (r"\S+\.ya?ml", "recipe"),
    (r"\S*\{0+\.\.\d+\}\S*\.tar", "shards"),
    (r"\S+\.(txt|tsv)", "listed"),
    (r"\S+\.jpe?g", "image"),
    (r"/[\w./-]+|DIR|FOLDER|LABELLED_FOLDER|IMAGES|shapes|fashion_mnist", "images"),
)


class Wrong(AssertionError):
    """A command or a name of a document does not hold."""


# --- the tiny world ------------------------------------------------------------------------------


class World:
    """A data set, a run on it, and files of every kind that a command reads; made when asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[tuple[Any, ...]] = set()
        """Commands, and configurations that were trained."""

    @functools.cached_property
    def images(self) -> Path:
        """A labelled folder: 48 images in 4 classes."""
        return tiny.write_images(self.folder / "images", 48, classes=4)

    @functools.cached_property
    def image(self) -> Path:
        return min(self.images.rglob("*.jpg"))

    @functools.cached_property
    def listed(self) -> Path:
        path = self.folder / "list.tsv"
        path.write_text("".join(f"{p}\t{p.parent.name}\n" for p in self.images.rglob("*.jpg")))
        return path

    @functools.cached_property
    def shards(self) -> str:
        files = sorted(self.images.rglob("*.jpg"))
        for number in range(2):
            with tarfile.open(self.folder / f"{number:03d}.tar", "w") as tar:
                for path in files[number::2]:
                    tar.add(path, path.name)
        return f"{self.folder}/{{000..001}}.tar"

    @functools.cached_property
    def run(self) -> Path:
        out = self.folder / "trained" / "run"
        # four blocks, as guides ask for the last four layers
        size = {"data__crop": 16, "model__patch_size": 4, "model__depth": 4}
        assert tiny.run(self.images, out, max_steps=4, eval__data=self.images, **size) == 0
        return out

    @functools.cached_property
    def other_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.folder / "trained" / "other"))

    @functools.cached_property
    def settings(self) -> Path:
        return self.run / "config.yaml"

    @functools.cached_property
    def checkpoint(self) -> Path:
        return max((self.run / "checkpoints").glob("step-*"))

    @functools.cached_property
    def broken_step(self) -> Path:
        out = self.folder / "broken" / "run"
        with mock.patch.dict(os.environ, {"IJEPA_FAST_FAULT": "0:1:nan-weight"}):
            assert tiny.run(self.images, out) == 4
        (path,) = out.glob("replay-step-*.safetensors")
        return path

    @functools.cached_property
    def recipe(self) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny.RECIPE))
        return path

    @functools.cached_property
    def released(self) -> Path:
        """A file with the released trainer's sections; tests/trainer/test_released_yaml.py has all
        of its keys.
        """
        path = self.folder / "in1k_vith14_ep300.yaml"
        meta = {"model_name": "vit_huge", "pred_depth": 12, "use_bfloat16": True}
        tree = {
            "data": {"batch_size": 128, "crop_size": 224, "root_path": str(self.images)},
            "mask": {"patch_size": 14, "num_pred_masks": 4},
            "meta": meta,
            "optimization": {"epochs": 300, "warmup": 40, "ema": [0.996, 1.0]},
        }
        path.write_text(yaml.safe_dump(tree))
        return path


@dataclasses.dataclass
class Sandbox:
    """The folder that one command runs in.

    Attributes:
        world: what it may read.
        folder: the working directory.
        makers: name of a file or folder -> the command of the documents that writes it.
        parser: pytest's own.
    """

    world: World
    folder: Path
    makers: dict[str, Command]
    parser: Any

    def read(self, word: str, making: Sequence[str] = ()) -> str:
        """An input, replaced if the documents made it up, and made if they make it."""
        if word in self.makers and word not in making:
            if not (self.folder / word).exists():
                handle(self.makers[word], self, (*making, word))
            return word
        # an image or recording of the repository is itself
        if not Path(word).is_absolute() and (ROOT / word).is_file():
            return str(ROOT / word)
        for pattern, name in INPUTS:
            if re.fullmatch(pattern, word):
                return str(getattr(self.world, name))
        return word

    def write(self, word: str) -> str:
        """An output: in this folder, in a folder that exists."""
        path = self.folder / word.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def arguments(self, words: Sequence[str], outputs: Sequence[int], making=()) -> list[str]:
        """Words with their paths replaced; `outputs` numbers those that are written."""
        result = []
        for number, word in enumerate(words):
            option, equals, value = word.partition("=")
            if number and words[number - 1] == "--preset":
                # a recipe may have the name of its data
                result.append(word)
            elif number in outputs:
                result.append(self.write(word))
            elif word.startswith("--") and equals:
                value = self.write(value) if option == "--out" else self.read(value, making)
                result.append(f"{option}={value}")
            else:
                result.append(word if word.startswith("-") else self.read(word, making))
        return result


def outputs(module: str, words: Sequence[str]) -> list[int]:
    """Which arguments are written: that of --out, and the second place of an export."""
    found = [n for n, word in enumerate(words) if n and words[n - 1] == "--out"]
    if module == "ijepa_fast.export":
        places = [
            n for n, w in enumerate(words) if "-" not in (w[:1], (words[n - 1] if n else "")[:1])
        ]
        found += places[1:2]
    return found


def call(main: Callable[[list[str]], int], words: Sequence[str], allowed=frozenset({0})) -> str:
    """What a command line prints, in this process; its exit code must be one of these."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code not in allowed:
        last = err.getvalue().strip() or out.getvalue().strip()
        raise Wrong(f"exit code {code}: {last[-2000:]}")
    return out.getvalue()


# --- rules: one a module -------------------------------------------------------------------------


def command_line(module: str) -> Callable[[list[str]], int]:
    """The function `main` of `python -m module`."""
    if importlib.util.find_spec(module) is None:
        raise Wrong(f"there is no module {module}")
    package = importlib.util.find_spec(f"{module}.__main__") if _is_package(module) else None
    loaded = importlib.import_module(f"{module}.__main__" if package else module)
    if not hasattr(loaded, "main"):
        raise Wrong(f"python -m {module} is no command")
    return loaded.main


def _is_package(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _run_module(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    """A command of the package, to its end."""
    main = command_line(module)
    if command.inline and (not words or (module.endswith("visualize") and len(words) == 1)):
        # a name in the text, or a command's part, arguments left out
        call(main, [*words, "--help"])
        return
    argv = sandbox.arguments(words, outputs(module, words), making)
    for name, word, more in QUICK:
        if name == module and (not word or word in words):
            argv += more
    call(main, argv, CODES.get(module, {0}))
    for number in outputs(module, words):
        written = Path(sandbox.write(words[number]))
        if module != "ijepa_fast.doctor" and not written.exists():
            raise Wrong(f"{words[number]} was not written")


def _train(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    """Checks the whole configuration, computes its cost, and trains a tiny network with it."""
    # what a script passes on is checked where the script is called
    words = tuple(word for word in words if word != "$@")
    argv = sandbox.arguments(words, outputs(module, words), making)
    asked = parse(argv)
    data = []
    # not written or installed here: thousands of images
    if not {"shapes", "fashion_mnist"}.isdisjoint(asked.config.data.sources):
        data += ["--data.root", str(sandbox.world.images)]
    if asked.config.eval.data is not None:
        data += ["--eval.data", str(sandbox.world.images)]
    if asked.print_config:
        assert "batch:" in call(train.main, argv)
        return
    cost = call(train.main, [*argv, *data, "--dry-run", "--device", "cpu"])
    assert "parameters" in cost
    if asked.dry_run:
        return
    key = (*argv, *data)
    if "--out" in words:
        place = words.index("--out") + 1
        key = (*argv[:place], *argv[place + 1 :], *data)
    if key in sandbox.world.done:
        # the same into another folder, or on other ranks
        return
    # as many patches as the tiny run's
    patch = 4 if asked.config.init else asked.config.model.patch_size
    size = ["--model.patch-size", str(patch), "--data.crop", str(4 * patch)]
    out = sandbox.folder / "trained"
    where = [] if "--out" in words else ["--out", str(out)]
    with mock.patch.object(Pictures, "_draw", return_value=None):
        call(train.main, [*argv, *data, *SMALL, *size, *where])
    out = out if where else Path(sandbox.write(words[words.index("--out") + 1]))
    assert [row["step"] for row in tiny.rows(out) if "loss" in row] == [1, 2]
    assert (out / "checkpoints" / "step-00000002").is_dir()
    sandbox.world.done.add(key)


def _bench(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    """Parsed; tests/trainer/test_bench.py runs it."""
    assert module == "ijepa_fast.bench"
    args: list[BenchArgs] = []

    def main(argv: list[str]) -> int:
        args.append(tyro.cli(BenchArgs, args=argv))
        return 0

    call(main, words)
    importlib.import_module("benchmarks.command").choose(args[0].ops)


def _parsed(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    """Hours of measurements: the program's own parser must take the arguments; no further."""
    if importlib.util.find_spec(module) is None:
        raise Wrong(f"there is no module {module}")
    name = f"{module}.__main__" if _is_package(module) else module
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin
    _parse_only(Path(spec.origin), words)


def _parse_only(path: Path, words: Sequence[str]) -> None:
    """Runs a program until it has parsed its arguments."""
    text = path.read_text(encoding="utf-8")
    compile(text, str(path), "exec")
    if "ArgumentParser" not in text:
        if words:
            raise Wrong(f"{path.name} takes no arguments, got {' '.join(words)}")
        return
    original = argparse.ArgumentParser.parse_args

    class Enough(BaseException):
        pass

    def stop(self: argparse.ArgumentParser, args=None, namespace=None):
        original(self, args, namespace)
        raise Enough

    def main(argv: list[str]) -> int:
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
            mock.patch.object(sys, "argv", [str(path), *argv]),
            contextlib.suppress(Enough),
        ):
            runpy.run_path(str(path), run_name="__main__")
        return 0

    call(main, words)


def _pip_module(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    _pip(("pip", *words), command, sandbox)


def _pytest_module(
    module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()
):
    _pytest(("pytest", *words), command, sandbox)


def _venv(module: str, command: Command, words: tuple[str, ...], sandbox: Sandbox, making=()):
    if len(words) != 1 or words[0].startswith("-"):
        raise Wrong(f"one folder, got {' '.join(words)}")


Module = Callable[..., None]
MODULES: dict[str, Module] = {
    **dict.fromkeys(COMMANDS, _run_module),
    "ijepa_fast.train": _train,
    "ijepa_fast.bench": _bench,
    "pip": _pip_module,
    "pytest": _pytest_module,
    "venv": _venv,
}


# --- rules: one a program ------------------------------------------------------------------------


def _python(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    if words[1] == "-m":
        module, rest = words[2], words[3:]
        if module.startswith("benchmarks."):
            _parsed(module, command, rest, sandbox)
        elif module in MODULES:
            MODULES[module](module, command, rest, sandbox, making)
        else:
            raise Wrong(f"no rule for python -m {module}")
    elif words[1] == "-c":
        compile(words[2], "-c", "exec")
    else:
        path = ROOT / words[1]
        if not path.is_file():
            raise Wrong(f"there is no file {words[1]}")
        if path.parent.name != "examples":
            _parse_only(path, words[2:])
            return

        def example(argv: list[str]) -> int:
            with mock.patch.object(sys, "argv", [str(path), *argv]):
                runpy.run_path(str(path), run_name="__main__")
            return 0

        assert call(example, [*words[2:], "--steps", "3"])


def _torchrun(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    """Its own parser takes its arguments; the program runs as on one rank."""
    rest = list(words[1:])
    without = command.inline and "-m" not in rest and not any(w.endswith(".py") for w in rest)
    if without:
        rest += ["-m", "ijepa_fast.train"]
    given: list[argparse.Namespace] = []

    def main(argv: list[str]) -> int:
        given.append(torchrun.get_args_parser().parse_args(argv))
        return 0

    call(main, rest)
    (args,) = given
    if "$" not in args.nnodes:
        torchrun.parse_min_max_nnodes(args.nnodes)
    if args.nproc_per_node.isdecimal():
        assert int(args.nproc_per_node) >= 1
    if not without:
        program = ("-m", args.training_script) if args.module else (args.training_script,)
        _python(("python", *program, *args.training_script_args), command, sandbox, making)


def _srun(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    rest = list(words[1:])
    while rest and rest[0].startswith("-"):
        if "=" not in rest.pop(0):
            raise Wrong("options of srun are written --name=value here")
    if not rest:
        raise Wrong("srun needs a command")
    run(tuple(rest), command, sandbox, making)


def _pytest(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    given, unknown = sandbox.parser.parse_known_and_unknown_args(list(words[1:]))
    conftest = (ROOT / "benchmarks" / "conftest.py").read_text(encoding="utf-8")
    unknown = [word for word in unknown if f'addoption("{word}"' not in conftest]
    if unknown:
        raise Wrong(f"pytest does not know {' '.join(unknown)}")
    for word in given.file_or_dir:
        if not (ROOT / str(word).partition("::")[0]).exists():
            raise Wrong(f"there is no {word}")


def _make(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    """A target of the Makefile; the Python commands of its recipe go through their rules."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^(\w+) \?=|\$\((\w+)\)", makefile, re.MULTILINE))
    known = {name for pair in variables for name in pair}
    for word in words[1:]:
        name, equals, _ = word.partition("=")
        if name not in (known if equals else targets):
            raise Wrong(f"the Makefile has no {'variable' if equals else 'target'} {name}")
    result = subprocess.run(
        ["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise Wrong(result.stderr)
    for line in result.stdout.splitlines():
        for _, recipe in documents.split(line.replace(".venv/bin/", "")):
            if recipe[0] in ("python", "python3"):
                _python(recipe, command, sandbox, making)


@functools.cache
def _requirements() -> dict[str, list[str]]:
    """Extra -> what it installs, of setup.py."""
    given: dict[str, Any] = {}
    with mock.patch("setuptools.setup", given.update):
        runpy.run_path(str(ROOT / "setup.py"))
    return {**given["extras_require"], "": given["install_requires"]}


PIP_SWITCHES = {"-e", "-q", "-y", "-U", "--upgrade", "--no-deps", "--no-index"}
PIP_SWITCHES |= {"--disable-pip-version-check"}


def _pip(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    """Never run. Files and extras exist; a package is one of ours or of `OTHERS`."""
    if words[1] not in ("install", "uninstall"):
        raise Wrong(f"no rule for pip {words[1]}")
    requirements = _requirements()
    packages = {re.split(r"[>=;\[ ]", r)[0] for rs in requirements.values() for r in rs}
    rest = iter(words[2:])
    for word in rest:
        value = word
        if word in ("-c", "-r", "--constraint", "--requirement"):
            if not (ROOT / (value := next(rest))).is_file():
                raise Wrong(f"there is no file {value}")
        elif word == "--index-url":
            assert next(rest).startswith("https://")
        elif word == "--find-links":
            assert next(rest) == "gpu-bundle/wheels"
        elif word in PIP_SWITCHES:
            continue
        elif match := re.fullmatch(r"(\.|ijepa-fast)(?:\[([\w,]+)\])?", word):
            for extra in filter(None, (match[2] or "").split(",")):
                if extra not in requirements:
                    raise Wrong(f"setup.py has no extra {extra}")
        elif re.split(r"[>=\[]", word)[0] not in packages | PACKAGES:
            raise Wrong(f"no rule for pip's {word}")


# not ours, named in the documents
PACKAGES = {"nvidia-dali", "transformers", "timm", "typeguard", "docstring-parser"}
SYSTEM_PACKAGES = {
    *("build-essential", "dataset-fashion-mnist", "g++", "git", "make", "python3"),
    *("python3-dev", "python3-venv", "python3.11", "python3.11-dev", "python3.11-venv"),
}


def _apt(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    names = [word for word in words[2:] if word != "-y"]
    if words[1] not in ("install", "update") or not SYSTEM_PACKAGES.issuperset(names):
        raise Wrong(f"no rule for apt's {' '.join(words[1:])}")


def _script(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    """`bash FILE`, `sbatch FILE`: bash can read it. Its commands are found in it, and get what it
    passes on.
    """
    place = next((n for n, word in enumerate(words[1:], 1) if not word.startswith("-")), 0)
    path = ROOT / words[place]
    if not place or not path.is_file():
        raise Wrong(f"there is no file {words[place]}")
    text = path.read_text(encoding="utf-8")
    _bash_reads(text)
    if passed := words[place + 1 :]:
        if 'ijepa_fast.train "$@"' not in text:
            raise Wrong(f"{words[place]} takes no arguments")
        _python(("python", "-m", "ijepa_fast.train", *passed), command, sandbox, making)


def _bash_reads(text: str) -> None:
    result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Wrong(result.stderr)


def _only(*patterns: str) -> Callable[..., None]:
    """Commands that are not run: these."""

    def rule(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
        text = " ".join(words)
        if not any(re.fullmatch(pattern, text) for pattern in patterns):
            raise Wrong(f"no rule for this form of {words[0]}")

    return rule


RULES: dict[str, Callable[..., None]] = {
    "python": _python,
    "python3": _python,
    "torchrun": _torchrun,
    "srun": _srun,
    "sbatch": _script,
    "bash": _script,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "apt": _apt,
    "apt-get": _apt,
    "git": _only(r"git clone \S+( \S+)?"),
    "cd": _only(r"cd [\w-]+"),
    "source": _only(r"source \.venv/bin/activate"),
    "docker": _only(r"docker run --gpus all", r"docker run --shm-size=\d+g"),
    "tensorboard": _only(r"tensorboard --logdir runs/[\w/]+"),
}
VARIABLES = {
    "TRITON_INTERPRET": r"1",
    "OMP_NUM_THREADS": r"\d+",
    "CUDA_VISIBLE_DEVICES": r"\d*(,\d+)*",
    "PYTHONPATH": r"[\w./:]+",
    "LD_LIBRARY_PATH": r"[\w./:]+",
}


def run(words: tuple[str, ...], command: Command, sandbox: Sandbox, making=()) -> None:
    """Sends one command through the rule of its program."""
    rule = RULES.get(words[0])
    if rule is None:
        raise Wrong(f"no rule for {words[0]}")
    rule(words, command, sandbox, making)


def handle(command: Command, sandbox: Sandbox, making: Sequence[str] = ()) -> None:
    """Checks a command by its rule, and its variables.

    Raises:
        Wrong: it does not hold; the text begins with file and line.
    """
    try:
        for name, value in command.environment:
            if name == "IJEPA_FAST_FAULT":
                # read only: this process is rank 0
                assert Faults.of(value, 0) or Faults.of(value, 1)
            elif not re.fullmatch(VARIABLES.get(name, "(?!)"), value):
                raise Wrong(f"no rule for the variable {name}={value}")
        run(command.words, command, sandbox, making)
    except (AssertionError, ValueError, IndexError) as error:
        raise Wrong(f"{command}: {command.text}\n{error}") from error


# --- names, links --------------------------------------------------------------------------------


@functools.cache
def options() -> frozenset[str]:
    """Every option of every command, and torchrun's; with hyphens."""
    known = set(OWN_OPTIONS)
    for name in flatten(as_dict(Config())):
        head, dot, tail = name.rpartition(".")
        known |= {name, f"{head}{dot}no_{tail}"}
    found = {f"--{name.replace('_', '-')}" for name in known}
    with mock.patch.dict(os.environ, {"COLUMNS": "400"}):
        texts = [torchrun.get_args_parser().format_help()]
        for module in COMMANDS:
            # only whole once its command line is there
            with contextlib.suppress(Wrong):
                texts += _helps(module)
    texts.append(call(command_line("ijepa_fast.bench"), ["--help"]))
    found |= {option for text in texts for option in re.findall(r"--[a-z][\w.-]*", text)}
    return frozenset(option.replace("_", "-") for option in found)


def _helps(module: str) -> Iterator[str]:
    main = command_line(module)
    text = call(main, ["--help"])
    yield text
    # subcommands
    for choices in re.findall(r"\{([a-z,-]+)\}", text)[:1] if module.endswith("visualize") else ():
        yield from (call(main, [name, "--help"]) for name in choices.split(","))


SECTIONS = sorted(key for key, value in as_dict(Config()).items() if isinstance(value, dict))
FIELD = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?![./(])")
SUFFIXES = {"py", "json", "md", "png", "yaml", "pt", "safetensors"}
PRESET = re.compile(r"vit[a-z]\d+(_\w+)?|\w+_(?:in\d+k|published)")


def wrong_names(document: Document, commands: frozenset[str]) -> list[str]:
    """Options, settings and presets in inline code that do not exist."""
    from ijepa_fast import released_yaml

    fields = set(flatten(as_dict(Config())))
    theirs = {*released_yaml.PLAIN, *released_yaml.ABSENT, *released_yaml.IGNORED}
    theirs |= set(released_yaml.OTHERS)
    found = []
    for span in document.spans:
        if span.text in commands:
            # its rule has checked it
            continue
        words = span.text.split()
        for number, word in enumerate(words):
            option = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][\w.-]*", option):
                if option.replace("_", "-") not in options():
                    found.append(f"{span}: no command has the option {option}")
                value = word.partition("=")[2] or (words[number + 1 : number + 2] or [""])[0]
                if option == "--preset" and value not in {*PRESETS, "NAME", ""}:
                    found.append(f"{span}: there is no preset {value}")
        for match in FIELD.finditer(span.text):
            module = ROOT / "ijepa_fast" / match[1] / f"{match[2]}.py"
            file = match[2] in SUFFIXES or module.is_file()
            if match[0] not in fields | theirs and not file:
                found.append(f"{span}: there is no setting {match[0]}")
        if PRESET.fullmatch(span.text) and span.text not in PRESETS:
            found.append(f"{span}: there is no preset {span.text}")
    return found


def dead_links(document: Document) -> list[str]:
    """Relative links without a file, and anchors without a heading."""
    found = []
    for link in document.links:
        if re.match(r"[a-z]+:", link.text):
            continue
        name, _, anchor = link.text.partition("#")
        path = (document.path.parent / name).resolve() if name else document.path
        if not path.exists():
            found.append(f"{link}: there is no {link.text}")
        elif anchor and path.suffix == ".md" and anchor not in documents.anchors(path):
            found.append(f"{link}: {name or 'this file'} has no heading #{anchor}")
    return found


# --- Python --------------------------------------------------------------------------------------


class _Paths(ast.NodeTransformer):
    """Replaces the inputs among a program's texts."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            for name in self.sandbox.makers:
                if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", node.value):
                    self.sandbox.read(name)
                    return node
            return ast.copy_location(ast.Constant(self.sandbox.read(node.value)), node)
        return node


def run_python(block: Place, sandbox: Sandbox, namespace: dict[str, Any]) -> bool:
    """Runs a block if it and those before it bind all that it uses; returns whether they do.

    Raises:
        Wrong: it is no Python, or fails.
    """
    try:
        tree = ast.parse(block.text)
    except SyntaxError as error:
        raise Wrong(f"{block}: {error}") from None
    if documents.unbound(tree) - set(namespace) - set(dir(builtins)):
        return False
    tree = ast.fix_missing_locations(_Paths(sandbox).visit(tree))
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            # other packages' own
            warnings.simplefilter("ignore")
            exec(compile(tree, str(block), "exec"), namespace)
    except Exception as error:
        raise Wrong(f"{block}: {type(error).__name__}: {error}") from error
    return True


def packages(document: Document) -> set[str]:
    """Top-level packages that the Python of a document imports."""
    names: set[str] = set()
    for block in document.python:
        with contextlib.suppress(SyntaxError):
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.partition(".")[0])
    return names


# --- the documents -------------------------------------------------------------------------------


def load(path: Path, name: str | None = None) -> Document:
    """A document and where it lies."""
    return documents.read(path, name or str(path.relative_to(ROOT)), RULES)


DOCUMENTS = [load(path) for path in FILES]
COMMANDS_FOUND = [command for document in DOCUMENTS for command in document.commands]


def makers(commands: Sequence[Command]) -> dict[str, Command]:
    """Names of files and folders that commands other than training write."""
    found: dict[str, Command] = {}
    for command in commands:
        for number, word in enumerate(command.words):
            if word == "-m" and len(command.words) > number + 1:
                module, rest = command.words[number + 1], command.words[number + 2 :]
                if module in COMMANDS and module != "ijepa_fast.doctor":
                    for place in outputs(module, rest):
                        found.setdefault(rest[place], command)
    return found


def _names(places):
    return [str(place) for place in places]


def _of(document: Document) -> str:
    return str(document.path.relative_to(ROOT))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield World(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(before)


@pytest.fixture
def sandbox(world, tmp_path, monkeypatch, pytestconfig):
    monkeypatch.chdir(tmp_path)
    return Sandbox(world, tmp_path, makers(COMMANDS_FOUND), pytestconfig._parser)


@pytest.mark.parametrize("command", COMMANDS_FOUND, ids=_names(COMMANDS_FOUND))
def test_the_command_runs(command, sandbox):
    # in the text, a bare name is not run
    key = (command.words, command.environment, command.inline and len(command.words) < 4)
    if key in sandbox.world.done:
        # the same words further up
        return
    handle(command, sandbox)
    sandbox.world.done.add(key)


WITH_PYTHON = [d for d in DOCUMENTS if d.python and _of(d) not in TESTED_ELSEWHERE]


@pytest.mark.parametrize("document", WITH_PYTHON, ids=_of)
def test_the_python_runs(document, sandbox):
    """The blocks of a document in their order, those that are whole."""
    namespace: dict[str, Any] = {"__name__": "documents"}
    absent = sorted(name for name in packages(document) if importlib.util.find_spec(name) is None)
    for block in document.python:
        compile(block.text, str(block), "exec")
    if absent:
        pytest.skip(f"{', '.join(absent)} is not installed")
    ran = [run_python(block, sandbox, namespace) for block in document.python]
    assert any(ran)


SCRIPTS = [script for document in DOCUMENTS for script in document.scripts]


@pytest.mark.parametrize("script", SCRIPTS, ids=_names(SCRIPTS))
def test_bash_reads_the_script(script):
    _bash_reads(script.text)


@pytest.mark.parametrize("document", DOCUMENTS[: len(MARKDOWN)], ids=_of)
def test_links_lead_somewhere(document):
    assert not dead_links(document)


@pytest.mark.parametrize("document", DOCUMENTS[: len(MARKDOWN)], ids=_of)
def test_options_settings_and_presets_exist(document):
    assert not wrong_names(document, frozenset(c.text for c in document.commands))


def test_commands_are_found_at_all():
    found = {command.words[:3] for command in COMMANDS_FOUND}
    assert ("python", "-m", "ijepa_fast.evaluate") in found
    assert ("make", "demo") in found
    assert any(command.words[0] == "torchrun" for command in COMMANDS_FOUND)
    assert len({command.file for command in COMMANDS_FOUND}) > 5


# --- that it can fail ----------------------------------------------------------------------------

GOOD = "# A run\n\n`python -m ijepa_fast.data`, [a run](#a-run), `--optim.lr` and `vits16`.\n"


def _made_up(folder: Path, text: str) -> Document:
    path = folder / "made_up.md"
    path.write_text(text)
    return load(path, "made_up.md")


def _first_failure(document: Document, sandbox: Sandbox) -> str:
    for command in document.commands:
        try:
            handle(command, sandbox)
        except Wrong as error:
            return str(error)
    pytest.fail("nothing is wrong")


def test_a_good_document_passes(tmp_path, sandbox):
    document = _made_up(tmp_path, GOOD + "```\ngit clone URL && cd ijepa-fast   # it's here\n```\n")
    assert [command.words[0] for command in document.commands] == ["git", "cd", "python"]
    for command in document.commands:
        handle(command, sandbox)
    assert not dead_links(document)
    assert not wrong_names(document, frozenset())


@pytest.mark.parametrize(
    "command",
    [
        "python -m ijepa_fast.train --preset fashion_mnist_published",
        "python -m ijepa_fast.train --config in1k_vith14_ep300.yaml --print-config",
        "python3 -m ijepa_fast.train --preset vits16 --dry-run "
        "--data /photos /more/list.tsv 'shards/{000..099}.tar'",
        "python -m ijepa_fast.train --config runs/mine/config.yaml --init runs/mine --out runs/b",
        "python -m ijepa_fast.evaluate runs/mine --data DIR --methods knn linear --out a.json",
        "python -m ijepa_fast.evaluate runs/mine --data DIR --methods finetune "
        "--finetune.share 0.01",
        "python -m ijepa_fast.export /shared/runs/mine/checkpoints/step-00001000 timm-mine "
        "--format timm",
    ],
)
def test_made_up_inputs_are_replaced(command, tmp_path, sandbox):
    (found,) = _made_up(tmp_path, f"```\n{command}\n```\n").commands
    handle(found, sandbox)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m ijepa_fast.train --data /images --optim.learning_rate 1", "unknown option"),
        ("python -m ijepa_fast.train --data /images --preset vitx16", "preset must be one of"),
        ("python -m ijepa_fast.train --preset vits16", "data.root must be given"),
        ("python -m ijepa_fast.train --preset demo --optim.lr -1 --dry-run", "optim.lr must be"),
        ("torchrun --nprocs-per-node 2 -m ijepa_fast.train --preset demo", "exit code 2"),
        ("torchrun -m ijepa_fast.trian --preset demo", "no rule for python -m ijepa_fast.trian"),
        ("python -m ijepa_fast.evaluate runs/mine --data DIR --neighbours 3", "exit code 2"),
        ("python -m ijepa_fast.evaluate nowhere --data DIR", "nowhere"),
        ("python -m ijepa_fast.export runs/mine hf --format onnx", "exit code 2"),
        ("python -m ijepa_fast.bench --ops latent_lost", "did you mean latent_loss"),
        ("python -m ijepa_fast.doctor --jason", "exit code 2"),
        ("python -m ijepa_fast.parity tests/golden/p9.safetensors", "p9.safetensors"),
        ("python -m benchmarks.bench_step --fool", "--fool"),
        ("python -m benchmarks.bench_nothing", "no module benchmarks.bench_nothing"),
        ("python examples/nothing.py", "no file examples/nothing.py"),
        ("python benchmarks/evidence_shapes.py --fast", "takes no arguments"),
        ("make tea", "no target tea"),
        ("make gpu-check PARTS=ops", "no variable PARTS"),
        ("make gpu-check PART=everything", "everything"),
        ("pip install -e '.[everything]'", "no extra everything"),
        ("pip install -c nothing.txt .", "no file nothing.txt"),
        ("pip install torchvision", "no rule for pip's torchvision"),
        ("pytest tests/nothing", "no tests/nothing"),
        ("pytest --nothing tests/ops", "pytest does not know --nothing"),
        ("sbatch examples/nothing.sh", "no file examples/nothing.sh"),
        ("apt install emacs", "no rule for apt's"),
        ("git push --force", "no rule for this form of git"),
        ("TRITON_INTERPRET=yes pytest tests/ops", "TRITON_INTERPRET=yes"),
        ("IJEPA_FAST_FAULT=1:2:tea make demo", "tea"),
    ],
)
def test_a_wrong_command_is_named(command, words, tmp_path, sandbox):
    """In a block and in the text: with file and line."""
    for text, line in ((f"a\n\n```\n{command}\n```\n", 4), (f"a\n`{command}` b\n", 2)):
        message = _first_failure(_made_up(tmp_path, text), sandbox)
        assert message.startswith(f"made_up.md:{line}: {command}\n")
        assert words in message


def test_an_unknown_program_among_commands_is_named(tmp_path, sandbox):
    text = "```\n$ git clone URL\nas printed\n$ conda create\n```\n"
    assert "made_up.md:4: " in _first_failure(_made_up(tmp_path, text), sandbox)
    text = "```\ngit clone \\\n    URL\nas printed\n```\n"
    message = _first_failure(_made_up(tmp_path, text), sandbox)
    assert message == "made_up.md:4: as printed\nno rule for as"


def test_an_output_that_another_command_reads_is_made(tmp_path, sandbox):
    text = "```\npython -m ijepa_fast.export runs/mine hf-x --format hf\n```\n"
    text += "`python -m ijepa_fast.evaluate hf-x --data LABELLED_FOLDER`\n"
    _, reads = _made_up(tmp_path, text).commands
    without = dataclasses.replace(sandbox, makers={})
    with pytest.raises(Wrong, match="hf-x"):
        handle(reads, without)
    handle(reads, dataclasses.replace(sandbox, makers=makers(_made_up(tmp_path, text).commands)))
    assert (sandbox.folder / "hf-x" / "model.safetensors").is_file()


@pytest.mark.parametrize("target", ["gone.md", "#no-heading", "made_up.md#nowhere", "x/masks.png"])
def test_a_dead_link_is_named(target, tmp_path):
    text = f"{GOOD}\n[a\nb]({target}) ![c](made_up.md) [d](https://example.org) `[e](f)`\n"
    (problem,) = dead_links(_made_up(tmp_path, text))
    assert problem.startswith("made_up.md:6: ")
    assert target.partition("#")[2] in problem


@pytest.mark.parametrize(
    "code",
    ["--optim.learning-rate", "--methodes knn", "optim.learning_rate=3", "vits17", "--preset vitx"],
)
def test_a_wrong_name_is_named(code, tmp_path):
    (problem,) = wrong_names(_made_up(tmp_path, f"{GOOD}\n- `{code}`\n"), frozenset())
    assert problem.startswith("made_up.md:5: ")


def test_wrong_python_is_named(tmp_path, sandbox):
    text = "```python\nimport os\nx = os.listdir('DIR')\n```\n\n```python\nassert not x\n```\n"
    namespace: dict[str, Any] = {}
    first, second = _made_up(tmp_path, text).python
    assert run_python(first, sandbox, namespace)
    assert sorted(namespace["x"]) == [f"class{number}" for number in range(4)]
    with pytest.raises(Wrong, match=r"made_up.md:7: AssertionError"):
        run_python(second, sandbox, namespace)
    # not whole
    assert not run_python(second, sandbox, {})
    with pytest.raises(Wrong, match=r"made_up.md:7: "):
        run_python(dataclasses.replace(second, text="assert not"), sandbox, namespace)


def test_a_script_that_bash_cannot_read_is_named(tmp_path):
    (script,) = _made_up(tmp_path, "```\n#!/bin/bash\nif true; then\n```\n").scripts
    with pytest.raises(Wrong):
        _bash_reads(script.text)
