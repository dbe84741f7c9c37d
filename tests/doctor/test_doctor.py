"""The doctor: what it finds, what it must not say, and that it runs where much is broken."""

import json
import os
import platform
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ijepa_fast.doctor import backends, machine, packages, self_test
from ijepa_fast.doctor.__main__ import main
from ijepa_fast.doctor.findings import Finding, clean, first_line

ROOT = Path(__file__).parents[2]
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
SECTIONS = ["versions", "machine", "back ends", "room", "self test"]
MARKS = "hans-marker", "tokenmarker", "homemarker", "secretmarker", "pathmarker", "hostmarker"


def _process(arguments, folder, code=None, **environment):
    """The doctor as a user runs it, or a program of ours."""
    program = ["-c", code] if code else ["-m", "ijepa_fast.doctor"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        check=False,
        cwd=folder,
        env={**os.environ, **PATHS, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def _named(found, name) -> Finding:
    (one,) = [finding for finding in found if finding.name == name]
    return one


@pytest.fixture(scope="module")
def private_run(tmp_path_factory) -> dict[str, Any]:
    """The whole report, self test included, where everything has a name to hide."""
    home = tmp_path_factory.mktemp("homemarker")
    result = _process(
        ["--json", "--out", str(home / "pathmarker")],
        home,
        HOME=str(home),
        USER="hans-marker",
        LOGNAME="hans-marker",
        HF_TOKEN="tokenmarker",
        AWS_SECRET_ACCESS_KEY="secretmarker",
        HOSTNAME="hostmarker",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert not list(home.iterdir()), "nothing is left behind"
    data: dict[str, Any] = json.loads(result.stdout)
    return data


def test_the_whole_report_is_safe_to_paste(private_run):
    shown = json.dumps(private_run)
    names = {platform.node(), *MARKS}
    assert not [name for name in names if name and name in shown]
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", shown)
    assert list(dict.fromkeys(f["section"] for f in private_run["findings"])) == SECTIONS
    assert private_run["problems"] == 0
    texts = {f["name"]: f["text"] for f in private_run["findings"]}
    assert texts["torch"] == torch.__version__
    error = re.match(r"losses of 3 steps differ .* by (\S+) relative", texts["fast path, float32"])
    assert error
    assert float(error[1]) <= 1e-5


def test_names_homes_and_addresses_are_taken_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/hans")
    monkeypatch.setattr("getpass.getuser", lambda: "hans")
    monkeypatch.setattr(platform, "node", lambda: "node17.cluster.example.org")
    for text, shown in (
        ("/home/hans/runs cannot be written", "~/runs cannot be written"),
        ("/home/hansi/runs", "/home/hansi/runs"),
        ("in /tmp/torchinductor_hans/a", "in /tmp/torchinductor_<user>/a"),
        ("no route to node17", "no route to <host>"),
        ("no route to node17.cluster.example.org:29500", "no route to <host>:29500"),
        ("connect to 10.1.22.3 failed", "connect to <address> failed"),
        ("connect to [fe80::1ff:fe23:4567:890a].", "connect to [<address>]."),
        ("torch 2.13.0 at 12:30:45, ops torch::foo and a.b.c", None),
        ("driver 580.82.07, 6.8.0-31-generic", None),
        ("a\nb\x1b[2J", "a b[2J"),
    ):
        assert clean(text) == (shown or text)
    # names that say nothing of anyone
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setattr(platform, "node", lambda: "localhost")
    assert clean("data.root, /root/x, localhost") == "data.root, ~/x, localhost"
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/secretmarker").read_text()
    assert first_line(caught.value) == "No such file or directory"


# --- packages ------------------------------------------------------------------------------------


def _install(folder: Path, name: str, version="1.0", needs="") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    (info / "METADATA").write_text(text)


@pytest.mark.parametrize(
    ("installed", "cuda", "level", "words"),
    [
        ([], "13.0", "note", "not installed"),
        (["nvidia-dali"], "13.0", "problem", "nvidia-dali; pip install nvidia-dali-cuda130"),
        (["nvidia-dali", "nvidia-dali-cuda130"], "13.0", "problem", "is a placeholder"),
        (["nvidia-dali-cuda120", "nvidia-dali-cuda130"], None, "problem", "same folder"),
        (["nvidia-dali-cuda120"], "13.0", "problem", "is for CUDA 12, torch for CUDA 13"),
        (["nvidia-dali-cuda120"], "12.8", "ok", "for CUDA 12, as torch's 12.8"),
        (["nvidia-dali-cuda130"], None, "ok", "decodes on the CPU"),
    ],
)
def test_a_wrong_dali_is_named(installed, cuda, level, words, tmp_path, monkeypatch):
    for name in installed:
        _install(tmp_path, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (finding,) = packages.dali()
    assert finding.level == level
    assert words in f"{finding.text} {finding.advice}"


def test_absent_and_old_packages_name_what_brings_them(tmp_path, monkeypatch):
    needs = 'Requires-Dist: torch>=2.11\nRequires-Dist: tyro>=1.0; extra == "train"\n'
    _install(tmp_path, "ijepa-fast", needs=needs)
    _install(tmp_path, "torch", "2.9.1+cu128")
    _install(tmp_path, "numpy", "2.4.6")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = list(packages.versions())
    assert _named(found, "torch")[1:3] == ("2.9.1+cu128, at least 2.11 is needed", "problem")
    assert _named(found, "numpy").level == "ok"
    tyro = _named(found, "tyro")
    assert (tyro.level, tyro.advice) == ("problem", "pip install 'ijepa-fast[train]'")
    xformers = _named(found, "xformers")
    assert xformers.level == "note"
    assert "not installed; the extra [gpu] brings it" in xformers.text


def test_the_extras_are_those_of_the_distribution(monkeypatch):
    """What the doctor says brings a package does."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = {**given["extras_require"], "": given["install_requires"]}
    for package, (extra, _) in packages.PACKAGES.items():
        assert package in {re.split(r"[>;=]", line)[0] for line in extras[extra]}, package


# --- machine and back ends -----------------------------------------------------------------------


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for driver, cuda, level, words in (
        ("580.82.07", None, "problem", "a build without it"),
        ("580.82.07", "13.0", "problem", "sees no GPU"),
        (None, None, "note", "everything runs on the CPU"),
    ):
        monkeypatch.setattr(machine, "_driver", lambda driver=driver: driver)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        finding = _named(machine.gpus(), "CUDA")
        assert finding.level == level
        assert words in finding.text


def test_every_gpu_has_its_line(monkeypatch):
    gpu = type("Gpu", (), {"name": "H100", "total_memory": 80 * 2**30, "major": 9, "minor": 0})
    monkeypatch.setattr(machine, "_driver", lambda: "580.82.07")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (70 * 2**30, 80 * 2**30))
    finding = _named(machine.gpus(), "GPU 1")
    assert finding.text == "H100, 80.0 GiB, 70.0 GiB free, compute capability 9.0"
    monkeypatch.setattr(gpu, "major", 7)
    assert _named(machine.gpus(), "GPU 0").level == "problem"
    # Docker's 64 MiB, and two ranks
    usage = type("Usage", (), {"total": 64 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert _named(machine.shared_memory(), "/dev/shm").level == "problem"


@pytest.mark.parametrize(
    ("free", "level"), [(100 * 2**30, "ok"), (10 * 2**30, "note"), (2**20, "problem")]
)
def test_room_is_judged(free, level, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    out = _named(machine.room(tmp_path / "a" / "b"), "folder of --out")
    assert out.level == level
    assert str(tmp_path) not in out.text
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert _named(machine.room(tmp_path), "folder of --out").level == "problem"


def test_every_attention_back_end_is_used_or_says_why_not():
    found = {f.name.removeprefix("attention "): f.text for f in backends.attention()}
    assert set(found) == {"of the fast path", "xformers", "varlen", "fa3", "fa4"}
    assert found["of the fast path"].startswith("sdpa (")
    assert found["fa3"] == "not usable: flash kernels need CUDA, and this run is on cpu"
    assert [dim for _, _, dim in backends._shapes()] == [24, 32, 64, 80, 88, 128]


# --- self test -----------------------------------------------------------------------------------


def test_wrong_losses_are_found(monkeypatch):
    found = iter([[1.0, 0.9, 0.8], [1.0, 0.9, 0.8001], [1.0, float("nan"), 0.8]])
    monkeypatch.setattr(self_test, "_losses", lambda *_: next(found))
    assert [f.level for f in self_test.steps()] == ["problem", "problem"]


def test_a_self_test_that_dies_or_hangs_is_a_finding(monkeypatch):
    line = (self_test.MARK + json.dumps(Finding("steps", "fine"))).encode()

    def ended(code):
        output = b"noise\n" + line + b"\n"
        return lambda *_, **__: subprocess.CompletedProcess([], code, output, b"Trace\nboom\n")

    def late(*_, **__):
        raise subprocess.TimeoutExpired([], 1, output=line)

    for run, words in (
        (ended(-signal.SIGSEGV), "signal 11: boom"),
        (ended(1), "exit code 1: boom"),
        (late, "ended after 120 s"),
    ):
        monkeypatch.setattr(subprocess, "run", run)
        first, last = self_test.child()
        assert first == Finding("steps", "fine")
        assert last.level == "problem"
        assert words in last.text


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "tyro"])
def test_it_runs_where_a_package_cannot_be_imported(missing, tmp_path):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "from ijepa_fast.doctor.__main__ import main\n"
        "sys.exit(main(['--no-self-test']))"
    )
    result = _process([], tmp_path, code=code)
    assert "Traceback" not in result.stderr
    assert result.returncode == 1, result.stdout
    assert result.stdout.count(f"import of {missing} halted") == 1
    assert "DALI" in result.stdout


def test_wrong_usage_is_exit_code_2(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["--out", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: --out must be a folder")
    assert main(["--jsn"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown option --jsn")


def test_a_part_that_fails_does_not_end_the_report(monkeypatch, capsys):
    def fail():
        raise KeyError("MemTotal")

    monkeypatch.setattr(machine, "processor", fail)
    assert main(["--no-self-test"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  problem  processor: cannot be looked at: KeyError: 'MemTotal'")
    assert lines[at - 1] == "machine"
    assert lines[at + 1] == "           -> the lines above may say why"
    assert any(line.startswith("  ok       attention of the fast path: ") for line in lines)
    assert lines[-1].startswith("1 problem, ")
