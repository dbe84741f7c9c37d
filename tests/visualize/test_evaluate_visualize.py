"""kNN scores of a run's features, and pictures whose pixels say what they should."""

import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast import evaluate, visualize
from ijepa_fast.config import DataConfig
from ijepa_fast.data import build_index
from ijepa_fast.evaluate import central_windows, labelled_data
from ijepa_fast.evaluate.features import pixels
from ijepa_fast.masks import Masks
from ijepa_fast.visualize import figure
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


def _error(capsys):
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


# --- evaluate ------------------------------------------------------------------------------------


def test_json(run, split_data, capsys):
    argv = [str(run), "--data", str(split_data), "--k", "5", "--json"]
    assert evaluate.main(argv) == 0
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
    assert evaluate.main([str(run), "--data", str(split_data), "--encoder", "context"]) == 0
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
    untrained = evaluate.untrained(config).state_dict()
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
    with pytest.raises(ValueError, match="classes of train and test part must be the same") as told:
        labelled_data(str(tmp_path), DATA, CPU)
    assert str(told.value).endswith(f"in {tmp_path / 'test'}")


def test_images_beside_the_class_folders_are_left_out(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shutil.copy(data / "class0" / "000.jpg", tmp_path / "data" / "loose.jpg")
    parts = _loaded(str(tmp_path / "data"))
    assert sum(len(part.labels) for part in parts) == 40


def test_an_undecodable_image_is_left_out(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    tiny.bad_png(tmp_path / "data" / "class1" / "bad.png")
    with tiny.log_lines() as lines:
        parts = _loaded(str(tmp_path / "data"))
    assert sum(len(part.labels) for part in parts) == 40
    assert sum(len(part.images) for part in parts) == 40
    assert [line for line in lines if "left out class1/bad.png" in line]


def test_not_a_run(tmp_path, data, capsys):
    assert evaluate.main([str(tmp_path), "--data", str(data)]) == 2
    assert "weights must be a run's folder, a checkpoint" in _error(capsys)


def test_a_run_without_checkpoint(run, tmp_path, data, capsys):
    shutil.copy(run / "config.yaml", tmp_path)
    assert evaluate.main([str(tmp_path), "--data", str(data)]) == 2
    assert "RUN must have a checkpoint" in _error(capsys)


def test_damaged_checkpoints(run, tmp_path, data, capsys):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    assert evaluate.main([str(tmp_path / "run"), "--data", str(data)]) == 3
    assert "error: all 2 checkpoints" in capsys.readouterr().err


def test_no_data(run, tmp_path, capsys):
    assert evaluate.main([str(run)]) == 2
    assert "data must be given" in _error(capsys)
    assert evaluate.main([str(run), "--data", str(tmp_path / "none")]) == 2
    assert "data.root must be an existing folder" in _error(capsys)


def test_one_class(run, tmp_path, capsys):
    tiny.write_images(tmp_path / "data", count=10, classes=1)
    assert evaluate.main([str(run), "--data", str(tmp_path / "data")]) == 2
    assert "data must have at least 2 classes (sub-folders), got 1" in _error(capsys)


def test_other_classes_in_the_test_part(run, tmp_path, capsys):
    tiny.write_images(tmp_path / "train", count=8, classes=2)
    tiny.write_images(tmp_path / "test", count=9, classes=3)
    assert evaluate.main([str(run), "--data", str(tmp_path)]) == 2
    assert "classes of train and test part must be the same" in _error(capsys)


@pytest.mark.parametrize("k", [0, 33])
def test_k_out_of_range(run, split_data, capsys, k):
    assert evaluate.main([str(run), "--data", str(split_data), "--k", str(k)]) == 2
    assert f"got {k}" in _error(capsys)


def test_nothing_decodable_is_an_error(run, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(8):
            tiny.bad_png(tmp_path / name / f"{number}.png")
    assert evaluate.main([str(run), "--data", str(tmp_path), "--k", "1"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: data must hold images that can be decoded")


@pytest.mark.parametrize("crop", [(32, 32), (32, 48), (64, 24), (16, 160)])
def test_central_windows_against_a_plain_search(tmp_path, crop):
    sizes = [(40, 30), (30, 40), (33, 33), (100, 7), (7, 100), (31, 64)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    index = build_index(tmp_path)
    rows = np.array([5, 0, 1, 2, 3, 4])
    windows = central_windows(index, rows, crop)
    assert windows.dtype == np.int32
    for row, (top, left, height, width) in zip(rows, windows.tolist(), strict=True):
        image_w, image_h = sizes[row]
        # a window of exactly the crop's shape grown until it touches a side, rounded down
        scale = min(Fraction(image_h, crop[0]), Fraction(image_w, crop[1]))
        exact = (crop[0] * scale, crop[1] * scale)
        assert (height, width) == tuple(max(1, int(side)) for side in exact)
        assert 0 <= top <= image_h - height
        assert 0 <= left <= image_w - width
        assert abs((image_h - height) - 2 * top) <= 1
        assert abs((image_w - width) - 2 * left) <= 1


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


# --- visualize -----------------------------------------------------------------------------------

GRID = (4, 6)
PATCHES = 24


def _scene():
    """Two images of plain colours, every patch its own; two target blocks, one context each."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 160, (2, *GRID, 3), dtype=np.uint8)
    # no grey: a faded patch is, and so is the background
    colours[..., 0] = 200
    images = colours.repeat(8, axis=1).repeat(8, axis=2)
    context = [[0, 1, 2, 6, 7, 8], [9, 10, 11, 15]]
    masks = Masks(
        context_index=torch.tensor(context[0] + [PATCHES + p for p in context[1]]).int(),
        context_cu=torch.tensor([0, 6, 10]).int(),
        max_context=6,
        target_index=torch.tensor([[[4, 5, 10, 11], [18, 19, 12, 13]], [[0, 1, 6, 7]] * 2]).int(),
    )
    shown = [
        [range(PATCHES), context[0], [4, 5, 10, 11], [18, 19, 12, 13]],
        [range(PATCHES), context[1], [0, 1, 6, 7], [0, 1, 6, 7]],
    ]
    return colours, images, masks, shown


def _panels(picture, count):
    """Cuts a picture into its panels: rows of pixels that are not white, below the titles."""
    # panels hold no pixel as light as the background
    inside = (picture < 253).any(axis=2)
    columns = inside.mean(axis=0) > 0.3
    edges = np.flatnonzero(np.diff(np.concatenate([[False], columns, [False]]).astype(int)))
    assert len(edges) == 2 * count
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_masks_keep_the_colours_of_what_is_visible(tmp_path, monkeypatch):
    """What is handed to the axes: exact."""
    colours, images, masks, shown = _scene()
    pyplot = figure.pyplot()
    drawn, titles = [], []
    monkeypatch.setattr(pyplot.Axes, "imshow", lambda _axis, image: drawn.append(image))
    monkeypatch.setattr(pyplot.Axes, "set_title", lambda _axis, text, **_: titles.append(text))
    visualize.draw_masks(tmp_path / "masks.png", images, masks, GRID)
    assert len(drawn) == 8
    expected = ["image", "context (6)", "target 1 (4)", "target 2 (4)"]
    assert titles == [*expected, expected[0], "context (4)", *expected[2:]]
    for number, image in enumerate(drawn):
        row, column = divmod(number, 4)
        for patch in range(PATCHES):
            y, x = divmod(patch, GRID[1])
            block = image[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1, 3)
            if patch in shown[row][column]:
                assert (block == colours[row, y, x]).all()
            else:
                assert block.min() >= 235
                assert (block == block[0, 0]).all()
    assert not pyplot.get_fignums()


def test_masks_on_paper(tmp_path):
    """What the PNG shows, patch by patch."""
    colours, images, masks, shown = _scene()
    # 16 rows would not fit a screen: only as many as asked for
    visualize.draw_masks(tmp_path / "masks.png", images, masks, GRID, rows=1)
    with Image.open(tmp_path / "masks.png") as file:
        picture = np.asarray(file.convert("RGB")).astype(int)
    panels = _panels(picture, 4)
    lines = (picture[:, panels[0][0] : panels[0][1]] < 253).any(axis=2).mean(axis=1) > 0.95
    top, bottom = np.flatnonzero(lines)[[0, -1]]
    for (left, right), visible in zip(panels, shown[0], strict=True):
        for patch in range(PATCHES):
            y, x = divmod(patch, GRID[1])
            at_y = int(top + (y + 0.5) * (bottom + 1 - top) / GRID[0])
            at_x = int(left + (x + 0.5) * (right - left) / GRID[1])
            pixel = picture[at_y, at_x]
            if patch in visible:
                assert abs(pixel - colours[0, y, x]).max() <= 3
            else:
                assert pixel.min() >= 230


def _rows(count=6):
    rows = [{"step": 0, "knn": {"raw pixels": 0.25}}]
    for step in range(1, count + 1):
        row = {"step": 10 * step, "loss": 1.0 / step, "lr": 0.1 * step, "weight_decay": 0.04}
        row |= {"momentum": 0.99 + step / 1000, "feature_std": 0.5}
        rows.append({**row, "timing": {"images_per_second": 100.0 + step}})
    return [*rows, {"step": 60, "knn": {"target encoder, step 60": 0.5}}]


def test_curves_draw_the_rows(tmp_path, monkeypatch):
    pyplot = figure.pyplot()
    lines, texts = {}, []
    plot, text = pyplot.Axes.plot, pyplot.Figure.text

    def record(axis, x, y, **options):
        lines[axis] = (list(x), list(y))
        return plot(axis, x, y, **options)

    def record_text(figure, x, y, words, **options):
        texts.append(words)
        return text(figure, x, y, words, **options)

    monkeypatch.setattr(pyplot.Axes, "plot", record)
    monkeypatch.setattr(pyplot.Figure, "text", record_text)
    rows = _rows()
    visualize.draw_curves(tmp_path / "curves.png", rows)
    curves = {axis.get_title(): line for axis, line in lines.items()}
    training = rows[1:-1]
    for title, key in (("loss", "loss"), ("learning rate", "lr"), ("weight decay", "weight_decay")):
        assert curves[title] == ([r["step"] for r in training], [r[key] for r in training])
    assert curves["images/s"][1] == [r["timing"]["images_per_second"] for r in training]
    assert len(curves) == 6
    assert texts == ["kNN: step 0: raw pixels 25.0 %   step 60: target encoder, step 60 50.0 %"]
    assert not pyplot.get_fignums()


def _blue(path):
    """Where the picture has the curves' colour."""
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGB")).astype(int)
    return (abs(picture - np.array([31, 119, 180])) < 40).all(axis=2)


def test_curves_on_paper(tmp_path):
    visualize.draw_curves(tmp_path / "curves.png", _rows())
    blue = _blue(tmp_path / "curves.png")
    height, width = blue.shape
    for row in range(2):
        for column in range(3):
            part = blue[
                row * height // 2 : (row + 1) * height // 2,
                column * width // 3 : (column + 1) * width // 3,
            ]
            assert part.any(axis=0).sum() > 0.5 * part.shape[1]
    # the loss falls, the learning rate rises
    loss = blue[: height // 2, : width // 3]
    rate = blue[: height // 2, width // 3 : 2 * width // 3]
    for part, falls in ((loss, True), (rate, False)):
        columns = np.flatnonzero(part.any(axis=0))
        first, last = (np.flatnonzero(part[:, c]).mean() for c in (columns[2], columns[-3]))
        assert (first < last) == falls


def test_curves_without_rows(tmp_path):
    visualize.draw_curves(tmp_path / "curves.png", [])
    assert not _blue(tmp_path / "curves.png").any()


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
    assert evaluate.main([str(tmp_path / "nowhere"), *flags]) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
