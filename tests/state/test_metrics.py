"""Rows, rates and the hash of sample ids."""

import json
import os
import resource
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from ijepa_fast.errors import NonFiniteError
from ijepa_fast.state import metrics
from ijepa_fast.state.metrics import (
    Journal,
    Meter,
    MetricsFile,
    Reporter,
    Watch,
    id_hash,
    read_rows,
)
from tests.trainer import tiny

CPU = torch.device("cpu")


def _row(step, **changes):
    timing = {
        "images_per_second": 123.4,
        "images_per_second_per_device": 61.7,
        "step_ms": 64.8,
        "data_wait_ms": 1.25,
        "memory_gib": 1.5,
        "mfu": None,
        "eta_seconds": 3725,
    }
    row = {
        "step": step,
        "epoch": 0,
        "lr": 0.00123,
        "weight_decay": 0.0456,
        "momentum": 0.99612,
        "loss": 0.25,
        "feature_std": 0.75,
        "skipped": 0,
        "ids_hash": "00",
        "timing": timing,
    }
    return {**row, **changes}


# --- hash ----------------------------------------------------------------------------------------


def _batch():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.permutation(1000)[:24]), np.arange(24)


@pytest.mark.parametrize("parts", [1, 2, 3, 24])
def test_the_hash_does_not_depend_on_the_division(parts):
    ids, positions = _batch()
    whole = id_hash(ids, positions)
    # any share of the positions, in any order
    order = np.random.default_rng(parts).permutation(24)
    shares = np.array_split(order, parts)
    total = torch.stack([id_hash(ids[share], positions[share]) for share in shares]).sum()
    assert whole.dtype == total.dtype == torch.int64
    assert whole.shape == ()
    assert int(total) == int(whole)


def test_the_hash_sees_every_change_and_every_swap():
    ids, positions = _batch()
    hashes = {int(id_hash(ids, positions))}
    for i in range(24):
        for change in (1, -1, 1000, 2**31):
            other = ids.clone()
            other[i] += change
            hashes.add(int(id_hash(other, positions)))
        for j in range(i):
            other = ids.clone()
            other[[i, j]] = other[[j, i]]
            hashes.add(int(id_hash(other, positions)))
    assert len(hashes) == 1 + 24 * 4 + 24 * 23 // 2


# --- the file ------------------------------------------------------------------------------------


def test_rows_past_the_step_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "knn": {"a": 0.5}}, *(_row(step) for step in (2, 4, 6, 8))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, step=4)
    assert file.rows == rows[:3]
    assert tiny.rows(tmp_path, timing=True) == rows[:3]
    file.append(_row(6, loss=0.125))
    # there at once, not at the end
    assert tiny.rows(tmp_path, timing=True)[-1]["loss"] == 0.125
    assert file.rows[-1]["loss"] == 0.125
    file.sync()
    file.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("interval", "kept"), [(2, [2, 4, 5]), (5, [2, 4, 5, 5]), (1, [2, 4, 5, 5])]
)
def test_a_row_between_two_log_lines_is_cut_where_training_goes_on(tmp_path, interval, kept):
    path = tmp_path / "metrics.jsonl"
    rows = [_row(2), _row(4), _row(5), {"step": 5, "knn": {"a": 0.5}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, step=5, interval=interval)
    file.close()
    assert [row["step"] for row in tiny.rows(tmp_path)] == kept
    assert "knn" in tiny.rows(tmp_path)[-1]


def test_lines_that_are_no_rows_are_left_out_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    broken = ['{"step": 4, "lo', "[]", "5", '{"loss": 1.0}', '{"step": null}', '"\xff"']
    lines = [json.dumps(_row(2)), *broken, json.dumps(_row(6))]
    path.write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    with tiny.log_lines() as told:
        file = MetricsFile(path, step=100)
    file.close()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 6]
    assert [f"line {number} is left out" in text for number, text in enumerate(told, 2)] == (
        [True] * len(broken)
    )


@pytest.mark.parametrize("torn", ['{"step": 6, "loss": 0.2', '{"st', "\0\0\0\0", ""])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_row(2)) + "\n" + json.dumps(_row(4)) + "\n" + torn)
    file = MetricsFile(path, step=100)
    file.append(_row(6))
    file.close()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 4, 6]


# --- the journal ---------------------------------------------------------------------------------


def _queue(journal, step, *, skipped=(0, 0, 0, 0), loss=0.5):
    journal.queue(
        {"step": step, "lr": 0.1},
        torch.tensor([loss, 0.75]),
        torch.tensor(skipped),
        timing={"step_ms": 64.8},
    )


@pytest.fixture
def journal(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    journal = Journal(file, mock.create_autospec(Reporter, instance=True))
    yield journal
    file.close()


def test_a_row_is_written_once_its_numbers_are_there(tmp_path, journal, monkeypatch):
    """On a CPU at once; a device is never waited for, but before the next row."""
    _queue(journal, 2, loss=0.5)
    journal.poll(2)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2]
    monkeypatch.setattr(metrics._Arrival, "here", False)
    _queue(journal, 4, loss=0.25, skipped=(1, 1, 2, 0))
    journal.poll(5)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2]
    _queue(journal, 6)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 4]
    journal.flush()
    journal.flush()
    first, second, _ = tiny.rows(tmp_path, timing=True)
    assert (first["loss"], first["feature_std"], first["skipped"]) == (0.5, 0.75, 0)
    assert (second["loss"], second["skipped"]) == (0.25, 2)
    assert second["timing"]["step_ms"] == 64.8


def test_the_third_skip_in_a_row_ends_the_run():
    watch = Watch(CPU)
    assert watch.check(2, torch.tensor([2, 2, 5, 0])) is None
    error = watch.check(7, torch.tensor([0, 3, 8, 1]))
    assert isinstance(error, NonFiniteError)
    assert list(error.steps) == [4, 5, 6]
    assert "got 3 steps in a row" in str(error)
    assert "(steps 4 to 6)" in str(error)


def test_rows_that_the_disk_refuses_wait(tmp_path, monkeypatch, caplog):
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    file.append({"step": 1})
    write = os.write
    refused: list[bytes] = []

    def full(descriptor, data):
        # half of a row still has room
        if not refused and len(data) > 4:
            refused.append(data)
            return write(descriptor, data[:4])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        file.append({"step": 2})
        file.append({"step": 3})
        with pytest.raises(OSError, match="No space"):
            file.sync()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    file.append({"step": 4})
    file.sync()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [1, 2, 3, 4]
    assert [row["step"] for row in file.rows] == [1, 2, 3, 4]
    file.close()
    words = [record.getMessage() for record in caplog.records]
    assert len([w for w in words if "cannot be written for now" in w]) == 1


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [None, 1e12])
def test_rates(monkeypatch, peak):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter = Meter(images=64, world=2, flops=2e9, peak=peak, device=CPU)
    now = 105.0
    meter.restart(10, 3.0)
    now = 113.0
    # 4 steps in 8 s, of which 1 s waiting
    timing = meter.read(14, 4.0, 114)
    used = timing.pop("memory_gib")
    assert 0 < used <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 + 0.001
    assert timing == {
        "images_per_second": 32.0,
        "images_per_second_per_device": 16.0,
        "step_ms": 2000.0,
        "data_wait_ms": 250.0,
        "mfu": None if peak is None else 0.032,
        "eta_seconds": 200,
    }
    # the next interval starts here
    now = 114.0
    timing = meter.read(18, 4.0, 114)
    assert (timing["step_ms"], timing["data_wait_ms"], timing["eta_seconds"]) == (250.0, 0.0, 24)


def test_peak_is_known_of_cuda_devices_in_bfloat16_only(monkeypatch):
    assert metrics.peak_flops(CPU, "bfloat16") is None
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    assert metrics.peak_flops(cuda, "bfloat16") == 989e12
    assert metrics.peak_flops(cuda, "float32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    assert metrics.peak_flops(cuda, "bfloat16") is None


# --- what a person sees --------------------------------------------------------------------------


def test_lines_say_what_there_is_room_for():
    row = _row(40)
    text = metrics.line(row, 400, 3)
    assert text.startswith(
        "step 40/400  epoch 1/3  loss 0.25000  lr 1.23e-03  123 img/s  ETA 1:02:05"
    )
    assert text.endswith("  std 0.750  1.50 GiB")
    row["timing"] |= {"mfu": 0.4567, "data_wait_ms": 12.3}
    text = metrics.line({**row, "skipped": 2}, 400, 3)
    assert text.endswith("ETA 1:02:05  SKIPPED 2 (not finite)")
    row["timing"] |= {"images_per_second": 12345.6, "eta_seconds": 360_000}
    row |= {"step": 250_000, "epoch": 299}
    text = metrics.line(row, 250_000, 300)
    assert "img/s  ETA 100:00:00" in text
    assert len(text) <= 100
    monitors = {"feature_std": 0.598, "rankme": 138.4, "lidar": 115.2}
    monitors |= {"prediction_cosine": -0.036, "mean_target_cosine": 0.796}
    row = {"step": 250_000, "monitors": monitors, "images": [50000, 10000]}
    row["knn"] = {"target encoder, step 250000": 0.11}
    texts = metrics.evaluation_lines(row)
    assert "kNN 11.0 % (target encoder, step 250000)  of 50000 and 10000 images" in texts[1]
    assert all(text.startswith("evaluation at step 250000  ") for text in texts)
    assert max(map(len, texts)) <= 100


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reporter_logs_lines_and_draws_a_bar_on_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    reporter = Reporter(last_step=400, epochs=3, tensorboard=None)
    try:
        with tiny.log_lines() as lines:
            reporter.advance(39)
            reporter.show(_row(39))
            reporter.advance(40)
            reporter.doing("evaluation")
        assert lines == [metrics.line(_row(39), 400, 3)]
        assert (reporter.progress is not None) == terminal
        if terminal:
            task = reporter.progress.tasks[0]
            assert (task.description, task.completed, task.total) == ("evaluation", 40, 400)
            assert "loss 0.2500" in task.fields["status"]
    finally:
        reporter.close()
