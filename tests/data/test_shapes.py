"""The embedded data set: deterministic, balanced, fair scenes; whole folders or none."""

import hashlib
import json
import logging
import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.data.sets import scenes, shapes
from ijepa_fast.data.sets.scenes import CLASSES, SIDE, Split, pose, render, silhouette
from ijepa_fast.data.sets.shapes import write_shapes
from ijepa_fast.evaluate.knn import knn_accuracy

TRAIN, TEST = 24, 16


def small(cache: Path | None) -> Path:
    return write_shapes(cache, train=TRAIN, test=TEST)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Scenes.


def test_scenes_are_frozen() -> None:
    """A changed scene is another data set: raise its version, and do so knowingly."""
    digest = hashlib.sha256()
    for number in range(24):
        digest.update(render("train", number).tobytes() + render("test", number).tobytes())
    assert digest.hexdigest() == "097ab08890bfb30b48338dd752ba9107dd87aa894dd21a9d9c23a5a34605ecec"


def test_render_is_pure() -> None:
    first = render("train", 11)
    render("test", 11)
    assert first.shape == (SIDE, SIDE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, render("train", 11))
    assert not np.array_equal(first, render("test", 11))
    assert not np.array_equal(first, render("train", 11 + len(CLASSES)))


def test_the_class_changes_the_silhouette_and_nothing_else() -> None:
    for number in range(16):
        at = pose("train", number)
        images = {name: scenes._render("train", number, name) for name in CLASSES}
        masks = {name: silhouette(name, at) for name in CLASSES}
        for name in CLASSES:
            same = masks[name] == masks["circle"]
            assert np.array_equal(images[name][same], images["circle"][same])
            assert name == "circle" or not np.array_equal(images[name], images["circle"])


def test_areas_are_those_of_the_pose_for_every_class() -> None:
    poses = [pose("train", number) for number in range(150)]
    for name in CLASSES:
        areas = np.array([silhouette(name, at).sum() / (SIDE * at.size) ** 2 for at in poses])
        assert abs(areas.mean() - 1) < 0.003, name
        # A tip may leave the image.
        assert areas.min() > 0.93, name
        assert areas.max() < 1.01, name


@pytest.mark.parametrize("name", CLASSES)
def test_silhouettes_are_centred_and_upright(name: str) -> None:
    at = scenes.Pose(x=0, y=0, size=0.42, angle=0, stretch=0, shear=0, mirrored=False)
    mask = silhouette(name, at)
    centres = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    assert abs((mask.sum(axis=0) @ centres) / mask.sum()) < 1e-3
    assert abs((mask.sum(axis=1) @ centres) / mask.sum()) < 1e-3
    upright = mask[:, ::-1] if name != "crescent" else mask[::-1]
    assert np.allclose(mask, upright, atol=1e-9)


def test_poses_follow_the_stated_ranges_alike_for_every_class() -> None:
    poses = [pose("train", number) for number in range(2400)]
    limits = {
        "x": (-0.11, 0.11),
        "y": (-0.11, 0.11),
        "size": (0.34, 0.48),
        "angle": (-math.pi / 6, math.pi / 6),
        "stretch": (-0.2, 0.2),
        "shear": (-0.15, 0.15),
    }
    for field, (low, high) in limits.items():
        share = (np.array([getattr(at, field) for at in poses]) - low) / (high - low)
        assert share.min() >= 0, field
        assert share.max() < 1, field
        for label in range(len(CLASSES)):
            mine = np.sort(share[label :: len(CLASSES)])
            distance = np.abs(mine - np.arange(mine.size) / mine.size).max()
            # Kolmogorov-Smirnov at 1e-4, for 48 comparisons.
            assert distance < 2.23 / math.sqrt(mine.size), (field, label)
    assert 0.45 < np.mean([at.mirrored for at in poses]) < 0.55


def test_rotation_turns_clockwise() -> None:
    upright = scenes.Pose(x=0, y=0, size=0.42, angle=0, stretch=0, shear=0, mirrored=False)
    quarter = scenes.Pose(
        x=0, y=0, size=0.42, angle=math.pi / 2, stretch=0, shear=0, mirrored=False
    )
    heart = silhouette("heart", upright)
    assert np.allclose(silhouette("heart", quarter), np.rot90(heart, -1), atol=1e-9)


def test_the_outline_can_be_seen() -> None:
    for number in range(100):
        inside = silhouette(CLASSES[number % len(CLASSES)], pose("train", number)) > 0.5
        image = render("train", number).astype(float)
        difference = image[inside].mean(axis=0) - image[~inside].mean(axis=0)
        assert np.linalg.norm(difference) > 40, number


def test_colours_and_pixels_do_not_give_the_class_away() -> None:
    counts: dict[Split, int] = {"train": 1600, "test": 400}
    labels = {s: torch.arange(n) % len(CLASSES) for s, n in counts.items()}
    features: dict[str, dict[str, torch.Tensor]] = {"colours": {}, "pixels": {}, "outlines": {}}
    for split, count in counts.items():
        images = np.stack([render(split, number) for number in range(count)])
        bins = (images.astype(np.int64) // 32) @ np.array([64, 8, 1])
        histograms = [np.bincount(image.ravel(), minlength=512) for image in bins]
        features["colours"][split] = torch.from_numpy(np.stack(histograms)).float()
        coarse = images.reshape(count, 24, 4, 24, 4, 3).mean(axis=(2, 4), dtype=np.float32)
        features["pixels"][split] = torch.from_numpy(coarse.reshape(count, -1))
        masks = [silhouette(CLASSES[n % 8], pose(split, n))[::3, ::3] for n in range(count)]
        features["outlines"][split] = torch.from_numpy(np.stack(masks)).float().flatten(1)
    accuracy = {
        name: knn_accuracy(part["train"], labels["train"], part["test"], labels["test"])
        for name, part in features.items()
    }
    assert accuracy["colours"] < 0.20
    assert accuracy["pixels"] < 0.35
    assert accuracy["outlines"] > 0.65


def test_render_errors() -> None:
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        render("val", 0)
    with pytest.raises(ValueError, match="items must be in"):
        render("train", -1)
    with pytest.raises(ValueError, match=r"name must be one of circle, .*got 'blob'"):
        silhouette("blob", pose("train", 0))


# The folder.


def test_folder_is_labelled_balanced_and_holds_the_scenes(tmp_path: Path) -> None:
    folder = small(tmp_path)
    assert folder == tmp_path / "ijepa-fast" / f"shapes-v1-{TRAIN}-{TEST}"
    counts: dict[Split, int] = {"train": TRAIN, "test": TEST}
    for split, count in counts.items():
        assert sorted(p.name for p in (folder / split).iterdir()) == sorted(CLASSES)
        files = sorted((folder / split).rglob("*.jpg"))
        by_class = Counter(path.parent.name for path in files)
        assert by_class == dict.fromkeys(CLASSES, count // len(CLASSES))
        for path in files:
            number = int(path.stem)
            assert path.parent.name == CLASSES[number % len(CLASSES)]
            with Image.open(path) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                error = np.asarray(image, np.float64) - render(split, number)
            assert np.sqrt((error**2).mean()) < 20


def test_default_is_the_whole_set_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(shapes, "_write", lambda folder, *counts: asked.append(counts))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = write_shapes()
    assert folder == tmp_path / "ijepa-fast" / "shapes-v1"
    assert asked == [(5120, 1024)]
    assert folder.is_dir()


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_cache_folder_without_a_usable_variable(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert small(None).parent == tmp_path / ".cache" / "ijepa-fast"


def test_same_bytes_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small(tmp_path / "a")
    assert contents(first) == contents(small(tmp_path / "b"))
    monkeypatch.setattr(shapes, "_write", lambda *_: pytest.fail("written again"))
    assert small(tmp_path / "a") == first


def _remove_image(folder: Path) -> None:
    (folder / "train/star/00006.jpg").unlink()


def _truncate_image(folder: Path) -> None:
    (folder / "test/ring/00004.jpg").write_bytes(b"")


def _flip_a_byte(folder: Path) -> None:
    path = folder / "train/heart/00003.jpg"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _swap_two_images(folder: Path) -> None:
    one, other = folder / "train/circle/00000.jpg", folder / "train/square/00005.jpg"
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def _add_image(folder: Path) -> None:
    shutil.copy(folder / "train/circle/00000.jpg", folder / "train/circle/09999.jpg")


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1")


def _other_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def _other_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))


@pytest.mark.parametrize(
    "damage",
    [
        _remove_image,
        _truncate_image,
        _flip_a_byte,
        _swap_two_images,
        _add_image,
        _remove_manifest,
        _spoil_manifest,
        _other_manifest,
        _other_version,
    ],
)
def test_damaged_folder_is_replaced(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = small(tmp_path)
    before = contents(folder)
    damage(folder)
    assert contents(folder) != before
    with caplog.at_level(logging.WARNING):
        assert small(tmp_path) == folder
    assert "damaged or incomplete" in caplog.text
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_other_peoples_files_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small(tmp_path)
    (folder / "train/ring/notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        small(tmp_path)
    assert "notes.txt" in caplog.text
    (kept,) = tmp_path.rglob("notes.txt")
    assert kept.read_text() == "mine"
    assert folder not in kept.parents
    assert str(kept.parents[2]) in caplog.text
    # A file manager's hidden file harms nothing and is left alone.
    (folder / ".DS_Store").write_text("")
    small(tmp_path)
    assert (folder / ".DS_Store").exists()


def test_something_else_in_the_place_is_an_error(tmp_path: Path) -> None:
    final = tmp_path / "ijepa-fast" / f"shapes-v1-{TRAIN}-{TEST}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    final.parent.mkdir()
    final.symlink_to(elsewhere)
    with pytest.raises(OSError, match="is not a folder"):
        small(tmp_path)
    assert (elsewhere / "file").read_text() == "mine"
    assert final.is_symlink()
    final.unlink()
    final.write_text("mine")
    with pytest.raises(OSError, match="is not a folder"):
        small(tmp_path)
    assert final.read_text() == "mine"


@pytest.mark.parametrize("damaged", [False, True])
def test_concurrent_writers_agree(damaged: bool, tmp_path: Path) -> None:
    if damaged:
        _truncate_image(small(tmp_path))
    start = threading.Barrier(4)

    def one(_: int) -> Path:
        start.wait()
        return small(tmp_path)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(one, range(4)))
    (folder,) = folders
    assert contents(folder) == contents(small(tmp_path / "alone"))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_loser_of_a_race_uses_the_winners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "ijepa-fast" / f"shapes-v1-{TRAIN}-{TEST}"
    write = shapes._write

    def slow(folder: Path, train: int, test: int) -> None:
        write(folder, train, test)
        shutil.copytree(folder, final)
        (final / ".first").write_text("")

    monkeypatch.setattr(shapes, "_write", slow)
    assert small(tmp_path) == final
    assert (final / ".first").exists()
    assert [p.name for p in final.parent.iterdir()] == [final.name]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_write_leaves_nothing(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(split: Split, number: int) -> None:
        if number == 20:
            raise stop

    monkeypatch.setattr(shapes, "render", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        small(tmp_path)
    assert list((tmp_path / "ijepa-fast").iterdir()) == []


def test_errors_name_the_folder_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/ijepa-fast.*XDG_CACHE_HOME"):
        small(tmp_path / "file")
    with pytest.raises(ValueError, match=r"train must be in 1\.\.100000, got 0"):
        write_shapes(tmp_path, train=0)
    with pytest.raises(ValueError, match=r"test must be in 1\.\.100000, got 100001"):
        write_shapes(tmp_path, test=100_001)
