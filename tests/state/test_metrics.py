"""Rows, rates and the hash of sample ids."""

import resource

import numpy as np
import pytest
import torch

from ijepa_fast.callbacks import Callbacks, MetricsFile
from ijepa_fast.errors import NonFiniteError
from ijepa_fast.state import metrics
from ijepa_fast.state.metrics import Journal, Meter, Watch, id_hash
from tests.trainer import tiny

CPU = torch.device("cpu")


# --- hash ----------------------------------------------------------------------------------------


def _batch():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.permutation(1000)[:24]), np.arange(24)


@pytest.mark.parametrize("parts", [1, 2, 3, 24])
def test_the_hash_does_not_depend_on_the_division(parts):
    ids, positions = _batch()
    whole = id_hash(ids, positions)
    # any share of the positions, in any order
    order = np.random.default_rng(parts).permutation(24)
    shares = np.array_split(order, parts)
    total = torch.stack([id_hash(ids[share], positions[share]) for share in shares]).sum()
    assert whole.dtype == total.dtype == torch.int64
    assert whole.shape == ()
    assert int(total) == int(whole)


def test_the_hash_sees_every_change_and_every_swap():
    ids, positions = _batch()
    hashes = {int(id_hash(ids, positions))}
    for i in range(24):
        for change in (1, -1, 1000, 2**31):
            other = ids.clone()
            other[i] += change
            hashes.add(int(id_hash(other, positions)))
        for j in range(i):
            other = ids.clone()
            other[[i, j]] = other[[j, i]]
            hashes.add(int(id_hash(other, positions)))
    assert len(hashes) == 1 + 24 * 4 + 24 * 23 // 2


# --- the journal ---------------------------------------------------------------------------------


def _queue(journal, step, *, skipped=(0, 0, 0, 0), loss=0.5):
    journal.queue(
        {"step": step, "lr": 0.1},
        torch.tensor([loss, 0.75]),
        torch.tensor(skipped),
        timing={"step_ms": 64.8},
    )


@pytest.fixture
def journal(tmp_path):
    callbacks = Callbacks(MetricsFile(tmp_path / "metrics.jsonl", step=0))
    yield Journal(callbacks)
    callbacks.end("done", 6)


def test_a_row_is_written_once_its_numbers_are_there(tmp_path, journal, monkeypatch):
    """On a CPU at once; a device is never waited for, but before the next row."""
    _queue(journal, 2, loss=0.5)
    journal.poll(2)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2]
    monkeypatch.setattr(metrics._Arrival, "here", False)
    _queue(journal, 4, loss=0.25, skipped=(1, 1, 2, 0))
    journal.poll(5)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2]
    _queue(journal, 6)
    assert [row["step"] for row in tiny.rows(tmp_path)] == [2, 4]
    journal.flush()
    journal.flush()
    first, second, _ = tiny.rows(tmp_path, timing=True)
    assert (first["loss"], first["feature_std"], first["skipped"]) == (0.5, 0.75, 0)
    assert (second["loss"], second["skipped"]) == (0.25, 2)
    assert second["timing"]["step_ms"] == 64.8


def test_the_third_skip_in_a_row_ends_the_run():
    watch = Watch(CPU)
    assert watch.check(2, torch.tensor([2, 2, 5, 0])) is None
    error = watch.check(7, torch.tensor([0, 3, 8, 1]))
    assert isinstance(error, NonFiniteError)
    assert list(error.steps) == [4, 5, 6]
    assert "got 3 steps in a row" in str(error)
    assert "(steps 4 to 6)" in str(error)


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [None, 1e12])
def test_rates(monkeypatch, peak):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    meter = Meter(images=64, world=2, flops=2e9, peak=peak, device=CPU)
    now = 105.0
    meter.restart(10, 3.0)
    now = 113.0
    # 4 steps in 8 s, of which 1 s waiting
    timing = meter.read(14, 4.0, 114)
    used = timing.pop("memory_gib")
    assert 0 < used <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 + 0.001
    assert timing == {
        "images_per_second": 32.0,
        "images_per_second_per_device": 16.0,
        "step_ms": 2000.0,
        "data_wait_ms": 250.0,
        "mfu": None if peak is None else 0.032,
        "eta_seconds": 200,
    }
    # the next interval starts here
    now = 114.0
    timing = meter.read(18, 4.0, 114)
    assert (timing["step_ms"], timing["data_wait_ms"], timing["eta_seconds"]) == (250.0, 0.0, 24)


def test_peak_is_known_of_cuda_devices_in_bfloat16_only(monkeypatch):
    assert metrics.peak_flops(CPU, "bfloat16") is None
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    assert metrics.peak_flops(cuda, "bfloat16") == 989e12
    assert metrics.peak_flops(cuda, "float32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    assert metrics.peak_flops(cuda, "bfloat16") is None
