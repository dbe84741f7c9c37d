"""The gate on compiled code, its parts, and kernels broken on purpose."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.static import gate
from benchmarks.static.measure import Numbers, measure
from benchmarks.static.occupancy import SMS
from benchmarks.static.record import recording
from benchmarks.static.table import pinned_version

ROOT = Path(__file__).parents[1]

# --- broken on purpose ---------------------------------------------------------------------------

UNUSED = """@triton.jit
def _unused_kernel(x_ptr):
    tl.store(x_ptr, 0)
"""
# in a copy of _layer_norm.py: what is replaced by what
BREAKS = {
    "nothing": {},
    "spill": {
        "max(2, min(8, 512 // columns))": "4",
        "min(16, max(1, columns // 256))": "1",
    },
    # the width at run time, so that rows may start anywhere
    "narrow": {
        'do_not_specialize=["R", "eps"]': 'do_not_specialize=["R", "eps", "D"]',
        "    HAS_X: tl.constexpr,\n    D: tl.constexpr,": "    D,\n    HAS_X: tl.constexpr,",
        "# --- launchers": UNUSED + "# --- launchers",
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the gate says to each copy."""

    def run(name):
        copies = tmp_path_factory.mktemp(name)
        package = shutil.copytree(ROOT / "kernels" / "ijepa_kernels", copies / "ijepa_kernels")
        file = package / "_layer_norm.py"
        text = file.read_text(encoding="utf-8")
        for old, new in BREAKS[name].items():
            assert old in text, f"_layer_norm.py has changed: {old!r} is not there to be broken"
            text = text.replace(old, new, 1)
        file.write_text(text, encoding="utf-8")
        only = ("--only", "add_layer_norm", "--only", "_layer_norm", "--model", "H/14")
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.static", *only, "--sm", "80"],
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(copies), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BREAKS, pool.map(run, BREAKS), strict=True))


def _failures(run):
    assert run.returncode in (0, 1), run.stderr
    return [line for line in run.stdout.splitlines() if line.startswith("FAILED")]


def test_an_unchanged_copy_passes(runs):
    """So the rest is red because of the change."""
    assert not _failures(runs["nothing"])
    assert runs["nothing"].returncode == 0
    assert "add_layer_norm_fwd" in runs["nothing"].stdout


def test_the_gate_finds_spills(runs):
    failures = _failures(runs["spill"])
    assert any("_add_layer_norm_bwd_kernel | sm_80: spills, must be 0, got " in f for f in failures)


@pytest.mark.skipif(triton.__version__ != pinned_version(), reason="judged under the pinned Triton")
def test_the_gate_finds_narrow_accesses(runs):
    failures = _failures(runs["narrow"])
    for metric in ("128-bit ld %", "128-bit st %", "instr./element"):
        assert any(
            "add_layer_norm | fwd fp32 residual | H/14 | _add_layer_norm_fwd_kernel | sm_80: "
            f"{metric} " in f
            for f in failures
        ), failures
    assert not any("bwd" in f for f in failures)


def test_the_gate_finds_a_kernel_without_a_case(runs):
    failures = _failures(runs["narrow"])
    assert "FAILED _unused_kernel is never launched by static_cases" in failures


# --- from call to machine code -------------------------------------------------------------------


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=place < size), mask=place < size)


def _copy(size=1 << 20, offset=0):
    x = torch.empty(2 << 20, device="meta")[offset:]
    _copy_kernel[(1024,)](x, x, size, BLOCK=1024)


@pytest.mark.parametrize("sm", SMS)
def test_measure_sees_alignment(sm):
    """Addresses and sizes that Triton knows to be multiples of 16 give 128-bit accesses."""
    with recording(sm) as launches:
        _copy()
        _copy(size=(1 << 20) + 1)
        _copy(offset=1)
    numbers = measure(launches)
    aligned, odd_size, odd_start = (numbers[launch] for launch in launches)
    assert (aligned.wide_loads, aligned.wide_stores, aligned.spills) == (100, 100, 0)
    assert (odd_size.wide_loads, odd_start.wide_loads) == (0, 0)
    assert 8 <= aligned.registers <= 32
    assert (aligned.shared, aligned.occupancy, aligned.warps, aligned.tile) == (0, 100, 4, 1024)
    assert 1 < aligned.instructions < odd_start.instructions


# --- judging -------------------------------------------------------------------------------------

NUMBERS = Numbers(4, 1024, 40, 0, 512, 75.0, 100.0, 80.0, 20.0)
ROW = "op | fwd | B/16 | _op_kernel"
TABLE = {"1.0": {"sm_80": {ROW: NUMBERS}}}


def _judged(numbers=NUMBERS, row=ROW, version="1.0", pinned="1.0", **about):
    report = gate.Report(version=version, table={"sm_80": {row: numbers}}, **about)
    return gate.judge(report, TABLE, pinned)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"registers": 45}, "registers 40 -> 45"),
        ({"shared": 528}, "shared B 512 -> 528"),
        ({"occupancy": 68.8}, "occupancy % 75 -> 68.8"),
        ({"wide_loads": 99.0}, "128-bit ld % 100 -> 99"),
        ({"wide_stores": 0.0}, "128-bit st % 80 -> 0"),
        ({"instructions": 21.1}, "instr./element 20 -> 21.1"),
    ],
)
def test_worse_numbers_fail(change, text):
    report = _judged(replace(NUMBERS, **change))
    assert report.worse == (f"{ROW} | sm_80: {text}; if intended, `make static-accept`",)
    assert report.failures == report.worse
    # told only where another Triton is pinned
    assert not _judged(replace(NUMBERS, **change), version="2.0").failures
    # within the tolerance, or better
    assert not _judged(replace(NUMBERS, registers=44, shared=0, wide_loads=99.5)).failures


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_spills_and_missing_cases_always_fail(version):
    report = _judged(
        replace(NUMBERS, spills=8), version=version, unlaunched=frozenset({"_b_kernel"})
    )
    assert report.broken == (
        f"{ROW} | sm_80: spills, must be 0, got 8",
        "_b_kernel is never launched by static_cases",
    )


def test_rows_must_be_those_of_the_table():
    report = _judged(row="op | bwd | B/16 | _op_kernel")
    assert [failure.partition(", first")[0] for failure in report.failures] == [
        "op: 1 rows not in the table",
        "op: 1 rows in the table but no longer launched",
    ]
    # of what was not measured nothing is expected
    about = {"ops": frozenset({"other"})}
    assert len(_judged(row="op | bwd | B/16 | _op_kernel", **about).failures) == 1
    assert len(_judged(version="2.0", pinned="2.0").failures) == 1, "no table of this version"
