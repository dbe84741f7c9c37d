"""Hostile pictures and files by the thousand: both decoders agree, nothing crashes or hangs.

Pillow's own test images come from its source distribution (PILLOW_SDIST names a copy of it).
"""

import faulthandler
import hashlib
import io
import json
import os
import resource
import shutil
import tarfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from PIL import __version__ as pillow_version

from benchmarks.photographs import write_photographs
from ijepa_fast.data import (
    DaliDecoder,
    DecodeError,
    PillowDecoder,
    build_index,
    crop_windows,
    named_data,
)
from ijepa_fast.data.cache import load_table, save_table
from ijepa_fast.data.index import COLUMNS, Index, Texts
from ijepa_fast.data.pixels import EXTENSIONS
from ijepa_fast.data.table_file import TableError
from ijepa_fast.errors import CheckpointError
from ijepa_fast.state import checkpoint
from tests.data.test_data_sources import damage_shards
from tests.state.test_saving import _state
from tests.trainer.damage import mutate, mutate_picture, picture_files
from tests.trainer.small_folder import HAS_DALI

# what Pillow warns of is no failure
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def mutations(pytestconfig):
    return pytestconfig.getoption("--mutations")


def _sdist(folder):
    given = os.environ.get("PILLOW_SDIST")
    if given:
        return Path(given)
    page = "https://pypi.org/simple/pillow/"
    request = urllib.request.Request(
        page, headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            files = json.load(answer)["files"]
        wanted = f"pillow-{pillow_version}.tar.gz"
        url = next(file["url"] for file in files if file["filename"] == wanted)
        path, _ = urllib.request.urlretrieve(url, folder / wanted)
    except OSError as error:
        pytest.skip(f"Pillow's source distribution cannot be fetched: {error}")
    return Path(path)


def _compare(index, *, rounds=2):
    """Every usable image through both decoders, one by one: counts of what came out. A picture that
    takes a minute ends the tests, with what every thread is at.
    """
    pillow, dali = PillowDecoder((64, 64), 2), DaliDecoder((64, 64), 2, max_batch=1)
    counts: Counter[str] = Counter()
    differ = []
    for row in range(len(index)):
        faulthandler.dump_traceback_later(60, exit=True)
        for epoch in range(rounds):
            ids = np.array([row])
            windows = crop_windows(
                index.width[ids],
                index.height[ids],
                ids,
                seed=0,
                epoch=epoch,
                scale=(0.1, 1.0),
                ratio=(3 / 4, 4 / 3),
            )
            found = []
            for decoder in (pillow, dali):
                try:
                    found.append(decoder.decode([index.read(row)], windows, index.plain[ids]))
                except DecodeError:
                    found.append(None)
            one, two = found
            if one is None or two is None:
                kind = "refused by both" if one is two else "refused by one"
            else:
                kind = "equal" if torch.equal(one, two) else "different"
            counts[kind] += 1
            if kind in ("refused by one", "different"):
                off = "" if one is None or two is None else int((one.int() - two.int()).abs().max())
                differ.append((index.name(row), epoch, kind, off))
    faulthandler.cancel_dump_traceback_later()
    pillow.close()
    dali.close()
    return counts, differ


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_pillows_own_pictures(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with tarfile.open(_sdist(tmp_path)) as archive:
        for member in archive:
            name = member.name.partition("/Tests/images/")[2]
            if not name or not member.isfile() or not name.lower().endswith(EXTENSIONS):
                continue
            file = archive.extractfile(member)
            assert file is not None
            (folder / name.replace("/", "_")).write_bytes(file.read())
    started = time.monotonic()
    index = build_index(folder)
    took = time.monotonic() - started
    counts, differ = _compare(index)
    verified = build_index(folder, verify=True)
    print(
        f"TORTURE Pillow's pictures: {len(index) + len(index.bad)} files, {len(index.bad)} refused "
        f"by header or end marker in {took:.1f} s, {len(verified.bad)} when verified; "
        f"decoded twice each: {dict(counts)}; {differ}"
    )
    assert not differ


def _photograph(tmp_path):
    return (write_photographs(tmp_path / "photographs", 2) / "00000.jpg").read_bytes()


def _png(data):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize((120, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("kind", ["jpg", "progressive.jpg", "png"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_at_every_percent(tmp_path, kind, damage):
    whole = _photograph(tmp_path)
    if kind == "progressive.jpg":
        buffer = io.BytesIO()
        Image.open(io.BytesIO(whole)).save(buffer, "JPEG", quality=90, progressive=True)
        whole = buffer.getvalue()
    elif kind == "png":
        whole = _png(whole)
    folder = tmp_path / "damaged"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for percent in range(100):
        data = bytearray(whole)
        place = len(whole) * percent // 100
        if damage == "truncated":
            del data[place:]
        else:
            data[min(place + int(rng.integers(50)), len(data) - 1)] ^= 1 << int(rng.integers(8))
        (folder / f"{percent:02d}.{kind}").write_bytes(data)
    (folder / f"whole.{kind}").write_bytes(whole)
    index = build_index(folder)
    counts, differ = _compare(index, rounds=3)
    print(f"TORTURE {damage} {kind}: {len(index.bad)} of 100 refused; {dict(counts)}; {differ[:5]}")
    if damage == "truncated":
        assert len(index) == 1
    assert not [entry for entry in differ if entry[2] == "refused by one"]
    assert counts["refused by one"] == 0


def _whole_pictures():
    """Photographs and Fashion-MNIST's: extension -> files."""
    folder = Path(skimage.data.__file__).parent
    names = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    photographs = [Image.open(folder / name).convert("RGB").resize((96, 72)) for name in names]
    clothes = build_index(named_data("fashion_mnist_10k"))
    small = [Image.open(io.BytesIO(clothes.read(row))).convert("RGB") for row in range(5)]
    return picture_files([np.asarray(image) for image in photographs + small])


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
@pytest.mark.parametrize("verify", [False, True])
def test_mutated_pictures(tmp_path, mutations, verify):
    """Only wholly decoded once, a file is known to have no damage behind its last pixel, which DALI
    does not read.
    """
    files, slowest, refused, differ = _whole_pictures(), 0.0, 0, []
    counts: Counter[str] = Counter()
    for first in range(0, mutations, 500):
        folder = tmp_path / str(first)
        folder.mkdir()
        for seed in range(first, min(first + 500, mutations)):
            rng = np.random.default_rng(seed)
            extension = list(files)[seed % len(files)]
            kinds = files[extension]
            whole, other = (kinds[int(n)] for n in rng.integers(0, len(kinds), 2))
            (folder / f"{seed}.{extension}").write_bytes(mutate_picture(whole, other, rng))
        faulthandler.dump_traceback_later(600, exit=True)
        started = time.monotonic()
        index = build_index(folder, verify=verify)
        slowest = max(slowest, time.monotonic() - started)
        found, unlike = _compare(index, rounds=1)
        counts += found
        differ += unlike
        refused += len(index.bad)
        assert all(reason.isprintable() and reason for _, reason in index.bad)
        index.close()
        shutil.rmtree(folder)
    print(
        f"TORTURE pictures, verified {verify}: {mutations} mutations, {refused} refused by the "
        f"table, {slowest:.1f} s for its slowest 500; decoded: {dict(counts)}; {differ[:5]}"
    )
    if verify:
        assert not differ
    assert all(
        (name.endswith(".jpg") and kind == "refused by one") or off <= 8
        for name, _, kind, off in differ
    )


@pytest.mark.parametrize("forged", [False, True])
def test_mutated_checkpoints(tmp_path, mutations, forged):
    """Damaged files; hostile ones with a manifest that fits them: no crash, no unbounded memory."""
    path = checkpoint.write(tmp_path, _state(7))
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    expected = checkpoint.read(path)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = sorted(whole.keys() - ({"manifest.json"} if forged else set()))
    for seed in range(mutations):
        name = names[seed % len(names)]
        data = mutate(whole[name], np.random.default_rng(seed))
        (path / name).write_bytes(data)
        if forged:
            manifest = json.loads(whole["manifest.json"])
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (path / "manifest.json").write_text(json.dumps(manifest))
        try:
            state = checkpoint.read(path)
        except CheckpointError:
            refused += 1
        else:
            if forged:
                assert sum(tensor.nbytes for tensor in state.tensors.values()) <= len(data) + 1000
            else:
                assert state.step == expected.step
                for key, tensor in expected.tensors.items():
                    assert tensor.equal(state.tensors[key])
        (path / name).write_bytes(whole[name])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"TORTURE checkpoints, forged {forged}: {mutations} mutations, {refused} refused, "
        f"memory grew by {grown:.0f} MiB"
    )
    assert grown < 300


def test_mutated_tables(tmp_path, mutations):
    for number in range(4):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    path = tmp_path / "t.safetensors"
    save_table(path, build_index(tmp_path))
    whole = path.read_bytes()
    refused = 0
    for seed in range(mutations):
        path.write_bytes(mutate(whole, np.random.default_rng(seed)))
        try:
            index = load_table(path)
        except (TableError, OSError):
            refused += 1
            continue
        # what is opened can be used: every row has a name, and lies in a file of the table
        assert len(index) == 4
        assert len([index.path(row) + index.name(row) for row in range(4)]) == 4
    print(f"TORTURE tables: {mutations} mutations, {refused} refused, no crash")
    assert refused > mutations // 2


def test_mutated_shards(tmp_path, mutations):
    refused, slowest = damage_shards(tmp_path, mutations)
    print(f"TORTURE shards: {mutations} mutations, {refused} without an image, {slowest:.2f} s")
    assert slowest < 5


def test_fourteen_million_rows(tmp_path):
    rows = 14_000_000
    ids = np.arange(rows)
    line = np.frombuffer(b"n00000000/n00000000_00000.JPEG\0", np.uint8)
    blob = np.tile(line, (rows, 1))
    for digit in range(8):
        blob[:, 1 + digit] = blob[:, 11 + digit] = (ids // 650) // 10 ** (7 - digit) % 10 + 48
    for digit in range(5):
        blob[:, 20 + digit] = ids // 10 ** (4 - digit) % 10 + 48
    columns = {name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()}
    columns["file"] = ids.astype(np.int32)
    index = Index(
        **columns,
        paths=Texts(blob.reshape(-1), np.arange(0, 31 * rows + 1, 31)),
        members=None,
        stamps=ids.astype(np.uint64),
        roots=("/data",),
        root_start=np.zeros(1, np.int32),
        classes=tuple(f"n{n:08d}" for n in range(21841)),
    )
    path = tmp_path / "table.safetensors"
    save_table(path, index)
    digest = index.digest()
    del index, columns, blob
    started = time.monotonic()
    opened = load_table(path)
    took = time.monotonic() - started
    size = path.stat().st_size / 2**30
    assert opened.digest() == digest
    assert opened.name(rows - 1) == "n00021538/n00021538_99999.JPEG"
    print(f"TORTURE table: {rows} rows, {size:.3f} GiB, opened in {took:.3f} s")
    assert size < 1
    assert took < 2
