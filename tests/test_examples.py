"""Kernels and the trainer's parts in other loops, data from elsewhere: the same losses."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import ijepa_fast
from ijepa_fast.visualize.run_pictures import Pictures
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mae():
    return runpy.run_path(str(ROOT / "examples" / "drop_in_mae.py"))


def test_the_masked_autoencoder_gives_the_same_losses(mae):
    """Gather, scatter, loss, optimiser and EMA swapped; the last value is the averaged model's."""
    plain, ours = (mae["train"](30, ours) for ours in (False, True))
    assert len(plain) == 31
    for step, (a, b) in enumerate(zip(plain, ours, strict=True)):
        assert b == pytest.approx(a, rel=1e-6), step
    # it learns, and the average is not the model itself
    assert plain[29] < 0.9 * plain[0]
    assert plain[30] != pytest.approx(plain[29], rel=1e-2)


def test_the_averaged_classifier_is_the_same():
    ema = runpy.run_path(str(ROOT / "examples" / "drop_in_ema.py"))
    plain, ours = (ema["train"](150, swapped) for swapped in (False, True))
    assert plain[0] == ours[0]  # the loop itself is untouched
    assert plain[1] == ours[1] > 0.6
    theirs = dict(plain[2].state_dict())
    for name, tensor in ours[2].state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["drop_in_mae.py", "drop_in_ema.py"])
def test_they_run_as_scripts_and_stay_short(name):
    path = ROOT / "examples" / name
    assert len(path.read_text().splitlines()) < 150
    command = [sys.executable, str(path), "--ours", "--steps", "5"]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "averaged model" in result.stdout


def test_a_parquet_file_gives_the_losses_of_its_images(tmp_path):
    pytest.importorskip("datasets")
    example = runpy.run_path(str(ROOT / "examples" / "parquet.py"))
    file = tmp_path / "images.parquet"
    example["write_example"](file, 40)
    source = example["Parquet"](file, tmp_path / "cache")
    for i in range(40):
        folder = tmp_path / "files" / str(source.label_at(i))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.png").write_bytes(source.bytes_at(i))
    assert tiny.run(tmp_path / "files", tmp_path / "plain", max_steps=3) == 0
    given = ["--file", file, "--out", tmp_path / "run", "--steps", 3]
    given += ["--config", tmp_path / "recipe.yaml", "--batch.global", 8, "--batch.device", 8]
    with mock.patch.object(Pictures, "_draw"):
        assert example["main"]([str(word) for word in given]) == 0
    assert tiny.losses(tmp_path / "run") == tiny.losses(tmp_path / "plain")


def test_the_loop_of_one_s_own_is_the_trainer(tmp_path, monkeypatch):
    path = ROOT / "examples" / "own_loop.py"
    assert len(path.read_text().splitlines()) < 80
    own = runpy.run_path(str(path))
    config, steps = own["CONFIG"], own["STEPS"]
    monkeypatch.setattr(Pictures, "_draw", lambda *arguments: None)
    run = ijepa_fast.pretrain(
        config, out=tmp_path / "run", max_steps=steps, log__interval=1, eval__seconds=0.0
    )
    assert steps == 50 == run.step
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert own["train"](config, steps, device) == [row["loss"] for row in run.rows]
