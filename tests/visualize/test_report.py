"""The report of a run: what it says, that it stands alone, and what a browser makes of it."""

import base64
import html.parser
import io
import re
import shlex
import shutil
import signal
import subprocess

import numpy as np
import pytest
from PIL import Image

from ijepa_fast.__main__ import main
from ijepa_fast.visualize import run_pictures
from ijepa_fast.visualize.report import write_report
from tests.trainer import tiny

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
PICTURES = ("masks.png", "pca.png", "neighbours.png", "curves.png")


class _Reader(html.parser.HTMLParser):
    """Text, images and table cells; every element that is opened is closed."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        self.text.append(data)


@pytest.fixture(scope="module")
def whole_run(split, tmp_path_factory):
    """A run of a few steps that ends with all pictures."""
    out = tmp_path_factory.mktemp("whole") / "<b> & run"
    settings = {"eval__data": split, "optim__epochs": 4}
    assert tiny.run(split / "train", out, pictures=True, **settings) == 0
    return out


def test_what_a_run_tells_to_type_next(whole_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = (whole_run / "train.log").read_text().splitlines()
    commands = [shlex.split(line[line.index("ijepa-fast ") :]) for line in log if "  ijepa" in line]
    assert [words[1] for words in commands] == ["evaluate", "embed", "export"]
    for words in commands:
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "features.npy").is_file()
    assert (tmp_path / f"hf-{whole_run.name}" / "config.json").is_file()


def test_a_run_ends_with_its_pictures_and_a_page_that_stands_alone(whole_run):
    page = (whole_run / "report.html").read_text()
    read = _Reader(page)
    assert not read.tags & {"script", "link", "iframe", "b&"}
    assert "//" not in re.sub(r"base64,[^\"]*", "", page)
    shown = [
        base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in read.sources
    ]
    assert shown == [(whole_run / name).read_bytes() for name in PICTURES[:3]]
    for picture in (*shown, (whole_run / "curves.png").read_bytes()):
        with Image.open(io.BytesIO(picture)) as image:
            assert image.format == "PNG"
    text = "".join(read.text)
    assert "<b> & run" in text
    assert "done at step 16" in text
    rows = tiny.rows(whole_run, timing=True)
    (last,) = [row for row in rows if "table" in row]
    for name, scores in last["table"].items():
        assert [name, *(f"{100 * value:.1f} %" for value in scores.values())] in read.rows
    for title in ("loss", "learning rate", "RankMe", "kNN, %", "Settings"):
        assert title in text
    assert f"{rows[1]['loss']:.3f} → {rows[-2]['loss']:.3f}" in text
    # every setting with its value
    assert ["predictor_", "width", "16"] in read.rows


@pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: {', '.join(BROWSERS)}")
@pytest.mark.parametrize(("width", "dark"), [(1000, True), (360, False)])
def test_a_browser_shows_it_whole(whole_run, tmp_path, width, dark):
    page = shutil.copy(whole_run / "report.html", tmp_path / "report.html")
    picture = tmp_path / "page.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    window = ["--hide-scrollbars", f"--window-size={width},4500", f"--screenshot={picture}"]
    options = ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [BROWSER, "--headless", *options, *window, *scheme, page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with Image.open(picture) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert shown.shape[1] == width
    paper = [20, 23, 26] if dark else [251, 251, 249]
    # nothing reaches the edges: nothing is wider than the page
    for edge in (shown[:, :12], shown[:, -12:]):
        assert (edge == paper).all()
    # text, curves and pictures are there
    used = (shown != paper).any(axis=2)
    assert used.any(axis=1).sum() > 1500
    accent = [108, 192, 220] if dark else [31, 111, 139]
    assert (abs(shown - accent).max(axis=2) < 20).sum() > 500
    colours = (shown.max(axis=2) - shown.min(axis=2) > 120).sum()
    assert colours > 5000


def test_a_run_without_labels_or_pictures(run, tmp_path, command):
    folder = shutil.copytree(run, tmp_path / "run")
    assert command("report", folder) == f"{folder / 'report.html'}\n"
    text = "".join(_Reader((folder / "report.html").read_text()).text)
    assert "metrics up to step 4" in text
    assert "Curves" in text
    assert not {"Accuracy", "Masks", "Nearest images", "Evaluations"} & set(text.split("\n"))
    # again, and elsewhere only where nothing is lost
    command("report", folder)
    out = tmp_path / "page.html"
    command("report", folder, "--out", out)
    assert "out must not exist" in command("report", folder, "--out", out, code=2)
    assert "RUN must be the folder of a run" in command("report", tmp_path, code=2)
    # no metrics yet, and numbers that cannot be drawn
    row = '{"step": 3, "epoch": 0, "loss": NaN, "timing": {"images_per_second": 2.5}}\n'
    for content in ("", row):
        (folder / "metrics.jsonl").write_text(content)
        write_report(out, folder)
        assert "Settings" in out.read_text()


def test_a_long_run_makes_no_large_page(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    row = '{{"step": {0}, "epoch": 0, "loss": {0}.5, "timing": {{"images_per_second": 9}}}}\n'
    (folder / "metrics.jsonl").write_text("".join(row.format(step) for step in range(1, 20_001)))
    write_report(tmp_path / "page.html", folder)
    page = (tmp_path / "page.html").read_text()
    assert len(page) < 60_000
    assert "20,000" in page


def test_pictures_of_features_keep_to_their_share(split, tmp_path, monkeypatch):
    """A run of seconds has no time for them; a long one has."""
    settings = {"eval__data": split, "eval__no_whole": True, "max_steps": 2}
    drawn: list[str] = []
    monkeypatch.setattr(run_pictures.Pictures, "_features", lambda *_: drawn.append("features"))
    with tiny.log_lines() as lines:
        assert tiny.run(split / "train", tmp_path / "a", pictures=True, **settings) == 0
    assert not drawn
    assert [line for line in lines if "no pca.png, no neighbours.png: " in line]
    assert (tmp_path / "a" / "report.html").is_file()
    elapsed = property(lambda _: 1e5)
    monkeypatch.setattr("ijepa_fast.state.Allowance.elapsed", elapsed)
    assert tiny.run(split / "train", tmp_path / "b", pictures=True, **settings) == 0
    assert drawn == ["features"]


def test_a_stop_is_in_the_report_and_no_picture_ends_a_run(split, tmp_path, monkeypatch):
    tiny.stop_at(signal.SIGTERM, 2, monkeypatch)
    out = tmp_path / "run"
    assert tiny.run(split / "train", out, pictures=True) == 128 + signal.SIGTERM
    assert "stopped by signal 15, saved at step 2 of 12" in (out / "report.html").read_text()
    monkeypatch.undo()

    def fail(*_):
        raise KeyError("no such\nthing")

    monkeypatch.setattr(run_pictures, "write_report", fail)
    monkeypatch.setattr(run_pictures, "draw_curves", fail)
    with tiny.log_lines() as lines:
        assert tiny.run(split / "train", out, pictures=True) == 0
    for name in ("report.html", "curves.png"):
        assert f"{name} is not drawn: 'no such\\nthing'" in lines
