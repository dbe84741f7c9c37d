"""Packed data sets: order, classes and pixels of the original, the same bytes after a kill."""

import io
import json
import os
import signal
import tarfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ijepa_fast.data import build_index, crop_windows, data_roots, pack
from ijepa_fast.data import pack as pack_function
from ijepa_fast.data.__main__ import main as data_main
from ijepa_fast.data.pack import MANIFEST, packed_image
from ijepa_fast.data.pixels import decode_window
from ijepa_fast.errors import TooManyBadFiles, UsageError
from tests.trainer import tiny
from tests.trainer.small_folder import make_loader
from tests.trainer.tiny import bad_png, snapshot

SIDE = 48


def picture(seed, size):
    """A smooth picture, and its JPEG file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photographs(tmp_path):
    """24 of several sizes in classes whose names are numbers, and one without a class."""
    root = tmp_path / "photographs"
    for n in range(24):
        path = root / f"part{n % 2}" / str(n % 11) / f"shot {n}.x.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(n, (90 + 40 * (n % 3), 60 + 50 * (n % 4))).save(path, quality=95)
    picture(50, (64, 200)).save(root / "alone.jpg")
    return build_index(root)


def whole(index, row):
    """All pixels of a row, as a run sees them."""
    window = np.array([0, 0, index.height[row], index.width[row]])
    return decode_window(index.read(row), window).astype(float)


def test_order_classes_sizes_and_pixels_are_kept(photographs, tmp_path):
    done = pack(photographs, tmp_path / "out", side=SIDE, shard_bytes=12_000)
    packed = build_index(tmp_path / "out")
    assert (done.images, done.left_out, done.shards) == (25, (), len(packed.shard_files))
    assert done.shards > 2
    assert packed.classes == photographs.classes
    assert packed.label.tolist() == photographs.label.tolist()
    assert packed.plain.all()
    assert not packed.bad
    for row in range(25):
        width, height = int(photographs.width[row]), int(photographs.height[row])
        assert min(packed.width[row], packed.height[row]) == SIDE
        assert packed.width[row] / packed.height[row] == pytest.approx(width / height, rel=0.02)
        original = Image.fromarray(whole(photographs, row).astype(np.uint8))
        size = (int(packed.width[row]), int(packed.height[row]))
        expected = np.asarray(original.resize(size, Image.Resampling.LANCZOS), float)
        assert np.abs(whole(packed, row) - expected).mean() < 2
    assert packed.name(0) == "000000.tar/000000000-alone.jpg"
    assert packed.name(1) == "000000.tar/000000001-shot_0_x.jpg"
    with make_loader(photographs, steps=6) as one, make_loader(packed, steps=6) as two:
        for ours, theirs in zip(one, two, strict=True):
            assert ours.ids.tolist() == theirs.ids.tolist()
            # windows are rounded to other pixels, of pictures as small as these
            off = (ours.images.float() - theirs.images.float()).abs()
            assert off.mean() < 12


def test_windows_are_the_same_part_of_the_image():
    ids = np.arange(500)
    shared = {"seed": 0, "epoch": 3, "scale": (0.3, 1.0), "ratio": (3 / 4, 4 / 3)}
    large = crop_windows(np.full(500, 2000), np.full(500, 1500), ids, **shared)
    small = crop_windows(np.full(500, 341), np.full(500, 256), ids, **shared)
    off = np.abs(large / (1500 / 256) - small).max(axis=1)
    # of the others a try fits by a pixel in one size only
    assert np.mean(off < 1.5) > 0.98


def test_small_jpegs_are_copied_and_others_encoded_at_their_size(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    small = picture(0, (SIDE, 300))
    files = {
        "a.jpg": encoded(small, quality=80, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        "b.png": encoded(small, "PNG"),
        "c.jpg": encoded(picture(1, (SIDE, 300)).convert("CMYK"), quality=95),
        "d.png": encoded(picture(2, (40, 30)).convert("L"), "PNG"),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    index = build_index(root)
    assert pack(index, tmp_path / "out", side=SIDE).copied == 2
    packed = build_index(tmp_path / "out")
    assert [packed.read(row) == index.read(row) for row in range(4)] == [True, False, True, False]
    assert packed.width.tolist() == index.width.tolist()
    assert packed.height.tolist() == index.height.tolist()
    for row in range(4):
        assert np.abs(whole(packed, row) - whole(index, row)).mean() < 3


def test_conversion_is_the_decoders(tmp_path):
    """Grey stays grey; 16 bits, palettes, alpha and CMYK become what a run sees."""
    size, colour = (200, 160), picture(3, (200, 160))
    high = Image.fromarray((np.asarray(colour.convert("L"), np.uint16) << 8) + 77)
    kinds = {
        "grey jpeg": encoded(colour.convert("L"), quality=95),
        "grey png": encoded(colour.convert("L"), "PNG", transparency=7),
        "16 bit": encoded(high, "PNG"),
        "palette": encoded(colour.convert("P"), "PNG"),
        "alpha": encoded(Image.merge("RGBA", (*colour.split(), colour.getchannel(0))), "PNG"),
        "cmyk": encoded(colour.convert("CMYK"), quality=95),
        "turned": encoded(colour, quality=95, exif=_turned()),
        "profile": encoded(colour, quality=95, icc_profile=b"x" * 200, comment=b"hello"),
    }
    for name, data in kinds.items():
        made = packed_image(data, side=64, quality=100)
        with Image.open(io.BytesIO(made)) as image:
            assert image.size == (80, 64), name
            assert image.mode == ("L" if "grey" in name else "RGB"), name
            assert not {"icc_profile", "exif", "comment"} & image.info.keys(), name
        seen = decode_window(data, np.array([0, 0, size[1], size[0]]))
        expected = Image.fromarray(seen).resize((80, 64), Image.Resampling.LANCZOS)
        got = decode_window(made, np.array([0, 0, 64, 80]))
        assert np.abs(got.astype(float) - np.asarray(expected)).mean() < 1.6, name


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


class Killed(BaseException):
    """What no handler is for."""


@pytest.mark.parametrize("after", [0, 7, 24])
def test_after_a_kill_the_bytes_are_the_same(photographs, tmp_path, monkeypatch, after):
    settings = {"side": SIDE, "shard_bytes": 12_000, "threads": 2}
    # as after a kill before the first manifest
    (tmp_path / "whole.partial").mkdir()
    (tmp_path / "whole.partial" / f".{MANIFEST}").touch()
    pack(photographs, tmp_path / "whole", **settings)
    added = []

    def dying(real, *arguments):
        added.append(arguments)
        if len(added) > after:
            raise Killed
        real(*arguments)

    real = pack_function.__globals__["_add"]
    with monkeypatch.context() as patch:
        patch.setitem(pack_function.__globals__, "_add", lambda *a: dying(real, *a))
        with pytest.raises(Killed):
            pack(photographs, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    done = pack(photographs, tmp_path / "out", **settings)
    assert (done.done < 25) == (after > 0)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    # finished: nothing is written again
    before = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    assert pack(photographs, tmp_path / "out", **settings).done == 0
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == before


def test_after_a_kill_before_the_last_move(tmp_path):
    data = tiny.write_images(tmp_path / "data", 3)
    bad_png(data / "class1" / "bad.png")
    index, out = build_index(data), tmp_path / "out"
    # a shard an image: nothing comes behind the last one but what is left out
    done = pack(index, out, side=32, shard_bytes=1)
    whole = snapshot(out)
    for bad in (True, False):
        if not bad:
            (data / "class1" / "bad.png").unlink()
            index, out = build_index(data), tmp_path / "good"
            done = pack(index, out, side=32, shard_bytes=1)
            whole = snapshot(out)
        out.rename(f"{out}.partial")
        again = pack(index, out, side=32, shard_bytes=1)
        assert (again.images, again.left_out) == (done.images, done.left_out)
        assert len(again.left_out) == bad
        assert snapshot(out) == whole


def test_others_are_refused(photographs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(photographs, out, side=SIDE)
    with pytest.raises(UsageError, match=r"new folder for other side \(48 -> 64\), got .*out"):
        pack(photographs, out, side=64)
    other = build_index(tmp_path / "photographs" / "part0")
    with pytest.raises(UsageError, match="new folder for other images"):
        pack(other, out, side=SIDE)
    with pytest.raises(UsageError, match="outside of the images in"):
        pack(photographs, tmp_path / "photographs" / "packed")
    with pytest.raises(UsageError, match="which holds something else"):
        pack(other, tmp_path / "photographs")
    (out / "000000.tar").write_bytes(b"short")
    with pytest.raises(UsageError, match=r"000000.tar must be a shard of \d+ bytes .* got 5"):
        pack(photographs, out, side=SIDE)
    monkeypatch.setattr("shutil.disk_usage", lambda _: mock.Mock(free=4000))
    with pytest.raises(UsageError, match=r"room for about .* GB more, got .* with 0.00 GB"):
        pack(photographs, tmp_path / "full")


def test_a_class_that_a_shard_cannot_say_is_refused(tmp_path, monkeypatch):
    class Odd:
        def __len__(self):
            return 1

        def bytes_at(self, i):
            return encoded(picture(i, (60, 60)))

        def label_at(self, i):
            return " dog"

    with data_roots(Odd()) as roots:
        index = build_index(roots)
        with pytest.raises(UsageError, match=r"name of a class must be printable.*got ' dog'"):
            pack(index, tmp_path / "out")
        monkeypatch.setattr(Odd, "label_at", lambda self, i: "dog")
        pack(build_index(roots), tmp_path / "out")
    assert build_index(tmp_path / "out").name(0) == "000000.tar/000000000-images_0_.jpg"


def test_damaged_images_are_left_out_and_named(tmp_path, capsys):
    data = tiny.write_images(tmp_path / "data", 12)
    bad_png(data / "class0" / "002-bad.png")
    arguments = [str(data), "--pack", str(tmp_path / "out"), "--side", "32"]
    assert data_main(arguments) == 0
    printed = capsys.readouterr().out
    assert "packed      12 images (0 as they were) in 1 shards" in printed
    assert "'class0/002-bad.png': " in printed
    packed = build_index(tmp_path / "out")
    assert len(packed) == 12
    assert not [row for row in range(12) if "bad" in packed.name(row)]
    # what the header tells counts too
    (data / "class0" / "no.jpg").write_bytes(b"")
    with pytest.raises(TooManyBadFiles, match="must be at most 1 of 14"):
        pack(build_index(data), tmp_path / "other")
    assert data_main([*arguments[:2], str(tmp_path / "other"), "--max-bad-share", "0.2"]) == 0


def test_ctrl_c_keeps_whole_shards(photographs, tmp_path, monkeypatch, capsys, caplog):
    real, seen = packed_image, []

    def slow(data, **options):
        seen.append(data)
        if len(seen) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return real(data, **options)

    monkeypatch.setitem(pack_function.__globals__, "packed_image", slow)
    arguments = [photographs.roots[0], "--pack", str(tmp_path / "out"), "--side", str(SIDE)]
    arguments += ["--shard-mb", "0.002", "--threads", "1"]
    assert data_main(arguments) == 130
    kept = json.loads((tmp_path / "out.partial" / MANIFEST).read_text())["shards"]
    assert f"{len(kept)} whole shards are kept in" in caplog.text
    assert data_main(arguments) == 0
    assert "25 images" in capsys.readouterr().out


def test_shards_are_in_webdatasets_layout(photographs, tmp_path):
    pack(photographs, tmp_path / "out", side=SIDE)
    with tarfile.open(tmp_path / "out" / "000000.tar") as archive:
        members = archive.getmembers()
    assert {member.mtime for member in members} == {0}
    names = [member.name for member in members]
    assert names[1:3] == ["000000001-shot_0_x.jpg", "000000001-shot_0_x.cls"]
