"""What is said of what takes long."""

import re
import threading
import time

from ijepa_fast.state import preparation
from ijepa_fast.state.preparation import Preparation
from tests.trainer import tiny


def _wait(lines, text):
    deadline = time.monotonic() + 10
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.005)


def test_what_lasts_is_named(monkeypatch):
    monkeypatch.setattr(preparation, "_LONG", 0.02)
    with tiny.log_lines() as lines, Preparation() as start:
        start.begin("networks")
        _wait(lines, "networks: ")
        start.begin("first step")
        _wait(lines, "first step: 0 s so far")
        # of a further micro-step: the same part
        start.begin("first step")
        assert not start.done
        start.finish(0.5)
        assert start.done
        told = lines[-1]
        assert re.fullmatch(
            r"first step done after \d\.\d s \((networks|first step) \d\.\d s, .*\), loss 0\.50000",
            told,
        )
        time.sleep(0.1)
        assert lines[-1] == told
        # between later steps too, ever more seldom
        start.begin("save")
        _wait(lines, "save: ")
        start.begin("")
    assert set(start.seconds) == {"networks", "first step"}


def test_short_parts_are_not_named():
    with tiny.log_lines() as lines, Preparation() as start:
        for number in range(5):
            start.begin(str(number))
        start.finish(0.5)
    assert len(lines) == 1


def test_a_start_that_fails_leaves_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_LONG", 60.0)
    assert tiny.run(tmp_path / "no-such-folder", tmp_path / "run") == 2
    assert "ijepa-start" not in {thread.name for thread in threading.enumerate()}
