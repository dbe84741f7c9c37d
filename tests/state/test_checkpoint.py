"""Checkpoints: exact round trip, damage noticed, kills at every point of a save, rotation."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ijepa_fast.config import ModelConfig, OptimConfig
from ijepa_fast.errors import CheckpointError
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues
from ijepa_fast.state import checkpoint
from ijepa_fast.state.checkpoint import State
from tests.trainer import tiny

MODEL = ModelConfig(
    name="vit_tiny",
    patch_size=8,
    width=16,
    depth=1,
    heads=2,
    predictor_width=8,
    predictor_depth=1,
)
FILES = ("manifest.json", "state.json", "state.safetensors")


def _training(seed):
    encoder, predictor = build_models(MODEL, (32, 24), torch.Generator().manual_seed(seed))
    return ReferenceStep(encoder, predictor, OptimConfig(), mean=(0.5,) * 3, std=(0.2,) * 3)


def _update(training, seed, *, poison=False):
    generator = torch.Generator().manual_seed(seed)
    for parameter in training.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if poison:
        training.parameters[0].grad.view(-1)[0] = torch.nan
    training.update(StepValues(lr=1e-2, weight_decay=0.1, momentum=0.9))


def _state(step, value=None):
    """A few numbers: small enough to damage every byte."""
    tensors = {"encoder.w": torch.full((2, 3), float(step if value is None else value))}
    return State(tensors=tensors, step=step, adam_step=step - 1, meta={"data": "abc"})


def _capture(training, *, step, meta):
    return checkpoint.Snapshot(training, keep=True).take(training, step=step, meta=meta)


def _save(folder, step, *, keep=3, keep_every_steps=None):
    checkpoint.write(folder, _state(step))
    checkpoint.rotate(folder, newest=step, keep=keep, keep_every_steps=keep_every_steps)


def _step(folder):
    return _latest(folder).step


def _latest(folder):
    state = checkpoint.load_latest(folder)
    assert state is not None
    return state


def _reseal(path, change):
    """Changes the header and makes the manifest agree, as a tool of somebody else might."""
    header = json.loads((path / "state.json").read_text())
    change(header)
    (path / "state.json").write_text(json.dumps(header))
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest:
        data = (path / name).read_bytes()
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_round_trip_is_exact_and_goes_on_the_same(tmp_path):
    training = _training(0)
    for seed in range(4):
        _update(training, seed, poison=seed == 2)
    meta = {"data": "digest", "config": {"optim": {"lr": 0.1}}}
    captured = _capture(training, step=4, meta=meta)
    path = checkpoint.write(tmp_path / "checkpoints", captured)
    assert path.name == "step-00000004"
    loaded = checkpoint.read(path)
    assert (loaded.step, loaded.adam_step) == (4, 3)
    assert {k: v for k, v in loaded.meta.items() if k != "format_version"} == meta

    names = {name.partition(".")[0] for name in loaded.tensors}
    assert names == {"encoder", "predictor", "target_encoder", "exp_avg", "exp_avg_sq"}
    assert all(t.dtype == torch.float32 for t in loaded.tensors.values())
    assert any(loaded.tensors[k].any() for k in loaded.tensors if k.startswith("exp_avg_sq."))

    other = _training(1)
    checkpoint.restore(other, loaded)
    again = _capture(other, step=4, meta=meta)
    assert again.adam_step == 3
    assert other.skipped.tolist() == [0, 0, 1, 0]
    # moments and Adam's count only show in what comes next
    for _ in range(2):
        assert again.tensors.keys() == captured.tensors.keys()
        for name, value in captured.tensors.items():
            assert torch.equal(value, again.tensors[name]), name
        _update(training, 9)
        _update(other, 9)
        captured = _capture(training, step=5, meta=meta)
        again = _capture(other, step=5, meta=meta)


def test_captured_tensors_are_copies():
    training = _training(0)
    _update(training, 0)
    captured = _capture(training, step=1, meta={})
    before = {k: v.clone() for k, v in captured.tensors.items()}
    _update(training, 1)
    assert all(torch.equal(v, captured.tensors[k]) for k, v in before.items())


def test_before_the_first_update_moments_are_zero():
    captured = _capture(_training(0), step=0, meta={})
    moments = [v for k, v in captured.tensors.items() if k.startswith("exp_avg")]
    assert captured.adam_step == 0
    assert moments
    assert not any(v.any() for v in moments)


def test_another_architecture_is_refused():
    training = _training(0)
    captured = _capture(training, step=0, meta={})
    tensors = {k: v for k, v in captured.tensors.items() if k != "predictor.mask_token"}
    with pytest.raises(CheckpointError, match=r"predictor\.mask_token must be float32 .* got none"):
        checkpoint.restore(training, State(tensors=tensors, step=0, adam_step=0, meta={}))


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(tmp_path, name):
    path = checkpoint.write(tmp_path, _state(7))
    data = (path / name).read_bytes()
    for length in range(len(data)):
        (path / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoint.read(path)
    (path / name).write_bytes(data + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.read(path)
    (path / name).write_bytes(data)
    assert checkpoint.read(path).step == 7


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(tmp_path, name):
    path = checkpoint.write(tmp_path, _state(7))
    data = (path / name).read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(flipped)
        with pytest.raises(CheckpointError):
            checkpoint.read(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed_and_a_foreign_one_is_not_touched(tmp_path, name):
    path = checkpoint.write(tmp_path, _state(7))
    (path / "notes.txt").write_text("mine")
    assert checkpoint.read(path).step == 7
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read(path)
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("manifest", [[], {}, None, {"state.json": 3}, "x"])
def test_a_manifest_of_another_shape_is_noticed(tmp_path, manifest):
    path = checkpoint.write(tmp_path, _state(7))
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.update(format_version=2), "format_version 1, got 2"),
        *((lambda header, key=key: header.pop(key), key) for key in ("step", "adam_step")),
        *(
            (lambda header, value=value: header.update(step=value), "whole numbers")
            for value in (None, "7", 7.0, True, -1, 5, 10**30)
        ),
    ],
)
def test_another_header_is_refused(tmp_path, change, words):
    path = checkpoint.write(tmp_path, _state(7))
    _reseal(path, change)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read(path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64])
def test_other_dtypes_are_refused(tmp_path, dtype):
    path = checkpoint.write(tmp_path, _state(7))
    file = path / "state.safetensors"
    save_file({"encoder.w": torch.ones(2, 3, dtype=dtype)}, file)
    _reseal(path, lambda header: None)
    with pytest.raises(CheckpointError, match=f"float32 tensors, got encoder.w in {dtype}"):
        checkpoint.read(path)


def test_the_next_older_one_is_used_and_said_so(tmp_path):
    for step in (3, 5, 8):
        path = checkpoint.write(tmp_path, _state(step))
    assert _step(tmp_path) == 8
    with (path / "state.safetensors").open("r+b") as file:
        file.truncate(20)
    with tiny.log_lines() as lines:
        assert _step(tmp_path) == 5
    assert len(lines) == 1
    assert "step-00000008 is unusable" in lines[0]
    assert "20" in lines[0]
    # the damaged one is left for a person to look at
    assert path.is_dir()


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    for step in (3, 5):
        (checkpoint.write(tmp_path, _state(step)) / "state.json").write_text("{}")
    before = tiny.snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints .* nothing was deleted"):
        checkpoint.load_latest(tmp_path)
    assert tiny.snapshot(tmp_path) == before


def test_no_checkpoints_is_none(tmp_path):
    assert checkpoint.load_latest(tmp_path / "missing") is None
    assert checkpoint.load_latest(tmp_path) is None


def test_rotation_keeps_the_newest_and_every_nth(tmp_path):
    for step in range(1, 13):
        _save(tmp_path, step, keep_every_steps=4)
    assert [int(p.name[5:]) for p in checkpoint.checkpoint_folders(tmp_path)] == [12, 11, 10, 8, 4]
    checkpoint.rotate(tmp_path, newest=12, keep=2, keep_every_steps=None)
    assert [int(p.name[5:]) for p in checkpoint.checkpoint_folders(tmp_path)] == [12, 11]
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000011", "step-00000012"}


def test_rotation_keeps_the_first_after_every_nth_too(tmp_path):
    """At 8 another one was being written, so that one was written at 9."""
    for step in (3, 4, 7, 9, 10, 12, 13, 14):
        _save(tmp_path, step, keep=1, keep_every_steps=4)
    assert [int(p.name[5:]) for p in checkpoint.checkpoint_folders(tmp_path)] == [14, 12, 9, 4]


def test_rotation_never_deletes_what_was_just_written(tmp_path):
    # the run went on from 8 because 12 is damaged
    for step in (8, 12):
        path = checkpoint.write(tmp_path, _state(step))
    (path / "state.json").unlink()
    _save(tmp_path, 9, keep=1)
    assert _step(tmp_path) == 9
    _save(tmp_path, 13, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000013"]


def test_copies_that_somebody_made_are_left_alone(tmp_path):
    for step in range(1, 6):
        path = checkpoint.write(tmp_path, _state(step))
        shutil.copytree(path, path.with_name(path.name + ".bak"))
    checkpoint.rotate(tmp_path, newest=5, keep=2, keep_every_steps=None)
    assert _step(tmp_path) == 5
    assert len(list(tmp_path.glob("*.bak"))) == 5
    assert len(list(tmp_path.iterdir())) == 7


def test_what_interrupted_writes_left_is_cleaned(tmp_path):
    checkpoint.write(tmp_path, _state(1))
    for name in (".tmp-step-00000002-1", f".tmp-step-00000002-{os.getpid()}", ".trash-step-0-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("half")
    # also with the process number of the killed one: in a container it is always the same
    _save(tmp_path, 2)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
    assert _step(tmp_path) == 2


class _Killed(BaseException):
    """Not an error that could be handled: the process is gone."""


class _KillAt:
    """Ends the world before the n-th operation on the disk: from then on nothing happens."""

    def __init__(self, monkeypatch, n):
        self.left = n
        self.dead = False
        for owner, name in (
            (os, "fsync"),
            (os, "write"),
            (Path, "rename"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), name))

    def _wrap(self, original, name):
        def call(*arguments, **options):
            if not self.dead and self.left > 0:
                self.left -= 1
                return original(*arguments, **options)
            # a write that is cut short leaves half of its bytes
            if not self.dead and name == "write":
                original(arguments[0], arguments[1][: len(arguments[1]) // 2])
            self.dead = True
            raise _Killed

        return call


@pytest.mark.parametrize("replace", [False, True])
def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path, monkeypatch, replace):
    """`replace`: the save overwrites a damaged checkpoint of the same step."""
    outcomes = set()
    for n in range(100):
        folder = tmp_path / str(n)
        checkpoint.write(folder, _state(3))
        if replace:
            damaged = checkpoint.write(folder, _state(5, value=-1))
            (damaged / "state.safetensors").write_bytes(b"")
        with monkeypatch.context() as patch:
            kill = _KillAt(patch, n)
            with contextlib.suppress(_Killed):
                _save(folder, 5)
        state = _latest(folder)
        outcomes.add(state.step)
        assert torch.equal(state.tensors["encoder.w"], torch.full((2, 3), float(state.step)))
        final = folder / "step-00000005"
        if final.exists() and not replace:
            assert checkpoint.read(final).step == 5
        # the same command again
        _save(folder, 5)
        assert _step(folder) == 5
        assert {p.name for p in folder.iterdir()} == {"step-00000003", "step-00000005"}
        if not kill.dead:
            break
    else:
        pytest.fail("the write never came to its end")
    assert n >= 9
    assert outcomes == {3, 5}


def test_an_error_while_saving_is_raised_and_leaves_no_rest(tmp_path, monkeypatch):
    checkpoint.write(tmp_path, _state(3))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, _state(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    assert _step(tmp_path) == 3


def test_files_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    checkpoint.write(tmp_path / "checkpoints", _state(3))
    before = events[: events.index("rename")]
    assert set(FILES) < set(before)
    # the folder that lists the files, then the folder that lists the checkpoints
    assert before[-1].startswith(".tmp-step-00000003")
    assert events[events.index("rename") + 1 :] == ["checkpoints"]
