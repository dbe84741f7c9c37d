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

import ijepa_kernels
from ijepa_fast.doctor import backends, findings, machine, packages, self_test
from ijepa_fast.doctor.__main__ import examine, main
from ijepa_fast.doctor.findings import Finding, clean, report

ROOT = Path(__file__).parents[2]
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
SECTIONS = ["versions", "machine", "back ends", "packages", "room", "self test"]
MARKS = ("hans-marker", "tokenmarker0123456789", "homemarker", "secretmarker", "pathmarker")


def _process(arguments, tmp_path, code=None, **environment):
    """The doctor as a user runs it, or a program of ours with `main` in it."""
    program = ["-c", f"import sys\n{code}"] if code else ["-m", "ijepa_fast.doctor"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        check=False,
        cwd=tmp_path,
        env={**os.environ, **PATHS, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def _named(found, name) -> Finding:
    (one,) = [finding for finding in found if finding.name == name]
    return one


@pytest.fixture(scope="module")
def private_run(tmp_path_factory) -> tuple[str, dict[str, Any]]:
    """Both forms of the whole report, self test included, where everything has a name to hide."""
    home = tmp_path_factory.mktemp("homemarker")
    code = (
        "from ijepa_fast.doctor import __main__ as doctor, findings\n"
        "shown = []\n"
        "doctor.report = lambda found: shown.append(found) or findings.report(found)\n"
        "code = doctor.main(sys.argv[1:])\n"
        "doctor.examine = lambda *_, **__: shown[0]\n"
        "print('FORMS')\n"
        "sys.exit(max(code, doctor.main(['--json'])))"
    )
    result = _process(
        ["--out", str(home / "pathmarker")],
        home,
        code=code,
        HOME=str(home),
        USER="hans-marker",
        LOGNAME="hans-marker",
        HF_TOKEN="tokenmarker0123456789",
        AWS_SECRET_ACCESS_KEY="secretmarker",
        HOSTNAME="hostmarker",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    assert not list(home.iterdir()), "nothing is left behind"
    text, _, data = result.stdout.partition("FORMS\n")
    return text, json.loads(data)


def test_both_forms_are_safe_to_paste(private_run):
    text, data = private_run
    names = {platform.node(), *MARKS, "hostmarker"}
    for shown in (text, json.dumps(data)):
        assert not [name for name in names if name and name in shown]
        assert not re.search(r"\d+\.\d+\.\d+\.\d+", shown)


def test_the_report_has_all_its_parts(private_run):
    text, data = private_run
    assert [line for line in text.splitlines() if line in SECTIONS] == SECTIONS
    assert list(dict.fromkeys(f["section"] for f in data["findings"])) == SECTIONS
    assert f"torch: {torch.__version__}" in text
    assert "0 problems" in text
    assert data["problems"] == 0
    # the public ops, each
    for name in ("latent_loss", "adamw_ema_", "patchify", "scatter_tokens"):
        assert name in text


def test_the_self_test_has_computed_something(private_run):
    text = private_run[0]
    error = re.search(r"fast path, float32: losses of 3 steps differ .* by (\S+) relative", text)
    assert error
    assert float(error[1]) <= 1e-5
    assert re.search(r"fast path, bfloat16: losses", text)
    assert re.search(r"kernels: add_layer_norm, .* as specified", text)
    assert re.search(r"decoder: .*a JPEG comes out \d\.\d of 255", text)
    assert "1 MiB written, forced to the disk, renamed, read" in text


# --- taking names out ----------------------------------------------------------------------------


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
        ("at ::1", "at <address>"),
        ("torch 2.13.0 at 12:30:45, ops torch::foo and a.b.c", None),
        ("driver 580.82.07, 6.8.0-31-generic", None),
    ):
        assert clean(text) == (shown or text)


def test_common_names_leave_ordinary_words_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setattr("getpass.getuser", lambda: "root")
    monkeypatch.setattr(platform, "node", lambda: "localhost")
    assert clean("data.root must be given, /root/x, localhost") == (
        "data.root must be given, ~/x, localhost"
    )


def test_a_finding_is_one_line_without_control_characters():
    finding = Finding(section="s", name="n", level="problem", text="a\nb\x1b[2J", advice="do\tit")
    text, data = report([finding])
    assert text.splitlines() == [
        *("s", "  problem  n: a b[2J", "           -> do it", ""),
        "1 problem, 0 notes, 0 ok",
    ]
    assert data["problems"] == 1


def test_errors_of_files_do_not_name_them():
    with pytest.raises(FileNotFoundError) as caught:
        Path("/nowhere/secretmarker").read_text()
    assert findings.first_line(caught.value) == "No such file or directory"


# --- packages ------------------------------------------------------------------------------------


def _install(folder: Path, name: str, version="1.0", files=()) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("raise ImportError('must not be imported')\n")


@pytest.mark.parametrize(
    ("files", "level"),
    [
        (["apex/__init__.py", "apex/ext/pyramid.py"], "problem"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], "ok"),
        (["apex/__init__.py", "amp_C.py"], "ok"),
    ],
)
def test_the_two_packages_called_apex_are_told_apart(files, level, tmp_path, monkeypatch):
    _install(tmp_path, "apex", files=files)
    monkeypatch.syspath_prepend(tmp_path)
    finding = _named(packages.wrong_packages(None), "apex")
    assert finding.level == level
    assert bool(finding.advice) == (level == "problem")


@pytest.mark.parametrize(
    ("installed", "cuda", "level", "words"),
    [
        (["nvidia-dali"], "13.0", "problem", "pip install nvidia-dali-cuda130"),
        (["nvidia-dali", "nvidia-dali-cuda130"], "13.0", "problem", "pip uninstall nvidia-dali;"),
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
    (finding,) = [f for f in packages.wrong_packages(cuda) if f.name == "DALI"]
    assert finding.level == level
    assert words in f"{finding.text} {finding.advice}"


def test_absent_and_old_packages_name_what_brings_them(tmp_path, monkeypatch):
    _install(tmp_path, "torch", "2.9.1+cu128")
    _install(tmp_path, "numpy", "2.4.6")
    info = tmp_path / "ijepa_fast-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: ijepa-fast\nVersion: 0.1.0\nRequires-Dist: torch>=2.11\n"
        'Requires-Dist: numpy>=1.26\nRequires-Dist: tyro>=1.0; extra == "train"\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = packages.versions()
    old = _named(found, "torch")
    assert (old.level, old.text) == ("problem", "2.9.1+cu128, at least 2.11 is needed")
    assert _named(found, "numpy").level == "ok"
    tyro = _named(found, "tyro")
    assert (tyro.level, tyro.advice) == ("problem", "pip install 'ijepa-fast[train]'")
    for name, extra in (("xformers", "gpu"), ("matplotlib", "viz"), ("tensorboard", "log")):
        finding = _named(found, name)
        assert finding.level == "note"
        assert f"not installed; the extra [{extra}] brings it" in finding.text
    assert _named(found, "DALI").level == "note"


def test_the_extras_are_those_of_the_distribution(monkeypatch):
    """What the doctor says brings a package does."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = {**given["extras_require"], "": given["install_requires"]}
    names = {k: {re.split(r"[>;=]", r)[0] for r in v} for k, v in extras.items()}
    wanted = {**packages.NEEDED, "triton": "", **{k: v[0] for k, v in packages.OPTIONAL.items()}}
    for package, extra in wanted.items():
        assert package in names[extra], package


# --- machine and back ends -----------------------------------------------------------------------


def test_a_driver_without_cuda_in_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "_driver", lambda: "580.82.07")
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = _named(machine.processor_and_gpus(), "CUDA")
    assert finding.level == "problem"
    assert "a build without it" in finding.text
    # a build with CUDA that sees nothing
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _named(machine.processor_and_gpus(), "CUDA").level == "problem"
    monkeypatch.setattr(machine, "_driver", lambda: None)
    assert _named(machine.processor_and_gpus(), "CUDA").level == "note"


class _Gpu:
    name, total_memory, multi_processor_count = "NVIDIA H100", 80 * 2**30, 132
    major, minor = 9, 0


def test_every_gpu_has_its_line(monkeypatch):
    monkeypatch.setattr(machine, "_driver", lambda: "580.82.07")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: _Gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (70 * 2**30, 80 * 2**30))
    found = machine.processor_and_gpus()
    finding = _named(found, "GPU 1")
    assert finding.text == (
        "NVIDIA H100, 80.0 GiB, 70.0 GiB free, compute capability 9.0, 132 multiprocessors"
    )
    assert _named(found, "NVIDIA driver").text == "580.82.07"
    monkeypatch.setattr(_Gpu, "major", 7)
    assert _named(machine.processor_and_gpus(), "GPU 0").level == "problem"
    # Docker's 64 MiB, and two ranks
    usage = type("Usage", (), {"total": 64 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    shared = _named(machine.limits(), "/dev/shm")
    assert (shared.level, shared.advice) == ("problem", "docker run --shm-size=1g, or --ipc=host")


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


@pytest.mark.parametrize(("soft", "level"), [(200, "problem"), (512, "note"), (4096, "ok")])
def test_open_files_are_judged(soft, level, monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (soft, 8192))
    assert _named(machine.limits(), "open files").level == level


def test_every_attention_back_end_is_used_or_says_why_not():
    found = {f.name: f.text for f in backends.attention()}
    assert set(found) == {
        "attention of the fast path",
        *(f"attention {name}" for name in ("xformers", "varlen", "fa3", "fa4")),
    }
    assert found["attention of the fast path"].startswith("sdpa (")
    assert found["attention fa3"] == ("not usable: flash kernels need CUDA, and this run is on cpu")


def test_head_dims_are_those_of_the_published_table():
    assert [dim for _, _, dim in backends._shapes()] == [24, 32, 64, 80, 88, 128]


def test_ops_name_everything_that_the_package_computes():
    names = backends.operations()[0].name.split(", ")
    folder = Path(ijepa_kernels.__file__).parent
    ops = {p.stem for p in folder.rglob("*.py") if f"def {p.stem}_ref(" in p.read_text()}
    assert {name.rstrip("_") for name in names} == ops


# --- self test -----------------------------------------------------------------------------------


def test_a_wrong_loss_a_wrong_op_and_wrong_pixels_are_found(monkeypatch):
    losses = {"float32": [1.0, 0.9, 0.8], "bfloat16": [1.0, 0.9, 0.8]}
    wrong = iter([losses["float32"], [1.0, 0.9, 0.8001], [1.0, 0.9, float("nan")]])
    monkeypatch.setattr(self_test, "_losses", lambda *_: next(wrong))
    assert [f.level for f in self_test._steps()] == ["problem", "problem"]

    plain = ijepa_kernels.gather_tokens
    monkeypatch.setattr(ijepa_kernels, "gather_tokens", lambda *a: plain(*a) + 1e-3)
    (finding,) = self_test._operations()
    assert finding.level == "problem"
    assert "gather_tokens" in finding.text
    assert "patchify" not in finding.text


def test_files_that_cannot_be_written_are_a_problem(tmp_path):
    assert self_test._write(tmp_path)[0].level == "ok"
    assert not list(tmp_path.iterdir())
    (finding,) = self_test._write(tmp_path / "missing")
    assert finding.level == "problem"
    assert "No such file" in finding.text


def test_a_self_test_that_dies_or_hangs_is_a_finding(tmp_path, monkeypatch):
    def ended(code, output=b""):
        return lambda *_, **__: subprocess.CompletedProcess([], code, output, b"boom\n")

    line = json.dumps({**vars(self_test._finding("files", "fine"))}).encode()
    monkeypatch.setattr(subprocess, "run", ended(-signal.SIGSEGV, b"noise\n" + line + b"\n"))
    first, last = self_test.child(tmp_path)
    assert (first.name, first.text) == ("files", "fine")
    assert last.level == "problem"
    assert "signal 11: boom" in last.text
    monkeypatch.setattr(subprocess, "run", ended(-signal.SIGALRM))
    assert [f.level for f in self_test.child(tmp_path)] == ["note"]

    def late(*_, **__):
        raise subprocess.TimeoutExpired([], 1, output=line)

    monkeypatch.setattr(subprocess, "run", late)
    assert [f.level for f in self_test.child(tmp_path)] == ["ok", "problem"]


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["torch", "tyro"])
def test_it_runs_where_a_package_cannot_be_imported(missing, tmp_path):
    code = (
        f"sys.modules[{missing!r}] = None\n"
        "from ijepa_fast.doctor.__main__ import main\n"
        "sys.exit(main(['--no-self-test']))"
    )
    result = _process([], tmp_path, code=code)
    assert "Traceback" not in result.stderr
    assert "versions" in result.stdout
    assert result.returncode == 1, result.stdout
    assert f"import of {missing} halted" in result.stdout


def test_a_problem_is_exit_code_1_and_wrong_usage_2(tmp_path, monkeypatch, capsys):
    problem = Finding(section="room", name="x", level="problem", text="full", advice="make room")
    monkeypatch.setattr(machine, "room", lambda out: [problem])
    assert main(["--no-self-test"]) == 1
    assert "problem  x: full\n           -> make room" in capsys.readouterr().out
    file = tmp_path / "file"
    file.write_text("")
    assert main(["--out", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: --out must be a folder")
    with pytest.raises(SystemExit) as stop:
        main(["--jsn"])
    assert stop.value.code == 2


def test_a_look_that_fails_does_not_end_the_report(monkeypatch):
    def fail(*_):
        raise KeyError("MemTotal")

    monkeypatch.setattr(machine, "processor_and_gpus", fail)
    found = examine(None, self_test=False)
    finding = _named(found, "processor and gpus")
    assert finding.level == "problem"
    assert finding.text == "cannot be looked at: KeyError: 'MemTotal'"
    assert _named(found, "open files")
    assert all(f.advice for f in found if f.level == "problem")
