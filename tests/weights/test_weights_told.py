"""What files of weights tell, and what flags may add; timm's own code on our folders."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ijepa_fast import evaluation
from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.errors import UsageError
from ijepa_fast.weights import Shape, export, read_weights
from ijepa_fast.weights.fit import fit_to
from tests.trainer import tiny
from tests.weights.test_weights import (
    MEAN,
    SMALL,
    STD,
    WIDE,
    _images,
    _near,
    _network,
    _pretrained,
    _released,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert tiny.run(data, out, max_steps=2, eval__data=data) == 0
    return out


def _subjects(capsys, *argv):
    assert evaluation.main([*(str(a) for a in argv), "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    return list(result["accuracy"])[2], result, captured.err


# --- which encoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "timm"])
@pytest.mark.parametrize("which", ["target", "context"])
def test_an_export_remembers_which_encoder_it_is(run, data, tmp_path, capsys, layout, which):
    first, second = tmp_path / "first", tmp_path / "second"
    argv = ["--format", layout, "--encoder", which]
    assert export.main([str(run), str(first), *argv]) == 0
    assert export.main([str(first), str(second), "--format", layout]) == 0
    assert f"{which} encoder of {first} written" in capsys.readouterr().out
    for folder in (first, second):
        assert f"# I-JEPA {which} encoder\n" in (folder / "README.md").read_text()
        subject, result, _ = _subjects(capsys, folder, "--data", data)
        assert subject == f"{which} encoder"
        assert result["encoder"] == which
        wanted = read_weights(run).encoder(which)
        got = read_weights(folder).encoder()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())
    # it can be asked for by its name, and not by the other's
    if which == "context":
        assert read_weights(first).encoder("context").keys() == wanted.keys()
    else:
        with pytest.raises(UsageError, match="encoder must be in the weights, got context"):
            read_weights(first).encoder("context")


def test_a_file_that_does_not_tell_is_just_an_encoder(data, tmp_path, capsys):
    save_file(dict(_network(SMALL).state_dict()), tmp_path / "a.safetensors")
    argv = (tmp_path / "a.safetensors", "--data", data, "--heads", "2")
    subject, result, _ = _subjects(capsys, *argv)
    assert (subject, result["encoder"]) == ("encoder", None)
    assert export.main([str(argv[0]), str(tmp_path / "hf"), "--heads", "2"]) == 0
    assert "\n# I-JEPA encoder\n" in (tmp_path / "hf" / "README.md").read_text()
    assert read_weights(tmp_path / "hf").kind() is None


def test_the_released_layout_with_one_encoder(tmp_path):
    context, target, _ = _released(tmp_path / "both.pth", SMALL)
    tree = torch.load(tmp_path / "both.pth")
    for name, kind, network in (
        ("encoder", "context", context),
        ("target_encoder", "target", target),
    ):
        torch.save({name: tree[name], "predictor": tree["predictor"]}, tmp_path / "one.pth")
        read = read_weights(tmp_path / "one.pth", heads=2)
        assert (read.kind(), read.title()) == (kind, f"{kind} encoder")
        assert torch.equal(read.encoder(kind)["pos_embed"], network.pos_embed)
    both = read_weights(tmp_path / "both.pth", heads=2)
    assert (both.kind("context"), both.kind("target")) == ("context", "target")


def test_an_encoder_of_an_unknown_kind_is_refused(tmp_path):
    save_file(
        dict(_network(SMALL).state_dict()),
        tmp_path / "a.safetensors",
        metadata={"ijepa_fast": json.dumps({"encoder": "student"})},
    )
    with pytest.raises(UsageError, match="encoder must be target or context, got 'student'"):
        read_weights(tmp_path / "a.safetensors", heads=2)


def test_the_card_has_the_accuracies_of_the_start_and_the_end(run, tmp_path):
    rows = tiny.rows(run)
    out = tmp_path / "run"
    out.mkdir()
    looks = [row for row in rows if "knn" in row]
    middle = {**looks[0], "step": 1, "knn": {"target encoder, step 1": 0.5}}
    text = [json.dumps({**row, "images": [16, 4]}) for row in (looks[0], middle, looks[-1])]
    (out / "metrics.jsonl").write_text("\n".join(text) + "\n")
    found = export._run_metrics(out)
    part = "kNN on data (16 training and 4 test images), "
    names = ("raw pixels", "untrained network", "target encoder, step 2")
    assert list(found) == [part + name for name in names]
    assert export._run_metrics(tmp_path) == {}


# --- flags ---------------------------------------------------------------------------------------


def test_mean_and_std_by_flag(data, tmp_path, capsys):
    export.export(_pretrained(SMALL), tmp_path / "hf", format="hf")
    path = tmp_path / "hf" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    argv = (tmp_path / "hf", "--data", data)
    _, plain, words = _subjects(capsys, *argv)
    assert "mean and std are 0.5" in words
    assert "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in words
    flags = ["--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.3", "0.4"]
    _, _, words = _subjects(capsys, *argv, *flags)
    assert "mean and std" not in words
    assert export.main([str(tmp_path / "hf"), str(tmp_path / "again"), *flags]) == 0
    again = read_weights(tmp_path / "again")
    assert (again.mean, again.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    capsys.readouterr()
    for bad, message in (
        ("--std 0.2 0 0.2", r"std must be 3 numbers above 0, got \(0.2, 0.0, 0.2\)"),
        ("--mean nan 0 0", r"mean must be 3 numbers, got \(nan, 0.0, 0.0\)"),
    ):
        assert evaluation.main([*(str(a) for a in argv), *bad.split()]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert plain["encoder"] == "target"


def test_timm_folders_take_heads_and_sizes_that_they_do_not_tell(tmp_path):
    export.export(_pretrained(WIDE), tmp_path / "timm", format="timm")
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit"}))
    with pytest.raises(UsageError, match=r"heads must be given \(--heads\)"):
        read_weights(tmp_path / "timm", image_size=WIDE.image_size)
    read = read_weights(tmp_path / "timm", heads=2, image_size=WIDE.image_size)
    assert read.shape == WIDE


@pytest.mark.parametrize("layout", ["hf", "timm", "torch"])
def test_flags_that_contradict_the_file_are_refused(tmp_path, layout):
    export.export(_pretrained(WIDE), tmp_path / "out", format=layout)
    read = read_weights(tmp_path / "out", heads=2, image_size=(16, 40))
    assert (read.shape, read.mean, read.std) == (WIDE, MEAN, STD)
    with pytest.raises(UsageError, match=r"heads must be 2, which .* tells, got 4"):
        read_weights(tmp_path / "out", heads=4)
    with pytest.raises(
        UsageError, match=r"image_size must be \[16, 40\], which .*, got \[40, 16\]"
    ):
        read_weights(tmp_path / "out", image_size=(40, 16))


def test_a_position_table_of_one_dimension_is_named(tmp_path):
    state = dict(_network(SMALL).state_dict())
    bent = state | {"pos_embed": state["pos_embed"].flatten()}
    with pytest.raises(UsageError, match=r"position table must be \(1, 3 x 3, D\), got \(288,\)"):
        fit_to(bent, state, old=SMALL.grid, new=SMALL.grid, source="here")


# --- timm itself ---------------------------------------------------------------------------------


def test_timm_computes_the_same_of_every_size(tmp_path):
    """Full width, heads and MLP of every named size, and rectangles; one block says it all."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: make venv")
    shapes = {"small": SMALL, "wide": WIDE}
    for name, a in ARCHITECTURES.items():
        patch = 14 if name == "vit_huge" else 16
        shapes[name] = Shape(
            image_size=(2 * patch, 3 * patch),
            patch_size=patch,
            width=a.width,
            depth=1,
            heads=a.heads,
            mlp_hidden=a.mlp_hidden,
        )
    for name, shape in shapes.items():
        export.export(_pretrained(shape), tmp_path / name, format="timm")
        save_file({"images": _images(shape)}, tmp_path / name / "images.safetensors")
    child = Path(__file__).with_name("timm_child.py")
    done = subprocess.run(
        [sys.executable, child, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, shape in shapes.items():
        theirs = load_file(tmp_path / name / "features.safetensors")
        with torch.no_grad():
            ours = _network(shape)(_images(shape))
        _near(theirs["patches"], ours)
        _near(theirs["pooled"], ours.mean(dim=1))
