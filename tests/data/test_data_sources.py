"""Sources of a data set: tar shards, list files, several at once; tables kept between starts."""

import errno
import functools
import io
import json
import os
import pickle
import resource
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ijepa_fast.data import Quarantine, build_index, index_to_arrays, open_index
from ijepa_fast.data import build as build_module
from ijepa_fast.data.__main__ import main as data_main
from ijepa_fast.data.build import NoImages
from ijepa_fast.data.cache import load_table, save_table
from ijepa_fast.data.headers import inspect_file
from ijepa_fast.data.index import Index
from ijepa_fast.data.reading import Reader
from ijepa_fast.data.report import duplicates
from ijepa_fast.data.table_file import TableError
from ijepa_fast.errors import TooManyBadFiles
from tests.trainer import tiny
from tests.trainer.damage import mutate
from tests.trainer.small_folder import DECODERS, folder, jpeg, make_loader, run
from tests.trainer.tiny import bad_png

OLD = 1_700_000_000


def shard(path, members, *, end=True):
    """Writes a tar of (name or TarInfo, bytes) members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if not end:
        path.write_bytes(path.read_bytes().rstrip(b"\0"))
    os.utime(path, (OLD, OLD))
    return path


def samples(count, first=0):
    """(name, bytes) of `count` images with `.cls` beside them."""
    for number in range(first, first + count):
        yield f"{number:04d}.jpg", jpeg(number)
        yield f"{number:04d}.cls", str(number % 12).encode()


def aged(root):
    """Everything below a folder as if it had been written long ago."""
    for where, folders, files in os.walk(root):
        for name in [*folders, *files]:
            os.utime(os.path.join(where, name), (OLD, OLD), follow_symlinks=False)
    os.utime(root, (OLD, OLD))
    return root


def made(path):
    path.mkdir(parents=True)
    return path


@pytest.fixture
def inspected(monkeypatch):
    """Gives the paths that were looked into since the last call."""
    paths = []

    def counted(real, root, path, label, **options):
        paths.append(path)
        return real(root, path, label, **options)

    for name in ("inspect_file", "inspect_shard"):
        real = getattr(build_module, name)
        monkeypatch.setattr(build_module, name, functools.partial(counted, real))

    def taken():
        found = sorted(paths)
        paths.clear()
        return found

    return taken


def same(one: Index, two: Index):
    a, b = index_to_arrays(one), index_to_arrays(two)
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


# --- tar shards ----------------------------------------------------------------------------------


def test_a_shard_is_read_where_it_lies(tmp_path):
    index = build_index(shard(tmp_path / "a.tar", samples(14)))
    assert len(index) == 14
    assert index.bad == ()
    # as numbers: 2 before 10
    assert index.classes == tuple(str(n) for n in range(12))
    for row in range(14):
        assert index.name(row) == f"a.tar/{row:04d}.jpg"
        assert index.classes[index.label[row]] == str(row % 12)
        assert index.read(row) == jpeg(row)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]
    index.close()
    assert index.read(3) == jpeg(3)


def test_names_and_classes_as_webdataset_writes_them(tmp_path):
    long = "d/" * 60 + "long.jpg"
    index = build_index(
        shard(
            tmp_path / "s.tar",
            [
                ("a/1.cls", b"cat\n"),
                ("a/1.jpg", jpeg(1)),
                ("2.jpeg", jpeg(2)),
                ("2.json", json.dumps({"label": "dog"}).encode()),
                ("3.PNG", jpeg(3)),
                ("3.json", b'{"other": 1}'),
                ("4.jpg", jpeg(4)),
                ("4.json", b"{" * 100_000),
                ("5.seg.jpg", jpeg(5)),
                ("6.jpg", jpeg(6)),
                ("6.cls", b"evil\x1b[2Jname"),
                ("7.jpg", jpeg(7)),
                ("7.cls", b"7"),
                ("7.json", b'{"label": "not this"}'),
                (long, jpeg(8)),
                ("caf\udce9.jpg", jpeg(9)),
            ],
        )
    )
    found = {index.name(row): int(index.label[row]) for row in range(len(index))}
    labels = {
        name.split("/", 1)[1]: index.classes[k] if k >= 0 else None for name, k in found.items()
    }
    assert labels == {
        "a/1.jpg": "cat",
        "2.jpeg": "dog",
        "3.PNG": None,
        "4.jpg": None,
        "5.seg.jpg": None,
        "6.jpg": None,
        "7.jpg": "7",
        long: None,
        "caf\udce9.jpg": None,
    }
    assert [index.read(row) for row in (7, 8)] == [jpeg(8), jpeg(9)]


class _Trap:
    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def _hostile_members():
    """(member, words of the reason why it is left out, or None for no word at all)."""
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("hard.jpg")
    hard.type, hard.linkname = tarfile.LNKTYPE, "good.jpg"
    fifo = tarfile.TarInfo("fifo.jpg")
    fifo.type = tarfile.FIFOTYPE
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    home = tarfile.TarInfo("folder.jpg")
    home.type = tarfile.DIRTYPE
    yield "good.jpg", jpeg(0), None
    yield "../../outside.jpg", jpeg(1), None
    yield "/tmp/absolute.jpg", jpeg(2), None
    for info in (link, hard, fifo, device, home):
        yield info, b"", "plain member"
    yield "empty.jpg", b"", "empty"
    yield "page.jpg", b"<html>", "not an image"
    yield "cut.jpg", jpeg(3)[:400], "Truncated"
    yield "twice.jpg", jpeg(4), None
    yield "twice.png", jpeg(5), "key 'twice' twice"
    yield "twice.jpg", jpeg(5), "key 'twice' twice"
    yield "payload.pkl", pickle.dumps(_Trap()), None
    yield "payload.pyd", b"MZ" + bytes(100), None


def test_hostile_members_are_left_out_with_a_reason(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    members = list(_hostile_members())
    path = shard(tmp_path / "data" / "h.tar", [(name, data) for name, data, _ in members])
    before = sorted(os.walk(tmp_path))
    index = build_index(path)
    assert [index.name(row) for row in range(len(index))] == [
        "h.tar/good.jpg",
        "h.tar/../../outside.jpg",
        "h.tar//tmp/absolute.jpg",
        "h.tar/twice.jpg",
    ]
    assert [index.read(row) for row in range(4)] == [jpeg(n) for n in (0, 1, 2, 4)]
    words = [words for _, _, words in members if words]
    assert len(index.bad) == len(words) == 10
    for word in words:
        assert any(word in reason for _, reason in index.bad), (word, index.bad)
    assert index.ignored == 2
    # nothing was extracted, made or run
    assert sorted(os.walk(tmp_path)) == before


def test_a_damaged_shard_keeps_what_comes_before(tmp_path):
    whole = shard(tmp_path / "whole.tar", samples(6)).read_bytes()
    cut = tmp_path / "cut.tar"
    content = len(whole.rstrip(b"\0"))
    first = 512 + len(jpeg(0))
    for percent in range(0, 100, 4):
        length = content * percent // 100
        cut.write_bytes(whole[:length])
        if length < first:
            with pytest.raises(NoImages, match=r"unusable files; the first: 'cut\.tar"):
                build_index(cut)
            continue
        index = build_index(cut)
        assert index.bad, percent
        assert all(index.read(row) == jpeg(row) for row in range(len(index)))
    # a header in the middle that is no header; a size that leads back
    with tarfile.open(tmp_path / "whole.tar") as archive:
        place = archive.getmembers()[4].offset
    for damage, at in ((b"\xff" * 512, place), (b"-0000000777\0", place + 124)):
        damaged = bytearray(whole)
        damaged[at : at + len(damage)] = damage
        if at != place:
            header = damaged[place : place + 512]
            header[148:156] = b" " * 8
            damaged[place + 148 : place + 156] = f"{sum(header):06o}\0 ".encode()
        cut.write_bytes(damaged)
        index = build_index(cut)
        assert len(index) == 2
        assert [name for name, _ in index.bad] == ["cut.tar"]
        assert "damaged" in index.bad[0][1]


def damage_shards(tmp_path, times):
    """Damages a shard at random and reads what is left; how often nothing is, and the slowest."""
    whole = shard(tmp_path / "whole.tar", samples(3)).read_bytes()
    path, refused, slowest = tmp_path / "m.tar", 0, 0.0
    for seed in range(times):
        path.write_bytes(mutate(whole, np.random.default_rng(seed)))
        started = time.monotonic()
        try:
            index = build_index(path, threads=1)
        except NoImages:
            refused += 1
        else:
            for row in range(len(index)):
                assert len(index.read(row)) == index.length[row]
            index.close()
        slowest = max(slowest, time.monotonic() - started)
    return refused, slowest


def test_random_damage_to_a_shard_never_does_harm(tmp_path):
    assert damage_shards(tmp_path, 150)[1] < 5


def test_a_shard_that_changes_under_the_run_is_not_trusted(tmp_path):
    path = shard(tmp_path / "a.tar", samples(3))
    index = build_index(path)
    index.read(0)
    # replaced: what is open is still the old one
    replaced = shard(tmp_path / "b.tar", samples(3, first=10))
    os.replace(replaced, path)
    os.utime(path, (OLD + 5, OLD + 5))
    assert index.read(1) == jpeg(1)
    index.close()
    with pytest.raises(OSError, match="the file has changed"):
        index.read(1)


@pytest.mark.parametrize("decoder", DECODERS)
def test_shards_train_as_a_folder_does(tmp_path, decoder):
    """The same images in the same order: the same batches."""
    loose = folder(tmp_path / "loose")
    names = sorted(path.name for path in loose.iterdir())
    for number, part in enumerate((names[:20], names[20:])):
        shard(
            tmp_path / f"t-{number:02d}.tar", [(name, (loose / name).read_bytes()) for name in part]
        )
    packed = build_index(str(tmp_path / "t-{00..01}.tar"))
    ours, theirs = run(packed, decoder=decoder), run(build_index(loose), decoder=decoder)
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs]
    assert all((a == b).all() for (_, a), (_, b) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
@pytest.mark.parametrize("size", [2**60, 2**33, 2**31])
def test_a_header_that_claims_exabytes(tmp_path, kind, size):
    """Extended headers are read as a whole: no more than the file has."""
    path = shard(tmp_path / "s.tar", samples(2))
    info = tarfile.TarInfo("h")
    info.type, info.size = kind, size
    header = info.tobuf(tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        place = archive.getmembers()[2].offset
    path.write_bytes(whole[:place] + header + whole[place:])
    index = build_index(path)
    assert len(index) == 1
    assert "damaged" in index.bad[0][1]


# --- lists, several sources ----------------------------------------------------------------------


def test_a_list_file(tmp_path):
    folder(tmp_path / "images", 4)
    shard(tmp_path / "s.tar", samples(2))
    (tmp_path / "list.tsv").write_text(
        "# comment\n\nimages/002.jpg\tzebra\r\nimages/000.jpg\tape\ns.tar\n"
        f"{tmp_path}/images/003.jpg\nnotes.txt\nimages/gone.jpg\tape\n"
    )
    index = build_index(tmp_path / "list.tsv")
    names = [index.name(row) for row in range(len(index))]
    assert names == [
        "images/002.jpg",
        "images/000.jpg",
        "s.tar/0000.jpg",
        "s.tar/0001.jpg",
        f"{tmp_path}/images/003.jpg",
    ]
    assert [index.classes[k] if k >= 0 else None for k in index.label] == [
        "zebra",
        "ape",
        "0",
        "1",
        None,
    ]
    assert index.bad == (("images/gone.jpg", "cannot be read: No such file or directory"),)
    assert index.ignored == 1


def test_several_sources_are_one_data_set(tmp_path):
    one, two = folder(tmp_path / "one", 3), folder(tmp_path / "two", 5)
    (two / "bad.jpg").write_bytes(b"")
    index = build_index([one, two])
    assert len(index) == 8
    assert [index.name(row) for row in (0, 3)] == [f"{one}/000.jpg", f"{two}/000.jpg"]
    assert index.read(7) == jpeg(4, (61, 52))
    assert index.bad == ((f"{two}/bad.jpg", "the file is empty"),)
    assert index.digest() != build_index([two, one]).digest()
    with pytest.raises(ValueError, match=r"once, got .*one' twice"):
        build_index([one, one])


def test_overlapping_sources_stay_as_they_are(tmp_path):
    """However often the table is renewed."""
    root, cache = folder(made(tmp_path / "d") / "sub", 3).parent, tmp_path / "cache"
    (root / "sub" / "bad.jpg").write_bytes(b"<html>")
    aged(root)
    first = build_index([root, root / "sub"])
    assert len(first.bad) == 2
    for number in range(3):
        (root / f"new{number}.jpg").write_bytes(jpeg(number))
        index, _ = open_index([root, root / "sub"], cache=cache)
        assert len(index.bad) == 2
        assert len(index) == 7 + number
        assert index.bad == first.bad


def test_a_list_gives_its_shards_another_class(tmp_path):
    cache, listing = tmp_path / "cache", tmp_path / "list.tsv"
    members = [(f"{n}.jpg", jpeg(n)) for n in range(2)]
    shard(tmp_path / "x.tar", members)
    for label in ("cat", "dog"):
        listing.write_text(f"x.tar\t{label}\n")
        index, _ = open_index(listing, cache=cache)
        assert index.classes == (label,)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.tar", "existing folder, list file or tar"),
        ("x-{00..02}.tar", "without .*x-01.tar"),
        ("x-{02..00}.tar", "range of 1 to"),
        ("x-{00..01}.zip", r"must name \.tar files"),
        ("notes.zip", "not a file like"),
    ],
)
def test_wrong_sources_are_named(tmp_path, source, words):
    shard(tmp_path / "x-00.tar", samples(1))
    (tmp_path / "notes.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=words):
        build_index(str(tmp_path / source))


def test_a_run_inside_its_data_is_no_data(tmp_path, capsys):
    data = tiny.write_images(tmp_path / "data")
    out = data / "run"
    assert tiny.run(data, out, pictures=True, max_steps=7) == 0
    assert (out / "masks.png").exists()
    assert tiny.run(data, out) == 0
    assert int(tiny.final_state(out)["step"]) == 15
    assert "'run', the folder of a run, which is no data" in capsys.readouterr().out
    assert len(build_index(data)) == 40
    with pytest.raises(ValueError, match=r"data\.root must not be the folder of a run"):
        build_index(out)


def test_folders_that_links_lead_to_twice_are_listed_once(tmp_path):
    root = folder(made(tmp_path / "data") / "a", 2).parent
    for name in "bcdefghi":
        folder(root / name, 1)
    for one in "abcdefghi":
        for other in "abcdefghi":
            (root / one / f"to_{other}").symlink_to(root / other)
    (root / "aa").symlink_to(tmp_path / "store")
    folder(made(tmp_path / "store") / "deep", 1)
    index = build_index(root)
    assert [path for path in index.paths if path.startswith("a")] == [
        "a/000.jpg",
        "a/001.jpg",
        "aa/deep/000.jpg",
    ]
    assert len(index) == 11


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf000.jpg\tape\n001.jpg\tcat\n", None),
        (
            b"000.jpg\t" + b"7" * 5000,
            r"at most 255 characters .* got '7{20}'\.\.\. of 5000 in line 1",
        ),
        (b"000.jpg\ta\0b", "no NUL"),
    ],
)
def test_odd_lists(tmp_path, content, words):
    folder(tmp_path, 2)
    listing = tmp_path / "list.tsv"
    listing.write_bytes(content)
    if words:
        with pytest.raises(ValueError, match=words):
            build_index(listing)
    else:
        assert build_index(listing).classes == ("ape", "cat")


def test_what_is_no_regular_file_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("fifo.txt", "zero.txt"):
        with pytest.raises(ValueError, match=r"data\.root must be a folder or a regular file"):
            build_index(tmp_path / name)
    for name in ("a\0b", "a\0-{0..1}.tar"):
        with pytest.raises(ValueError, match=r"data\.root"):
            build_index(name)


# --- what is lost as a whole ---------------------------------------------------------------------


def test_a_cut_shard_ends_the_run_unless_allowed(tmp_path, capsys):
    for number in range(4):
        shard(tmp_path / f"{number}.tar", samples(10, first=10 * number))
    whole = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(whole[: len(whole) // 5])
    source, cache = str(tmp_path / "{0..3}.tar"), tmp_path / "cache"
    with pytest.raises(
        TooManyBadFiles, match=r"must be whole, got '2\.tar': the shard is damaged"
    ) as e:
        open_index(source, cache=cache)
    index, _ = open_index(source, cache=cache, allow_missing=True)
    missing = 40 - len(index)
    assert 7 <= missing <= 9
    assert f"about {missing} images are missing; mend them, or add --data.allow-missing" in str(
        e.value
    )
    # it is no single file: the share of bad files does not count it
    quarantine = Quarantine(None, 0.0, len(index))
    with make_loader(index, quarantine=quarantine, steps=1) as loader:
        assert len(list(loader)) == 1
    assert "2.tar" not in quarantine
    assert data_main([source]) == 1
    assert f"not whole   '2.tar': about {missing} images are missing" in capsys.readouterr().out
    shard(tmp_path / "2.tar", samples(10, first=20))
    assert len(open_index(source, cache=cache)[0]) == 40


def test_a_cut_shard_is_one_in_capitals_too(tmp_path):
    for name in ("A.TAR", "B.TAR"):
        shard(tmp_path / name, samples(10))
    whole = (tmp_path / "B.TAR").read_bytes()
    (tmp_path / "B.TAR").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TooManyBadFiles, match=r"must be whole, got 'B\.TAR'"):
        open_index(tmp_path, cache=tmp_path / "cache")


def test_a_folder_that_cannot_be_listed_ends_the_run_unless_allowed(tmp_path, monkeypatch, capsys):
    data = tiny.write_images(tmp_path / "data")
    real = os.scandir

    def scandir(path):
        if str(path).rstrip("/").endswith("class1"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    monkeypatch.setattr("ijepa_fast.data.sources.os.scandir", scandir)
    assert tiny.run(data, tmp_path / "out") == 4
    error = capsys.readouterr().err
    assert "must be whole, got 'class1/': the folder cannot be read: Permission denied" in error
    assert tiny.run(data, tmp_path / "out", data__allow_missing=True, max_steps=1) == 0
    assert "'class1/' is not whole" in capsys.readouterr().out
    # also where settings are chosen from the data
    argv = ["--data", str(data), "--data.allow-missing", "--print-config"]
    assert tiny._main(argv, pictures=False) == 0
    with pytest.raises(NoImages, match=r"the first: '\./': the folder cannot be read"):
        build_index(data / "class1")


def test_too_few_open_files_condemn_nothing(tmp_path):
    for number in range(120):
        shard(tmp_path / f"{number:03d}.tar", samples(1, first=number))
    index = build_index(str(tmp_path / "{000..119}.tar"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = Reader(index, threading.Event())
    opened = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, before[1]))
        parts = reader.begin(list(range(120)))
        read = [data for part in parts for data in part.result()]
        assert read == [jpeg(n) for n in range(120)]
        # not one to be had
        index.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            index.read(0)
        with pytest.raises(OSError, match="Too many open files"):
            build_index(str(tmp_path / "000.tar"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        reader.close(wait=True)


def test_ctrl_c_ends_a_scan_at_once(tmp_path, monkeypatch, capsys):
    root, real, looked = folder(tmp_path / "set", 400), inspect_file, []

    def slow(*arguments, **options):
        looked.append(arguments)
        if len(looked) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)
        return real(*arguments, **options)

    monkeypatch.setattr(build_module, "inspect_file", slow)
    assert data_main([str(root), "--threads", "1"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(looked) <= 128


# --- kept tables ---------------------------------------------------------------------------------


def test_a_table_is_made_once_and_renewed_where_files_changed(tmp_path, inspected):
    root, cache = folder(tmp_path / "set", 12), tmp_path / "cache"
    shard(root / "s.tar", samples(3))
    (root / "bad.jpg").write_bytes(b"<html>")
    aged(root)
    first, path = open_index(root, cache=cache)
    assert len(inspected()) == 14
    again, same_path = open_index(root, cache=cache)
    assert inspected() == []
    assert same_path == path
    same(first, again)
    # one more, one changed in place, one gone
    (root / "new.jpg").write_bytes(jpeg(50))
    (root / "003.jpg").write_bytes(jpeg(51, (70, 60)))
    (root / "004.jpg").unlink()
    renewed, _ = open_index(root, cache=cache)
    assert inspected() == ["003.jpg", "new.jpg"]
    same(renewed, build_index(root))
    assert renewed.read(3) == jpeg(51, (70, 60))
    inspected()
    # what is so young may still change within the clock's resolution: looked into again
    open_index(root, cache=cache)
    assert inspected() == ["003.jpg", "new.jpg"]
    # a file mended in place, its folder untouched
    aged(root)
    open_index(root, cache=cache)
    inspected()
    (root / "bad.jpg").write_bytes(jpeg(60))
    os.utime(root, (OLD, OLD))
    mended, _ = open_index(root, cache=cache)
    assert inspected() == ["bad.jpg"]
    assert (len(mended), mended.bad) == (16, ())


def test_what_cannot_be_opened_does_not_disable_the_cache(tmp_path, inspected):
    root, cache = folder(tmp_path / "set", 3), tmp_path / "cache"
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "fifo.jpg")
    aged(root)
    open_index(root, cache=cache)
    inspected()
    index, _ = open_index(root, cache=cache)
    assert inspected() == []
    assert len(index.bad) == 2
    (tmp_path / "set" / "nowhere.jpg").write_bytes(jpeg(9))
    os.utime(root, (OLD, OLD))
    index, _ = open_index(root, cache=cache)
    assert "broken.jpg" in inspected()
    assert [name for name, _ in index.bad] == ["fifo.jpg"]


def test_times_in_the_future_are_trusted(tmp_path, inspected):
    root, cache = folder(tmp_path / "set", 3), tmp_path / "cache"
    for path in (*root.iterdir(), root):
        os.utime(path, (4_000_000_000, 4_000_000_000))
    open_index(root, cache=cache)
    assert len(inspected()) == 3
    open_index(root, cache=cache)
    assert inspected() == []


def test_the_table_of_other_data_is_not_taken(tmp_path, caplog):
    one, two = (aged(folder(tmp_path / name, 3)) for name in ("one", "two"))
    (one / "000.jpg").write_bytes(jpeg(50))
    (one_index, path), (_, other) = (open_index(root, cache=tmp_path / "c") for root in (one, two))
    assert path
    assert other
    other.replace(path)
    again, _ = open_index(one, cache=tmp_path / "c")
    assert again.roots == one_index.roots == (str(one),)
    assert f"is of other data: {two}" in caplog.text


def test_rows_by_name(tmp_path):
    root = folder(made(tmp_path / "set") / "a", 4).parent
    folder(root / "aa", 4)
    shard(tmp_path / "s.tar", samples(3))
    for index in (build_index(root), build_index([root, tmp_path / "s.tar"])):
        for row in range(len(index)):
            assert index.rows_named(index.name(row)).tolist() == [row]
        for name in ("000.jpg", "a/00", "a/000.jp", "nothing", "a/000.jpga/001.jpg"):
            assert index.rows_named(name).size == 0


def test_verifying_finds_damage_and_remembers_it(tmp_path, inspected):
    root, cache = folder(tmp_path / "set", 6), tmp_path / "cache"
    bad_png(root / "bad.jpg")
    aged(root)
    index, _ = open_index(root, cache=cache)
    assert len(index) == 7
    assert not index.verified.any()
    inspected()
    index, _ = open_index(root, cache=cache, verify=True)
    assert len(inspected()) == 7
    assert [name for name, _ in index.bad] == ["bad.jpg"]
    assert index.verified.all()
    open_index(root, cache=cache, verify=True)
    assert inspected() == []
    # one more file: the verdict on the others stands
    (root / "more.jpg").write_bytes(jpeg(70))
    index, _ = open_index(root, cache=cache)
    assert inspected() == ["more.jpg"]
    assert [name for name, _ in index.bad] == ["bad.jpg"]
    assert index.verified.tolist() == [True] * 6 + [False]


def test_large_sets_compare_an_image_when_it_is_read(tmp_path, monkeypatch):
    root, cache = aged(folder(tmp_path / "set", 4)), tmp_path / "cache"
    open_index(root, cache=cache)
    monkeypatch.setattr("ijepa_fast.data.cache._COMPARED", 3)
    touched = root / "001.jpg"
    touched.write_bytes(touched.read_bytes())
    (root / "002.jpg").write_bytes(jpeg(9)[:200])
    os.utime(root, (OLD, OLD))
    index, _ = open_index(root, cache=cache)
    assert index.read(0)
    assert index.read(1) == touched.read_bytes()
    with pytest.raises(OSError, match=r"has changed: .* bytes expected"):
        index.read(2)
    assert [name for name, _ in open_index(root, cache=cache, compare_all=True)[0].bad] == [
        "002.jpg"
    ]


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, caplog):
    root, cache = folder(tmp_path / "set", 3), tmp_path / "cache"
    cache.write_text("a file")
    index, path = open_index(root, cache=cache)
    assert (len(index), path) == (3, None)
    assert "is not kept" in caplog.text


def test_a_damaged_table_is_made_anew(tmp_path):
    root, cache = aged(folder(tmp_path / "set", 5)), tmp_path / "cache"
    _, path = open_index(root, cache=cache)
    assert path is not None
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(120):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: int(rng.integers(0, len(whole)))]
        else:
            header = int.from_bytes(whole[:8], "little") + 8
            for place in rng.integers(0, header, 3):
                damaged[int(place)] = int(rng.integers(256))
        path.write_bytes(damaged)
        # a whole table, whatever the file says; a change inside a name or number is not seen
        again, _ = open_index(root, cache=cache)
        assert len(again) == 5
    path.write_bytes(whole[:-1])
    with pytest.raises(TableError):
        load_table(path)


def test_other_formats_and_other_files_are_no_tables(tmp_path):
    index = build_index(folder(tmp_path / "set", 2))
    path = tmp_path / "t.safetensors"
    save_table(path, index)
    same(load_table(path), index)
    path.write_bytes(path.read_bytes().replace(b'"format":"2"', b'"format":"9"'))
    with pytest.raises(TableError, match="must have format 2, got '9'"):
        load_table(path)


# --- the report ----------------------------------------------------------------------------------


def test_the_report(tmp_path, capsys):
    root = folder(made(tmp_path / "set") / "ape", 30).parent
    (root / "cat").mkdir()
    (root / "cat" / "same.jpg").write_bytes((root / "ape" / "004.jpg").read_bytes())
    (root / "ape" / "also.jpg").write_bytes((root / "ape" / "004.jpg").read_bytes())
    (root / "ape" / "x\x1b[2J.jpg").write_bytes(b"<html>")
    (root / "notes.txt").write_text("")
    assert data_main([str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["classes"], found["other_files"]) == (32, 2, 1)
    assert found["formats"] == {"JPEG": 32}
    assert found["bytes"] == sum(p.stat().st_size for p in root.rglob("*.jpg")) - 6
    assert found["duplicates"] == [["ape/004.jpg", "ape/also.jpg", "cat/same.jpg"]]
    assert found["duplicates_of_several_classes"] == 1
    assert [entry["file"] for entry in found["bad"]] == ["ape/x\x1b[2J.jpg"]
    assert sum(found["shorter_side"].values()) == sum(found["kilobytes"].values()) == 32
    assert Path(found["table"]).is_file()
    assert data_main([str(root)]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "2 images repeat another's bytes" in text
    # one more is too many
    (root / "ape" / "worse.jpg").write_bytes(b"")
    assert data_main([str(root)]) == 1
    assert data_main([str(root), "--max-bad-share", "0.5"]) == 0
    assert data_main([str(tmp_path / "none")]) == 2
    assert "error: data.root must be an existing folder" in capsys.readouterr().err
    assert data_main([str(root), "--max-bad-share", "2"]) == 2


def test_files_that_only_look_alike_are_no_duplicates(tmp_path):
    one = jpeg(1, (300, 200))
    middle = one.index(b"\xff\xda") + 14
    other = bytearray(one)
    other[middle : middle + 2] = bytes(b ^ 1 for b in other[middle : middle + 2])
    assert len(one) - middle > 1100
    (tmp_path / "a.jpg").write_bytes(one)
    (tmp_path / "b.jpg").write_bytes(other)
    (tmp_path / "c.jpg").write_bytes(one)
    index = build_index(tmp_path)
    assert index.mark[0] == index.mark[1]
    assert duplicates(index) == [[0, 2]]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_bad_member_is_replaced_and_quarantined_by_its_name(tmp_path, decoder):
    loose = folder(tmp_path / "loose")
    members = [(path.name, path.read_bytes()) for path in sorted(loose.iterdir())]
    members[5] = ("005.png", bad_png(tmp_path / "bad.png").read_bytes())
    index = build_index(shard(tmp_path / "s.tar", members))
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1, len(index))
    with make_loader(index, decoder=decoder, quarantine=quarantine) as loader:
        ids = [row for batch in loader for row in batch.ids.tolist()]
    assert 5 not in ids
    assert list(quarantine.files) == ["s.tar/005.png"]
