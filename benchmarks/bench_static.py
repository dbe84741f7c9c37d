"""The machine code of every kernel, without a GPU; see benchmarks/static/."""

import pytest
import triton

from benchmarks.static.gate import check


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
def bench_static(capsys: pytest.CaptureFixture[str]) -> None:
    report = check()
    with capsys.disabled():
        print("\n" + report.text())
    assert not report.failures, f"{len(report.failures)} failures, printed below the table"
