"""`import ijepa_fast`: what it offers, its examples, its types, and that commands are over it."""

import doctest
import inspect
import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import tyro
import yaml
from PIL import Image

import ijepa_fast
from ijepa_fast import train
from ijepa_fast.__main__ import main
from ijepa_fast.config import as_arguments, as_dict, cli, flatten, parse
from ijepa_fast.errors import UsageError
from ijepa_fast.ranks import Signals
from ijepa_fast.run import Run
from ijepa_fast.visualize.run_pictures import Pictures
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the examples of the docstrings name: images, a recipe, a run of three steps."""
    folder = tmp_path_factory.mktemp("world")
    images = tiny.write_images(folder / "images", classes=4)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny.RECIPE))
    (folder / "image.jpg").write_bytes((images / "class0" / "000.jpg").read_bytes())
    with mock.patch.object(Pictures, "_draw"), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ijepa_fast.pretrain("tiny.yaml", data="images", out="runs/mine", max_steps=3)
    return folder


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(Pictures, "_draw", lambda *arguments: None)
    return world


# --- names, examples, types ----------------------------------------------------------------------


def test_names_come_when_they_are_asked_for():
    code = (
        "import sys, ijepa_fast; before = set(sys.modules); "
        "assert {'pretrain', 'Config'} <= set(dir(ijepa_fast)); "
        "assert not {'torch', 'numpy', 'tyro'} & before; "
        "ijepa_fast.Config(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        getattr(ijepa_fast, "pretrian")  # noqa: B009


DOCUMENTED = [name for name in ijepa_fast.__all__ if callable(getattr(ijepa_fast, name))]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_its_example_runs(name, inside):
    names = {"ijepa_fast": ijepa_fast, "torch": torch, "Path": Path}
    offered = getattr(ijepa_fast, name)
    found = doctest.DocTestFinder().find(offered, name, module=False, globs=names)
    assert any(test.examples for test in found)
    runner, printed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), io.StringIO()
    for test in found:
        runner.run(test, out=printed.write)
    assert not runner.failures, printed.getvalue()


def test_a_user_s_script_is_typed(tmp_path):
    """The one of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    cache = str(ROOT / ".mypy_cache" / "script")
    (code,) = re.findall(r"```python\n(import ijepa_fast\n.*?)```", text, re.DOTALL)
    lines = len(code.splitlines())
    assert lines <= 15
    (tmp_path / "script.py").write_text(code + "reveal_type(run.rows)\nreveal_type(result)\n")
    (tmp_path / "wrong.py").write_text(
        "import ijepa_fast\n"
        'ijepa_fast.embed("run", "images", layers="first")\n'
        'ijepa_fast.evaluate("run", methods=["knnn"])\n'
        "ijepa_fast.pretrian()\n"
    )
    settings = ["[mypy]", "strict = True", "follow_imports = skip", "ignore_missing_imports = True"]
    settings += ["[mypy-ijepa_fast.*]", "follow_imports = silent"]
    (tmp_path / "mypy.ini").write_text("\n".join(settings))
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", cache, "script.py", "wrong.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in result.stdout.splitlines() if re.match("(script|wrong).py", line)]
    assert [re.sub(r":\d+: error.*\[", " [", line) for line in told] == [
        "wrong.py [arg-type]",
        "wrong.py [list-item]",
        "wrong.py [attr-defined]",
        f'script.py:{lines + 1}: note: Revealed type is "list[dict[str, Any]]"',
        f'script.py:{lines + 2}: note: Revealed type is "dict[str, Any]"',
    ]


# --- commands and functions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate", "embed", "export"])
def test_a_command_has_the_arguments_of_its_function(name, capsys, monkeypatch):
    parameters = inspect.signature(getattr(ijepa_fast, name)).parameters
    asked = {}
    cli_function = tyro.cli

    def spy(function, **options):
        asked["function"] = function
        return cli_function(function, **options)

    monkeypatch.setattr(tyro, "cli", spy)
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    told = inspect.signature(asked["function"]).parameters
    assert told.keys() - parameters.keys() == ({"json"} if name == "evaluate" else set())
    assert all(told[key].default == parameters[key].default for key in parameters)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key, parameter in parameters.items():
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY and key != "finetune":
            # its text from the docstring, and its default
            shown = re.search(rf" --{key.replace('_', '-')} .+?\w\. \(default: (.+?)\)", text)
            default = parameter.default
            assert shown
            assert shown[1] == (" ".join(default) if isinstance(default, tuple) else str(default))


def test_pretrain_takes_what_the_command_takes():
    """Every option under its own name, and its value as the command parses it."""
    whole = {**flatten(as_dict(parse(["--preset", "demo"]).config)), "max_steps": 7, "seed": 3}
    words = as_arguments("demo", {name.replace(".", "__"): value for name, value in whole.items()})
    asked = parse(words)
    assert flatten(as_dict(asked.config)) == whole
    assert {field.name for field in fields(cli.TrainArguments)} == {*cli.OWN, "settings"}
    assert parse(as_arguments(asked.config, {})).config == asked.config
    short = {"data": ["a", Path("b")], "model": "vit_small", "batch_size": 64, "epochs": 60}
    config = parse(as_arguments(None, {**short, "lr": 1e-4, "workers": 3})).config
    assert (config.data.root, config.model.name, config.batch.global_) == (
        ("a", "b"),
        "vit_small",
        64,
    )
    assert (config.optim.epochs, config.optim.lr, config.data.threads) == (60, 1e-4, 3)
    part = replace(config.optim, lr=0.25)
    nested = {"optim": part, "eval": {"every": 5}, "log": {"samples": True}}
    config = parse(as_arguments(config, nested)).config
    assert (config.optim.lr, config.eval.every, config.log.samples) == (0.25, 5, True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ijepa_fast.pretrain("dmeo"),
            "config must be a Config, a YAML file, or one of demo",
        ),
        (lambda: ijepa_fast.pretrain("demo", bach_size=3), "unknown option --bach_size; did you"),
        (lambda: ijepa_fast.pretrain("demo", epochs="many"), "--optim.epochs must be a whole num"),
        (lambda: ijepa_fast.pretrain("demo", optim={"lr": -1}), "optim.lr must be at least 0"),
        (
            lambda: ijepa_fast.pretrain("demo", dry_run=True),
            "dry_run must be left to the command, got True",
        ),
        (
            lambda: ijepa_fast.embed("runs/mine", "images", layers="first"),
            "layers must be one of las",
        ),
        (
            lambda: ijepa_fast.evaluate("runs/mine", methods="knnn"),
            "methods must be one of knn, r",
        ),
        (
            lambda: ijepa_fast.export("runs/mine", "x", format="onix"),
            "format must be one of hf, timm",
        ),
        (lambda: ijepa_fast.embed(3, "images"), "weights must be a path, or what was read, got 3"),
        (
            lambda: ijepa_fast.embed(ijepa_fast.load_encoder("runs/mine"), "images", heads=2),
            "heads must be left out where the weights are no file",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(call, message, inside):
    before = sorted(inside.rglob("*"))
    with pytest.raises(UsageError, match=re.escape(message)) as told:
        call()
    assert "\n" not in str(told.value)
    assert sorted(inside.rglob("*")) == before


# --- pretrain ------------------------------------------------------------------------------------


def _state():
    logger = logging.getLogger("ijepa_fast")
    return (
        {thread.name for thread in threading.enumerate()},
        [signal.getsignal(number) for number in Signals.HANDLED],
        (list(logger.handlers), logger.level, logger.propagate),
        (torch.distributed.is_initialized(), torch.get_num_threads(), os.getcwd()),
        (torch.is_grad_enabled(), torch.random.get_rng_state().sum().item()),
    )


def test_it_is_the_command_to_the_bit_and_leaves_the_process_as_it_was(inside, tmp_path):
    before = _state()
    run = ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "a", max_steps=4)
    assert _state() == before
    again = ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "a", max_steps=6)
    assert _state() == before
    assert (run.step, again.step, again.end, again.signal) == (4, 6, 6, 0)
    argv = ["--config", "tiny.yaml", "--data", "images", "--out", str(tmp_path / "b")]
    assert train.main([*argv, "--max-steps", "6"]) == 0
    tiny.assert_same_state(tmp_path / "a", tmp_path / "b")
    assert [row["loss"] for row in again.rows] == tiny.losses(tmp_path / "b")
    before = _state()
    with pytest.raises(UsageError, match="the recipe differs"):
        ijepa_fast.pretrain("tiny.yaml", data="images", out=run, seed=4)
    assert _state() == before


def test_a_signal_ends_it_after_a_step(inside, tmp_path, monkeypatch):
    before = _state()
    tiny.stop_at(signal.SIGINT, 3, monkeypatch)
    run = ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "run")
    assert (run.step, run.end, run.signal) == (3, 15, signal.SIGINT)
    assert (run.out / "checkpoints" / "step-00000003").is_dir()
    assert _state() == before


def test_ctrl_c_while_there_is_nothing_to_save(inside, tmp_path, monkeypatch):
    """In a notebook the kernel lives on."""
    before = _state()
    monkeypatch.setattr(Run, "announce", lambda run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "run")
    assert _state() == before


def test_in_a_thread(inside, tmp_path):
    done = []

    def work():
        done.append(
            ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "t", max_steps=1)
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [run.step for run in done] == [1]


def test_twice_with_a_process_group(inside, tmp_path, monkeypatch):
    """As under torchrun, of one rank; the group is made and ended each time."""
    for name, value in tiny.rank_environments(1)[0].items():
        monkeypatch.setenv(name, value)
    before = _state()
    for steps in (1, 2):
        run = ijepa_fast.pretrain("tiny.yaml", data="images", out=tmp_path / "run", max_steps=steps)
        assert (run.step, _state()) == (steps, before)


# --- encoders ------------------------------------------------------------------------------------


def test_preprocess_and_encoder_are_what_embed_does(inside, tmp_path):
    random = np.random.default_rng(0)
    shapes = [(60, 44), (33, 90), (32, 32), (20, 24)]
    for number, shape in enumerate(shapes):
        pixels = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    encoder = ijepa_fast.load_encoder("runs/mine")
    found = ijepa_fast.embed(encoder, tmp_path, decoder="pillow")
    paths = [tmp_path / path for path in found.paths]
    x = encoder.preprocess(paths)
    assert (x.shape, x.dtype) == ((5, 3, 32, 32), torch.float32)
    np.testing.assert_allclose(encoder(x).numpy(), found.features, rtol=1e-5, atol=1e-6)
    assert encoder(x[1]).shape == (32,)
    torch.testing.assert_close(encoder(x[1]), encoder(x)[1], rtol=1e-5, atol=1e-6)
    for row, path in zip(x, paths, strict=True):
        opened = Image.open(path)
        assert torch.equal(encoder.preprocess(str(path)), row)
        assert torch.equal(encoder.preprocess(opened), row)
        array = np.array(opened.convert("RGB"))
        assert torch.equal(encoder.preprocess(array), row)
        assert torch.equal(encoder.preprocess(torch.from_numpy(array)), row)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images must be at least one, got []"),
        (3, "an image must be a path, a PIL image or uint8 (height, width, 3), got 'int'"),
        (torch.zeros(3, 8, 8), "an image must be uint8 (height, width, 3), got 'torch.float32 (3"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "an image must be uint8 (height, width, 3)"),
        ("tiny.yaml", "an image must be decodable, got tiny.yaml: not an image"),
    ],
)
def test_what_is_no_image(images, message, inside):
    encoder = ijepa_fast.load_encoder("runs/mine")
    with pytest.raises(UsageError, match=re.escape(message)):
        encoder.preprocess(images)
    with pytest.raises(ValueError, match=re.escape("images must be float (B, 3, height, width)")):
        encoder(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_an_encoder_is_taken_as_it_is_now(inside, tmp_path):
    encoder = ijepa_fast.load_encoder("runs/mine", encoder="context")
    before = ijepa_fast.evaluate(encoder, "images", k=3)
    assert before == ijepa_fast.evaluate("runs/mine", "images", k=3, encoder="context")
    with torch.no_grad():
        encoder.network.norm.weight.mul_(2)
    weights = ijepa_fast.read_weights(ijepa_fast.export(encoder, tmp_path / "timm", format="timm"))
    written = weights.encoder()["norm.weight"]
    assert torch.equal(written, encoder.network.norm.weight)
    # what the run measured is not of these weights
    assert ijepa_fast.weights.as_pretrained(encoder).run is None
    # of a network without a run as well
    bare = ijepa_fast.Encoder(encoder.network, patch_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
    features = ijepa_fast.embed(bare, "images", decoder="pillow").features
    expected = ijepa_fast.embed(
        weights, "images", decoder="pillow", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert np.array_equal(features, expected.features)
