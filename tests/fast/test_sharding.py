"""FSDP2 and the other ways to spread the fast path over ranks, on gloo, against one rank; and both
paths resuming each other's runs.
"""

import pytest
import torch

from ijepa_fast.fast import sharding
from tests.trainer import tiny

STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    assert tiny.run(data, out, **_settings()) == 0
    return out


def _settings(**more):
    return {"optim__epochs": 4, "log__interval": 1, **more}


def _ranks(data, out, **settings):
    codes, output = tiny.run_ranks(data, out, **_settings(**settings))
    assert codes == [0] * settings.get("world", 2), output
    return out


def test_two_ranks_with_fsdp_train_as_one(data, one_rank, tmp_path):
    """Accumulated, too: unsharded gradients wait for the last micro-step."""
    out = _ranks(data, tmp_path / "run", batch__device=2, shard="full")
    tiny.assert_near(out, one_rank, STEPS)


@pytest.mark.parametrize(
    "settings",
    [{"path": "reference"}, {"shard": "none"}, {"shard": "hybrid", "world": 4, "local_world": 2}],
    ids=["reference", "replicated", "hybrid"],
)
def test_other_ways_to_spread(data, one_rank, tmp_path, settings):
    out = _ranks(data, tmp_path / "run", batch__device=8 // settings.get("world", 2), **settings)
    tiny.assert_near(out, one_rank, STEPS)


def test_paths_and_ranks_go_on_from_each_other(data, one_rank, tmp_path):
    """One curve, whoever computes which part of it."""
    out = tmp_path / "run"
    _ranks(data, out, max_steps=4, batch__device=4)
    assert tiny.run(data, out, **_settings(max_steps=8, path="reference")) == 0
    _ranks(data, out, max_steps=12, batch__device=2, path="reference")
    assert tiny.run(data, out, **_settings(max_steps=14)) == 0
    _ranks(data, out, batch__device=4)
    tiny.assert_near(out, one_rank, STEPS)


def test_two_ranks_in_bfloat16(data, tmp_path):
    """Sharded, norms of the context side are rounded too: near one rank, not equal to it."""
    settings = _settings(optim__precision="bfloat16", max_steps=8)
    assert tiny.run(data, tmp_path / "one", **settings) == 0
    codes, output = tiny.run_ranks(data, tmp_path / "two", batch__device=4, **settings)
    assert codes == [0, 0], output
    one, two = (tiny.losses(tmp_path / name) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=5e-3)
    a, b = (tiny.final_state(tmp_path / name) for name in ("one", "two"))
    assert {k: (v.dtype, v.shape) for k, v in a.items()} == {
        k: (v.dtype, v.shape) for k, v in b.items()
    }
    # averages are kept in float32, not in the target's bfloat16
    average = b["target_encoder.blocks.0.mlp.fc1.weight"]
    assert not torch.equal(average, average.bfloat16().float())


def test_meshes_that_cannot_be():
    device = torch.device("cpu")
    assert sharding.make_mesh("auto", device, 1) is None
    assert sharding.make_mesh("none", device, 1) is None
    for kind in ("full", "hybrid"):
        with pytest.raises(ValueError, match=rf"shard must be none or auto without.*'{kind}'"):
            sharding.make_mesh(kind, device, 1)


def test_what_the_reference_path_cannot_do(data, tmp_path):
    for setting in ("shard", "memory", "graphs", "attention"):
        value = {"shard": "full", "memory": "full", "graphs": "on", "attention": "varlen"}[setting]
        with pytest.raises(ValueError, match=rf"{setting} must be .* with path reference"):
            tiny.config(data, tmp_path / "run", path="reference", **{setting: value})
