"""The command `ijepa-fast`: its words, its end, and how soon it answers."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_fast import __version__
from ijepa_fast.__main__ import COMMANDS, main
from ijepa_fast.config import dump_yaml
from ijepa_fast.data.sets.idx import cache_folder
from ijepa_fast.errors import UsageError
from ijepa_fast.state import RunFolder
from tests.trainer import tiny

ROOT = Path(__file__).parents[1]


def _process(*words, **options):
    result = subprocess.run(
        [sys.executable, *words],
        **{"stdout": subprocess.PIPE, **options},
        check=False,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    return result.returncode, (result.stdout or b"").decode(), result.stderr.decode()


@pytest.mark.parametrize("module", ["ijepa_fast.train", "ijepa_fast train"])
def test_wrong_arguments_are_answered_before_torch_is_imported(module):
    name, *more = module.split()
    code, _, err = _process("-X", "importtime", "-m", name, *more, "--bach-size", "3")
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines() if "|" in line}
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "error: unknown option --bach-size; did you mean --batch"
    )
    assert "ijepa_fast.config" in imported
    assert not imported & {"torch", "numpy"}


def test_what_is_no_command(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    with pytest.raises(UsageError, match=r"COMMAND must be one of train, .*, got 'trian'"):
        main(["trian"])


def test_version_benchmarks_and_completion(capsys):
    assert main(["--version"]) == main(["bench"]) == 0
    out = capsys.readouterr().out
    assert f"ijepa-fast {__version__}\n" in out
    assert f"cd {ROOT} && python -m benchmarks" in out
    with pytest.raises(SystemExit):
        main(["--completion", "bash"])
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "--optim.lr", "--resume"))
    with pytest.raises(UsageError, match="--completion must be one of bash, zsh, fish, got 'csh'"):
        main(["--completion", "csh"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed"], "what is required must be given: RUN_OR_WEIGHTS, --data"),
        (["embed", "a", "--data", "b"], "out must be given: --out features.npy"),
        (["embed", "a", "--data", "b", "--out"], "--out must be followed by a value, got none"),
        (["embed", "a", "--data", "b", "--out", "c.txt"], "out must be .npy or .*, got 'c.txt'"),
        (["visualize"], "COMMAND must be one of masks, .*, prove, got none"),
        (["visualize", "pcaa"], "COMMAND must be one of masks, .*, prove, got pcaa"),
    ],
)
def test_what_is_missing_or_misspelt_is_named(words, message, capsys):
    assert main(words) == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_a_command_runs_as_its_module_does(capsys):
    assert main(["data", "/nonexistent"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_stdout_that_is_full_or_gone_is_no_traceback():
    with open("/dev/full", "wb") as full:
        code, _, err = _process("-m", "ijepa_fast", "--version", stdout=full)
    assert (code, err) == (
        5,
        "error: stdout must be writable, got [Errno 28] No space left on device\n",
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        assert _process("-m", "ijepa_fast", "--version", stdout=gone) == (141, "", "")
    closing = (
        "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    assert _process("-c", closing, "-m", "ijepa_fast", "--version") == (0, "", "")


def test_a_run_outlives_its_stdout(tmp_path, monkeypatch, capsys):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            pass

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdout", Gone())
    folder = RunFolder(tiny.config(tmp_path, tmp_path / "run"))
    for text in ("one", "two"):
        logging.getLogger("ijepa_fast.train").info(text)
    folder.close()
    lines = (tmp_path / "run" / "train.log").read_text().splitlines()
    ends = ["one", "nothing more is shown", "two"]
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 3
    assert capsys.readouterr().err == ""


def test_names_are_utf_8_in_every_locale():
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = ("-m", "ijepa_fast", "train", "--preset", "demo", "--print-config", "--out", "ü")
    code, out, err = _process(*words, env={**os.environ, **plain})
    assert (code, err) == (0, "")
    assert 'out: "\\xFC"' in out


def test_a_user_without_a_home_is_told_what_to_set(tmp_path, monkeypatch):
    def unknown():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("HOME", str(tmp_path))
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folder() == tmp_path / ".cache"
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(UsageError, match="XDG_CACHE_HOME must be a folder where there is no home"):
        cache_folder()


def _occupied(out):
    out.write_text("a file")


def _other(out):
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(tiny.config(out, out, seed=9)))
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)


@pytest.mark.parametrize(
    ("before", "settings", "message"),
    [
        (None, {"init": "/nonexistent"}, "init must name weights, got /nonexistent"),
        (None, {"eval__data": "/nonexistent"}, "eval.data must be "),
        (None, {"masks__min_keep": 15}, "masks.min_keep must be"),
        (None, {"batch__global": 64, "batch__device": 64}, "batch.global must be at most the numb"),
        (None, {"graphs": "on"}, "graphs must be auto or off on a CPU, got on"),
        (None, {"attention": "fa3"}, "attention must be "),
        (_occupied, {}, "out must be a folder that can be written, got "),
        (_other, {}, "the recipe differs from the one in "),
    ],
)
def test_a_dry_run_refuses_what_training_refuses(before, settings, message, tmp_path, capsys):
    data, out = tiny.write_images(tmp_path / "data"), tmp_path / "run"
    if before:
        before(out)
    for more in ({"dry_run": True}, {}):
        was = out.exists()
        assert tiny.run(data, out, **settings, **more) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {message}")
        assert err.count("\n") == 1
        assert not more or out.exists() == was


def test_a_dry_run_sees_another_run_in_the_folder(tmp_path, capsys):
    data, out = tiny.write_images(tmp_path / "data", 8), tmp_path / "run"
    folder = RunFolder(tiny.config(data, out))
    try:
        assert tiny.run(data, out, dry_run=True) == 2
    finally:
        folder.close()
    assert "another run is training in" in capsys.readouterr().err
