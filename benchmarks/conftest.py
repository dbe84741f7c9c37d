"""What `pytest benchmarks` prints and compares after the measurements."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import baselines
from benchmarks.harness import RESULTS, copy_bandwidth, device, machine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ijepa")
    group.addoption("--accept-baseline", action="store_true", help="write baselines/<gpu>.json")
    group.addoption("--results", type=Path, help="write results here after every measurement")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    results = item.config.getoption("--results")
    if results and RESULTS:
        baselines.dump(results.with_suffix(".json"), machine(), RESULTS)
        results.with_suffix(".md").write_text(_heading() + baselines.table(RESULTS) + "\n")


def _heading() -> str:
    text = ", ".join(f"{key} {value}" for key, value in machine().items() if value)
    if device().type == "cuda":
        text += f"; copy {copy_bandwidth():.0f} GB/s"
    return text + "\n\n"


def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    config.slower = []
    if not RESULTS:
        return
    if config.getoption("--accept-baseline"):
        if session.testsfailed:
            config.compared = "a benchmark failed: no baseline is written"
        else:
            config.compared = f"baseline written: {baselines.accept(machine(), RESULTS)}"
        return
    config.compared, config.slower = baselines.compare(machine(), RESULTS)
    if config.slower and session.exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if not RESULTS:
        return
    terminalreporter.section("ijepa_kernels")
    terminalreporter.write_line(_heading() + baselines.table(RESULTS))
    terminalreporter.write_line(config.compared)
    for line in config.slower:
        terminalreporter.write_line("SLOWER " + line, red=True)
