"""Hostile files that a run reads, sockets that it opens, and what it writes into logs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ijepa_fast.config.cli import load_yaml, read_yaml
from ijepa_fast.errors import CheckpointError, UsageError
from ijepa_fast.state import checkpoint
from tests.state.test_saving import _state
from tests.trainer import tiny
from tests.trainer.damage import mutate

ROOT = Path(__file__).parents[2]


def _aliases(levels):
    """A few hundred bytes that stand for 10 ** levels entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_aliases(9), "no aliases"),
        ("a: &a [*a]", "no aliases"),
        ("[" * 5000, "at most 20 levels"),
        ("{a: " * 30 + "1" + "}" * 30, "at most 20 levels"),
        ("x: !!python/object/apply:os.system ['touch /tmp/owned']", "could not determine"),
        ("x: !!python/name:os.system", "could not determine"),
        ("a" * (2 << 20), "at most 1048576 characters"),
        ("a: 'b", "found unexpected end"),
        ("\x00", "special characters are not allowed"),
        ("- " * 3000, "at most 20 levels"),
    ],
)
def test_hostile_yaml_is_refused(text, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_yaml(text)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_yaml(path)


def test_plain_yaml_still_loads():
    assert load_yaml("a: {b: [1, 2.5, x]}\n# c\n") == {"a": {"b": [1, 2.5, "x"]}}
    assert load_yaml("") is None


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_mutated_checkpoints_are_refused_or_whole(tmp_path, name):
    """A short campaign; the long one is in tests/torture."""
    path = checkpoint.write(tmp_path, _state(7))
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    expected = checkpoint.read(path)
    refused = 0
    for seed in range(120):
        (path / name).write_bytes(mutate(whole[name], np.random.default_rng(seed)))
        try:
            state = checkpoint.read(path)
        except CheckpointError:
            refused += 1
            continue
        # unchanged, or changed where it makes no difference (a space in the manifest)
        assert state.step == expected.step
        for key, tensor in expected.tensors.items():
            assert tensor.equal(state.tensors[key])
    assert refused >= 100


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        json.dumps({"state.json": {"bytes": 10**400, "sha256": "x"}}),
        json.dumps({"../../etc/passwd": {"bytes": 1, "sha256": "x"}}),
        json.dumps({"state.json": 1, "state.safetensors": []}),
        '{"state.json": NaN}',
        "\ud800",
    ],
)
def test_hostile_manifests(tmp_path, manifest):
    path = checkpoint.write(tmp_path, _state(7))
    (path / "manifest.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


AUDIT = """
import sys
opened = []

def hook(event, arguments):
    if event in ("socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"):
        opened.append((event, arguments[1:]))

sys.addaudithook(hook)
from ijepa_fast.train import main
code = main(sys.argv[1:])
print("SOCKETS", opened)
sys.exit(code)
"""


def test_a_run_alone_opens_no_socket(tmp_path):
    data = tiny.write_images(tmp_path / "data")
    argv = tiny.arguments(data, tmp_path / "run", max_steps=2, log__to="tensorboard")
    result = subprocess.run(
        [sys.executable, "-c", AUDIT, *argv, "--eval.data", str(data)],
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "SOCKETS []" in result.stdout


def test_control_characters_do_not_reach_log_or_terminal(tmp_path, capsys):
    """File names and reasons, wherever they are shown."""
    data = tiny.write_images(tmp_path / "data")
    evil = "x\x1b[2J\x07\r\nFAKE LINE.jpg"
    (data / "class0" / evil).write_bytes(b"<html>")
    tiny.bad_png(data / "class1" / "y\x1b]0;owned\x07.png")
    out = tmp_path / "run"
    assert tiny.run(data, out, data__max_bad_share=0.5) == 0
    captured = capsys.readouterr()
    for text in (captured.out, captured.err, (out / "train.log").read_text()):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert not any(line.startswith("FAKE") for line in text.splitlines())
    names = [
        json.loads(line)["file"] for line in (out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert f"class0/{evil}" in names


@pytest.mark.parametrize("name", ["../up", "a/b/../../c", "sp ace", "ü\x1b[2J", "-dash"])
def test_odd_names_of_a_run_are_a_folder_and_no_more(tmp_path, name):
    data = tiny.write_images(tmp_path / "data")
    inside = tmp_path / "inside"
    inside.mkdir()
    argv = tiny.arguments(data, inside / "run", max_steps=1)
    argv[argv.index("--out") : argv.index("--out") + 2] = [f"--out={inside / name}"]
    assert tiny._main(argv, pictures=False) == 0
    expected = Path(os.path.normpath(inside / name))
    assert (expected / "checkpoints").is_dir()
    assert "\x1b" not in (expected / "train.log").read_text()
    # nothing beside it
    made = {p.name for p in tmp_path.iterdir()} | {p.name for p in inside.iterdir()}
    assert made <= {"data", "inside", "up", "recipe.yaml", expected.name, "a", "run"}
