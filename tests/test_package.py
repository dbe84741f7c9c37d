"""What a user gets: the sdists, the wheels made of them and of a clone, and their commands in an
empty folder.

Nothing is downloaded: the new environment finds what the packages need (torch and the others)
beside the Python that runs this test, but not this repository.
"""

import email
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ijepa_fast
import ijepa_kernels

ROOT = Path(__file__).parents[1]


def _run(command, folder):
    """What it prints, without this repository on the path."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist, `uploaded/` with the two wheels made of it, and `clone/` with the one
    that pip makes of a clone: what the sdist holds, but for PKG-INFO.
    """
    folder = tmp_path_factory.mktemp("built")
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    setup += ["sdist", "--dist-dir", str(folder)]
    subprocess.run(setup, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "-w"]
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (clone,) = (path.parent for path in folder.glob("*/setup.py"))
    (clone / "PKG-INFO").unlink()
    _run([*pip, folder / "uploaded", sdist, clone / "kernels"], folder)
    _run([*pip, folder / "clone", clone], folder)
    return folder


def _held(wheel):
    """Names of its files, and what its METADATA says of a key."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return set(archive.namelist()), email.message_from_bytes(archive.read(metadata)).get_all


def test_the_changelog_has_its_form():
    """Of Keep a Changelog: sections of versions with their dates, and six kinds of changes."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    versions = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    dated = [re.fullmatch(r"(\d+\.\d+\.\d+) - \d{4}-\d\d-\d\d", version) for version in versions]
    assert all(dated[versions[0] == "Unreleased" :])
    assert ijepa_fast.__version__ in [version[1] for version in dated if version]
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_sdist_is_the_repository(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout: nothing says what belongs to the repository")
    there = {name for name in git.stdout.splitlines() if (ROOT / name).exists()}
    assert there - held <= {".gitignore", ".ci/run"}


def _files(folder, package):
    files = [path for path in (folder / package).rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix() for p in files if p.suffix != ".pyc"}


def _modules(names):
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheels_hold_the_packages_and_their_data(built):
    """Each file is in one of those that are uploaded, and all are in that of a clone."""
    fast, kernels = sorted((built / "uploaded").iterdir())
    (whole,) = (built / "clone").iterdir()
    ours, of_ours = _held(fast)
    theirs, _ = _held(kernels)
    both, of_both = _held(whole)
    assert _modules(ours) == _files(ROOT, "ijepa_fast")
    assert _modules(theirs) == _files(ROOT / "kernels", "ijepa_kernels")
    assert _modules(both) == _modules(ours | theirs)
    assert of_ours("Version") == of_both("Version") == [ijepa_fast.__version__]
    needed = {"torch", "triton", "numpy"}
    pinned = f"ijepa-kernels=={ijepa_kernels.__version__}"
    for of, expected in ((of_ours, needed | {pinned}), (of_both, needed)):
        required = [line for line in of("Requires-Dist") if "extra ==" not in line]
        assert {re.split(">|;", line)[0] for line in required} == expected


def test_their_commands_run_in_an_empty_folder(built, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    _run([*pip, "--no-deps", *(built / "uploaded").iterdir()], empty)
    # a path alone: what lies there is importable, its own .pth files are not read
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = environment / "bin" / "ijepa-fast"
    where = _run([python, "-c", "import ijepa_fast as f; print(f.__file__)"], empty)
    assert Path(where.strip()).is_relative_to(site)
    assert ijepa_fast.__version__ in _run([command, "--version"], empty)
    demo = [command, "train", "--preset", "demo", "--max-steps", "20", "--eval.no-whole"]
    text = _run(demo, empty)
    assert "done: runs/demo" in text
    assert (empty / "runs" / "demo" / "checkpoints" / "step-00000020").is_dir()
    _run([command, "doctor"], empty)
