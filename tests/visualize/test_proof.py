"""The numbers behind the pictures: against plain computations, and on painters that are known to
know, or not to.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ijepa_fast.data.sets.named import NAMES
from ijepa_fast.visualize import inputs
from ijepa_fast.visualize.decoder import commands as decoder_commands
from ijepa_fast.visualize.decoder import proof
from ijepa_fast.visualize.decoder.conditions import Conditions
from tests.trainer import tiny

# --- statistics ----------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, 400)
    found = proof.bootstrap_mean(values)
    error = values.std() / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert proof.bootstrap_mean(values) == found


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    held, trials = 0, 120
    for trial in range(trials):
        found = proof.bootstrap_mean(rng.normal(1, 2, 60), seed=trial, resamples=200)
        held += found.low <= 1 <= found.high
    assert 0.88 <= held / trials <= 0.99


# --- what is compared ----------------------------------------------------------------------------

COLOURS = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 40]])


def _blocks(count, seed=0):
    """The condition vector holds the class, which is the colour of the block."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randint(-20, 21, (count, 8, 8, 3), generator=generator)
    pixels = (COLOURS[labels][:, None, None] + noise).clamp(0, 255).byte()
    given = Conditions(
        pooled=torch.nn.functional.one_hot(labels, 4).float(),
        box=torch.arange(count)[:, None].repeat(1, 4),
        pixels=pixels,
        image=torch.arange(count),
        context=torch.zeros(count, 16, dtype=torch.bool),
        grid=(4, 4),
    )
    return given, labels


class _Painter:
    """Paints the class of the vector with the given probability, else any; and counts."""

    def __init__(self, knows):
        self.knows, self.calls = knows, []

    def sample(self, given, *, seed, steps, guidance):
        self.calls.append((seed, steps, guidance))
        generator = torch.Generator().manual_seed(1000 + seed)
        any_class = torch.randint(4, (len(given),), generator=generator)
        told = torch.rand(len(given), generator=generator) < self.knows
        painted = torch.where(told, given.pooled.argmax(dim=1), any_class)
        pixels = COLOURS[painted][:, None, None].repeat(1, 8, 8, 1)
        noise = torch.randint(-9, 10, pixels.shape, generator=generator)
        # more noise in later rows
        scale = torch.linspace(0.2, 4, len(given))[:, None, None, None]
        return (pixels + scale * noise).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def classifier():
    given, labels = _blocks(800)
    return proof.train_classifier(given.pixels, labels, 4)


def test_the_classifier_learns_and_leaves_the_generator_alone(classifier):
    given, labels = _blocks(200, seed=1)
    assert (proof.classify(classifier, given.pixels) == labels).float().mean() > 0.97
    state = torch.random.get_rng_state()
    again = proof.train_classifier(given.pixels[:128], labels[:128], 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_shuffling_moves_every_vector_and_nothing_else():
    given, _ = _blocks(50)
    given = replace(given, pooled=torch.arange(50.0)[:, None].repeat(1, 3))
    mixed = proof.shuffled(given)
    assert (mixed.pooled != given.pooled).all()
    assert sorted(mixed.pooled[:, 0].tolist()) == list(range(50))
    for name in ("box", "pixels", "image", "context"):
        assert torch.equal(getattr(mixed, name), getattr(given, name))
    assert given.pooled[7, 0] == 7


def test_a_painter_that_knows(classifier):
    given, labels = _blocks(200, seed=2)
    knows, ignores = _Painter(0.8), _Painter(0.0)
    result = proof.prove(given, labels, knows, (given, ignores), classifier, seeds=3, steps=7)
    accuracy = {name: entry["value"] for name, entry in result["accuracy"].items()}
    assert accuracy["real blocks"] > 0.97
    assert accuracy["prediction"] == pytest.approx(0.8 + 0.2 / 4, abs=0.06)
    assert accuracy["shuffled conditions"] == pytest.approx(0.25, abs=0.08)
    assert accuracy["untrained network"] == pytest.approx(0.25, abs=0.08)
    for name, entry in result["difference"].items():
        other = accuracy[name.removeprefix("prediction - ")]
        assert entry["value"] == pytest.approx(accuracy["prediction"] - other)
        assert 0.4 < entry["low"] < entry["value"] < entry["high"]
    # the same noise everywhere
    assert knows.calls == [(seed, 7, 1.0) for seed in range(3)] * 2
    assert ignores.calls == [(seed, 7, 1.0) for seed in range(3)]
    assert result["largest_class_share"] == torch.bincount(labels).max() / 200
    text = proof.as_text(result)
    assert text.count("holds") == 2
    assert "NOT shown" not in text


def test_a_painter_that_ignores_its_condition(classifier):
    given, labels = _blocks(200, seed=3)
    blind, other = _Painter(0.0), _Painter(0.0)
    result = proof.prove(given, labels, blind, (given, other), classifier)
    for entry in result["difference"].values():
        assert entry["low"] <= 0 <= entry["high"]
    assert proof.as_text(result).count("NOT shown") == 2


# --- command line --------------------------------------------------------------------------------


def test_prove_command(run, split, tmp_path, command, monkeypatch):
    painter, control, out = tmp_path / "d", tmp_path / "c", tmp_path / "p.json"
    short = ("--data", split, "--steps", "2", "--passes", "1", "--width", "8")
    command("train-decoder", run, *short, "--out", painter)
    command("train-decoder", run, *short, "--untrained", "--out", control)
    prove = ("prove", run, "--data", split, "--decoder", painter, "--out", out)
    few = ("--sampling-steps", "2", "--seeds", "2")
    command(*prove, *few, "--control", control)
    result = json.loads(out.read_text())
    assert (result["blocks"], result["seeds"], result["step"]) == (12, 2, 4)
    assert result["classes"] == [f"class{n}" for n in range(4)]
    assert result["real_crops"] == 32 * 6  # images x target blocks
    assert (result["control"]["step"], result["decoder"]["step"]) == (0, 4)
    untrained = inputs.untrained_networks(inputs.read_config(run, None)).digest
    assert result["control"]["digest"] == untrained != result["decoder"]["digest"]
    names = {"real blocks", "prediction", "shuffled conditions", "untrained network"}
    assert set(result["accuracy"]) == names
    # the control trained on the spot is the same
    command(*prove, *few, "--overwrite")
    assert json.loads(out.read_text())["accuracy"] == result["accuracy"]
    other = tmp_path / "other"
    command("train-decoder", run, *short, "--untrained", "--seed", "1", "--out", other)
    wrong, again = tiny.write_images(tmp_path / "wrong", classes=2), "--overwrite"
    for message, argv in (
        ("out must not exist", prove),
        ("out must end in .json", (*prove[:-1], tmp_path / "p.png")),
        ("blocks must be at least 2, got 1", (*prove, "--blocks", "1", again)),
        ("decoder must belong to this checkpoint", (*prove, "--control", painter, again)),
        (
            "control must be trained as the decoder was (seed 0), got 1",
            (*prove, "--control", other, again),
        ),
        ("data must be what the decoder was trained on", (*prove, "--data", wrong, again)),
    ):
        assert message in command(*argv, code=2)
    # named sets are the same wherever the command runs, a folder is not
    monkeypatch.chdir(tmp_path)
    assert [decoder_commands._named(name) for name in NAMES] == list(NAMES)
    assert decoder_commands._named("photos") == str(tmp_path / "photos")
