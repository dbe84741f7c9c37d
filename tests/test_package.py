"""What a user gets: the sdist, the wheel made of it, and the wheel's commands in an empty folder.

Nothing is downloaded: the new environment finds what the packages need (torch and the others)
beside the Python that runs this test, but not this repository.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ijepa_fast

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
    """Folder with the sdist, and the wheel that pip makes of it."""
    folder = tmp_path_factory.mktemp("built")
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    setup += ["sdist", "--dist-dir", str(folder)]
    subprocess.run(setup, cwd=ROOT, check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"]
    _run([*pip, "--no-build-isolation", "-w", folder, sdist], folder)
    return folder


def test_the_sdist_is_the_repository(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout: nothing says what belongs to the repository")
    there = {name for name in git.stdout.splitlines() if (ROOT / name).exists()}
    assert there - held <= {".gitignore", ".ci/run"}


def test_the_wheel_holds_both_packages_and_their_data(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    for package, folder in (("ijepa_fast", ROOT), ("ijepa_kernels", ROOT / "kernels")):
        files = [path for path in (folder / package).rglob("*") if path.is_file()]
        expected = {p.relative_to(folder).as_posix() for p in files if p.suffix != ".pyc"}
        assert {n for n in names if n.startswith(package + "/")} == expected
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "ijepa_fast",
        "ijepa_kernels",
    }
    assert f"\nVersion: {ijepa_fast.__version__}\n" in text


def test_the_wheel_s_commands_run_in_an_empty_folder(built, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment)
    python = environment / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    _run([*pip, "--no-deps", wheel], empty)
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
