"""The benchmarks' command: what it refuses, that it verifies before it times, and its numbers."""

import functools
import json

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import command, harness
from benchmarks.harness import Bench, Result
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


def _refused(arguments, capsys) -> str:
    assert bench.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("pytest", "benchmarks need pytest, which is not installed: pip install"),
    ],
)
def test_a_missing_module_is_named(missing, words, monkeypatch, capsys):
    def absent(name):
        if name == "benchmarks.command":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return harness

    monkeypatch.setattr("importlib.import_module", absent)
    assert words in _refused(["--device", "cpu"], capsys)


def test_files_are_not_overwritten_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "run", pytest.fail)
    file = tmp_path / "old.json"
    file.write_text("precious")
    error = _refused(["--out", str(file)], capsys)
    assert f"--out must be a new file, got {file}: --force replaces it" in error
    assert file.read_text() == "precious"
    assert "got the folder" in _refused(["--out", str(tmp_path), "--force"], capsys)
    assert "can be written" in _refused(["--out", str(tmp_path / "no" / "x.json")], capsys)


def test_unknown_ops_are_named_with_a_near_one(capsys):
    error = _refused(["--ops", "latent_los"], capsys)
    assert (
        error
        == "error: --ops must name benchmarked ops, got latent_los; did you mean latent_loss?\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_that_is_not_there_is_refused(capsys):
    assert "--device must be cpu or auto" in _refused(["--device", "cuda"], capsys)


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
    assert text.startswith(f"device {content['machine']['device']}")
    assert "no measurement of a kernel" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| latent_loss_alone ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["latent_loss_alone", "small", "forward", "bfloat16"]
    assert float(cells[4]) == pytest.approx(times["ours"] / 1e3, abs=1e-4)
    assert float(cells[5]) == pytest.approx(times["reference"] / 1e3, abs=1e-4)
    assert float(cells[7]) == pytest.approx(times["reference"] / times["ours"], abs=0.01)
    assert cells[6] == cells[8] == "-"
    assert "training step" not in text


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


def test_the_table_has_compile_and_bandwidth_where_they_were_measured():
    def result(provider, median, **more):
        case = {"op": "loss", "shape": "B/16", "direction": "forward", "spread_us": 0.0}
        return Result(provider=provider, median_us=median, calls=40, **case, **more)

    results = [
        result("reference", 300.0),
        result("compile", 120.0),
        result("ours", 100.0, gb_per_s=1234.5, percent_of_copy=81.2),
    ]
    assert command.table(results, {"loss": "bfloat16"}) == [
        ["loss", "B/16", "forward", "bfloat16", "0.1000", "0.3000", "0.1200", "3.00", "1234", "81"]
    ]


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


def test_small_and_full_cases():
    harness.use(torch.device("cpu"))
    (small,) = command._cases(False)
    assert (small.batch, small.precision, small.config.model.depth) == (2, "float32", 2)
    assert [case.config.model.depth for case in command._cases(True)] == [None, None]
    harness.use(torch.device("cuda"))
    (one,) = command._cases(False)
    assert (one.name, one.batch, one.mode, one.precision) == ("B/16", 128, "published", "bfloat16")
    assert len(command._cases(True)) == 6
    assert len(command.choose(())) >= 9
    assert command.choose(None) == []
