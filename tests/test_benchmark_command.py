"""The benchmarks' command: what it refuses, that it verifies before it times, and its numbers."""

import functools
import json

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import command, harness
from benchmarks.harness import Bench
from benchmarks.step_contest import measure
from benchmarks.step_providers import make_case


@pytest.fixture(autouse=True)
def _own_results(monkeypatch):
    """Nothing of this reaches the results of a session of benchmarks, nor the reverse."""
    monkeypatch.setattr(harness, "RESULTS", [])
    monkeypatch.setattr(harness, "_asked", [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_files_are_not_overwritten_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", pytest.fail)
    file = tmp_path / "old.json"
    file.write_text("precious")
    assert bench.main(["--out", str(file)]) == 2
    assert f"--out must be a new file, got {file}: --force replaces it" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_ops_are_verified_timed_and_written(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    file.write_text("old")
    verified = []
    monkeypatch.setattr(Bench, "verify", lambda self, *case: verified.append((self.name, *case)))
    arguments = ["--ops", "latent_loss_alone", "--device", "cpu", "--out", str(file), "--force"]
    assert bench.main(arguments) == 0
    content = json.loads(file.read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert (content["failed"], content["step"]) == ([], [])
    times = {key.rpartition("/")[2]: r["median_us"] for key, r in content["ops"].items()}
    assert set(times) == {"reference", "ours"}
    assert verified == [("latent_loss_alone", name, "small") for name in ("reference", "ours")]
    text = capsys.readouterr().out
    assert "no measurement of a kernel" in text
    ratio = times["reference"] / times["ours"]
    assert f"| ours | {times['ours']:.1f} |" in text
    assert f"| {ratio:.2f} |" in text


def test_what_is_wrong_is_named_and_not_timed(tmp_path):
    def inputs(model, device, generator):
        return (torch.randn(4, model.width, generator=generator).to(device),)

    def wrong(x):
        return 1.01 * x * x

    made = Bench(
        name="square",
        inputs=inputs,
        providers={"reference": torch.square, "ours": wrong},
        bytes=lambda model, backward: 1,
    )
    said: list[str] = []
    out = tmp_path / "bench.json"
    assert command.run([made], step=False, full=False, out=out, say=said.append) == 1
    (line,) = [text for text in said if text.startswith("FAILED")]
    assert "square, small, forward, ours: AssertionError: square: ours differs" in line
    content = json.loads(out.read_text())
    assert list(content["ops"]) == ["square/small/forward/reference"]
    assert len(content["failed"]) == 1


def test_the_step_is_verified_and_its_failures_end_in_code_1(tmp_path, monkeypatch, capsys):
    case = make_case("demo", batch=2, precision="float32", depth=1, predictor_depth=1, steps=2)
    monkeypatch.setattr(command, "_cases", lambda full: [case])
    # verified only
    monkeypatch.setattr(command, "measure", functools.partial(measure, repeats=0))
    out = tmp_path / "bench.json"
    assert bench.main(["--step", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["step"]
    assert [row["provider"] for row in rows][:2] == ["reference", "fast"]
    assert rows[1]["held_against"] == "reference"
    assert rows[1]["loss_error"] < 1e-5
    text = capsys.readouterr().out
    assert "| fast |" in text
    assert "latent_loss" not in text

    failing = [{**rows[0], "error": "out of memory"}]
    monkeypatch.setattr(command, "measure", lambda *_, **__: failing)
    assert bench.main(["--step", "--device", "cpu"]) == 1
    assert "FAILED, not timed" in capsys.readouterr().out
