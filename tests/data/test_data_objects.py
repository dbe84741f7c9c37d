"""Data that a Python object gives: the same table, pixels and losses as the same files."""

import errno
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch

from ijepa_fast.data import build_index, data_roots, open_index
from ijepa_fast.data.objects import find_object
from ijepa_fast.data.reading import Reader
from ijepa_fast.errors import UsageError
from tests.trainer import tiny
from tests.trainer.small_folder import DECODERS, folder, jpeg, make_loader, run


class Items:
    """A list of encoded images; an item that is an exception is raised."""

    def __init__(self, items, labels=None, **more):
        self.items, self.labels, self.reads = list(items), labels, []
        self.__dict__.update(more)

    def __len__(self):
        return len(self.items)

    def bytes_at(self, i):
        self.reads.append(i)
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


class Labelled(Items):
    def label_at(self, i):
        return self.labels[i]


def items_of(root, **more):
    """The images of a folder of classes, in the order of its table."""
    paths = sorted(root.rglob("*.jpg"))
    return Labelled([p.read_bytes() for p in paths], [p.parent.name for p in paths], **more)


@pytest.mark.parametrize("decoder", DECODERS)
def test_table_and_batches_are_those_of_the_folder(tmp_path, decoder):
    files = build_index(folder(tmp_path / "images"))
    with data_roots(items_of(tmp_path / "images")) as roots:
        given = build_index(roots)
        for column in ("width", "height", "format", "plain", "length", "mark"):
            assert np.array_equal(getattr(given, column), getattr(files, column)), column
        assert [given.name(row) for row in (0, 36)] == ["images[0]", "images[36]"]
        assert given.classes == ("images",)
        assert given.rows_named("images[7]").tolist() == [7]
        for (ids, images), (other_ids, others) in zip(
            run(files, decoder=decoder), run(given, decoder=decoder), strict=True
        ):
            assert ids == other_ids
            assert torch.equal(images, others)


def test_losses_and_evaluation_are_those_of_the_folder(tmp_path):
    data = tiny.write_images(tmp_path / "data", classes=4)
    options = {"max_steps": 6, "log__interval": 1, "eval__every": 1, "eval__seconds": 60}
    assert tiny.run(data, tmp_path / "files", eval__data=data, **options) == 0
    source = items_of(data)
    with data_roots(source) as (root,):
        assert tiny.run(root, tmp_path / "items", eval__data=root, **options) == 0
    rows = tiny.rows(tmp_path / "items")
    assert [row["loss"] for row in rows if "loss" in row] == [
        row["loss"] for row in tiny.rows(tmp_path / "files") if "loss" in row
    ]
    assert any("knn" in row for row in rows)


def test_two_ranks_read_from_their_own_objects(tmp_path):
    data = tiny.write_images(tmp_path / "data")
    assert tiny.run(data, tmp_path / "one", max_steps=4) == 0
    # ranks are forked from a server: a module that they import gives the object
    codes, output = run_ranks_with_items(data, tmp_path / "two", max_steps=4, batch__device=4)
    assert codes == [0, 0], output
    tiny.assert_near(tmp_path / "one", tmp_path / "two", 2)


def run_ranks_with_items(data, out, **settings):
    argv, output = tiny.arguments("object:images", out, **settings), out.parent / "ranks.txt"
    children = [
        tiny._FORKS.Process(target=_rank, args=(data, argv, output, environment))
        for environment in tiny.rank_environments(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    return [child.exitcode for child in children], output.read_text()


def _rank(data, argv, output, environment):
    with data_roots(items_of(data)):
        tiny._in_child(argv, output, environment)


def test_a_resume_takes_the_same_data_only(tmp_path, capsys):
    data = tiny.write_images(tmp_path / "data")
    source = items_of(data)
    with data_roots(source) as (root,):
        assert tiny.run(root, tmp_path / "run", max_steps=2) == 0
    # from the command line there is no object
    assert tiny.run(root, tmp_path / "run", max_steps=4) == 2
    assert "got object:images: an object of the Python program" in capsys.readouterr().err
    other = items_of(data)
    other.items[3] = jpeg(3, (40, 36))
    with data_roots(other) as (root,):
        assert tiny.run(root, tmp_path / "run", max_steps=4) == 2
        assert "the images in object:images differ" in capsys.readouterr().err
    with data_roots(items_of(data)) as (root,):
        assert tiny.run(root, tmp_path / "run", max_steps=4) == 0


def test_bad_items_are_left_out_and_named(tmp_path):
    good = [jpeg(i) for i in range(20)]
    source = Items(
        [*good, b"", b"no image", good[0][:500], KeyError("gone"), OSError("lost"), [1], *good]
    )
    with data_roots(source) as roots:
        index, _ = open_index(roots)
        assert dict(index.bad) == {
            "images[20]": "the file is empty",
            "images[21]": "not an image: no header of JPEG, PNG, BMP, WebP, TIFF or PPM",
            "images[22]": index.bad[2][1],
            "images[23]": "OSError: bytes_at raises KeyError: 'gone'",
            "images[24]": "cannot be read: OSError: lost",
            "images[25]": "OSError: bytes_at must return bytes, got list",
        }
        assert [index.name(row) for row in (19, 20)] == ["images[19]", "images[26]"]
        assert index.read(20) == good[0]
        # changed since: as a file that has changed
        source.items[30] = good[3]
        source.items[31] = RuntimeError("not now")
        with make_loader(index, steps=5) as loader:
            seen = {int(row) for batch in loader for row in batch.ids}
            assert not {24, 25} & seen
            assert {f"images[{n}]" for n in (30, 31)} <= loader._quarantine.files.keys()


def test_storage_that_fails_is_no_bad_item(monkeypatch):
    monkeypatch.setattr("ijepa_fast.data.reading._BACKOFF", (0.01,))
    source = Items([jpeg(i) for i in range(8)])
    with data_roots(source) as roots:
        index, _ = open_index(roots)
        reader = Reader(index, threading.Event())
        source.items[2] = ConnectionError("reset")
        assert reader.read(2) == "cannot be read: ConnectionError: reset"
        source.items[:] = [ConnectionResetError(errno.ECONNRESET, "reset")] * 8
        with pytest.raises(OSError, match=r"storage of the data fails: 'object:images.*: reset"):
            reader.read(2)


def test_a_table_is_made_once_and_kept_by_a_fingerprint(tmp_path):
    images = [jpeg(i) for i in range(9)]
    source = Items(images)
    for _ in range(2):
        with data_roots(source) as roots:
            assert open_index(roots, cache=tmp_path)[1] is None
            assert open_index(roots, cache=tmp_path)[0] is open_index(roots, cache=tmp_path)[0]
    # each start reads every item once, none reads them twice
    assert sorted(source.reads) == sorted([*range(9)] * 2)
    assert not list(tmp_path.iterdir())

    for fingerprint, reads in (("a", 9), ("a", 0), ("b", 9)):
        source = Items(images, fingerprint=fingerprint)
        with data_roots(source) as roots:
            index, path = open_index(roots, cache=tmp_path)
            assert len(source.reads) == reads, fingerprint
            assert path is not None
            assert index.read(4) == images[4]
    # items that another start may be able to read
    labels = mock.Mock(side_effect=["a"] * 8 + [TimeoutError("slow")])
    for source in (
        Items([*images, OSError("lost")], fingerprint="c"),
        Items(images, fingerprint="d", label_at=labels),
    ):
        with data_roots(source) as roots:
            index, path = open_index(roots, cache=tmp_path)
            assert (len(index.bad), path) == (1, None)


def test_objects_beside_folders(tmp_path):
    files = folder(tmp_path / "images", 3)
    source, other = Items([jpeg(9)], name="more"), Items([jpeg(8)], name="more")
    with data_roots([files, source, other, source]) as roots:
        assert roots == [str(files), "object:more", "object:more-2", "object:more"]
        index, path = open_index(roots[:3], cache=tmp_path / "cache")
        assert path is None
        assert [index.read(row) for row in range(5)] == [
            *(jpeg(i, (60 + i % 3, 48 + i % 5)) for i in range(3)),
            jpeg(9),
            jpeg(8),
        ]
    with pytest.raises(UsageError, match=r"got object:more:"):
        find_object("object:more")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (17, "data must be paths, or objects with __len__ and bytes_at.i., got 'int'"),
        (Items([], name="a b"), "name of data must be .*, got 'a b'"),
        (Items([], fingerprint=3), "fingerprint of data must be a text, got 3"),
        (Items([]), "data.root must hold images"),
    ],
)
def test_what_is_no_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message), data_roots(data) as roots:
        open_index(roots)


def test_items_are_read_by_several_threads_at_once():
    class Slow(Items):
        most = inside = 0

        def bytes_at(self, i):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.01)
            self.inside -= 1
            return super().bytes_at(i)

    source = Slow([jpeg(i) for i in range(300)])
    with data_roots(source) as roots:
        open_index(roots, threads=4)
    assert source.most > 1
