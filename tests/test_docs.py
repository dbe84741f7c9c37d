"""Every command of the documents parses and, where it is quick, runs; links and options exist.

A command is a line of a fenced block or of a script, or inline code, that begins with one of
`PROGRAMS`. Its own parser must take it. The quick ones (`RUN`) run on a tiny run, document by
document in one folder, so that what one command writes the next one reads.
"""

import argparse
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tyro
import yaml
from torch.distributed import run as torchrun

from ijepa_fast import __main__ as console
from ijepa_fast import train
from ijepa_fast.config import Config, cli, released_yaml
from ijepa_fast.config.presets import PRESETS
from ijepa_fast.ranks.faults import Faults
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")]
GUIDES += sorted((ROOT / "docs").glob("*.md"))
# dated: their commands are those of their day, their links must still lead somewhere
DATED = [ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "log").glob("*.md"))]
EXAMPLES = [path for path in sorted((ROOT / "examples").iterdir()) if path.suffix in (".py", ".sh")]
# commands that run here, and what makes them quick
RUN = {
    ("ijepa_fast.data", ""): (),
    ("ijepa_fast.embed", ""): ("--decoder", "pillow"),
    ("ijepa_fast.export", ""): (),
    ("ijepa_fast.evaluate", "knn"): ("--decoder", "pillow", "--linear-epochs", "1"),
    **{
        ("ijepa_fast.visualize", name): ()
        for name in ("masks", "curves", "report", "pca", "neighbours")
    },
    ("ijepa_fast.visualize", "train-decoder"): ("--steps=2", "--images=16", "--width=8"),
    ("ijepa_fast.visualize", "predictor"): ("--sampling-steps=2", "--seeds=2"),
    ("ijepa_fast.visualize", "prove"): ("--sampling-steps=2", "--blocks=8", "--seeds=2"),
}


class Parsed(BaseException):
    """A program's parser has taken the arguments."""


def _ids(paths: Sequence[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# --- what a document holds -----------------------------------------------------------------------


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language; of other files than Markdown the script or docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [] if language == "python" else [text.split('"""')[path.suffix == ".py"]]


def unfenced(path: Path) -> str:
    """A Markdown file without its fenced blocks."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(path: Path) -> list[str]:
    """Inline code, one space between words."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", unfenced(path))]


def split(line: str) -> list[list[str]]:
    """The words of a line's commands: without variables before, comments, what follows `|`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|<>"):
            found.append([])
        elif found[-1] or not re.match(r"[A-Z_]+=", word):
            found[-1].append(word)
    return [words for words in found if words and words[0] in PROGRAMS]


def commands(path: Path) -> Iterator[tuple[str, list[str], bool]]:
    """(text, words, inline) of every command."""
    lines: list[tuple[str, bool]] = []
    for code in blocks(path, "(?:bash)?"):
        typed = [line.strip() for line in code.replace("\\\n", " ").splitlines()]
        # behind a prompt, where there is one: the rest is what was printed
        prompted = [line.removeprefix("$ ") for line in typed if line.startswith("$ ")]
        lines += [(line, False) for line in prompted or typed]
    if path.suffix == ".md":
        lines += [(span, True) for span in spans(path) if " " in span]
    for text, inline in lines:
        if re.sub(r"^([A-Z_]+=\S* )+", "", text).partition(" ")[0] in PROGRAMS:
            yield from ((text, words, inline) for words in split(text))


# --- a command's rule ----------------------------------------------------------------------------


def call(main: Callable[[], object], argv: Sequence[str], parse_only: bool = False) -> str:
    """What a command prints; ValueError with its last words where it fails.

    With `parse_only` it ends where its parser, tyro's or argparse's, has taken the arguments.
    """

    def ending(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parsed(*args: Any, **kwargs: Any) -> None:
            stop.close()
            parse(*args, **kwargs)
            raise Parsed

        return parsed

    out, parser = io.StringIO(), argparse.ArgumentParser
    with (
        contextlib.ExitStack() as stop,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        mock.patch.object(sys, "argv", list(argv)),
    ):
        if parse_only:
            stop.enter_context(mock.patch.object(tyro, "cli", ending(tyro.cli)))
            ended = ending(parser.parse_args)
            stop.enter_context(mock.patch.object(parser, "parse_args", ended))
        try:
            code = main()
        except Parsed:
            code = 0
        except SystemExit as end:
            code = end.code
    if code and not isinstance(code, dict):
        raise ValueError(f"exit code {code}: {out.getvalue().strip()[-1500:]}")
    return out.getvalue()


def _run(path: Path, argv: Sequence[str], parse_only: bool = False) -> str:
    """A program of the repository; one without a parser takes no arguments, and none is run."""
    if not re.search(r"parse_args\(|cli\(|import main\n|argv", path.read_text("utf-8")):
        if argv and argv[0] != "--help":
            raise ValueError(f"{path.name} takes no arguments, got {' '.join(argv)}")
        return ""
    main = functools.partial(runpy.run_path, str(path), run_name="__main__")
    return call(main, [str(path), *argv], parse_only)


def _module(name: str, argv: Sequence[str], parse_only: bool = False) -> str:
    """`python -m NAME`; of `ijepa_fast` without what ends the process."""
    package, _, command = name.partition(".")
    if package == "ijepa_fast":
        words = [command, *argv] if command else [*argv]
        return call(functools.partial(console.main, words), [name], parse_only)
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__main__.py"):
        if file.is_file():
            return _run(file, argv, parse_only)
    raise ValueError(f"there is no command {name}")


def _train(argv: Sequence[str]) -> None:
    """The whole configuration is valid, and has data."""
    whole = ["--preset", "demo"]
    asked = cli.parse([w for word in argv for w in (whole if word == "$@" else [word])])
    if not asked.config.data.root:
        raise ValueError("--data is missing")


def _python(words: Sequence[str], inline: bool) -> None:
    if words[1] != "-m":
        _run(_file(words[1]), words[2:], parse_only=True)
    elif (module := words[2]) == "ijepa_fast.train":
        _train(words[3:])
    elif module in ("pip", "pytest"):
        PROGRAMS[module](words[2:], inline)
    elif module != "venv":
        # in the text, arguments may be left out
        rest = ["--help"] if inline and len(words) < 5 else words[3:]
        quick = [RUN[key] for key in RUN if key[0] == module and (not key[1] or key[1] in rest)]
        if quick and not inline:
            # made-up folders of images are the tiny data set; runs are in the folder already
            given = [re.sub("^(/images|LABELLED_FOLDER|DIR)$", "images", word) for word in rest]
            _module(module, [*given, *quick[0]])
        else:
            _module(module, rest, parse_only=True)


def _console(words: Sequence[str], inline: bool) -> None:
    """`ijepa-fast NAME ...` is `python -m ijepa_fast.NAME ...`; it has no module for `bench`."""
    if not words[1].startswith("-") and words[1] != "bench":
        _python(["python", "-m", f"ijepa_fast.{words[1]}", *words[2:]], inline)


def _torchrun(words: Sequence[str], inline: bool) -> None:
    """Perhaps behind srun; in the text the program may be left out."""
    rest = list(words[words.index("torchrun") + 1 :])
    rest += [] if "-m" in rest else ["-m", "ijepa_fast.train", "--data", "/images"]
    parsed: list[argparse.Namespace] = []
    call(lambda: parsed.append(torchrun.get_args_parser().parse_args(rest)), ["torchrun"])
    program = ["python", "-m", parsed[0].training_script]
    _python([*program, *parsed[0].training_script_args], inline)


def _make(words: Sequence[str], inline: bool) -> None:
    """Its targets and variables are known; the Python of the recipe goes through its rule."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in (word.partition("=")[0] for word in words[1:] if "=" in word):
        if not re.search(rf"^{name} \?=|\$\({name}\)", text, re.MULTILINE):
            raise ValueError(f"the Makefile has no variable {name}")
    made = _quiet(["make", "-n", *words[1:]])
    for recipe in split(made.replace(".venv/bin/", "").replace("\n", ";")):
        if recipe[0].startswith("python"):
            _python(recipe, inline=True)


def _script(words: Sequence[str], inline: bool) -> None:
    place = next(n for n, word in enumerate(words) if n and not word.startswith("-"))
    _quiet(["bash", "-n", str(_file(words[place]))])
    if words[place + 1 :]:
        _train(words[place + 1 :])


def _pip(words: Sequence[str], inline: bool) -> None:
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    for before, word in pairwise(words):
        if before == "-c":
            _file(word)
        if match := re.fullmatch(r"(?:\.|ijepa-fast)\[([\w,]+)\]", word):
            missing = set(match[1].split(",")) - set(setup.call_args.kwargs["extras_require"])
            if missing:
                raise ValueError(f"setup.py has no extra {', '.join(missing)}")


def _quiet(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)
    return done.stdout


def _file(name: str) -> Path:
    if not (ROOT / name).exists():
        raise ValueError(f"there is no file {name}")
    return ROOT / name


PROGRAMS: dict[str, Callable[[Sequence[str], bool], None]] = {
    **dict.fromkeys(("python", "python3"), _python),
    **dict.fromkeys(("sbatch", "bash"), _script),
    **dict.fromkeys(("torchrun", "srun"), _torchrun),
}
PROGRAMS |= {
    "ijepa-fast": _console,
    "make": _make,
    "pip": _pip,
    "pytest": lambda words, inline: None,
}


def wrong_commands(path: Path) -> list[str]:
    """Commands of a document that are refused or fail, and why."""
    found = []
    for text, words, inline in commands(path):
        try:
            for plan in re.findall(r"IJEPA_FAST_FAULT=(\S+)", text):
                Faults.of(plan, 0)
            for word in words:
                if re.match(r"(tests|examples|benchmarks)/", word):
                    _file(word)
            PROGRAMS[words[0]](words, inline)
        except (Exception, SystemExit) as error:
            found.append(f"{text}\n  {type(error).__name__}: {error}")
    return found


# --- names and links -----------------------------------------------------------------------------


@functools.cache
def options() -> set[str]:
    """Every option of every command, and torchrun's; with hyphens."""
    names = ("train", "data", "doctor", "embed", "evaluate", "export", "parity", "replay")
    asked = [[f"ijepa_fast.{name}"] for name in (*names, "visualize")] + [["benchmarks"]]
    asked += [list(key) for key in RUN if key[0] == "ijepa_fast.visualize"]
    text = torchrun.get_args_parser().format_help() + " ".join(f"--{n}" for n in cli.OWN)
    with mock.patch.dict(os.environ, {"COLUMNS": "400"}):
        text += "".join(_module(name, [*rest, "--help"]) for name, *rest in asked)
    return {name.replace("_", "-") for name in re.findall(r"--[a-z][\w.-]*", text)}


def wrong_names(path: Path) -> list[str]:
    """Options, settings and presets in inline code that do not exist."""
    tree = cli.as_dict(Config())
    fields = {*cli.flatten(tree), *released_yaml.PLAIN, *released_yaml.ABSENT}
    fields |= {*released_yaml.IGNORED, *released_yaml.OTHERS}
    sections = "|".join(key for key, value in tree.items() if isinstance(value, dict))
    setting = rf"(?<![\w./-])(?:{sections})\.(?!png|safetensors|onnx|py|md)[a-z_]+\b(?![./(])"
    preset = r"vit[a-z]\d+(?:_\w+)?|\w+_(?:in\d+k|published)"
    known = {text for text, _, _ in commands(path)}
    found = []
    for span in {span for span in spans(path) if not span.startswith("docker ")} - known:
        flags = re.findall(r"(?<!\S)--[a-z][\w.-]*", span)
        found += [name for name in flags if name.replace("_", "-") not in options()]
        found += [name for name in re.findall(setting, span) if name not in fields]
        found += [span] if re.fullmatch(preset, span) and span not in PRESETS else []
    return found


def anchors(path: Path) -> set[str]:
    """Of a Markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*?)\s*$", unfenced(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(path: Path) -> list[str]:
    """Relative links without a file, and anchors without a heading."""
    text = re.sub(r"`[^`]+`", "", unfenced(path))
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text) + re.findall(r"(?:src|href)=\"(.+?)\"", text)
    found = []
    for link in (link for link in links if not re.match(r"[a-z]+:", link)):
        name, _, anchor = link.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(link)
    return found


# --- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data set of 48 images in 4 classes and a run of four blocks, as guides ask for four."""
    folder = tmp_path_factory.mktemp("world")
    images = tiny.write_images(folder / "images", 48, classes=4)
    size = {"data__crop": 16, "model__patch_size": 4, "model__depth": 4}
    assert tiny.run(images, folder / "run", max_steps=4, eval__data=images, **size) == 0
    return folder


@pytest.fixture
def inside(world, tmp_path, monkeypatch):
    """A folder in which the runs that documents name exist, and the released trainer's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(world / "images")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "runs").mkdir()
    shutil.copytree(world / "run", tmp_path / "runs" / "other")
    for name in ("mine", "fashion"):
        (tmp_path / "runs" / name).symlink_to(world / "run")
    recipe = {"data": {"batch_size": 128, "root_path": "images"}, "meta": {"pred_depth": 12}}
    recipe |= {"mask": {"patch_size": 14}, "optimization": {"epochs": 300}}
    (tmp_path / "in1k_vith14_ep300.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("path", [*GUIDES, *EXAMPLES], ids=_ids([*GUIDES, *EXAMPLES]))
def test_commands_and_python_hold(path, inside):
    assert not wrong_commands(path)
    # those of the kernels are run by test_kernels_alone.py
    with mock.patch.object(train, "pretrain", functools.partial(train.pretrain, max_steps=2)):
        for code in blocks(path, "python") if path.parent.name != "kernels" else ():
            exec(compile(code, path.name, "exec"), {})


@pytest.mark.parametrize("path", GUIDES, ids=_ids(GUIDES))
def test_options_settings_and_presets_exist(path):
    assert not wrong_names(path)


@pytest.mark.parametrize("path", [*GUIDES, *DATED], ids=_ids([*GUIDES, *DATED]))
def test_links_lead_somewhere(path):
    assert not dead_links(path)
