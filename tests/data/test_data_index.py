"""The index: what is listed, what is refused and why, digests, arrays."""

import io
import os
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.data import build_index, index_from_arrays, index_to_arrays, open_index
from ijepa_fast.data.index import COLUMNS


def _encode(size=(40, 30), mode="RGB", fmt="JPEG", seed=0, **options):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _write(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_rows_labels_sizes(tmp_path):
    root = _write(
        tmp_path,
        {
            "train/dog/b.JPG": _encode((50, 20)),
            "train/cat/a.jpeg": _encode((30, 40)),
            "val/cat/z.png": _encode((31, 41), fmt="PNG"),
            "val/deep/er/bird/x.webp": _encode((32, 42), fmt="WEBP"),
            "val/cat/y.bmp": _encode((33, 43), fmt="BMP"),
            "val/cat/t.tif": _encode((34, 44), fmt="TIFF"),
            "val/cat/p.ppm": _encode((35, 45), fmt="PPM"),
            "val/cat/g.PGM": _encode((36, 46), mode="L", fmt="PPM"),
            "top.png": _encode((37, 47), fmt="PNG"),
            "train/dog/notes.txt": b"hello",
            "labels.csv": b"a,b",
            ".hidden.jpg": _encode(),
            ".cache/c.jpg": _encode(),
        },
    )
    index = build_index(root)
    assert list(index.paths) == sorted(index.paths, key=os.fsencode)
    assert len(index) == 9
    assert index.classes == ("bird", "cat", "dog")
    assert index.bad == ()
    assert index.ignored == 2
    size = {index.name(i): (int(index.width[i]), int(index.height[i])) for i in range(9)}
    assert size["train/dog/b.JPG"] == (50, 20)
    assert size["val/deep/er/bird/x.webp"] == (32, 42)
    label = {index.name(i): int(index.label[i]) for i in range(9)}
    assert label["top.png"] == -1
    assert label["train/cat/a.jpeg"] == label["val/cat/z.png"] == 1
    assert label["val/deep/er/bird/x.webp"] == 0
    for row in range(9):
        assert index.read(row) == (root / index.name(row)).read_bytes()
        assert index.length[row] == (root / index.name(row)).stat().st_size
    types = [index.file.dtype, index.offset.dtype, index.length.dtype, index.label.dtype]
    assert types == [np.int32, np.int64, np.uint32, np.int32]


def test_flat_folder_has_no_classes(tmp_path):
    index = build_index(_write(tmp_path, {"a.jpg": _encode(), "b.jpg": _encode(seed=1)}))
    assert index.classes == ()
    assert index.label.tolist() == [-1, -1]


def _grey16():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(buffer, "PNG")
    return buffer.getvalue()


def _animation():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "plain"),
    [
        ("rgb.jpg", _encode, True),
        ("grey.jpg", lambda: _encode(mode="L"), True),
        ("progressive.jpg", lambda: _encode(progressive=True), True),
        ("cmyk.jpg", lambda: _encode(mode="CMYK"), False),
        ("stored_as_rgb.jpg", lambda: _encode(keep_rgb=True), False),
        ("rgb.png", lambda: _encode(fmt="PNG"), True),
        ("grey.png", lambda: _encode(mode="L", fmt="PNG"), True),
        ("alpha.png", lambda: _encode(mode="RGBA", fmt="PNG"), False),
        ("animated.png", _animation, False),
        ("grey_alpha.png", lambda: _encode(mode="LA", fmt="PNG"), False),
        ("colour_key.png", lambda: _encode(fmt="PNG", transparency=(1, 2, 3)), False),
        ("palette.png", lambda: _encode(mode="P", fmt="PNG"), False),
        ("one_bit.png", lambda: _encode(mode="1", fmt="PNG"), False),
        ("sixteen.png", _grey16, False),
        ("png_inside.jpg", lambda: _encode(fmt="PNG"), True),
        ("webp.webp", lambda: _encode(fmt="WEBP"), False),
        ("bmp.bmp", lambda: _encode(fmt="BMP"), False),
    ],
)
def test_what_dali_may_decode(tmp_path, name, data, plain):
    assert build_index(_write(tmp_path, {name: data()})).plain.tolist() == [plain]


def test_an_incomplete_progressive_jpeg_is_pillows_once_it_is_verified(tmp_path):
    """The bits that its scans lack are smoothed over, by each decoder in its own way."""
    whole = _encode(progressive=True)
    last = whole.rindex(b"\xff\xc4")
    files = {"cut.jpg": whole[:last] + b"\xff\xd9", "whole.jpg": whole}
    root = _write(tmp_path, files)
    assert build_index(root, verify=True).plain.tolist() == [False, True]


def _hostile(root):
    """One good image and every kind of bad file; returns bad name -> words of its reason."""
    jpeg, png = _encode((64, 64)), _encode((64, 64), fmt="PNG")
    expected = {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "dir/empty.jpg": "empty",
        "dir/page.jpg": "not an image",
        "noise.webp": "not an image",
        "half_header.jpg": "",
        "float.tif": "mode 'F'",
        "bomb.png": "pixels",
        "gif.png": "not an image",
        "fifo.jpg": "not a regular file",
        "broken.jpg": "broken symbolic link",
    }
    huge = bytearray(png)
    huge[16:24] = (50_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    floats = io.BytesIO()
    Image.new("F", (20, 20)).save(floats, "TIFF")
    _write(
        root,
        {
            "good.jpg": jpeg,
            # Padding after the end marker is fine, and so is a trailer that hides it.
            "padded.jpg": jpeg + bytes(500),
            "trailer.jpg": jpeg + bytes(5000),
            "cut.jpg": jpeg[: len(jpeg) // 2],
            "cut.png": png[: len(png) // 2],
            "dir/empty.jpg": b"",
            "dir/page.jpg": b"<html><body>404 not found</body></html>",
            "noise.webp": np.random.default_rng(0).bytes(3000),
            "half_header.jpg": jpeg[:100],
            "float.tif": floats.getvalue(),
            "bomb.png": bytes(huge),
            "gif.png": _encode(fmt="GIF"),
        },
    )
    os.mkfifo(root / "fifo.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    (root / "loop").symlink_to(root)
    return expected


def test_bad_files_are_named_with_a_reason(tmp_path, recwarn):
    expected = _hostile(tmp_path)
    started = time.monotonic()
    index = build_index(tmp_path)
    assert time.monotonic() - started < 5
    assert list(index.paths) == ["good.jpg", "padded.jpg", "trailer.jpg"]
    reasons = dict(index.bad)
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name], (name, reasons[name])
        assert "0x" not in reasons[name]  # no memory address: reasons are the same in every run
    assert list(reasons) == sorted(reasons)
    assert index.digest() == build_index(tmp_path, threads=1).digest()
    assert not recwarn.list


def test_linked_folders_and_files_are_followed(tmp_path):
    _write(tmp_path, {"store/cat/a.jpg": _encode()})
    root = tmp_path / "set"
    root.mkdir()
    (root / "tabby").symlink_to(tmp_path / "store" / "cat")
    (root / "b.jpg").symlink_to(tmp_path / "store" / "cat" / "a.jpg")
    assert tuple(build_index(root).paths) == ("b.jpg", "tabby/a.jpg")


def test_unreadable_files(tmp_path):
    _write(tmp_path, {"a.jpg": _encode(), "b.jpg": _encode()})
    (tmp_path / "b.jpg").chmod(0)
    if os.access(tmp_path / "b.jpg", os.R_OK):
        pytest.skip("this user may read everything")
    assert build_index(tmp_path).bad == (("b.jpg", "cannot be read: Permission denied"),)


@pytest.mark.parametrize(
    ("files", "root", "words"),
    [
        ({}, "missing", ["data.root", "existing folder", "missing"]),
        ({"f.jpg": b"x"}, "f.jpg", ["data.root", "not a file", "f.jpg"]),
        ({"a.txt": b"x", "b.gif": b"x"}, "", ["data.root", ".jpg", "2 other files"]),
        ({"a.jpg": b"x"}, "", ["data.root", "1 unusable", "a.jpg", "not an image"]),
    ],
)
def test_unusable_roots_are_clear_errors(tmp_path, files, root, words):
    _write(tmp_path, files)
    with pytest.raises(ValueError, match=words[0]) as caught:
        build_index(tmp_path / root)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_image_smaller_than_a_patch_is_named(tmp_path):
    _write(
        tmp_path, {"a.jpg": _encode((40, 16)), "b.jpg": _encode((40, 15)), "c.jpg": _encode((9, 9))}
    )
    with pytest.raises(ValueError, match=r"at least 16 pixels.*'b\.jpg' of 40x15 and 1 more"):
        open_index(tmp_path, min_side=16)
    assert len(open_index(tmp_path, min_side=9)[0]) == 3


def test_names_that_are_not_text(tmp_path):
    name = b"caf\xe9 \xff.jpg"
    (tmp_path / os.fsdecode(name)).write_bytes(_encode())
    (tmp_path / ("n" * 251 + ".jpg")).write_bytes(_encode(seed=1))
    (tmp_path / os.fsdecode(b"bad\xe9\n.jpg")).write_bytes(b"")
    index = build_index(tmp_path)
    assert [os.fsencode(path) for path in index.paths] == [name, b"n" * 251 + b".jpg"]
    assert index.read(0) == _encode()
    back = index_from_arrays(index_to_arrays(index))
    assert list(back.paths) == list(index.paths) == [back.paths[0], back.paths[1]]
    assert back.bad == index.bad


def test_digest_notices_changes_and_nothing_else(tmp_path):
    files = {"x/a.jpg": _encode(), "x/b.jpg": _encode((50, 50))}
    one, two = tmp_path / "one", tmp_path / "two"
    digest = build_index(_write(one, files)).digest()
    assert len(digest) == 64
    assert build_index(_write(two, files)).digest() == digest
    (two / "x/b.jpg").write_bytes(_encode((50, 51)))
    assert build_index(two).digest() != digest
    # another image of the same size and length
    again = (one / "x/b.jpg").read_bytes()
    other = _encode((50, 50), seed=1)
    length = max(len(again), len(other))
    (one / "x/b.jpg").write_bytes(again.ljust(length, b"\0"))
    before = build_index(one)
    (one / "x/b.jpg").write_bytes(other.ljust(length, b"\0"))
    after = build_index(one)
    assert after.digest() != before.digest()
    assert before.matches(before.digest())
    assert not after.matches(before.digest())
    # of runs that were started before marks were in it
    assert before.matches(before._compute_digest(()))
    (one / "x/b.jpg").rename(one / "x/c.jpg")
    assert build_index(one).digest() != after.digest()


def test_arrays_round_trip_through_tensors(tmp_path):
    _hostile(tmp_path)
    index = build_index(tmp_path)
    arrays = index_to_arrays(index)
    assert all(array.dtype != object for array in arrays.values())
    # As a broadcast would carry them.
    back = index_from_arrays(
        {name: torch.from_numpy(array.copy()).clone().numpy() for name, array in arrays.items()}
    )
    for name in ("classes", "roots", "bad", "bad_paths", "ignored"):
        assert getattr(back, name) == getattr(index, name)
    assert list(back.paths) == list(index.paths)
    for name in (*COLUMNS, "stamps", "root_start", "bad_stamps", "ignored_in", "watched_times"):
        assert np.array_equal(getattr(back, name), getattr(index, name))
        assert getattr(back, name).dtype == getattr(index, name).dtype
    assert back.digest() == index.digest()
    del arrays["plain"]
    with pytest.raises(ValueError, match="plain"):
        index_from_arrays(arrays)


def test_a_file_that_changed_is_not_read_silently(tmp_path):
    index = build_index(_write(tmp_path, {f"{name}.jpg": _encode() for name in "abcd"}))
    (tmp_path / "a.jpg").write_bytes(_encode()[:50])
    (tmp_path / "b.jpg").unlink()
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").unlink()
    same = _encode()
    (tmp_path / "d.jpg").write_bytes(same[:-10] + bytes(10))
    changes = ("has changed", "not a regular file", "No such file", "another image of the same")
    for row, words in enumerate(changes):
        with pytest.raises(OSError, match=words):
            index.read(row)
