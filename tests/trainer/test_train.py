"""Whole runs, tiny: what they write, how they resume, how they end."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ijepa_fast import __version__
from ijepa_fast.data import PillowDecoder, build_index, crop_windows, epoch_order
from ijepa_fast.fast import FastStep
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules
from ijepa_fast.state.run_folder import RunFolder
from ijepa_fast.state.saves import Saver
from tests.trainer import tiny

ROOT = Path(__file__).parents[2]
FIELDS = {
    "step",
    "epoch",
    "loss",
    "lr",
    "weight_decay",
    "momentum",
    "feature_std",
    "skipped",
    "ids_hash",
    "timing",
}
TIMINGS = {
    "images_per_second",
    "images_per_second_per_device",
    "step_ms",
    "data_wait_ms",
    "memory_gib",
    "mfu",
    "eta_seconds",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run of 15 steps, with its pictures."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert tiny.run(data, out, pictures=True) == 0
    return out


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def _steps(out):
    return sorted(int(p.name[5:]) for p in (out / "checkpoints").glob("step-*"))


def _one_line(capsys):
    """The only line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.startswith("error: ")
    return text


def _poison(monkeypatch, *steps):
    """Makes the gradients of these steps (counted from 1 in this process) not finite."""
    original, count = FastStep.accumulate, 0

    def accumulate(self, *arguments, **options):
        nonlocal count
        count += 1
        result = original(self, *arguments, **options)
        if count in steps:
            self.parameters[3].grad.view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(FastStep, "accumulate", accumulate)


# --- one run -------------------------------------------------------------------------------------


def test_what_a_run_leaves(whole):
    names = {p.name for p in whole.iterdir()}
    assert names - {".lock"} == {
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "masks.png",
        "curves.png",
        "pca.png",
        "neighbours.png",
        "report.html",
    }
    # no epoch's end asks for a checkpoint
    assert _steps(whole) == [15]
    for name in ("masks.png", "curves.png", "pca.png", "neighbours.png"):
        with Image.open(whole / name) as image:
            assert min(image.size) > 200
    log = (whole / "train.log").read_text()
    assert "40 images in 2 classes" in log
    assert "step 14/15" in log
    assert re.search(r"first step done after \d+\.\d s \(.* s\), loss 0\.\d+", log)
    # but the commands at its end, which hold paths of any length
    said = [line.partition(" INFO ")[2] for line in log.splitlines() if "  ijepa-fast" not in line]
    assert max(map(len, said)) <= 100
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["model"]["width"] == 32
    assert config["batch"] == {"global": 8, "device": 8}


def test_rows_have_every_field(whole):
    rows = tiny.rows(whole, timing=True)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2]
    for row in rows:
        assert row.keys() == FIELDS
        assert row["timing"].keys() == TIMINGS
        assert row["skipped"] == 0
        assert row["feature_std"] > 0
        assert row["timing"]["images_per_second"] > 0
        assert len(row["ids_hash"]) == 16
    assert len({row["ids_hash"] for row in rows}) == len(rows)
    assert rows[0]["weight_decay"] < rows[-1]["weight_decay"]
    assert rows[0]["momentum"] < rows[-1]["momentum"]


def test_the_loss_falls(whole):
    losses = tiny.losses(whole)
    assert losses[-1] < 0.8 * losses[0]


def test_the_loop_is_the_reference_step_on_the_right_inputs(data, whole):
    """The same run written out: order, crops, masks and schedules by step, and nothing else."""
    config = tiny.config(data, whole)
    generator = torch_generator(config.seed, Stream.INIT)
    networks = build_models(config.model, config.data.crop_size, generator)
    step = ReferenceStep(*networks, config.optim, mean=config.data.mean, std=config.data.std)
    schedules = Schedules.of(config.optim, global_batch=8, steps_per_epoch=5)
    index, decoder = build_index(data), PillowDecoder((32, 32), 1)
    losses = []
    for done in range(15):
        epoch, place = divmod(done, 5)
        ids = epoch_order(40, seed=config.seed, epoch=epoch)[8 * place : 8 * place + 8]
        windows = crop_windows(
            index.width[ids],
            index.height[ids],
            ids,
            seed=config.seed,
            epoch=epoch,
            scale=config.data.scale,
            ratio=config.data.ratio,
        )
        images = decoder.decode([index.read(row) for row in ids], windows)
        masks = sample_masks(
            config.masks, grid=(4, 4), seed=config.seed, step=done, positions=np.arange(8)
        )
        elements = 8 * masks.target_index[0].numel() * 32
        losses.append(step.accumulate(images, masks, elements)[0].item())
        step.update(schedules.at(done + 1))
    decoder.close()
    logged = {row["step"]: row["loss"] for row in tiny.rows(whole)}
    assert [losses[number - 1] for number in logged] == pytest.approx(list(logged.values()))
    state = tiny.final_state(whole)
    for name, network in zip(
        ("encoder", "predictor", "target_encoder"), (*networks, step.target_encoder), strict=True
    ):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(state[f"{name}.{key}"], value, rtol=1e-4, atol=2e-6)


def test_the_networks_move_and_differ(whole):
    state = tiny.final_state(whole)
    assert state["step"] == state["adam_step"] == 15
    name = "blocks.0.mlp.fc1.weight"
    moved = state[f"encoder.{name}"] - state[f"target_encoder.{name}"]
    # momentum near 1: the target follows, far behind
    assert 0 < moved.norm() < state[f"encoder.{name}"].norm()
    assert state["exp_avg_sq.predictor.mask_token"].any()


def test_a_complete_run_says_so_and_changes_nothing(data, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert tiny.run(data, out, pictures=True) == 0
    assert "the run is complete at step 15" in capsys.readouterr().out
    before, after = tiny.snapshot(whole), tiny.snapshot(out)
    for name in ("train.log", "config.yaml", "report.html"):  # new lines; another --out
        before.pop(name)
        after.pop(name)
    assert after == before
    # so is one that has gone further than it is told to
    assert tiny.run(data, out, max_steps=7) == 0
    assert "the run is complete at step 15" in capsys.readouterr().out
    tiny.assert_same_state(out, whole)


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_both_decoders_train_on_the_same_samples(data, whole, out, decoder):
    assert tiny.run(data, out, data__decoder=decoder, max_steps=4) == 0
    rows, others = tiny.rows(out), tiny.rows(whole)[:2]
    assert [r["ids_hash"] for r in rows] == [r["ids_hash"] for r in others]
    assert tiny.losses(out) == pytest.approx(tiny.losses(whole)[:2], rel=2e-2)
    name = {"dali": "DALI", "pillow": "Pillow"}[decoder]
    assert f"decoder: {name}" in (out / "train.log").read_text()


def test_accumulation_changes_nothing_but_rounding(data, whole, out):
    assert tiny.run(data, out, batch__device=2) == 0
    assert tiny.losses(out) == pytest.approx(tiny.losses(whole), rel=1e-6)
    assert [r["ids_hash"] for r in tiny.rows(out)] == [r["ids_hash"] for r in tiny.rows(whole)]
    assert "2 on the device x 4 accumulated" in (out / "train.log").read_text()


def test_bfloat16_trains(data, out):
    assert tiny.run(data, out, optim__precision="bfloat16") == 0
    assert tiny.losses(out)[-1] < 0.8 * tiny.losses(out)[0]
    assert all(v.dtype != torch.bfloat16 for v in tiny.final_state(out).values())


def test_knn_before_and_after(data, out):
    assert tiny.run(data, out, eval__data=str(data), max_steps=6) == 0
    rows = [row for row in tiny.rows(out) if "knn" in row]
    assert [row["step"] for row in rows] == [0, 6]
    assert rows[0]["knn"].keys() == {"raw pixels", "untrained network"}
    assert rows[1]["knn"].keys() == {"target encoder, step 6"}
    # two colours
    assert rows[0]["knn"]["raw pixels"] == 1.0
    assert "raw pixels" in (out / "train.log").read_text()


# --- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[4], [5], [7], [1, 2, 3, 13]])
def test_stopped_and_resumed_is_bit_identical(data, whole, out, stops):
    """At a log line, at an epoch's end, in the middle of both, and several times."""
    for stop in stops:
        assert tiny.run(data, out, max_steps=stop) == 0
        assert tiny.final_state(out)["step"] == stop
        assert tiny.rows(out)[-1]["step"] == stop
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 7), (signal.SIGINT, 4)])
def test_a_signal_saves_and_stops(data, whole, out, monkeypatch, number, step):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        tiny.stop_at(number, step, patch)
        assert tiny.run(data, out) == 128 + number
    assert tiny.final_state(out)["step"] == step
    assert (
        f"stopped by signal {int(number)}, saved at step {step}" in (out / "train.log").read_text()
    )
    assert signal.getsignal(signal.SIGINT) is handler
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


def test_a_signal_in_the_last_step_is_a_finished_run(data, whole, out, monkeypatch):
    tiny.stop_at(signal.SIGTERM, 15, monkeypatch)
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_from_outside(data, whole, out, number, code):
    """The real thing, at whatever step it meets."""
    process = _started(tiny.arguments(data, out, checkpoint__minutes=1e-9), out)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code
    assert 1 <= tiny.final_state(out)["step"] <= 15
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


def _started(argv, out):
    """A run in another process that has reached a checkpoint which was not there before."""
    before = set(_steps(out)) if out.exists() else set()
    process = tiny.start(argv, out.parent / "output.txt")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.is_alive():
        if set(_steps(out)) - before:
            return process
        time.sleep(0.001)
    process.kill()
    process.join()
    pytest.fail((out.parent / "output.txt").read_text())


def _kill_during_save(process, out):
    """Kills while a checkpoint's temporary folder is there."""
    while process.is_alive():
        if not any((out / "checkpoints").glob(".tmp-*")):
            continue
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.01)
        if any((out / "checkpoints").glob(".tmp-*")):
            break
        os.kill(process.pid, signal.SIGCONT)
    process.kill()


def test_killed_at_five_moments_is_bit_identical(data, out, tmp_path):
    settings = {"optim__epochs": 10, "checkpoint__minutes": 1e-9}
    argv = tiny.arguments(data, out, **settings)
    delays = random.Random(5)
    for kill in range(5):
        process = _started(argv, out)
        if kill % 2:
            _kill_during_save(process, out)
        else:
            time.sleep(delays.uniform(0, 0.15))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if kill % 2:
            assert any((out / "checkpoints").glob(".tmp-*"))
    assert max(_steps(out)) < 50
    assert tiny.run(data, out, **settings) == 0
    assert not any((out / "checkpoints").glob(".tmp-*"))
    assert tiny.run(data, tmp_path / "whole", **settings) == 0
    tiny.assert_same_state(out, tmp_path / "whole")


def test_a_kill_before_the_first_checkpoint_starts_over(data, whole, out, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ijepa_fast.state.checkpoint.write", die)
        with pytest.raises(Killed):
            tiny.run(data, out, checkpoint__keep_every=1)
    # noticed when the writing thread has died
    assert [row["step"] for row in tiny.rows(out)][:2] == [2, 4]
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


def test_the_newest_damaged_uses_the_next_older_one(data, whole, out, capsys):
    for stop in (5, 10, 12):
        assert tiny.run(data, out, max_steps=stop) == 0
    assert _steps(out) == [5, 10, 12]
    file = out / "checkpoints" / "step-00000012" / "state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    capsys.readouterr()
    assert tiny.run(data, out) == 0
    said = capsys.readouterr().out
    assert "step-00000012 is unusable" in said
    assert "resumed from the checkpoint at step 10" in said
    tiny.assert_same_state(out, whole)


def test_all_damaged_ends_with_3_and_nothing_deleted(data, out, capsys):
    for stop in (5, 6):
        assert tiny.run(data, out, max_steps=stop) == 0
    for manifest in out.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    before = tiny.snapshot(out)
    capsys.readouterr()
    assert tiny.run(data, out) == 3
    assert "all 2 checkpoints" in _one_line(capsys)
    after = tiny.snapshot(out)
    for name in ("train.log", "config.yaml"):
        before.pop(name)
        after.pop(name)
    assert after == before


def test_rows_reach_the_disk_before_the_checkpoint_does(data, out, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(path, target):
        events.append(Path(target).name)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    for stop in (5, 10, 15):
        assert tiny.run(data, out, max_steps=stop) == 0
    order = [e for e in events if e == "metrics.jsonl" or e.startswith("step-")]
    saved = ["step-00000005", "step-00000010", "step-00000015"]
    assert order == [name for step in saved for name in ("metrics.jsonl", step)]


def test_rotation_in_a_run(data, out, monkeypatch):
    # so that each is written at its step, however slow the disk is
    monkeypatch.setattr(Saver, "busy", False)
    settings = {"checkpoint__keep": 1, "checkpoint__keep_every": 2, "optim__epochs": 5}
    assert tiny.run(data, out, **settings) == 0
    assert _steps(out) == [10, 20, 25]


# --- refusals ------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(data, out, capsys):
    folder = RunFolder(tiny.config(data, out))
    try:
        before = tiny.snapshot(out)
        assert tiny.run(data, out) == 2
        assert "another run is training in" in _one_line(capsys)
        assert tiny.snapshot(out) == before
    finally:
        folder.close()
    assert tiny.run(data, out, max_steps=1) == 0


def test_a_second_process_is_refused_while_the_first_trains(data, out, capsys):
    settings = {"optim__epochs": 50, "checkpoint__minutes": 1e-9}
    process = _started(tiny.arguments(data, out, **settings), out)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        assert tiny.run(data, out, optim__epochs=50) == 2
        assert "another run is training in" in _one_line(capsys)
    finally:
        process.kill()
        process.join()


def test_a_changed_recipe(data, out, capsys):
    assert tiny.run(data, out, max_steps=5) == 0
    old = (out / "config.yaml").read_bytes()
    before = tiny.snapshot(out)
    capsys.readouterr()
    changes = {"optim__lr": 1e-3, "seed": 4}
    assert tiny.run(data, out, **changes) == 2
    line = _one_line(capsys)
    assert "optim.lr: 0.002 -> 0.001" in line
    assert "seed: 3 -> 4" in line
    assert "--allow-changed-recipe" in line
    assert tiny.snapshot(out) == before

    assert tiny.run(data, out, allow_changed_recipe=True, **changes) == 0
    assert (out / "config-1.yaml").read_bytes() == old
    new = yaml.safe_load((out / "config.yaml").read_text())
    assert (new["optim"]["lr"], new["seed"]) == (1e-3, 4)
    assert tiny.final_state(out)["step"] == 15


def test_what_is_not_recipe_may_change(data, whole, out):
    assert tiny.run(data, out, max_steps=5) == 0
    settings = {"log__interval": 1, "checkpoint__keep": 1, "data__threads": 2, "data__prefetch": 1}
    assert tiny.run(data, out, **settings) == 0
    a, b = tiny.final_state(out), tiny.final_state(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert len(tiny.rows(out)) == 3 + 10


def test_a_changed_data_set(tmp_path, out, capsys):
    data = tiny.write_images(tmp_path / "data")
    assert tiny.run(data, out, max_steps=5) == 0
    (data / "class0" / "000.jpg").rename(data / "class0" / "new.jpg")
    capsys.readouterr()
    assert tiny.run(data, out) == 2
    assert "differ from those that the run was started with" in _one_line(capsys)
    assert tiny.run(data, out, allow_changed_recipe=True) == 0


def test_a_wrong_start_can_be_corrected(data, whole, out, tmp_path, capsys):
    """Nothing was trained yet, so there is nothing that a changed recipe could spoil."""
    assert tiny.run(tmp_path / "no-such-folder", out) == 2
    _one_line(capsys)
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)
    assert not (out / "config-1.yaml").exists()


def _empty(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")


def _small(folder):
    tiny.write_images(folder, count=9)
    Image.new("RGB", (7, 40)).save(folder / "narrow.png")


WRONG = {
    "missing": (lambda folder: None, "data.root must be an existing folder"),
    "empty": (_empty, "data.root must hold images"),
    "small": (_small, "images must be at least 8 pixels on each side"),
    "few": (lambda folder: tiny.write_images(folder, count=7), "batch.global must be at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_unusable_data_ends_with_2_before_training(tmp_path, out, capsys, name):
    make, message = WRONG[name]
    make(tmp_path / "data")
    assert tiny.run(tmp_path / "data", out) == 2
    assert message in _one_line(capsys)
    assert not (out / "checkpoints").exists()
    # with the traceback, for whoever reads the log later
    log = (out / "train.log").read_text()
    assert message in log
    assert "Traceback" in log


def test_the_command_itself(tmp_path):
    """As a user types it: exit code and one line, after those that say what begins."""
    argv = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    result = subprocess.run(
        [sys.executable, "-m", "ijepa_fast.train", *argv],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stdout.startswith(f"ijepa-fast {__version__}: loading PyTorch\n")
    assert result.stderr.startswith("error: data.root must be an existing folder")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- bad files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_an_undecodable_file_is_quarantined_and_replaced(tmp_path, out, decoder):
    data = tiny.write_images(tmp_path / "data", count=39)
    tiny.bad_png(data / "class0" / "bad.png")
    assert tiny.run(data, out, data__decoder=decoder) == 0
    (entry,) = (json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines())
    assert entry["file"] == "class0/bad.png"
    assert entry["reason"]
    assert entry["epoch"] == 0
    assert "class0/bad.png" in (out / "train.log").read_text()
    assert tiny.final_state(out)["step"] == 15
    assert all(np.isfinite(tiny.losses(out)))


def test_a_run_with_a_bad_file_resumes_exactly(tmp_path, out):
    data = tiny.write_images(tmp_path / "data", count=39)
    tiny.bad_png(data / "class0" / "bad.png")
    for stop in (1, 7):
        assert tiny.run(data, out, max_steps=stop) == 0
    assert tiny.run(data, out) == 0
    assert tiny.run(data, tmp_path / "whole") == 0
    tiny.assert_same_state(out, tmp_path / "whole")


def test_a_file_that_is_no_image_is_left_out(tmp_path, out):
    data = tiny.write_images(tmp_path / "data")
    (data / "class1" / "text.jpg").write_text("no image")
    assert tiny.run(data, out, max_steps=2) == 0
    (entry,) = (json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines())
    assert entry["file"] == "class1/text.jpg"
    assert "not an image" in entry["reason"]


def test_too_many_bad_files_end_with_4(tmp_path, out, capsys):
    data = tiny.write_images(tmp_path / "data")
    tiny.bad_png(data / "class0" / "bad.png")
    tiny.bad_png(data / "class1" / "worse.png")
    assert tiny.run(data, out) == 4
    line = _one_line(capsys)
    assert "unusable files must be at most 1 of 42" in line
    assert "quarantine.jsonl" in line
    files = [json.loads(x)["file"] for x in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(files) == ["class0/bad.png", "class1/worse.png"]
    # a larger share may be allowed without starting over
    assert tiny.run(data, out, data__max_bad_share=0.05) == 0


# --- gradients that are not finite ---------------------------------------------------------------


def test_three_in_a_row_end_with_4_and_the_weights_stay(data, whole, out, monkeypatch, capsys):
    assert tiny.run(data, out, max_steps=5) == 0
    with monkeypatch.context() as patch:
        _poison(patch, *range(3, 7))
        assert tiny.run(data, out) == 4
    line = _one_line(capsys)
    assert "3 steps in a row" in line
    # said at the latest one log interval after the third
    assert re.search(r"steps 8 to 1[01]", line)
    assert _steps(out) == [5]
    assert all(v.isfinite().all() for v in tiny.final_state(out).values())
    assert tiny.rows(out)[-1]["skipped"] in (3, 4)
    # the cause gone, the same command goes on from the last good checkpoint
    assert tiny.run(data, out) == 0
    tiny.assert_same_state(out, whole)


def test_a_skipped_step_advances_the_schedule_only(data, whole, out, tmp_path, monkeypatch):
    other = tmp_path / "other"
    for folder, stops in ((out, [15]), (other, [6, 15])):
        with monkeypatch.context() as patch:
            _poison(patch, 4, 5)
            assert tiny.run(data, folder, max_steps=stops[0]) == 0
        for stop in stops[1:]:
            assert tiny.run(data, folder, max_steps=stop) == 0
    state, rows = tiny.final_state(out), tiny.rows(out)
    assert (int(state["step"]), int(state["adam_step"])) == (15, 13)
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2, 2, 2, 2, 2]
    for key in ("lr", "weight_decay", "momentum", "ids_hash"):
        assert [row[key] for row in rows] == [row[key] for row in tiny.rows(whole)]
    assert all(v.isfinite().all() for v in state.values())
    tiny.assert_same_state(out, other)
