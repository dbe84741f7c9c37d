"""`ijepa-fast evaluate`: its data, scores and refusals."""

import json
import re
import shutil

import pytest
import torch

from ijepa_fast import evaluation
from ijepa_fast.config import DataConfig
from ijepa_fast.evaluation import labelled_data
from ijepa_fast.evaluation.features import pixels
from ijepa_fast.weights import read_weights
from ijepa_fast.weights.encoder import load_encoder
from tests.trainer import tiny

DATA = DataConfig(crop=32, decoder="pillow", threads=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    for stop in (5, 6):
        assert tiny.run(data, out, max_steps=stop) == 0
    return out


@pytest.fixture(scope="module")
def split_data(tmp_path_factory):
    """Sub-folders train (32 images) and test (12)."""
    root = tmp_path_factory.mktemp("split")
    tiny.write_images(root / "train", count=32, classes=4)
    tiny.write_images(root / "test", count=12, classes=4)
    return root


def test_json(run, split_data, capsys):
    argv = [str(run), "--data", str(split_data), "--k", "5", "--json"]
    assert evaluation.main(argv) == 0
    result = json.loads(capsys.readouterr().out)
    accuracy = result.pop("accuracy")
    versions = result.pop("versions")
    assert versions["torch"] == torch.__version__
    assert result == {
        "weights": f"step 6 of {run}",
        "encoder": "target",
        "step": 6,
        "data": str(split_data),
        "classes": 4,
        "images": [32, 12],
        "k": 5,
        "precision": "float32",
        "device": "cpu",
    }
    assert list(accuracy) == ["raw pixels", "untrained network", "target encoder, step 6"]
    # four colours
    assert accuracy["raw pixels"]["kNN"] == 1.0
    assert all(0.25 < score <= 1.0 for scores in accuracy.values() for score in scores.values())


def test_table_and_context_encoder(run, split_data, capsys):
    assert evaluation.main([str(run), "--data", str(split_data), "--encoder", "context"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["kNN", "not", "centred"]
    assert lines[2].split() == ["raw", "pixels", "100.0", "%", "100.0", "%"]
    assert lines[4].startswith("context encoder, step 6  ")
    last = f"32 training and 12 test images in 4 classes of {split_data}; k = 20"
    assert lines[-1] == last


def test_the_encoders_are_those_of_the_checkpoint(run):
    state = tiny.final_state(run)
    for which, prefix in (("target", "target_encoder."), ("context", "encoder.")):
        read = read_weights(run)
        config = read.config
        assert config is not None
        assert read.step == 6
        assert config.model.width == 32
        weights = load_encoder(read, encoder=which).network.state_dict()
        assert weights.keys() == {k.removeprefix(prefix) for k in state if k.startswith(prefix)}
        assert all(torch.equal(v, state[prefix + k]) for k, v in weights.items())
    untrained = evaluation.untrained(config).network.state_dict()
    assert not torch.equal(untrained["patch_embed.proj.weight"], weights["patch_embed.proj.weight"])


def _loaded(root):
    return [part.load() for part in labelled_data(root, DATA, CPU)]


def test_a_keyed_split_where_there_is_none(data):
    train, test = _loaded(str(data))
    assert len(train.labels) + len(test.labels) == 40
    assert 0.6 * 40 < len(train.labels) < 40
    again = _loaded(str(data))
    for one, other in zip((train, test), again, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    # every image is in one of the two
    both = torch.cat([train.images, test.images])
    assert len({image.numpy().tobytes() for image in both}) == 40
    assert torch.bincount(torch.cat([train.labels, test.labels])).tolist() == [10] * 4
    # labels belong to their images: a class is a colour
    mean = both.float().mean(dim=(1, 2))
    labels = torch.cat([train.labels, test.labels])
    assert (mean[labels == 0].argmax(dim=1) == 0).all()
    assert (mean[labels == 1].argmax(dim=1) == 2).all()


def test_sub_folders_are_the_split(split_data, tmp_path):
    train, test = _loaded(str(split_data))
    assert (len(train.labels), len(test.labels)) == (32, 12)
    assert train.images.shape == (32, 32, 32, 3)
    shutil.copytree(split_data / "train", tmp_path / "train")
    shutil.copytree(split_data / "test", tmp_path / "val")
    _, val = _loaded(str(tmp_path))
    assert torch.equal(val.images, test.images)


def test_the_part_with_the_training_classes_is_held_out(split_data, tmp_path):
    """ImageNet's `test` has no labels."""
    for name, part in (("train", "train"), ("val", "test")):
        shutil.copytree(split_data / part, tmp_path / name)
    (tmp_path / "test").mkdir()
    shutil.copy(split_data / "test" / "class0" / "000.jpg", tmp_path / "test")
    _, test = labelled_data(str(tmp_path), DATA, CPU)
    assert len(test.rows) == 12
    # what is hidden is no class
    (tmp_path / "train" / ".cache").mkdir()
    assert len(labelled_data(str(tmp_path), DATA, CPU)[1].rows) == 12
    # as it was: `test` where both have them
    shutil.rmtree(tmp_path / "test")
    shutil.copytree(split_data / "train", tmp_path / "test")
    assert len(labelled_data(str(tmp_path), DATA, CPU)[1].rows) == 32
    shutil.rmtree(tmp_path / "val" / "class0")
    shutil.rmtree(tmp_path / "test" / "class1")
    with pytest.raises(ValueError, match="classes of train and test part of data must") as told:
        labelled_data(str(tmp_path), DATA, CPU)
    assert str(told.value).endswith(f"in {tmp_path / 'test'}")


def test_images_beside_the_class_folders_are_left_out(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data / "class0" / "000.jpg", tmp_path / "data" / "loose.jpg")
    parts = _loaded(str(tmp_path / "data"))
    assert sum(len(part.labels) for part in parts) == 40


def test_unusable_images_are_left_out(data, tmp_path):
    """One that cannot be decoded, and one that is gone since the folder was listed."""
    shutil.copytree(data, tmp_path / "data")
    tiny.bad_png(tmp_path / "data" / "class1" / "bad.png")
    parts = labelled_data(str(tmp_path / "data"), DATA, CPU)
    (tmp_path / "data" / "class0" / "000.jpg").unlink()
    with tiny.log_lines() as lines:
        images = [part.load() for part in parts]
    assert sum(len(part.labels) for part in images) == 39
    assert sum(len(part.images) for part in images) == 39
    for name in ("class0/000.jpg", "class1/bad.png"):
        assert [line for line in lines if f"left out '{name}'" in line]


def test_inputs_that_are_refused(run, split_data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "untrained", ignore=shutil.ignore_patterns("checkpoints"))
    tiny.write_images(tmp_path / "one", count=10, classes=1)
    tiny.write_images(tmp_path / "other" / "train", count=8, classes=2)
    tiny.write_images(tmp_path / "other" / "test", count=9, classes=3)
    for argv, message in (
        ([tmp_path, "--data", split_data], "weights must be a run's folder, a checkpoint"),
        ([tmp_path / "untrained", "--data", split_data], "RUN must have a checkpoint"),
        ([run], "data must be given"),
        ([run, "--data", tmp_path / "none"], "data must be an existing folder"),
        ([run, "--data", tmp_path / "one"], "data must have at least 2 classes (sub-folders), got"),
        (
            [run, "--data", tmp_path / "other"],
            "classes of train and test part of data must be the same",
        ),
        ([run, "--data", split_data, "--k", "0"], "got 0"),
        ([run, "--data", split_data, "--k", "33"], "got 33"),
    ):
        assert evaluation.main([str(word) for word in argv]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert message in text


def test_damaged_checkpoints(run, tmp_path, data, capsys):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    assert evaluation.main([str(tmp_path / "run"), "--data", str(data)]) == 3
    assert "error: all 2 checkpoints" in capsys.readouterr().err


def test_nothing_decodable_is_an_error(run, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            tiny.bad_png(tmp_path / name / f"{number}.png")
    assert evaluation.main([str(run), "--data", str(tmp_path), "--k", "1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: at least half of the images must be usable, got 0 of")


def test_pixels():
    images = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    # small enough: every pixel as it is, channels first
    expected = images.permute(0, 3, 1, 2).reshape(3, -1).float()
    assert torch.equal(pixels(images), expected)
    large = torch.randint(0, 256, (300, 128, 64, 3), dtype=torch.uint8)
    result = pixels(large)
    assert result.shape == (300, 3 * 64 * 64)
    means = large.float().view(300, 64, 2, 64, 3).mean(dim=2)
    torch.testing.assert_close(result.view(300, 3, 64, 64), means.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--finetune.lr", "-1"], "finetune.lr must be at least 0 and finite, got -1.0"),
        (["--finetune.layer-decay", "2"], "finetune.layer-decay must be between 0 and 1, got 2.0"),
        (["--linear-epochs", "0"], "linear-epochs must be at least 1, got 0"),
        (["--seed", "-1"], r"seed must be in 0..2\*\*64-1, got -1"),
    ],
)
def test_settings_are_checked_before_the_weights_are_read(tmp_path, capsys, flags, message):
    assert evaluation.main([str(tmp_path / "nowhere"), *flags]) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
