"""The metrics file, and what a person sees."""

import json
import os
import sys
from pathlib import Path

import pytest

from ijepa_fast.callbacks import MetricsFile, Progress, RunInfo, read_rows
from ijepa_fast.callbacks.progress import evaluation_lines, line
from ijepa_fast.config import Config, OptimConfig
from tests.trainer import tiny


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


# --- the file ------------------------------------------------------------------------------------


def test_rows_past_the_step_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "knn": {"a": 0.5}}, *(_row(step) for step in (2, 4, 6, 8))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, step=4)
    assert file.rows == rows[:3]
    assert tiny.rows(tmp_path, timing=True) == rows[:3]
    file.on_step(_row(6, loss=0.125))
    # there at once, not at the end
    assert tiny.rows(tmp_path, timing=True)[-1]["loss"] == 0.125
    assert file.rows[-1]["loss"] == 0.125
    file.sync()
    file.on_end("done", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("interval", "kept"), [(2, [2, 4, 5]), (5, [2, 4, 5, 5]), (1, [2, 4, 5, 5])]
)
def test_a_row_between_two_log_lines_is_cut_where_training_goes_on(tmp_path, interval, kept):
    path = tmp_path / "metrics.jsonl"
    rows = [_row(2), _row(4), _row(5), {"step": 5, "knn": {"a": 0.5}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = MetricsFile(path, step=5, interval=interval)
    file.on_end("done", 0)
    assert [row["step"] for row in tiny.rows(tmp_path)] == kept
    assert "knn" in tiny.rows(tmp_path)[-1]


def test_lines_that_are_no_rows_are_left_out_and_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    broken = ['{"step": 4, "lo', "[]", "5", '{"loss": 1.0}', '{"step": null}', '"\xff"']
    lines = [json.dumps(_row(2)), *broken, json.dumps(_row(6))]
    path.write_bytes("".join(line + "\n" for line in lines).encode("latin-1"))
    with tiny.log_lines() as told:
        file = MetricsFile(path, step=100)
    file.on_end("done", 0)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 6]
    assert [f"line {number} is left out" in text for number, text in enumerate(told, 2)] == (
        [True] * len(broken)
    )


@pytest.mark.parametrize("torn", ['{"step": 6, "loss": 0.2', '{"st', "\0\0\0\0", ""])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_row(2)) + "\n" + json.dumps(_row(4)) + "\n" + torn)
    file = MetricsFile(path, step=100)
    file.on_step(_row(6))
    file.on_end("done", 0)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 4, 6]


def test_rows_that_the_disk_refuses_wait(tmp_path, monkeypatch, caplog):
    file = MetricsFile(tmp_path / "metrics.jsonl", step=0)
    file.on_step({"step": 1})
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
        file.on_step({"step": 2})
        file.on_step({"step": 3})
        with pytest.raises(OSError, match="No space"):
            file.sync()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    file.on_step({"step": 4})
    file.sync()
    assert [row["step"] for row in tiny.rows(tmp_path)] == [1, 2, 3, 4]
    assert [row["step"] for row in file.rows] == [1, 2, 3, 4]
    file.on_end("done", 0)
    words = [record.getMessage() for record in caplog.records]
    assert len([w for w in words if "cannot be written for now" in w]) == 1


# --- what a person sees --------------------------------------------------------------------------


def test_lines_say_what_there_is_room_for():
    row = _row(40)
    text = line(row, 400, 3)
    assert text.startswith(
        "step 40/400  epoch 1/3  loss 0.25000  lr 1.23e-03  123 img/s  ETA 1:02:05"
    )
    assert text.endswith("  std 0.750  1.50 GiB")
    row["timing"] |= {"mfu": 0.4567, "data_wait_ms": 12.3}
    text = line({**row, "skipped": 2}, 400, 3)
    assert text.endswith("ETA 1:02:05  SKIPPED 2 (not finite)")
    row["timing"] |= {"images_per_second": 12345.6, "eta_seconds": 360_000}
    row |= {"step": 250_000, "epoch": 299}
    text = line(row, 250_000, 300)
    assert "img/s  ETA 100:00:00" in text
    assert len(text) <= 100
    monitors = {"feature_std": 0.598, "rankme": 138.4, "lidar": 115.2}
    monitors |= {"prediction_cosine": -0.036, "mean_target_cosine": 0.796}
    row = {"step": 250_000, "monitors": monitors, "images": [50000, 10000]}
    row["knn"] = {"target encoder, step 250000": 0.11}
    texts = evaluation_lines(row)
    assert "kNN 11.0 % (target encoder, step 250000)  of 50000 and 10000 images" in texts[1]
    assert all(text.startswith("evaluation at step 250000  ") for text in texts)
    assert max(map(len, texts)) <= 100


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_logs_lines_and_draws_a_bar_on_a_terminal(monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    config = Config(optim=OptimConfig(epochs=3, warmup=1))
    progress = Progress()
    progress.on_start(RunInfo(config=config, out=Path(), step=38, last_step=400, images=8))
    try:
        with tiny.log_lines() as lines:
            progress.advance(39)
            progress.on_step(_row(39))
            progress.advance(40)
            progress.doing("evaluation")
        assert lines == [line(_row(39), 400, 3)]
        assert (progress.bar is not None) == terminal
        if terminal:
            task = progress.bar.tasks[0]
            assert (task.description, task.completed, task.total) == ("evaluation", 40, 400)
            assert "loss 0.2500" in task.fields["status"]
    finally:
        progress.on_end("done", 40)
