"""TensorBoard, Weights & Biases and MLflow, read back; what is missing, and old names."""

import importlib.util
import json
import struct
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from unittest import mock

import pytest

from ijepa_fast.callbacks import RunInfo, check_packages
from ijepa_fast.callbacks.scalars import scalars
from ijepa_fast.callbacks.wandb import WeightsAndBiases
from ijepa_fast.config import Config, parse
from tests.trainer import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with all loggers, killed before step 9 and resumed to its end; and MLflow's ids."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = {"eval__data": data, "eval__every": 4, "checkpoint__minutes": 1e-9}
    argv = [*tiny.arguments(data, out, **settings), "--log.to", "tensorboard", "wandb", "mlflow"]
    environment = {"WANDB_MODE": "offline", "WANDB_X_DISABLE_STATS": "true"}
    fault = {"IJEPA_FAST_FAULT": "0:9:kill"}
    codes, ids = [], []
    for more in (fault, {}):
        child = tiny.start(argv, out.parent / "output.txt", {**environment, **more})
        child.join(120)
        codes.append(child.exitcode)
        ids.append(
            [(out / name).read_text().split()[0] for name in ("wandb_run_id", "mlflow_run_id")]
        )
    text = (out.parent / "output.txt").read_text()
    assert codes == [-9, 0], text
    assert ids[0] == ids[1]
    assert "is taken out" not in text
    return out


def _expected(out):
    """Name -> step -> value, of the journal."""
    values: dict[str, dict[int, float]] = {}
    for row in tiny.rows(out, timing=True):
        for name, value in scalars(row).items():
            values.setdefault(name, {})[row["step"]] = value
    assert [*values["train/loss"]] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [*values["monitors/rankme"]] == [0, 4, 8, 12, 15]
    assert [*values["knn/target encoder"]] == [4, 8, 12, 15]
    return values


def test_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    expected = _expected(run)
    assert set(events.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert got == [(step, pytest.approx(value, rel=1e-6)) for step, value in values.items()]


def _wandb_records(path):
    """Of a .wandb file: LevelDB's log format, of blocks with checked pieces."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # generated

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        # 1 a whole record, 2 to 4 its first, middle and last piece
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(run):
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    run_id, last = (run / "wandb_run_id").read_text().split()
    assert last == "15"
    expected = _expected(run)
    values: dict[str, dict[int, float]] = {}
    config: dict[str, dict] = {}
    for file in files:
        for record in _wandb_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert record.run.run_id == run_id
                assert record.run.display_name == "run"
                config |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
            elif kind == "metric":
                assert (record.metric.glob_name, record.metric.step_metric) == ("*", "step")
            elif kind == "history":
                row = {
                    i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item
                }
                for name in row.keys() & expected.keys():
                    values.setdefault(name, {})[row["step"]] = row[name]
    assert config["optim"]["lr"] == 2e-3
    assert values.keys() == expected.keys()
    for name, got in values.items():
        assert dict(sorted(got.items())) == expected[name], name


def test_wandb_is_sent_again_what_a_kill_may_have_lost(tmp_path, monkeypatch):
    fake, clock = mock.MagicMock(), iter([0.0, 50.0, 100.0, 100.0, 200.0])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    fake.init.return_value.id = "abc"
    log = fake.init.return_value.log
    info = RunInfo(config=Config(), out=tmp_path, step=0, last_step=20, images=8)
    killed = WeightsAndBiases()
    killed.on_start(info)
    for step in (2, 4):
        killed.on_step({"step": step, "loss": 0.5})
        # 50 s and 100 s after the start: then all rows up to step 0 have long been written
        killed.on_checkpoint(step, tmp_path)
    assert (tmp_path / "wandb_run_id").read_text() == "abc 0"
    rows = [{"step": 0, "monitors": {"rankme": 9.5}}, *({"step": n, "loss": 0.5} for n in (2, 4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.reset_mock()
    WeightsAndBiases().on_start(replace(info, step=4))
    sent = [call.args[0] for call in log.call_args_list]
    assert sent == [{"step": n, "train/loss": 0.5} for n in (2, 4)]
    assert fake.init.call_args.kwargs["id"] == "abc"


def test_mlflow(run, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((run / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("ijepa-fast")
    assert experiment
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.run_id == (run / "mlflow_run_id").read_text()
    assert (one.info.run_name, one.info.status) == ("run", "FINISHED")
    assert one.data.params["optim.lr"] == "0.002"
    expected = _expected(run)
    assert one.data.metrics.keys() == expected.keys()
    for name, values in expected.items():
        history = client.get_metric_history(one.info.run_id, name)
        # of a step that was done again, the last value
        got = {m.step: m.value for m in sorted(history, key=lambda m: (m.step, m.timestamp))}
        assert got == values, name


def test_a_missing_package_is_refused_before_any_work(data, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name)
    )
    for more in ({}, {"dry_run": True}):
        assert tiny.run(data, tmp_path / "run", log__to="wandb", **more) == 2
        error = capsys.readouterr().err
        assert "log.to must be what is installed: pip install 'ijepa-fast[wandb]'" in error
        assert not (tmp_path / "run").exists()
    # a folder that happens to have the name is no package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    with pytest.raises(ValueError, match=r"ijepa-fast\[log\]"):
        check_packages(["tensorboard"])
    check_packages(["jsonl"])


def test_one_rank_logs(data, tmp_path):
    settings = {"log__to": "tensorboard", "max_steps": 2, "batch__device": 4}
    codes, text = tiny.run_ranks(data, tmp_path / "run", **settings)
    assert codes == [0, 0], text
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 1


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("log: {tensorboard: true}", ("jsonl", "tensorboard")),
        ("log: {tensorboard: false}", ("jsonl",)),
        ("version: 0.1.0\nlog: {tensorboard: true, interval: 3}", ("jsonl", "tensorboard")),
        ("log: {to: []}", ()),
        ("log: {to: wandb}", ("wandb",)),
    ],
)
def test_settings(tmp_path, text, names):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    config = parse(["--config", str(file), "--preset", "demo"]).config
    assert config.log.to == names


@pytest.mark.parametrize(
    "text", ["log: {to: [jsonl], tensorboard: true}", "log: {tensorboard: 3}", "log: {to: [disk]}"]
)
def test_settings_that_are_refused(tmp_path, text):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"log\.(to|tensorboard)"):
        parse(["--config", str(file), "--preset", "demo"])
