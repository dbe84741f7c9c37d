"""Files and folders that are written whole, by makers that live, fail and are killed."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from ijepa_fast.atomic import atomic_write

ROOT = Path(__file__).parents[1]
MAKER = """
import pathlib, sys
from ijepa_fast.atomic import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as path:
    path.write_text("half")
    print(path, flush=True)
    sys.stdin.read()
    path.write_text("whole")
"""


@pytest.fixture
def maker(tmp_path):
    """Starts a process that has half written `name`, and ends when its input does."""
    started = []

    def start(name):
        child = subprocess.Popen(
            [sys.executable, "-c", MAKER, tmp_path / name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        assert child.stdout
        return child, Path(child.stdout.readline().strip()).parent

    yield start
    for child in started:
        child.kill()
        child.communicate()


def test_what_a_killed_maker_left_is_removed_and_a_living_ones_is_not(maker, tmp_path):
    killed, abandoned = maker("a")
    living, busy = maker("b")
    killed.kill()
    killed.wait()
    assert sorted(tmp_path.iterdir()) == sorted([abandoned, busy])
    with atomic_write(tmp_path / "c") as path:
        path.mkdir()
    assert sorted(tmp_path.iterdir()) == [busy, tmp_path / "c"]
    living.communicate()
    assert living.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b").read_text() == "whole"


def test_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    for text in ("old", "new"):
        with atomic_write(file) as path:
            path.write_text(text)
    with contextlib.suppress(KeyboardInterrupt), atomic_write(file) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "deleted" / "file"):
        pass
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with atomic_write(folder) as path:
        path.mkdir()
        (path / "first").touch()
    with pytest.raises(OSError, match="not empty"), atomic_write(folder) as path:
        path.mkdir()
    assert [p.relative_to(tmp_path).name for p in tmp_path.rglob("*")] == ["folder", "first"]
