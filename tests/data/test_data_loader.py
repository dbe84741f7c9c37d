"""The loader: identity across ranks and resumes, errors, running ahead, shutdown."""

import errno
import io
import os
import re
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.data import (
    Index,
    PillowDecoder,
    Quarantine,
    build_index,
    crop_windows,
    decode_usable,
    epoch_order,
)
from ijepa_fast.data.loader import DataStalled
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


def test_batches_are_what_order_and_crops_say(index):
    decoder = PillowDecoder((32, 32), 1)
    with make_loader(index, steps=9) as loader:
        assert loader.steps_per_epoch == IMAGES // 8 == 4
        batches = list(loader)
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        epoch, step_in_epoch = divmod(step, 4)
        ids = epoch_order(IMAGES, seed=7, epoch=epoch)[8 * step_in_epoch : 8 * step_in_epoch + 8]
        assert batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == ids.tolist()
        windows = crop_windows(
            index.width[ids],
            index.height[ids],
            ids,
            seed=7,
            epoch=epoch,
            scale=(0.3, 1.0),
            ratio=(3 / 4, 4 / 3),
        )
        expected = decoder.decode([index.read(row) for row in ids], windows)
        assert torch.equal(batch.images, expected)
    decoder.close()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("world", "device_batch"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_and_accumulation_see_the_same_positions(index, decoder, world, device_batch):
    whole = run(index, decoder=decoder, steps=5)
    ranks = [
        run(index, decoder=decoder, steps=5, rank=rank, world=world, device_batch=device_batch)
        for rank in range(world)
    ]
    accumulation = 8 // (world * device_batch)
    assert {len(batches) for batches in ranks} == {5 * accumulation}
    for step, (ids, images) in enumerate(whole):
        parts = [
            ranks[rank][step * accumulation + micro_step]
            for micro_step in range(accumulation)
            for rank in range(world)
        ]
        assert [i for part, _ in parts for i in part] == ids
        assert torch.equal(torch.cat([part for _, part in parts]), images)


@pytest.mark.parametrize("decoder", DECODERS)
def test_resume_in_the_middle_of_an_epoch(index, decoder):
    whole = run(index, decoder=decoder, steps=10, device_batch=4)
    for start in (3, 4, 9):
        rest = run(index, decoder=decoder, start_step=start, steps=10, device_batch=4)
        assert len(rest) == 2 * (10 - start)
        for (ids, images), (ids_before, images_before) in zip(
            rest, whole[2 * start :], strict=True
        ):
            assert ids == ids_before
            assert torch.equal(images, images_before)
    assert run(index, start_step=10, steps=10) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch": 40, "device_batch": 40}, ["37", "40"]),
        ({"device_batch": 3}, ["divisible", "3", "8"]),
        ({"start_step": 11}, ["start_step", "11"]),
        ({"rank": 2, "world": 2, "device_batch": 4}, ["rank", "2"]),
    ],
)
def test_wrong_arguments_are_named(index, options, words):
    threads = threading.active_count()
    with pytest.raises(ValueError, match=words[0]) as caught:
        make_loader(index, **options)
    assert all(word in str(caught.value) for word in words)
    assert threading.active_count() == threads


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_early_close_ends_every_thread(index, decoder, taken):
    before = set(threading.enumerate())
    loader = make_loader(index, decoder=decoder, steps=10**6, prefetch=2)
    for _ in range(taken):
        next(loader)
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 5
    assert set(threading.enumerate()) <= before
    with pytest.raises(StopIteration):
        next(loader)


def test_what_cannot_be_used_is_left_out_and_named(index, monkeypatch, caplog):
    os.unlink(index.path(1))
    spoil(index, [3])
    rows = np.arange(6)
    windows = np.array([[0, 0, 40, 40]] * 6, dtype=np.int32)
    decoder = PillowDecoder((32, 32), 1)
    images, usable = decode_usable(index, rows, windows, decoder)
    assert usable.tolist() == [0, 2, 4, 5]
    assert torch.equal(images[1], decode_usable(index, rows[2:3], windows[:1], decoder)[0][0])
    assert "left out '001.jpg': cannot be read: No such file" in caplog.text
    assert "left out '003.jpg': not an image" in caplog.text
    assert len(decode_usable(index, rows[1:2], windows[:1], decoder)[1]) == 0
    # one bad sector is a file's, a lost server is not
    real, broken = Index.read, {4}

    def read(self, row):
        if row in broken:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, row)

    monkeypatch.setattr(Index, "read", read)
    assert decode_usable(index, rows, windows, decoder)[1].tolist() == [0, 2, 5]
    broken |= set(range(IMAGES))
    with pytest.raises(OSError, match="Input/output error"):
        decode_usable(index, rows, windows, decoder)
    decoder.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_jpeg_of_endless_scans_is_refused(tmp_path, decoder):
    """Each scan passes over all pixels: megabytes would keep a decoder busy for minutes."""
    root, buffer = folder(tmp_path, 10), io.BytesIO()
    Image.new("L", (1600, 1600), 90).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    for name, scans in (("endless", 4000), ("many", 40)):
        (root / f"{name}.jpg").write_bytes(data[:last] + data[last:-2] * scans + data[-2:])
    index = build_index(root)
    quarantine = Quarantine(None, 0.1, 12)
    assert run(index, decoder=decoder, steps=10, quarantine=quarantine)
    assert list(quarantine.files) == ["endless.jpg"]
    words = r"at most 2147483648, got 1600x1600 pixels in 40\d\d scans"
    assert re.search(words, quarantine.files["endless.jpg"])
    assert dict(build_index(root, verify=True).bad) == quarantine.files


class _Decoder:
    """Black images; raises something that is no DecodeError at the third batch."""

    def __init__(self, faulty=False):
        self.calls, self.faulty = 0, faulty

    def decode(self, encoded, windows, plain=None):
        self.calls += 1
        if self.faulty and self.calls == 3:
            raise ZeroDivisionError("the third batch")
        return torch.zeros(len(encoded), 32, 32, 3, dtype=torch.uint8)

    def close(self):
        raise AssertionError("a decoder that was given is closed by its owner")


def test_errors_of_the_thread_reach_the_consumer(index):
    with make_loader(index, given=_Decoder(faulty=True)) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError, match="the third batch") as caught:
                next(loader)
        frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert "decode" in frames  # where it happened, not only where it was raised again


def test_a_decoder_that_does_not_end_is_named_with_its_largest_image(tmp_path, monkeypatch):
    root, release = folder(tmp_path, 7), threading.Event()
    Image.new("RGB", (400, 400), 90).save(root / "large.png")
    given = _Decoder()
    monkeypatch.setattr(given, "decode", lambda *_: release.wait(60))
    loader = make_loader(build_index(root), given=given, timeout=0.05)
    try:
        with pytest.raises(DataStalled, match=r"decoding 8 images, 'large\.png' with the most"):
            next(loader)
    finally:
        release.set()
        loader.close()


def test_decoding_runs_ahead_but_bounded(index):
    decoder = _Decoder()
    with make_loader(index, given=decoder, prefetch=4, steps=100) as loader:
        deadline = time.monotonic() + 5
        while decoder.calls < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        # Four in the queue and one in the thread's hand.
        assert decoder.calls == 5
        assert loader.wait_seconds == 0
        next(loader)
        assert loader.wait_seconds > 0


def test_an_abandoned_loader_does_not_keep_the_process_alive(index):
    # Neither closed nor exhausted: the interpreter must still end, and quietly.
    code = (
        "import sys\n"
        "from ijepa_fast.config import DataConfig\n"
        "from ijepa_fast.data import Loader, build_index\n"
        "config = DataConfig(crop=32, threads=1)\n"
        "loader = Loader(build_index(sys.argv[1]), config, seed=0, global_batch=8, device_batch=8,"
        " steps=10**6)\n"
        "next(loader)\n"
        "print('done')\n"
    )
    command = [sys.executable, "-c", code, index.roots[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "done\n"
    assert "Traceback" not in done.stderr


def test_the_decoder_in_use_is_logged_once(index, caplog):
    with caplog.at_level("INFO", logger="ijepa_fast.data"):
        sample_ids(index, steps=3)
    assert [r.getMessage() for r in caplog.records] == ["decoder: Pillow (2 threads), as asked"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decoder", DECODERS)
def test_images_arrive_on_the_gpu(index, decoder):
    cpu = run(index, decoder="pillow", steps=4)
    gpu = run(index, decoder=decoder, steps=4, device="cuda")
    for (ids, images), (gpu_ids, gpu_images) in zip(cpu, gpu, strict=True):
        assert ids == gpu_ids
        assert gpu_images.device.type == "cuda"
        assert (images.int() - gpu_images.cpu().int()).abs().float().mean() < 1.5
