"""Masks, curves, principal components and neighbours: against plain computations."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.masks import mean_tokens, sample_masks
from ijepa_fast.model import VisionTransformer, initialise
from ijepa_fast.visualize import __main__ as command_line
from ijepa_fast.visualize import curves, feature_pictures, figure, inputs, masks
from ijepa_fast.weights import Shape, export, read_weights
from ijepa_fast.weights.encoder import Encoder, network_of
from tests.trainer import tiny

DATA = DataConfig(crop=32, decoder="pillow", threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert tiny.run(data, out, max_steps=6) == 0
    return out


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to matplotlib: images, titles, rectangles."""
    pyplot = figure.pyplot()
    found: dict[str, list] = {"images": [], "titles": [], "patches": [], "texts": []}
    axes, title, text = pyplot.Axes, pyplot.Axes.set_title, pyplot.Figure.text

    def set_title(axis, words, **options):
        found["titles"].append(words)
        return title(axis, words, **options)

    def figure_text(self, x, y, words, **options):
        found["texts"].append(words)
        return text(self, x, y, words, **options)

    monkeypatch.setattr(axes, "imshow", lambda _, image, **__: found["images"].append(image))
    monkeypatch.setattr(axes, "set_title", set_title)
    monkeypatch.setattr(axes, "add_patch", lambda _, patch: found["patches"].append(patch))
    monkeypatch.setattr(pyplot.Figure, "text", figure_text)
    return found


def _png(path):
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB"))


def _fails(capsys, *argv, code=2):
    assert command_line.main([str(a) for a in argv]) == code
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


# --- masks ---------------------------------------------------------------------------------------

GRID = (6, 8)


def test_both_geometries_over_the_images(tmp_path, drawn):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 100, (2, *GRID, 3), dtype=np.uint8)
    images = colours.repeat(4, axis=1).repeat(4, axis=2)
    settings = MaskConfig(min_keep=2, truncation_group=8)
    masks.draw_geometries(tmp_path / "m.png", images, settings, GRID, seed=5, step=3)
    assert len(drawn["images"]) == 2 * 5
    rectangles = iter(drawn["patches"])
    for row in range(2):
        assert (drawn["images"][5 * row] == images[row]).all()
        for number, geometry in enumerate(("published", "unbiased")):
            cut, whole = (
                sample_masks(
                    MaskConfig(min_keep=2, truncation_group=group, geometry=geometry),
                    grid=GRID,
                    seed=5,
                    step=3,
                    positions=np.arange(2),
                )
                for group in (8, 1)
            )
            context, before = (
                m.context_index[m.context_cu[row] : m.context_cu[row + 1]].numpy() % 48
                for m in (cut, whole)
            )
            targets = cut.target_index[row].numpy()
            left, right = drawn["images"][5 * row + 1 + 2 * number :][:2]
            for patch in range(48):
                y, x = divmod(patch, GRID[1])
                here = (slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
                own = colours[row, y, x]
                assert (left[here] == own).all() == (patch in context)
                assert (right[here] == own).all() == (patch in targets)
                if patch not in context:
                    pale = (0.3 * own.astype(np.float32) + 168).astype(np.uint8)
                    assert (left[here] == pale).all() == (patch in before)
            titles = drawn["titles"][5 * row + 1 + 2 * number :][:2]
            of = f" of {len(before)}" if len(before) > len(context) else ""
            assert titles == [f"context: {len(context)}{of}", f"targets: 4 x {targets.shape[1]}"]
            for block in targets:
                y, x = np.divmod(block, GRID[1])
                edge = next(rectangles).get_bbox()
                inset = edge.y0 + 0.5 - 4 * y.min()
                assert 0 < inset < 1
                box = [4 * x.min(), 4 * y.min(), 4 * x.max() + 4, 4 * y.max() + 4]
                expected = np.array(box) - 0.5 + inset * np.array([1, 1, -1, -1])
                assert np.allclose([edge.x0, edge.y0, edge.x1, edge.y1], expected)
            # the frames of both panels
            next(rectangles), next(rectangles)
    for geometry in ("published", "unbiased"):
        settings = MaskConfig(min_keep=2, truncation_group=8, geometry=geometry)
        mean = mean_tokens(settings, GRID, seed=5)
        heading = [t for t in drawn["texts"] if t.startswith(geometry)]
        assert len(heading) == 1
        assert f"{mean.context:.1f} of 48" in heading[0]
        assert f"{mean.target:.1f} in a target" in heading[0]


def test_masks_command(tmp_path, data, run, capsys):
    out = tmp_path / "masks.png"
    assert (
        command_line.main(["masks", "--data", str(data), "--config", str(run), "--out", str(out)])
        == 0
    )
    assert _png(out).shape[1] > 500
    assert "masks of 4 images" in capsys.readouterr().out
    before = out.read_bytes()
    assert "out must not exist" in _fails(capsys, "masks", "--data", data, "--out", out)
    assert out.read_bytes() == before
    both = ("--preset", "demo", "--config", run)
    out = tmp_path / "other.png"
    assert "either --config or --preset" in _fails(
        capsys, "masks", "--data", data, *both, "--out", out
    )
    assert "preset must be one of" in _fails(
        capsys, "masks", "--data", data, "--preset", "vit", "--out", out
    )
    assert "images must be at least 1" in _fails(
        capsys, "masks", "--data", data, "--images", "0", "--out", out
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "masks.png"]


# --- curves --------------------------------------------------------------------------------------


def _write_rows(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _training(step, loss):
    return {
        "step": step,
        "loss": loss,
        "lr": 1e-3 * step,
        "momentum": 0.99,
        "timing": {"images_per_second": 7.0 + step},
    }


def test_curves_of_several_runs(tmp_path, monkeypatch, capsys):
    pyplot = figure.pyplot()
    lines: dict = {}
    levels = []
    plot = pyplot.Axes.plot
    legends = []

    def record(axis, x, y, *style, **options):
        lines.setdefault(axis, []).append((list(x), list(y)))
        return plot(axis, x, y, *style, **options)

    level, legend = pyplot.Axes.axhline, pyplot.Figure.legend

    def record_level(axis, y, **options):
        levels.append((axis.get_title(), y))
        return level(axis, y, **options)

    def record_legend(self, handles, labels, **options):
        legends.append((labels, [h.get_color() for h in handles]))
        return legend(self, handles, labels, **options)

    monkeypatch.setattr(pyplot.Axes, "plot", record)
    monkeypatch.setattr(pyplot.Axes, "axhline", record_level)
    monkeypatch.setattr(pyplot.Figure, "legend", record_legend)
    scores = {"raw pixels": 0.4, "untrained network": 0.3}
    first = [
        {"step": 0, "data": "d", "knn": scores},
        _training(10, 4.0),
        {"step": 20, "data": "d", "knn": {"target encoder, step 20": 0.5}, "monitors": None},
        {
            "step": 40,
            "data": "d",
            "knn": {"target encoder, step 40": 0.6},
            "monitors": {"rankme": 12.5, "prediction_cosine": 0.25},
        },
    ]
    second = [_training(5, 2.0), _training(10, 1.0)]
    runs = [_write_rows(tmp_path / "a" / "run", first), _write_rows(tmp_path / "b" / "run", second)]
    out = tmp_path / "c.png"
    assert command_line.main(["curves", *map(str, runs), "--out", str(out)]) == 0
    by_title = {axis.get_title(): found for axis, found in lines.items()}
    assert by_title == {
        "loss": [([10], [4.0]), ([5, 10], [2.0, 1.0])],
        "learning rate": [([10], [0.01]), ([5, 10], [0.005, 0.01])],
        "momentum of the target encoder": [([10], [0.99]), ([5, 10], [0.99, 0.99])],
        "images/s": [([10], [17.0]), ([5, 10], [12.0, 17.0])],
        "kNN accuracy, %": [([0, 20, 40], [30.0, 50.0, 60.0])],
        "RankMe": [([40], [12.5])],
        "cosine of prediction and target": [([40], [0.25])],
    }
    assert [value for _, value in levels] == [40.0]
    # one name is not enough where folders share it
    (labels, colours) = legends[0]
    assert labels == ["a/run", "b/run"]
    assert len(set(colours)) == 2
    assert _png(out).shape[1] > 500
    assert "a/run, b/run" in capsys.readouterr().out
    assert not pyplot.get_fignums()


def test_curves_refuse(tmp_path, capsys):
    run = _write_rows(tmp_path / "run", [_training(1, 1.0)])
    out = tmp_path / "c.png"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "metrics.jsonl with rows" in _fails(capsys, "curves", run, empty, "--out", out)
    assert "each run once" in _fails(capsys, "curves", run, run, "--out", out)
    assert "end in .png" in _fails(capsys, "curves", run, "--out", tmp_path / "c.jpg")
    assert "existing folder" in _fails(capsys, "curves", run, "--out", tmp_path / "no" / "c.png")
    nothing = _write_rows(tmp_path / "nothing", [{"step": 3}])
    assert "at least one number" in _fails(capsys, "curves", nothing, "--out", out)
    assert not out.exists()


def test_lidar_and_weight_decay_are_drawn_where_they_are(tmp_path):
    rows = [{"step": 4, "weight_decay": 0.1, "feature_std": 0.2, "monitors": {"lidar": 3.0}}]
    titles = curves.draw_runs(tmp_path / "c.png", {"run": rows})
    assert titles == ["weight decay", "feature std of the target encoder", "LiDAR"]


# --- principal components ------------------------------------------------------------------------


def test_colours_are_the_principal_components_of_all_patches():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(5, 16, generator=generator)
    strengths = torch.tensor([8.0, 4.0, 2.0, 0.5, 0.2])
    latent = torch.randn(3 * 20, 5, generator=generator) * strengths
    given = (latent @ basis + 7).view(3, 20, 16)
    colours = feature_pictures.pca_colours(given)
    assert colours.shape == (3, 20, 3)
    rows = given.double().flatten(0, 1).numpy()
    centred = rows - rows.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    for component in range(3):
        axis = axes[component] * np.sign(axes[component][np.abs(axes[component]).argmax()])
        scores = np.sort(centred @ axis)
        low, high = np.interp([0.02, 0.98], np.linspace(0, 1, 60), scores)
        expected = np.clip((centred @ axis - low) / (high - low), 0, 1)
        np.testing.assert_allclose(colours.reshape(60, 3)[:, component], expected, atol=1e-8)


def test_fewer_components_than_three_are_grey():
    flat = torch.arange(12.0).view(2, 6, 1) * torch.tensor([1.0, -2.0])
    colours = feature_pictures.pca_colours(flat)
    assert (colours[..., 1:] == 0.5).all()
    assert colours[..., 0].min() == 0
    assert colours[..., 0].max() == 1
    with pytest.raises(ValueError, match="features must be finite"):
        feature_pictures.pca_colours(torch.full((1, 2, 3), torch.nan))


def test_larger_images_and_exported_weights(run, tmp_path):
    encoder, data, own, name = inputs.load_encoder(run)
    assert name == "run, step 6"
    assert own is not None
    images = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    found = feature_pictures.patch_features(encoder, images)
    assert found.shape == (2, 48, 32)
    torch.testing.assert_close(feature_pictures.pooled_features(encoder, images), found.mean(dim=1))
    export.export(read_weights(run), tmp_path / "hf", layout="hf")
    again, other, none, name = inputs.load_encoder(tmp_path / "hf")
    assert torch.equal(feature_pictures.patch_features(again, images), found)
    assert (other.crop_size, none, name) == (data.crop_size, None, "hf")


def test_pca_command(run, data, tmp_path, capsys, drawn):
    out = tmp_path / "pca.png"
    argv = ["pca", str(run), "--data", str(data), "--images", "3", "--out", str(out)]
    assert command_line.main(argv) == 0
    whole = [image.shape for image in drawn["images"]]
    assert whole == [(32, 32, 3), (4, 4, 3)] * 3
    assert set(drawn["titles"]) <= {f"class{n}" for n in range(4)}
    assert command_line.main([*argv, "--size", "96", "--overwrite"]) == 0
    assert [image.shape for image in drawn["images"][6:]] == [(96, 96, 3), (12, 12, 3)] * 3
    assert out.is_file()
    capsys.readouterr()
    assert "multiples of 8 pixels" in _fails(capsys, *argv, "--size", "50", "--overwrite")
    other = tmp_path / "other.png"
    assert "weights must be a run's folder" in _fails(
        capsys, "pca", tmp_path, "--data", data, "--out", other
    )
    assert "existing folder" in _fails(capsys, "pca", run, "--data", "no", "--out", other)


def test_pca_of_a_rectangle_rounds_its_width_to_the_patch(data, tmp_path, drawn, monkeypatch):
    shape = Shape(image_size=(16, 40), patch_size=8, width=16, depth=1, heads=2, mlp_hidden=32)
    network = network_of(shape)
    initialise(network, torch.Generator().manual_seed(0))
    encoder = Encoder(network, patch_size=8, mean=DATA.mean, std=DATA.std)
    given = (encoder, replace(DATA, crop=(16, 40)), str(data), "rectangle")
    monkeypatch.setattr(inputs, "load_encoder", lambda _: given)
    argv = ["pca", "x", "--images", "2", "--size", "24", "--out", str(tmp_path / "p.png")]
    assert command_line.main(argv) == 0
    # 24 * 40 / 16 is 60
    assert [image.shape for image in drawn["images"]] == [(24, 64, 3), (3, 8, 3)] * 2


def test_a_damaged_run_is_exit_code_3(run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    argv = ("pca", tmp_path / "run", "--data", data, "--out", tmp_path / "p.png")
    assert "damaged" in _fails(capsys, *argv, code=3)


# --- neighbours ----------------------------------------------------------------------------------


def test_nearest_against_a_plain_search():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(30, 8, generator=generator) + 5
    queries = np.array([4, 0, 29])
    found = feature_pictures.nearest(rows, queries, 5)
    centred = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    for line, query in enumerate(queries):
        cosines = [
            (float(c @ centred[query] / np.linalg.norm(c) / np.linalg.norm(centred[query])), -row)
            for row, c in enumerate(centred)
            if row != query
        ]
        best = sorted(cosines, reverse=True)[:5]
        assert found.rows[line].tolist() == [-row for _, row in best]
        np.testing.assert_allclose(found.cosines[line], [c for c, _ in best], atol=1e-5)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.29"):
        feature_pictures.nearest(rows, queries, 30)


def test_duplicates_are_nearest(run, tmp_path, drawn, capsys, monkeypatch):
    """Twelve files of noise, each twice; features of patches are never kept for all of them."""
    monkeypatch.delattr(feature_pictures, "patch_features")
    rng = np.random.default_rng(0)
    for number in range(12):
        image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for copy in "ab":
            folder = tmp_path / "test" / f"c{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number:02d}{copy}.png")
    shutil.copytree(tmp_path / "test", tmp_path / "train")
    out = tmp_path / "n.png"
    argv = ["neighbours", str(run), "--data", str(tmp_path), "--out", str(out)]
    assert command_line.main([*argv, "--queries", "5", "--k", "3"]) == 0
    assert len(drawn["images"]) == 5 * 4
    for line in range(5):
        query, first, second, _ = drawn["images"][4 * line : 4 * line + 4]
        assert (query == first).all()
        assert (query != second).any()
        titles = drawn["titles"][4 * line : 4 * line + 4]
        assert titles[0].startswith("query\nc")
        assert titles[1] == "1.000\n" + titles[0][6:]
    assert "nearest of 24 images" in capsys.readouterr().out
    assert "k must be in 1..23" in _fails(capsys, *argv, "--k", "24", "--overwrite")
    assert "pool must be at least 2" in _fails(capsys, *argv, "--pool", "1", "--overwrite")


# --- images --------------------------------------------------------------------------------------


def test_images_without_classes(tmp_path):
    for number in range(20):
        tiny.write_images(tmp_path / str(number), count=1, classes=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(20):
        shutil.copy(tmp_path / str(number) / "class0" / "000.jpg", flat / f"{number:02d}.jpg")
    parts = [inputs.load_pictures(part, 99) for part in inputs.open_parts(str(flat), DATA)]
    names = [name for part in parts for name in part.names]
    assert sorted(names) == [f"{number:02d}.jpg" for number in range(20)]
    assert all(len(part.images) for part in parts)
    assert parts[1].label(0) == ""
    for number, name in enumerate(["train"] * 3 + ["test"] * 2):
        (tmp_path / "split" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(flat / f"{number:02d}.jpg", tmp_path / "split" / name / f"{number:02d}.jpg")
    parts = [inputs.load_pictures(p, 99) for p in inputs.open_parts(str(tmp_path / "split"), DATA)]
    assert [sorted(part.names) for part in parts] == [
        ["00.jpg", "01.jpg", "02.jpg"],
        ["03.jpg", "04.jpg"],
    ]


def test_pictures_keep_their_labels_and_names(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    tiny.bad_png(tmp_path / "data" / "class1" / "bad.png")
    parts = inputs.open_parts(str(tmp_path / "data"), DATA)
    with tiny.log_lines() as lines:
        both = [inputs.load_pictures(part, 1000, seed=3) for part in parts]
    assert [line for line in lines if "left out class1/bad.png" in line]
    assert sum(len(part.images) for part in both) == 40
    for part in both:
        assert len(part.images) == len(part.labels) == len(part.names)
        for row, name in enumerate(part.names):
            assert part.label(row) == name.partition("/")[0]
            with Image.open(tmp_path / "data" / name) as file:
                mean = np.asarray(file).mean(axis=(0, 1))
            assert abs(part.images[row].float().mean(dim=(0, 1)).numpy() - mean).max() < 12
    fewer = inputs.load_pictures(parts[0], 5, seed=3)
    assert fewer.names == both[0].names[:5]
    assert fewer.names != inputs.load_pictures(parts[0], 5, seed=4).names


def test_the_encoder_of_a_picture_is_the_target_encoder(run):
    state = tiny.final_state(run)
    network = inputs.load_encoder(run)[0].network
    assert isinstance(network, VisionTransformer)
    weights = network.state_dict()
    assert all(torch.equal(value, state["target_encoder." + key]) for key, value in weights.items())


def test_looks_at_a_part_are_curves_of_their_own():
    """Against fewer images accuracies are lower: no jump at the end."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "knn": {"raw pixels": 0.8, "untrained network": 0.5}},
        {"step": 10, "knn": {"target encoder, step 10": 0.4}, "images": [20, 5]},
        {"step": 20, "knn": {"target encoder, step 20": 0.45}, "images": [20, 5]},
        {"step": 25, "knn": {"target encoder, step 25": 0.6}},
    ]
    whole = curves._knn(rows)
    assert [(line.steps, line.values) for line in whole] == [([0, 25], [50.0, 60.0]), ([], [80.0])]
    (part,) = curves._knn_of_part(rows)
    assert (part.steps, part.values) == ([10, 20], [40.0, 45.0])
    # a run from other weights starts with them; the untrained network is a level
    rows[0]["knn"]["target encoder, step 0"] = 0.5625
    assert [(line.steps, line.values) for line in curves._knn(rows)] == [
        ([0, 25], [56.25, 60.0]),
        ([], [80.0]),
        ([], [50.0]),
    ]
