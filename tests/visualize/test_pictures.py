"""Sheets, masks, curves, principal components and neighbours: against plain computations."""

import json
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.config import DataConfig, MaskConfig
from ijepa_fast.masks import Masks, mean_tokens, sample_masks
from ijepa_fast.model import initialise
from ijepa_fast.visualize import (
    curves,
    feature_pictures,
    figure,
    inputs,
    masks,
)
from ijepa_fast.visualize.figure import Frame, Panel, draw_sheet
from ijepa_fast.weights import Encoder, Shape, export, network_of, read_weights
from tests.trainer import tiny

DATA = DataConfig(crop=32, decoder="pillow", threads=1)


def _png(path):
    with Image.open(path) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB")).astype(int)


def _plain_colours(count, grid, patch):
    """Images of which each patch has a colour of its own: (count, *grid, 3), and the images."""
    colours = np.random.default_rng(0).integers(0, 160, (count, *grid, 3), dtype=np.uint8)
    # no grey: a faded patch is
    colours[..., 0] = 200
    return colours, colours.repeat(patch, axis=1).repeat(patch, axis=2)


# --- sheets --------------------------------------------------------------------------------------


def test_a_sheet_on_paper(tmp_path):
    """Every pixel of a small image is a square of its colour; nothing is outside the paper."""
    colours, _ = _plain_colours(5, (4, 6), 1)
    green = Frame((1, 2, 2, 3), "#00ff00")
    panels = [Panel(image, "two\nlines") for image in colours]
    panels[4] = panels[4]._replace(frames=[green])
    rows = [[panels[0], None, panels[1]], [panels[2], None, panels[3]], [panels[4]]]
    draw_sheet(tmp_path / "s.png", rows, "a title " * 30, side=1.5)
    picture = _png(tmp_path / "s.png")
    width = round(120 * 1.5)
    inside = (picture[..., 0] == 200).mean(axis=1) > 0.2
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int)))
    tops, bottoms = edges[::2], edges[1::2]
    assert len(tops) == 3
    assert (abs(bottoms - tops - width * 4 / 6) <= 2).all()
    left = [12 * figure.SPACE * 10, 12 * (3 * figure.SPACE + figure.GAP + 1.5) * 10]
    for number, image in enumerate(colours):
        top, begin = tops[number // 2], left[number % 2]
        for y in range(4):
            for x in range(6):
                pixel = picture[
                    int(top + (y + 0.5) * width / 6), int(begin + (x + 0.5) * width / 6)
                ]
                assert abs(pixel - image[y, x]).max() <= 1
    # the frame runs along the edges of its pixels
    drawn = (picture[..., 1] > 230) & (picture[..., 0] < 30) & (picture[..., 2] < 30)
    ys, xs = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    expected = [tops[2] + width / 6, tops[2] + width / 2]
    np.testing.assert_allclose([ys[0], ys[-1]], expected, atol=3)
    np.testing.assert_allclose(
        [xs[0], xs[-1]], [left[0] + width / 3, left[0] + width * 5 / 6], atol=3
    )
    # a title of several lines, all of it on the paper
    dark = (picture < 100).all(axis=2)
    assert dark[: tops[0]].any()
    assert not dark[:, :2].any()
    assert not dark[:, -2:].any()
    assert not figure.pyplot().get_fignums()


# --- masks ---------------------------------------------------------------------------------------


def _shows(image, colours, visible):
    """Patches in their colour where they are visible, and else of one nearly white."""
    side = len(image) // len(colours)
    for patch in range(colours.shape[0] * colours.shape[1]):
        y, x = divmod(patch, colours.shape[1])
        block = image[side * y : side * (y + 1), side * x : side * (x + 1)].reshape(-1, 3)
        assert (block == block[0]).all()
        assert (block[0] == colours[y, x]).all() == (patch in visible)
        assert patch in visible or block.min() >= 165


def test_masks_of_a_batch(tmp_path, sheets):
    colours, images = _plain_colours(3, (4, 6), 8)
    context = [[0, 1, 2, 6, 7, 8], [9, 10, 11, 15], [3]]
    given = Masks(
        context_index=torch.tensor([24 * n + p for n in range(3) for p in context[n]]).int(),
        context_cu=torch.tensor([0, 6, 10, 11]).int(),
        max_context=6,
        target_index=torch.tensor([[[4, 5, 10, 11], [18, 19, 12, 13]]] * 3).int(),
    )
    masks.draw_masks(tmp_path / "masks.png", images, given, (4, 6), rows=2)
    ((rows, _),) = sheets
    assert len(rows) == 2
    for number, row in enumerate(rows):
        seen = [range(24), context[number], [4, 5, 10, 11], [18, 19, 12, 13]]
        words = ["image", f"context ({len(context[number])})", "target 1 (4)", "target 2 (4)"]
        assert [panel.words for panel in row] == words
        for panel, visible in zip(row, seen, strict=True):
            _shows(panel.image, colours[number], visible)


def test_both_geometries_over_the_images(tmp_path, sheets):
    grid = (6, 8)
    colours, images = _plain_colours(2, grid, 4)
    settings = MaskConfig(min_keep=2, truncation_group=8)
    masks.draw_geometries(tmp_path / "m.png", images, settings, grid, seed=5, step=3)
    ((rows, title),) = sheets
    for number, geometry in enumerate(("published", "unbiased")):
        config = replace(settings, geometry=geometry)
        mean = mean_tokens(config, grid, seed=5)
        assert f"{geometry}: on average {mean.context:.1f} of 48" in title
        assert f"{mean.target:.1f} in a target" in title
        keys: dict[str, Any] = {"grid": grid, "seed": 5, "step": 3, "positions": np.arange(2)}
        cut = sample_masks(config, **keys)
        whole = sample_masks(replace(config, truncation_group=1), **keys)
        for row in range(2):
            assert (rows[row][0].image == images[row]).all()
            context, before = (
                m.context_index[m.context_cu[row] : m.context_cu[row + 1]].numpy() % 48
                for m in (cut, whole)
            )
            left, right = rows[row][1 + 2 * number : 3 + 2 * number]
            _shows(left.image, colours[row], context)
            for patch in set(before) - set(context):
                y, x = divmod(int(patch), 8)
                pale = (0.3 * colours[row, y, x].astype(np.float32) + 168).astype(np.uint8)
                assert (left.image[4 * y, 4 * x] == pale).all()
            targets = cut.target_index[row].numpy()
            _shows(right.image, colours[row], targets)
            of = f" of {len(before)}" if len(before) > len(context) else ""
            assert left.words == f"{geometry}\ncontext: {len(context)}{of}"
            assert right.words == f"{geometry}\ntargets: 4 x {targets.shape[1]}"
            for block, frame in zip(targets, right.frames, strict=False):
                y, x = np.divmod(block, 8)
                inset = frame.box[0] - 4 * y.min()
                assert 0 < inset < 1
                size = (4 * np.ptp(y) + 4 - 2 * inset, 4 * np.ptp(x) + 4 - 2 * inset)
                expected = (4 * y.min() + inset, 4 * x.min() + inset, *size)
                np.testing.assert_allclose(frame.box, expected)


def test_masks_command(tmp_path, split, run, command):
    out, other = tmp_path / "masks.png", tmp_path / "other.png"
    argv = ("masks", "--data", split, "--out")
    assert "masks of 4 images" in command(*argv, out, "--config", run)
    before = out.read_bytes()
    assert "out must not exist" in command(*argv, out, code=2)
    assert out.read_bytes() == before
    both = ("--preset", "demo", "--config", run)
    assert "either --config or --preset" in command(*argv, other, *both, code=2)
    assert "preset must be one of" in command(*argv, other, "--preset", "vit", code=2)
    assert "images must be at least 1" in command(*argv, other, "--images", "0", code=2)
    assert list(tmp_path.iterdir()) == [out]


# --- curves --------------------------------------------------------------------------------------


def _write_rows(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _training(step, loss):
    timing = {"images_per_second": 7.0 + step}
    return {"step": step, "loss": loss, "lr": 1e-3 * step, "momentum": 0.99, "timing": timing}


def test_curves_of_several_runs(tmp_path, monkeypatch, command):
    pyplot = figure.pyplot()
    lines: dict = {}
    levels, names = [], []
    plot, level, legend = pyplot.Axes.plot, pyplot.Axes.axhline, pyplot.Figure.legend

    def record(axis, x, y, **options):
        lines.setdefault(axis, []).append((list(x), list(y)))
        return plot(axis, x, y, **options)

    def record_level(axis, y, **options):
        levels.append(y)
        return level(axis, y, **options)

    def record_legend(self, handles, labels, **options):
        names.append((labels, len({handle.get_color() for handle in handles})))
        return legend(self, handles, labels, **options)

    monkeypatch.setattr(pyplot.Axes, "plot", record)
    monkeypatch.setattr(pyplot.Axes, "axhline", record_level)
    monkeypatch.setattr(pyplot.Figure, "legend", record_legend)
    monitors = {"rankme": 12.5, "lidar": 3.0, "prediction_cosine": 0.25}
    first = [
        {"step": 0, "data": "d", "knn": {"raw pixels": 0.4, "untrained network": 0.3}},
        {**_training(10, 4.0), "weight_decay": 0.1, "feature_std": 0.2},
        {"step": 20, "data": "d", "knn": {"target encoder, step 20": 0.5}, "monitors": None},
        {"step": 40, "knn": {"target encoder, step 40": 0.6}, "monitors": monitors},
    ]
    second = [_training(5, 2.0), _training(10, 1.0)]
    runs = [_write_rows(tmp_path / "a" / "run", first), _write_rows(tmp_path / "b" / "run", second)]
    out = tmp_path / "c.png"
    assert "a/run, b/run" in command("curves", *runs, "--out", out)
    assert {axis.get_title(): found for axis, found in lines.items()} == {
        "loss": [([10], [4.0]), ([5, 10], [2.0, 1.0])],
        "learning rate": [([10], [0.01]), ([5, 10], [0.005, 0.01])],
        "weight decay": [([10], [0.1])],
        "momentum": [([10], [0.99]), ([5, 10], [0.99, 0.99])],
        "feature std": [([10], [0.2])],
        "images/s": [([10], [17.0]), ([5, 10], [12.0, 17.0])],
        "kNN, %": [([0, 20, 40], [30.0, 50.0, 60.0])],
        "RankMe": [([40], [12.5])],
        "LiDAR": [([40], [3.0])],
        "prediction cosine": [([40], [0.25])],
    }
    assert levels == [40.0]
    # one name is not enough where folders share it
    assert names == [(["a/run", "b/run"], 2)]
    assert _png(out).shape[1] > 500
    assert not pyplot.get_fignums()


def test_curves_on_paper(tmp_path):
    curves.draw_curves(
        tmp_path / "c.png", {"run": [_training(10 * n, 1.0 / n) for n in range(1, 7)]}
    )
    picture = _png(tmp_path / "c.png")
    # the loss falls, the learning rate rises
    blue = (abs(picture - np.array([31, 119, 180])) < 40).all(axis=2)
    height, width = len(blue), blue.shape[1] // 4
    for column, falls in ((0, True), (1, False)):
        part = blue[:height, column * width : (column + 1) * width]
        columns = np.flatnonzero(part.any(axis=0))
        first, last = (np.flatnonzero(part[:, c]).mean() for c in (columns[2], columns[-3]))
        assert len(columns) > 0.5 * width
        assert (first < last) == falls


def test_curves_refuse(tmp_path, command):
    run = _write_rows(tmp_path / "run", [_training(1, 1.0)])
    out = tmp_path / "c.png"
    (tmp_path / "empty").mkdir()
    nothing = _write_rows(tmp_path / "nothing", [{"step": 3}])
    for message, runs, path in (
        ("metrics.jsonl with rows", [run, tmp_path / "empty"], out),
        ("each run once", [run, run], out),
        ("end in .png", [run], tmp_path / "c.jpg"),
        ("existing folder", [run], tmp_path / "no" / "c.png"),
        ("at least one number", [nothing], out),
    ):
        assert message in command("curves", *runs, "--out", path, code=2)
    assert not out.exists()


def test_accuracies_at_a_part_are_curves_of_their_own():
    """Against fewer images accuracies are lower: no jump at the end."""
    rows: list[dict[str, Any]] = [
        {"step": 0, "knn": {"raw pixels": 0.8, "untrained network": 0.5}},
        {"step": 10, "knn": {"target encoder, step 10": 0.4}, "images": [20, 5]},
        {"step": 20, "knn": {"target encoder, step 20": 0.45}, "images": [20, 5]},
        {"step": 25, "knn": {"target encoder, step 25": 0.6}},
    ]

    def found(title):
        return [(line.steps, line.values) for line in curves.panels_of(rows)[title]]

    assert found("kNN, %") == [([0, 25], [50.0, 60.0]), ([], [80.0])]
    assert found("kNN on a part of the images, %") == [([10, 20], [40.0, 45.0])]
    # a run from other weights starts with them; the untrained network is a level
    rows[0]["knn"]["target encoder, step 0"] = 0.5625
    assert found("kNN, %") == [([0, 25], [56.25, 60.0]), ([], [80.0]), ([], [50.0])]


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
    encoder, data, config, name = inputs.open_weights(run)
    assert name == "run, step 4"
    assert config is not None
    # pictures show the target encoder
    state, weights = tiny.final_state(run), encoder.network.state_dict()
    assert all(torch.equal(v, state["target_encoder." + key]) for key, v in weights.items())
    images = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    found = feature_pictures.patch_features(encoder, images)
    assert found.shape == (2, 48, 32)
    torch.testing.assert_close(feature_pictures.pooled_features(encoder, images), found.mean(dim=1))
    export.export(read_weights(run), tmp_path / "hf", format="hf")
    again, other, none, name = inputs.open_weights(tmp_path / "hf")
    assert torch.equal(feature_pictures.patch_features(again, images), found)
    assert (other.crop_size, none, name) == (data.crop_size, None, "hf")


def test_pca_command(run, split, tmp_path, command, sheets):
    out = tmp_path / "pca.png"
    argv = ("pca", run, "--data", split, "--images", "3", "--out")
    command(*argv, out)
    command(*argv, out, "--size", "96", "--overwrite")
    for (rows, _), shapes in zip(sheets, ([(32, 32, 3), (4, 4, 3)], [(96, 96, 3), (12, 12, 3)])):  # noqa: B905
        panels = [panel for row in rows for panel in row if panel]
        assert [panel.image.shape for panel in panels] == shapes * 3
        assert {panel.words for panel in panels} <= {"", *(f"class{n}" for n in range(4))}
    other = tmp_path / "other.png"
    assert "multiples of 8 pixels" in command(*argv, other, "--size", "50", code=2)
    assert "weights must be a run's" in command("pca", tmp_path, *argv[2:], other, code=2)
    assert "existing folder" in command(*argv, other, "--data", "no", code=2)


def test_pca_of_a_rectangle_rounds_its_width_to_the_patch(
    split, tmp_path, sheets, monkeypatch, command
):
    shape = Shape(image_size=(16, 40), patch_size=8, width=16, depth=1, heads=2, mlp_hidden=32)
    network = network_of(shape)
    initialise(network, torch.Generator().manual_seed(0))
    encoder = Encoder(network, patch_size=8, mean=DATA.mean, std=DATA.std)
    data = replace(DATA, crop=(16, 40))
    given = inputs.OpenedWeights(encoder, data, None, "rectangle")
    monkeypatch.setattr(inputs, "open_weights", lambda _: given)
    size = ("--images", "2", "--size", "24")
    command("pca", "x", "--data", split, *size, "--out", tmp_path / "p.png")
    # 24 * 40 / 16 is 60
    shapes = [panel.image.shape for row in sheets[0][0] for panel in row if panel]
    assert shapes == [(24, 64, 3), (3, 8, 3)] * 2


def test_a_damaged_run_is_exit_code_3(run, split, tmp_path, command):
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        file.write_bytes(b"")
    argv = ("pca", tmp_path / "run", "--data", split, "--out", tmp_path / "p.png")
    assert "damaged" in command(*argv, code=3)


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


def test_duplicates_are_nearest(run, tmp_path, sheets, command, monkeypatch):
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
    argv = ("neighbours", run, "--data", tmp_path, "--out", tmp_path / "n.png")
    assert "nearest of 24 images" in command(*argv, "--queries", "5", "--k", "3")
    ((rows, title),) = sheets
    alike = []
    for query, gap, first, second, third in rows:
        assert gap is None
        assert (query.image == first.image).all()
        assert (query.image != second.image).any()
        assert query.words.startswith("query\nc")
        assert first.words == "1.000\n" + query.words[6:]
        for near in (first, second, third):
            alike.append(near.words[-2:] == query.words[-2:])
            assert near.frames[0].colour == ("#1a9850" if alike[-1] else "#d73027")
    assert len(rows) == 5
    assert f"{sum(alike)} of 15 have the query's class" in title
    assert "k must be in 1..23" in command(*argv, "--k", "24", "--overwrite", code=2)
    assert "pool must be at least 2" in command(*argv, "--pool", "1", "--overwrite", code=2)


# --- images --------------------------------------------------------------------------------------


def test_pictures_show_all_images_but_those_trained_on(split, run, tmp_path, sheets, command):
    """Of a folder without parts none is held back; labels are not needed."""
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for number, file in enumerate(sorted((split / part).rglob("*.jpg"))):
            shutil.copy(file, tmp_path / part / f"{number:02d}.jpg")
    for root, count in ((tmp_path / "train", 32), (tmp_path, 12)):
        shown = inputs.shown_images(str(root), DATA, 99)
        assert sorted(shown.names) == [f"{number:02d}.jpg" for number in range(count)]
        assert shown.label(0) == ""
    argv = ("--data", tmp_path / "train", "--out", tmp_path / "n.png")
    printed = command("neighbours", run, *argv, "--k", "31", "--queries", "1")
    assert "nearest of 32 images" in printed
    assert "class" not in printed
    ((rows, _),) = sheets
    assert len(rows[0]) == 33


def test_pictures_keep_their_labels_and_names(split, tmp_path):
    data = shutil.copytree(split / "train", tmp_path / "data")
    tiny.bad_png(data / "class1" / "bad.png")
    parts = inputs.open_parts(str(data), DATA)
    with tiny.log_lines() as lines:
        both = [inputs.load_pictures(part, 1000, seed=3) for part in parts]
    assert [line for line in lines if "left out 'class1/bad.png'" in line]
    assert sum(len(part.images) for part in both) == 32
    for part in both:
        assert len(part.images) == len(part.labels) == len(part.names)
        for row, name in enumerate(part.names):
            assert part.label(row) == name.partition("/")[0]
            with Image.open(data / name) as file:
                mean = np.asarray(file).mean(axis=(0, 1))
            assert abs(part.images[row].float().mean(dim=(0, 1)).numpy() - mean).max() < 12
    fewer = inputs.load_pictures(parts[0], 5, seed=3)
    assert fewer.names == both[0].names[: len(fewer.names)]
    assert fewer.names != inputs.load_pictures(parts[0], 5, seed=4).names
