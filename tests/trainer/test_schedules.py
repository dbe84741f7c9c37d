"""Schedules: values worked out by hand, a plain loop, and the edges."""

import math
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

from ijepa_fast.config import OptimConfig
from ijepa_fast.schedules import Schedules
from tests.trainer.plain_step import plain_schedules

RATES: dict[str, float] = {
    "start_lr": 2e-4,
    "lr": 1e-3,
    "final_lr": 1e-6,
    "weight_decay": 0.04,
    "final_weight_decay": 0.4,
    "momentum": 0.996,
    "final_momentum": 1.0,
}


def _schedules(**changes: Any) -> Schedules:
    lengths = {"steps_per_epoch": 10, "epochs": 10, "warmup": 4.0, "ipe_scale": 1.0}
    return Schedules(**{**lengths, **RATES, **changes})


def test_lengths_by_hand():
    schedules = _schedules()
    assert (schedules.run_steps, schedules.total_steps, schedules.warmup_steps) == (100, 100, 40)
    # 1.25 * 2 * 5 = 12.5 and 1.5 * 5 = 7.5 are cut; the run is not stretched
    stretched = _schedules(steps_per_epoch=5, epochs=2, warmup=1.5, ipe_scale=1.25)
    assert (stretched.run_steps, stretched.total_steps, stretched.warmup_steps) == (10, 12, 7)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (1, 2.2e-4),  # 2e-4 + 8e-4 / 40
        (20, 6e-4),  # half way up
        (39, 9.8e-4),  # one step below the peak
        (40, 1e-3),  # W itself is the start of the cosine
        (70, 5.005e-4),  # half way down: the mean of 1e-3 and 1e-6
        (60, 1e-6 + 9.99e-4 * 0.75),  # a third: (1 + cos 60 deg) / 2 = 3/4
        (80, 1e-6 + 9.99e-4 * 0.25),
        (100, 1e-6),
        (101, 1e-6),
        (5000, 1e-6),
    ],
)
def test_learning_rate_by_hand(step, lr):
    assert _schedules().at(step).lr == pytest.approx(lr, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "decay", "momentum"),
    [
        (1, 0.4 - 0.18 * (1 + math.cos(math.pi / 100)), 0.996),
        (50, 0.22, 0.99796),
        (75, 0.4 - 0.18 * (1 - math.sqrt(0.5)), 0.99896),
        # 100 equal increments of 4e-5, the first value at step 1: the end value is never used
        (100, 0.4, 0.99996),
        (300, 0.4, 0.99996),
    ],
)
def test_weight_decay_and_momentum_by_hand(step, decay, momentum):
    assert _schedules().at(step).weight_decay == pytest.approx(decay, abs=1e-15)
    assert _schedules().at(step).momentum == pytest.approx(momentum, abs=1e-15)


@pytest.mark.parametrize(
    ("ipe", "epochs", "warmup", "ipe_scale"),
    [
        (3, 4, 1, 1.0),
        (5, 2, 1, 1.25),
        (7, 9, 2.5, 1.0),
        (7, 9, 0, 1.1),
        (1, 1, 0, 1.0),
        (1, 5, 5, 1.0),
        (4, 6, 1, 0.5),
        (11, 13, 3, 1.25),
        (625, 3, 0.3, 1.25),
    ],
)
def test_equals_a_plain_loop_at_every_step(ipe, epochs, warmup, ipe_scale):
    case = {
        **RATES,
        "ipe": ipe,
        "epochs": epochs,
        "warmup": warmup,
        "ipe_scale": ipe_scale,
        "ema": [RATES["momentum"], RATES["final_momentum"]],
    }
    schedules = _schedules(steps_per_epoch=ipe, epochs=epochs, warmup=warmup, ipe_scale=ipe_scale)
    expected = list(islice(plain_schedules(case), int(1.5 * ipe * epochs) + 3))
    actual = [schedules.at(s) for s in range(1, len(expected) + 1)]
    for values, (lr, decay, momentum) in zip(actual, expected, strict=True):
        assert values.lr == pytest.approx(lr, abs=1e-15)
        assert values.weight_decay == pytest.approx(decay, abs=1e-14)
        assert values.momentum == pytest.approx(momentum, abs=1e-14)


@pytest.mark.parametrize(
    ("scaling", "batch", "factor"),
    [
        ("none", 512, 1.0),
        ("linear", 512, 0.25),
        ("sqrt", 512, 0.5),
        ("linear", 8192, 4.0),
        ("sqrt", 8192, 2.0),
        ("linear", 2048, 1.0),
        ("sqrt", 2048, 1.0),
    ],
)
def test_learning_rates_follow_the_batch_only_on_request(scaling, batch, factor):
    config = OptimConfig(lr_scaling=scaling, epochs=100, warmup=7, ipe_scale=1.25)
    schedules = Schedules.of(config, global_batch=batch, steps_per_epoch=17)
    rates = {name: factor * RATES[name] for name in ("start_lr", "lr", "final_lr")}
    lengths = {"steps_per_epoch": 17, "epochs": 100, "warmup": 7, "ipe_scale": 1.25}
    assert schedules == _schedules(**lengths, **rates)


def test_every_setting_of_the_configuration_arrives():
    config = OptimConfig(
        epochs=3,
        lr=0.5,
        start_lr=0.25,
        final_lr=0.125,
        warmup=1.5,
        weight_decay=0.1,
        final_weight_decay=0.2,
        momentum=0.5,
        final_momentum=0.75,
        ipe_scale=2.0,
        lr_reference_batch=64,
        lr_scaling="linear",
    )
    assert Schedules.of(config, global_batch=128, steps_per_epoch=9) == Schedules(
        steps_per_epoch=9,
        epochs=3,
        warmup=1.5,
        ipe_scale=2.0,
        start_lr=0.5,
        lr=1.0,
        final_lr=0.25,
        weight_decay=0.1,
        final_weight_decay=0.2,
        momentum=0.5,
        final_momentum=0.75,
    )


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step):
    with pytest.raises(ValueError, match=f"step must be at least 1, got {step}"):
        _schedules().at(step)


@pytest.mark.parametrize("name", ["steps_per_epoch", "epochs"])
def test_an_empty_run_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        replace(_schedules(), **{name: 0})


def test_schedules_shorter_than_a_step_are_an_error():
    # 0.4 steps: there is no step T at which to hold the values
    with pytest.raises(ValueError, match=r"ipe_scale must .* at least 1 .*got 0\.1"):
        _schedules(steps_per_epoch=2, epochs=2, warmup=0, ipe_scale=0.1)
