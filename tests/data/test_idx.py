"""Fashion-MNIST's files as PNG, read back by another library, and files that are damaged."""

import gzip
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ijepa_fast import evaluation
from ijepa_fast.data import open_index
from ijepa_fast.data.__main__ import main as data_main
from ijepa_fast.data.sets import idx, named
from ijepa_fast.data.sets.idx import EMBEDDED, find_idx, write_idx
from ijepa_fast.errors import UsageError
from tests.trainer import tiny


def _idx(values):
    values = np.ascontiguousarray(values, dtype=np.uint8)
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    return header + values.tobytes()


@pytest.fixture
def files(tmp_path):
    """30 training and 12 test images of 9 x 7, classes 0, 1 and 3; one file is not compressed."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    folder.mkdir()
    made = {}
    for part, prefix, count in (("train", "train", 30), ("test", "t10k", 12)):
        images = rng.integers(0, 256, (count, 9, 7), dtype=np.uint8)
        labels = np.array([0, 1, 3], dtype=np.uint8)[np.arange(count) % 3]
        made[part] = images, labels
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return folder, made


def test_every_pixel_and_label(files, tmp_path):
    folder, made = files
    written = write_idx(folder, tmp_path / "cache")
    for part, (images, labels) in made.items():
        assert sorted(p.name for p in (written / part).iterdir()) == ["0", "1", "3"]
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            with Image.open(written / part / str(label) / f"{number:05d}.png") as image:
                assert image.mode == "L"
                assert np.array_equal(np.asarray(image), pixels)
    assert len(open_index(str(written / "train"))[0]) == 30
    assert [p.name for p in (tmp_path / "cache" / "ijepa-fast").iterdir()] == [written.name]


def test_written_once(files, tmp_path, monkeypatch):
    folder, _ = files
    first = write_idx(folder, tmp_path / "cache")
    monkeypatch.setattr(idx, "_write", None)
    assert write_idx(folder, tmp_path / "cache") == first
    (first / "train" / "0" / "00000.png").unlink()
    with pytest.raises(ValueError, match="must hold 30 images, got 29: delete"):
        write_idx(folder, tmp_path / "cache")


def test_the_loser_of_a_race_uses_the_winners(files, tmp_path, monkeypatch):
    folder, _ = files
    real, times = idx._write, []

    def overtaken(found, own):
        monkeypatch.setattr(idx, "_write", real)
        winners = write_idx(folder, tmp_path) / "manifest.json"
        times.append(winners.stat().st_ino)
        return real(found, own)

    monkeypatch.setattr(idx, "_write", overtaken)
    written = write_idx(folder, tmp_path)
    assert [(written / "manifest.json").stat().st_ino] == times
    assert list(written.parent.iterdir()) == [written]


def test_a_living_build_is_left_alone_and_a_killed_one_removed(files, tmp_path):
    (folder, made), cache, large = files, tmp_path / "cache", tmp_path / "large"
    shutil.copytree(folder, large)
    images = np.zeros((20_000, 9, 7), dtype=np.uint8)
    (large / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
    (large / "train-labels-idx1-ubyte").write_bytes(_idx(np.zeros(20_000)))
    code = "import pathlib, sys; from ijepa_fast.data.sets.idx import write_idx; "
    code += "write_idx(*map(pathlib.Path, sys.argv[1:]))"
    child = subprocess.Popen([sys.executable, "-c", code, large, cache])
    try:
        while not (begun := list(cache.glob("ijepa-fast/.*/*/train/0/00000.png"))):
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGSTOP)
        write_idx(folder, cache)
        assert begun[0].exists()
    finally:
        child.kill()
        child.wait()
    assert begun[0].exists()
    images = made["train"][0]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(255 - images)))
    write_idx(folder, cache)
    assert not list(cache.glob("ijepa-fast/.*"))


def test_other_files_go_elsewhere(files, tmp_path):
    folder, made = files
    first = write_idx(folder, tmp_path / "cache")
    images, _ = made["train"]
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(255 - images)))
    assert write_idx(folder, tmp_path / "cache") != first


def test_classes_of_fashion_mnist_have_their_names(files, tmp_path, monkeypatch):
    import hashlib

    folder, made = files
    digest = hashlib.sha256(made["train"][1].tobytes()).hexdigest()
    monkeypatch.setattr(idx, "_FASHION_LABELS", (digest,))
    written = write_idx(folder, tmp_path / "cache")
    assert {p.name for p in (written / "test").iterdir()} == {"t-shirt_top", "trouser", "dress"}


def test_the_embedded_set(tmp_path):
    written = write_idx(EMBEDDED, tmp_path)
    classes = sorted(p.name for p in (written / "train").iterdir())
    assert classes == sorted(idx._FASHION)
    labels = gzip.decompress((EMBEDDED / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = gzip.decompress((EMBEDDED / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    order = np.random.default_rng(0).permutation(10_000)
    for part, rows in (("train", order[:8000]), ("test", order[8000:])):
        files = {p.stem: p for p in (written / part).rglob("*.png")}
        assert sorted(files) == [f"{n:05d}" for n in range(len(rows))]
        for number in (0, 1, 1999):
            path, row = files[f"{number:05d}"], int(rows[number])
            assert path.parent.name == idx._FASHION[labels[row]]
            with Image.open(path) as image:
                assert image.tobytes() == pixels[784 * row : 784 * (row + 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", None, "got none of train labels"),
        ("train-labels-idx1-ubyte", b"", "begin with 00000801.*got nothing"),
        ("train-labels-idx1-ubyte", _idx(np.zeros((3, 2, 2))), "got 00000803"),
        ("train-labels-idx1-ubyte", _idx(np.zeros(30))[:-1], r"must hold \(30,\) bytes, got 29"),
        ("train-labels-idx1-ubyte", _idx(np.zeros(29)), "as many, got 30 and 29"),
        ("train-images-idx3-ubyte.gz", b"no gzip", "must be a readable IDX file"),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            "must be a readable IDX",
        ),
        (
            "train-images-idx3-ubyte.gz",
            gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12, mtime=0),
            "must hold",
        ),
    ],
)
def test_damaged_files(files, tmp_path, name, content, message):
    folder, _ = files
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_idx(folder, tmp_path / "cache")
    left = tmp_path / "cache" / "ijepa-fast"
    assert not left.exists() or not list(left.iterdir())


def test_a_folder_of_images_is_none(tmp_path):
    tiny.write_images(tmp_path / "data", count=4)
    assert find_idx(tmp_path / "data") is None
    assert named.named_data(str(tmp_path / "data")) is None


def test_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "FASHION_MNIST", tmp_path / "none")
    with pytest.raises(ValueError, match="apt install dataset-fashion-mnist"):
        named.named_data("fashion_mnist")


def test_training_and_evaluation_take_the_folder(files, tmp_path, capsys):
    folder, _ = files
    settings = {"data__crop": 8, "model__patch_size": 2, "eval__data": folder, "max_steps": 2}
    assert tiny.run(folder, tmp_path / "run", **settings) == 0
    assert "30 images in 3 classes" in capsys.readouterr().out
    assert evaluation.main([str(tmp_path / "run"), "--k", "3"]) == 0
    assert f"30 training and 12 test images in 3 classes of {folder}" in capsys.readouterr().out


def test_the_data_command_takes_the_name(files, monkeypatch, capsys):
    folder, _ = files
    monkeypatch.setattr(named, "FASHION_MNIST", folder)
    for root in ("fashion_mnist", str(folder)):
        assert data_main([root]) == 0
        assert "images      30," in capsys.readouterr().out


def test_a_typing_error_is_still_one():
    with pytest.raises((ValueError, UsageError), match=r"data\.root must be an existing folder"):
        open_index("fashion_mnst")
