"""Two ranks on gloo against one: the same curve, the same weights, the same decisions."""

import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from ijepa_fast.ranks import distributed
from tests.trainer import tiny

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    """Runs of one rank, by truncation group, made when asked for."""
    runs = {}

    def get(group):
        if group not in runs:
            runs[group] = tmp_path_factory.mktemp("one") / "run"
            settings = {"masks__truncation_group": group, "log__interval": 1}
            assert tiny.run(data, runs[group], max_steps=STEPS, **settings) == 0
        return runs[group]

    return get


@pytest.mark.parametrize(
    ("group", "device_batch"),
    [(4, 4), (4, 2), (1, 4), (8, 2)],
)
def test_two_ranks_train_as_one(data, one_rank, tmp_path, group, device_batch):
    """Groups smaller than, equal to and larger than the device batch, with accumulation or not."""
    out = tmp_path / "run"
    settings = {"masks__truncation_group": group, "batch__device": device_batch}
    codes, output = tiny.run_ranks(data, out, max_steps=STEPS, log__interval=1, **settings)
    assert codes == [0, 0], output
    accumulated = 8 // (2 * device_batch)
    expected = f"2 ranks x {device_batch} on the device x {accumulated} accumulated"
    assert expected in (out / "train.log").read_text()
    tiny.assert_near(out, one_rank(group), STEPS)
    # one rank writes and prints
    assert output.count("step 1/8") == 1


def test_two_ranks_resume_bit_identically(data, tmp_path):
    settings = {"log__interval": 1, "batch__device": 2}
    for name, stops in (("whole", [STEPS]), ("parts", [3, STEPS])):
        for stop in stops:
            codes, output = tiny.run_ranks(data, tmp_path / name, max_steps=stop, **settings)
            assert codes == [0, 0], output
    tiny.assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_rank_stops_both_at_the_same_step(data, tmp_path, number):
    """Whichever rank it reaches, both leave with its code and rank 0 saves."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    settings = {"batch__device": 4, "optim__epochs": 400, "checkpoint__minutes": 1e-9}
    argv = tiny.arguments(data, out, **settings)
    children = [tiny.start(argv, output, e) for e in tiny.rank_environments(2)]
    while not any((out / "checkpoints").glob("step-*")) and children[0].is_alive():
        children[0].join(0.005)
    os.kill(children[1].pid, number)
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [128 + number] * 2, output.read_text()
    step = int(tiny.final_state(out)["step"])
    assert f"stopped by signal {number:d}, saved at step {step}" in (out / "train.log").read_text()
    assert "done:" not in (out / "train.log").read_text()


def test_a_batch_that_the_ranks_cannot_share(data, tmp_path):
    out = tmp_path / "run"
    codes, output = tiny.run_ranks(data, out, world=3, batch__device="auto")
    # rank 0 says why, the others only leave
    assert codes == [2, 1, 1]
    message = "error: batch.global must be divisible by the number of ranks (3), got 8\n"
    # beside it torch may tell that a connection ended
    said = [line for line in output.splitlines(keepends=True) if "error:" in line.casefold()]
    assert [line for line in said if "c10" not in line] == [message]
    assert not out.exists()


def test_wrong_data_is_one_line_on_two_ranks(tmp_path):
    codes, output = tiny.run_ranks(tmp_path / "none", tmp_path / "run", batch__device=4)
    assert codes[0] == 2
    # rank 1 must end too, however it learns of it
    assert codes[1] not in (0, None)
    assert "error: data.root must be an existing folder" in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


# --- the functions underneath --------------------------------------------------------------------


def _in_rank(environment, job, folder):
    os.environ.update(environment)
    ranks = distributed.start("cpu")
    try:
        job(ranks, Path(folder))
    finally:
        distributed.stop()
    (Path(folder) / f"ok-{ranks.rank}").touch()


def _on_ranks(job, folder, world=2):
    context = multiprocessing.get_context("forkserver")
    children = [
        context.Process(target=_in_rank, args=(environment, job, str(folder)))
        for environment in tiny.rank_environments(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        child.kill()
    assert [(folder / f"ok-{rank}").exists() for rank in range(world)] == [True] * world


def _arrays():
    return {
        "int": np.arange(6, dtype=np.int32).reshape(2, 3),
        "bool": np.array([True, False, True]),
        "empty": np.empty((0, 4), dtype=np.float32),
        "scalar": np.array(2**40 + 1, dtype=np.int64),
        "view": np.arange(20.0)[::3],
        "name with spaces, äöü": np.array([255], dtype=np.uint8),
    }


def _job_broadcast(ranks, _folder):
    expected = _arrays()
    result = distributed.broadcast_arrays(_arrays() if ranks.is_main else None)
    assert list(result) == list(expected)
    for name, value in expected.items():
        assert result[name].dtype == value.dtype
        assert result[name].shape == value.shape
        assert np.array_equal(result[name], value)
    assert distributed.broadcast_arrays({} if ranks.is_main else None) == {}


def _recorded(calls):
    original = torch.distributed.all_reduce

    def all_reduce(flat):
        calls.append(flat.numel())
        original(flat)

    return all_reduce


def _job_reduce(ranks, folder):
    sizes = [3, 5, 1, 9, 4, 4, 0, 2, 8]
    for limit in (1, 4, 8, 10**6):
        distributed.BUCKET_ELEMENTS = limit
        calls: list[int] = []
        tensors = [torch.arange(float(n)) + 100 * i + ranks.rank for i, n in enumerate(sizes)]
        # not contiguous, two-dimensional
        tensors.append((torch.ones(4, 6) * (ranks.rank + 1)).t()[:, ::2])
        with mock.patch.object(torch.distributed, "all_reduce", _recorded(calls)):
            distributed.all_reduce_sum_(tensors)
        for i, n in enumerate(sizes):
            assert torch.equal(tensors[i], 2 * torch.arange(float(n)) + 200 * i + 1)
        assert torch.equal(tensors[-1], torch.full((6, 2), 3.0))
        assert sum(calls) == sum(sizes) + 12
        # as many as fit, in order; a tensor larger than a bucket travels alone
        expected = [0]
        for n in (*sizes, 12):
            if expected[-1] + n > limit and expected[-1]:
                expected.append(0)
            expected[-1] += n
        assert [n for n in calls if n] == expected
    (folder / f"calls-{ranks.rank}").write_text(str(calls))


def _job_agree(ranks, _folder):
    agreement = distributed.Agreement()
    wishes = [[[0, 0], [0, 7], [0, 0], [0, 0]], [[0, 1], [15, 0], [0, 0], [0, 0]]][ranks.rank]
    got = [agreement.exchange(wish) for wish in wishes]
    agreement.finish()
    # everybody gets the largest wish, one exchange later
    assert got == [[0, 0], [0, 1], [15, 7], [0, 0]]


@pytest.mark.parametrize("job", [_job_broadcast, _job_reduce, _job_agree])
def test_between_two_ranks(job, tmp_path):
    _on_ranks(job, tmp_path)


def test_alone():
    arrays = _arrays()
    result = distributed.broadcast_arrays(arrays)
    assert all(result[name] is arrays[name] for name in arrays)
    tensor = torch.arange(3.0)
    distributed.all_reduce_sum_([tensor])
    assert tensor.tolist() == [0, 1, 2]
    agreement = distributed.Agreement()
    assert agreement.exchange([15, 0]) == [15, 0]
    agreement.finish()
    ranks = distributed.start("cpu")
    assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
    distributed.stop()


def test_a_due_checkpoint_is_written_once(data, tmp_path):
    out = tmp_path / "run"
    # always due: what the ranks agree on is a step old, and must not be done twice
    codes, _ = tiny.run_ranks(
        data, out, world=2, batch__device="auto", checkpoint__minutes=1e-9, checkpoint__keep=100
    )
    assert codes == [0, 0]
    steps = sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())
    by_clock, end = steps[:-1], steps[-1]
    assert end == 15
    assert by_clock
    assert all(step - 1 not in steps for step in by_clock)
