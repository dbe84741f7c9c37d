"""What pictures are made of: a split of coloured images in four classes, and a short run on it."""

import pytest

from ijepa_fast.visualize import __main__ as command_line
from ijepa_fast.visualize import feature_pictures, masks
from ijepa_fast.visualize.decoder import predictor
from tests.trainer import tiny


@pytest.fixture(scope="package")
def split(tmp_path_factory):
    """Sub-folders train (32 images) and test (12)."""
    root = tmp_path_factory.mktemp("split")
    tiny.write_images(root / "train", count=32, classes=4)
    tiny.write_images(root / "test", count=12, classes=4)
    return root


@pytest.fixture(scope="package")
def run(split, tmp_path_factory):
    """Four steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert tiny.run(split / "train", out, max_steps=4) == 0
    return out


@pytest.fixture
def sheets(monkeypatch):
    """Sheets that are drawn, instead of PNG files: (rows of panels, title) each."""
    found: list = []

    def record(path, rows, title, *, side):
        path.touch()
        found.append((rows, title))

    for module in (feature_pictures, masks, predictor):
        monkeypatch.setattr(module, "draw_sheet", record)
    return found


@pytest.fixture
def command(capsys):
    """Runs a command; returns what it prints, or its error line where a code is expected."""

    def call(*argv, code=0):
        assert command_line.main([str(a) for a in argv]) == code
        printed = capsys.readouterr()
        if not code:
            return printed.out
        message = printed.err.splitlines()[-1]
        assert message.startswith("error: ")
        return message

    return call
