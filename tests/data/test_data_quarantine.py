"""Bad files: replaced as a function of the position, written down, limited."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ijepa_fast.data import Quarantine, build_index, epoch_order
from ijepa_fast.data.order import replacement_id
from ijepa_fast.errors import TooManyBadFiles
from tests.trainer.small_folder import (
    DECODERS,
    IMAGES,
    folder,
    make_loader,
    run,
    sample_ids,
    spoil,
)


@pytest.fixture
def index(tmp_path):
    return build_index(folder(tmp_path / "images"))


@pytest.mark.parametrize("decoder", DECODERS)
def test_replacements_are_the_same_found_known_or_resumed(index, tmp_path, decoder):
    clean = run(index, steps=4)
    order = epoch_order(IMAGES, seed=7, epoch=0)
    bad = {int(order[3]), int(order[4]), int(order[21])}
    # One whose first replacement is bad too, if there is one: the second attempt is used.
    bad.add(replacement_id(IMAGES, seed=7, epoch=0, position=4, attempt=0))
    spoil(index, bad)
    path = tmp_path / "quarantine.jsonl"

    def fresh():
        return Quarantine(path, 0.2, IMAGES)

    found = run(index, decoder=decoder, steps=10, quarantine=fresh())
    lines = path.read_text().splitlines()
    known = run(index, decoder=decoder, steps=10, quarantine=fresh())
    resumed = run(index, decoder=decoder, start_step=5, steps=10, quarantine=fresh())
    assert path.read_text().splitlines() == lines
    for part in (known, [*found[:5], *resumed]):
        assert [ids for ids, _ in part] == [ids for ids, _ in found]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(part, found, strict=True))
    assert not bad & {i for ids, _ in found for i in ids}

    # Only the bad positions changed, to what `replacement_id` says.
    for position, drawn in enumerate(order[:32].tolist()):
        row = found[position // 8][0][position % 8]
        attempt, expected = 0, drawn
        while expected in bad:
            expected = replacement_id(IMAGES, seed=7, epoch=0, position=position, attempt=attempt)
            attempt += 1
        assert row == expected
        if drawn not in bad and decoder == "pillow":
            step, place = divmod(position, 8)
            assert torch.equal(found[step][1][place], clean[step][1][place])

    entries = [json.loads(line) for line in lines]
    assert {entry["id"] for entry in entries} == bad
    for entry in entries:
        assert entry["file"] == index.name(entry["id"])
        assert entry["reason"]
        epoch_of = epoch_order(IMAGES, seed=7, epoch=entry["epoch"])
        replaced = int(epoch_of[entry["position"]])
        assert replaced == entry["id"] or replaced in bad


def test_found_on_several_ranks_sharing_one_file(index, tmp_path):
    order = epoch_order(IMAGES, seed=7, epoch=0)
    spoil(index, [int(order[1]), int(order[6])])
    path = tmp_path / "quarantine.jsonl"
    ranks = []
    for rank in range(2):
        quarantine = Quarantine(path, 0.2, IMAGES)
        ranks.append(
            sample_ids(index, steps=8, rank=rank, world=2, device_batch=4, quarantine=quarantine)
        )
    together = sample_ids(index, steps=8)
    assert [a + b for a, b in zip(*ranks, strict=True)] == together
    files = [json.loads(line)["file"] for line in path.read_text().splitlines()]
    assert sorted(files) == sorted(index.name(int(order[p])) for p in (1, 6))


def test_files_that_vanish_are_replaced_too(index):
    order = epoch_order(IMAGES, seed=7, epoch=0)
    os.unlink(index.path(order[2]))
    quarantine = Quarantine(None, 0.2, IMAGES)
    ids = sample_ids(index, steps=1, quarantine=quarantine)
    assert ids[0][2] == replacement_id(IMAGES, seed=7, epoch=0, position=2, attempt=0)
    assert quarantine.files == {index.name(order[2]): "cannot be read: No such file or directory"}


@pytest.mark.parametrize("decoder", DECODERS)
def test_over_the_limit_the_run_stops(index, tmp_path, decoder):
    spoil(index, range(8))
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 0.2, IMAGES)
    with (
        make_loader(index, decoder=decoder, quarantine=quarantine) as loader,
        pytest.raises(
            TooManyBadFiles, match=r"at most 7 of 37 \(data.max_bad_share\), got 8"
        ) as error,
    ):
        list(loader)
    assert str(path) in str(error.value)
    assert len(path.read_text().splitlines()) == 8
    # And it does not start again.
    with pytest.raises(TooManyBadFiles, match="got 8"):
        Quarantine(path, 0.2, IMAGES)


def test_bad_files_of_the_index_count_and_are_written_once(tmp_path):
    root = folder(tmp_path / "images", 10)
    (root / "empty.jpg").write_bytes(b"")
    index = build_index(root)
    path = tmp_path / "quarantine.jsonl"
    # Every rank knows them, rank 0 writes them down.
    quarantine = Quarantine(path, 0.0, 11)
    sample_ids(index, steps=1, rank=1, world=2, device_batch=4, quarantine=quarantine)
    assert "empty.jpg" in quarantine
    assert not path.exists()
    for _ in range(2):
        assert len(sample_ids(index, steps=1, quarantine=Quarantine(path, 0.0, 11))) == 1
    expected = {"file": "empty.jpg", "reason": "the file is empty", "id": None}
    expected |= {"epoch": None, "position": None}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected]
    (root / "empty2.jpg").write_bytes(b"")
    with pytest.raises(TooManyBadFiles, match=r"at most 1 of 12 .*got 2; the last: 'empty2.jpg'"):
        make_loader(build_index(root), quarantine=Quarantine(path, 0.0, 12))


def test_quarantine_reads_past_torn_lines_and_odd_names(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    odd = os.fsdecode(b"caf\xe9\n\xff.jpg")
    quarantine = Quarantine(path, 1.0, 10)
    quarantine.add(odd, "broken", sample_id=3, epoch=1, position=2)
    quarantine.add(odd, "broken", sample_id=3, epoch=2, position=9)
    with path.open("ab") as file:
        file.write(b'{"file": "torn.jpg", "rea')
    again = Quarantine(path, 1.0, 10)
    assert dict(again.files) == {odd: "broken"}
    again.add("b.jpg", "cut")
    assert dict(Quarantine(path, 1.0, 10).files) == {odd: "broken", "b.jpg": "cut"}
    # The first object learns what the other one wrote before it writes itself.
    quarantine.add("b.jpg", "cut")
    assert path.read_text().count("b.jpg") == 1
    assert path.read_bytes().isascii()


def test_quarantine_of_several_writers(tmp_path):
    path = tmp_path / "quarantine.jsonl"

    def append_many(rank):
        # An object and a file descriptor of its own, as a rank has.
        quarantine = Quarantine(path, 1.0, 10_000)
        for i in range(50):
            quarantine.add(f"rank{rank}/{i}.jpg", "r" * (i * 7 % 300), sample_id=i)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append_many, range(3)))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({entry["file"] for entry in entries}) == len(entries) == 150


@pytest.mark.parametrize(
    ("share", "images", "limit"), [(0.0, 5, 1), (0.001, 10_000, 10), (0.29, 100, 29)]
)
def test_quarantine_limit(share, images, limit):
    quarantine = Quarantine(None, share, images)
    for i in range(limit):
        quarantine.add(f"{i}", "x")
    with pytest.raises(TooManyBadFiles, match=f"at most {limit} of {images}"):
        quarantine.add("one more", "x")


def test_no_usable_image_left_ends(index):
    spoil(index, range(IMAGES))
    quarantine = Quarantine(None, 1.0, IMAGES)
    with (
        make_loader(index, quarantine=quarantine) as loader,
        pytest.raises(TooManyBadFiles, match="at least one image must be usable"),
    ):
        next(loader)
    with pytest.raises(TooManyBadFiles, match="at least one image must be usable"):
        make_loader(index, quarantine=quarantine)
