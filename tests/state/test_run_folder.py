"""Whose checkpoints a run goes on from, and what becomes of a folder under it."""

import shutil

import pytest

from ijepa_fast.callbacks import MetricsFile
from ijepa_fast.config import as_dict
from ijepa_fast.fast import FastStep
from ijepa_fast.state import RunFolder, saves
from ijepa_fast.state.run_folder import recipe_difference
from tests.trainer import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def _refused(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: the recipe differs from the one in ")
    assert "/checkpoints/step-00000002 (" in error
    assert error.count("\n") == 1
    return error


def test_another_runs_checkpoint_is_refused(data, out, tmp_path, capsys):
    other = tmp_path / "other"
    assert tiny.run(data, out, max_steps=2) == 0
    assert tiny.run(data, other, max_steps=2, seed=4) == 0
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(other / "checkpoints", out / "checkpoints")
    capsys.readouterr()
    assert tiny.run(data, out) == 2
    assert "seed: 4 -> 3" in _refused(capsys)
    assert tiny.run(data, out, max_steps=4, allow_changed_recipe=True) == 0


def test_checkpoints_know_their_recipe_without_config_yaml(data, out, capsys):
    assert tiny.run(data, out, max_steps=2) == 0
    (out / "config.yaml").unlink()
    capsys.readouterr()
    assert tiny.run(data, out, optim__lr=1e-3) == 2
    assert "optim.lr: 0.002 -> 0.001" in _refused(capsys)
    # the wrong start has left no trace: the right one goes on
    assert not (out / "config.yaml").exists()
    assert tiny.run(data, out, max_steps=4) == 0
    assert (out / "config.yaml").exists()


def test_a_setting_that_is_newer_than_a_run_does_not_stop_it(data, out):
    settings = as_dict(tiny.config(data, out))
    older = {**settings, "optim": {k: v for k, v in settings["optim"].items() if k != "eps"}}
    assert recipe_difference(older, settings) == []
    newer = {**settings, "optim": {**settings["optim"], "eps": 1e-3}}
    assert recipe_difference(older, newer) == ["optim.eps: 1e-08 -> 0.001"]


def _at_step(step, act, monkeypatch):
    update, left = FastStep.update, [step]

    def acting(self, values):
        update(self, values)
        left[0] -= 1
        if not left[0]:
            act()

    monkeypatch.setattr(FastStep, "update", acting)


def _fails_once(monkeypatch, kind, name):
    real, left = getattr(kind, name), [OSError("no space left")]

    def failing(self, *arguments):
        if left:
            raise left.pop()
        return real(self, *arguments)

    monkeypatch.setattr(kind, name, failing)


@pytest.mark.parametrize("deleted", [False, True])
def test_a_folder_that_goes_is_made_anew(data, out, tmp_path, monkeypatch, deleted):
    def act():
        if not deleted:
            out.rename(tmp_path / "elsewhere")
            return
        shutil.rmtree(out)
        # as on a full disk
        for kind, name in ((RunFolder, "_write_config"), (MetricsFile, "_begin")):
            _fails_once(monkeypatch, kind, name)

    monkeypatch.setattr(saves, "BACKOFF", (0.0, 0.0))
    _at_step(7, act, monkeypatch)
    assert tiny.run(data, out) == 0
    assert {"config.yaml", "metrics.jsonl", "train.log"} <= {p.name for p in out.iterdir()}
    assert [row["step"] for row in tiny.rows(out)] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert tiny.final_state(out)["step"] == 15
    assert "was moved or deleted, and is made anew" in (out / "train.log").read_text()
    # it is the run's own still
    assert tiny.run(data, out) == 0


def test_another_folder_in_its_place_is_not_touched(data, out, tmp_path, monkeypatch, capsys):
    def act():
        out.rename(tmp_path / "elsewhere")
        out.mkdir()
        (out / "metrics.jsonl").write_text("mine")

    monkeypatch.setattr(saves, "BACKOFF", (0.0,))
    _at_step(7, act, monkeypatch)
    assert tiny.run(data, out) == 5
    assert "is another folder now" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == "mine"


def test_a_full_disk_masks_no_result(data, out, capsys):
    """Every line of the log is refused, and the file cannot be closed well."""
    out.mkdir()
    (out / "train.log").symlink_to("/dev/full")
    assert tiny.run(data, out, max_steps=2) == 0
    captured = capsys.readouterr()
    assert captured.out.count("train.log cannot be written for now") == 1
    assert "done: " in captured.out
    assert "Traceback" not in captured.err
