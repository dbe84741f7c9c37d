"""What `pytest benchmarks` prints and compares after the measurements."""

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baselines, harness, targets
from benchmarks.harness import MISSING, RESULTS, machine

WITHOUT_GPU = (
    "No GPU: a tiny shape, on the ops' CPU implementations. These times show only that the "
    "benchmarks run, and are no measurement of a kernel; nothing is compared with torch.compile."
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ijepa")
    group.addoption("--accept-baseline", action="store_true", help="write baselines/<gpu>.json")
    group.addoption("--results", type=Path, help="write results here after every measurement")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    results = item.config.getoption("--results")
    if results and RESULTS:
        baselines.dump(results.with_suffix(".json"), machine(), RESULTS)
        results.with_suffix(".md").write_text(_report())


def _on_gpu() -> bool:
    return harness.device().type == "cuda"


def _report() -> str:
    """The table, and what is to be known with it, as Markdown."""
    parts = [", ".join(f"{key} {value}" for key, value in machine().items() if value)]
    if _on_gpu():
        parts[0] += f"; copy {harness.copy_bandwidth():.0f} GB/s"
    else:
        parts.append(WITHOUT_GPU)
    parts.append(baselines.table(RESULTS))
    if MISSING:
        parts.append("Not measured: " + ", ".join(sorted(MISSING)) + ".")
    if missed := targets.missed(RESULTS):
        parts.append("\n".join(f"- TARGET MISSED {line}" for line in missed))
    return "\n\n".join(parts) + "\n"


def pytest_sessionfinish(session: pytest.Session) -> None:
    config: Any = session.config
    config.compared, config.slower = "", []
    accepted = config.getoption("--accept-baseline")
    if not RESULTS:
        return
    if not _on_gpu():
        config.compared = "no GPU: nothing is held against a baseline, and none is written"
        if accepted and session.exitstatus == 0:
            session.exitstatus = 1
    elif accepted and session.testsfailed:
        config.compared = "a benchmark failed: no baseline is written"
    elif accepted:
        config.compared = f"baseline written: {baselines.accept(machine(), RESULTS)}"
    else:
        config.compared, config.slower = baselines.compare(machine(), RESULTS)
        if config.slower and session.exitstatus == 0:
            session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    # not imported here: it needs the trainer and its packages, and the ops do not
    steps: Any = sys.modules.get("benchmarks.step_report")
    if steps and steps.ROWS:
        terminalreporter.section("training step")
        terminalreporter.write_line(steps.markdown(harness.device(), steps.ROWS))
    if not RESULTS:
        return
    terminalreporter.section("ijepa_kernels")
    terminalreporter.write_line(_report())
    terminalreporter.write_line(config.compared)
    for line in config.slower:
        terminalreporter.write_line("SLOWER " + line, red=True)
