"""Configuration: every rule, presets against the published tables, flags, YAML and exit codes."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ijepa_fast import __version__, train
from ijepa_fast.config import (
    ARCHITECTURES,
    Architecture,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    cli,
)
from ijepa_fast.config.cli import as_dict, dump_yaml, flatten, parse
from ijepa_fast.config.presets import PRESETS, preset
from ijepa_fast.errors import UsageError
from ijepa_fast.schedules import Schedules
from ijepa_fast.state.run_folder import recipe_difference

NAN, INF = float("nan"), float("inf")

# --- rules ---------------------------------------------------------------------------------------

SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "masks": MaskConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "batch": BatchConfig,
    "log": LogConfig,
    "checkpoint": CheckpointConfig,
}

# section, settings, what the message names: field, rule, value
RULES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("model", {"name": "vit_big"}, "model.name", "one of vit_tiny, vit_small", "'vit_big'"),
    ("model", {"width": -4}, "model.width", "at least 1", "-4"),
    ("model", {"width": 390, "heads": 6}, "model.width", "a positive multiple of 4", "390"),
    ("model", {"heads": 7}, "model.width", "divisible by the number of heads (7)", "768"),
    ("model", {"predictor_width": 0}, "model.predictor_width", "a positive multiple of 4", "0"),
    ("model", {"predictor_width": 390}, "model.predictor_width", "a positive multiple of 4", "390"),
    ("model", {"predictor_width": 100}, "model.predictor_width", "number of heads (12)", "100"),
    ("masks", {"geometry": "other"}, "masks.geometry", "one of published, unbiased", "'other'"),
    ("masks", {"min_keep": -1}, "masks.min_keep", "at least 0", "-1"),
    ("masks", {"target_scale": (0.2, 0.15)}, "masks.target_scale", "two ascending", "(0.2, 0.15)"),
    ("masks", {"target_scale": (0.2, 1.01)}, "masks.target_scale", "at most 1", "(0.2, 1.01)"),
    ("masks", {"target_scale": (0.0, 0.2)}, "masks.target_scale", "above 0", "(0.0, 0.2)"),
    ("masks", {"target_scale": (NAN, 0.2)}, "masks.target_scale", "ascending", "(nan, 0.2)"),
    ("masks", {"context_scale": (0.85, 1.5)}, "masks.context_scale", "at most 1", "(0.85, 1.5)"),
    ("masks", {"target_aspect": (1.5, 0.75)}, "masks.target_aspect", "ascending", "(1.5, 0.75)"),
    ("masks", {"context_aspect": (0.0, 1.0)}, "masks.context_aspect", "above 0", "(0.0, 1.0)"),
    ("data", {"crop": 0}, "data.crop", "at least 1 pixel", "0"),
    ("data", {"crop": (224, -16)}, "data.crop", "at least 1 pixel", "(224, -16)"),
    ("data", {"scale": (0.3, 1.2)}, "data.scale", "at most 1", "(0.3, 1.2)"),
    ("data", {"scale": (0.9, 0.3)}, "data.scale", "ascending", "(0.9, 0.3)"),
    ("data", {"ratio": (0.0, 1.0)}, "data.ratio", "above 0", "(0.0, 1.0)"),
    ("data", {"mean": (0.5, NAN, 0.5)}, "data.mean", "finite", "(0.5, nan, 0.5)"),
    ("data", {"std": (0.2, 0.0, 0.2)}, "data.std", "positive", "(0.2, 0.0, 0.2)"),
    ("data", {"std": (0.2, INF, 0.2)}, "data.std", "finite", "(0.2, inf, 0.2)"),
    ("data", {"decoder": "cv2"}, "data.decoder", "one of auto, dali, pillow", "'cv2'"),
    ("data", {"max_bad_share": 1.5}, "data.max_bad_share", "between 0 and 1", "1.5"),
    ("data", {"max_bad_share": -0.1}, "data.max_bad_share", "between 0 and 1", "-0.1"),
    ("optim", {"lr": -1.0}, "optim.lr", "at least 0", "-1.0"),
    ("optim", {"lr": NAN}, "optim.lr", "at least 0", "nan"),
    ("optim", {"start_lr": INF}, "optim.start_lr", "at least 0", "inf"),
    ("optim", {"final_lr": -1e-6}, "optim.final_lr", "at least 0", "-1e-06"),
    ("optim", {"weight_decay": -0.1}, "optim.weight_decay", "at least 0", "-0.1"),
    ("optim", {"final_weight_decay": NAN}, "optim.final_weight_decay", "at least 0", "nan"),
    ("optim", {"warmup": -1}, "optim.warmup", "at least 0", "-1"),
    ("optim", {"epochs": 10, "warmup": 12, "ipe_scale": 1.1}, "optim.warmup", "scale (11)", "12"),
    ("optim", {"momentum": 1.1}, "optim.momentum", "between 0 and 1", "1.1"),
    ("optim", {"final_momentum": -0.1}, "optim.final_momentum", "between 0 and 1", "-0.1"),
    ("optim", {"beta1": 1.0}, "optim.beta1", "between 0 and 1", "1.0"),
    ("optim", {"beta2": NAN}, "optim.beta2", "between 0 and 1", "nan"),
    ("optim", {"eps": 0.0}, "optim.eps", "positive", "0.0"),
    ("optim", {"ipe_scale": 0.0}, "optim.ipe_scale", "positive", "0.0"),
    ("optim", {"ipe_scale": INF}, "optim.ipe_scale", "finite", "inf"),
    ("optim", {"loss": "huber"}, "optim.loss", "one of smooth_l1, l2, l1", "'huber'"),
    ("optim", {"precision": "fp16"}, "optim.precision", "one of bfloat16, float32", "'fp16'"),
    ("optim", {"lr_scaling": "log"}, "optim.lr_scaling", "one of none, linear, sqrt", "'log'"),
    ("batch", {"global_": 64, "device": 48}, "batch.device", "of batch.global (64)", "48"),
    ("checkpoint", {"minutes": 0.0}, "checkpoint.minutes", "positive", "0.0"),
    ("", {"seed": -1}, "seed", "in 0..2**63-1", "-1"),
    ("", {"seed": 2**63}, "seed", "in 0..2**63-1", str(2**63)),
    ("", {"out": ""}, "out", "a folder", "''"),
    ("", {"out": "a\0b"}, "out", "text in UTF-8 without NUL", "'a\\x00b'"),
    ("", {"init": "r\udcff"}, "init", "text in UTF-8 without NUL", "'r\\udcff'"),
    ("data", {"root": ("a", "\udcff")}, "data.root", "text in UTF-8", "'\\udcff'"),
    ("data", {"timeout": INF}, "data.timeout", "positive and at most 1000000 seconds", "inf"),
    ("", {"rank_timeout": INF}, "rank_timeout", "between 1 and 1000000 seconds", "inf"),
    ("model", {"depth": 10**6}, "model.depth", "at most 256", "1000000"),
    ("model", {"width": 2**20}, "model.width", "at most 65536", "1048576"),
    ("masks", {"num_contexts": 10**9}, "masks.num_contexts", "at most 16", "1000000000"),
    ("data", {"crop": 10**9}, "data.crop", "at most 16384 pixels", "1000000000"),
    ("", {"data": DataConfig(crop=16_384)}, "data.crop", "of at most 16384 patches", "16384"),
    ("optim", {"epochs": 2**31}, "optim.epochs", "at most 2147483647", "2147483648"),
    ("", {"device": "tpu"}, "device", "one of auto, cpu, cuda", "'tpu'"),
    ("", {"data": DataConfig(crop=(224, 100))}, "data.crop", "model.patch_size (16)", "100"),
    ("", {"batch": BatchConfig(global_=2000)}, "batch.global", "truncation_group (128)", "2000"),
]
RULES += [
    (section, {name: 0}, f"{section}.{name.rstrip('_')}".lstrip("."), "at least 1", "0")
    for section, names in {
        "model": "patch_size width depth heads mlp_hidden predictor_depth",
        "masks": "num_targets num_contexts truncation_group",
        "data": "threads prefetch",
        "optim": "epochs lr_reference_batch",
        "batch": "global_ device",
        "log": "interval",
        "checkpoint": "keep keep_every",
        "": "max_steps",
    }.items()
    for name in names.split()
]


@pytest.mark.parametrize(
    ("section", "settings", "name", "rule", "value"), RULES, ids=[f"{r[2]}={r[4]}" for r in RULES]
)
def test_a_wrong_value_is_named_with_its_rule(section, settings, name, rule, value):
    make = SECTIONS[section] if section else Config
    with pytest.raises(ValueError, match="must be") as caught:
        make(**settings)
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert rule in message
    assert message.endswith(f", got {value}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("model", {"width": 200, "heads": 10, "predictor_width": 40}),
        ("masks", {"target_scale": (0.15, 0.15), "context_scale": (1.0, 1.0), "min_keep": 0}),
        ("data", {"scale": (1.0, 1.0), "max_bad_share": 0.0, "mean": (-1.0, 0.0, 2.0)}),
        ("optim", {"lr": 0.0, "warmup": 600, "momentum": 1.0, "beta1": 0.0, "weight_decay": 0.0}),
        ("optim", {"epochs": 10, "warmup": 12, "ipe_scale": 1.2}),
        ("batch", {"global_": 1, "device": 1}),
        ("", {"seed": 2**63 - 1, "max_steps": 1}),
        ("", {"data": DataConfig(crop=(32, 160))}),
    ],
)
def test_values_on_the_edge_are_allowed(section, settings):
    config = (SECTIONS[section] if section else Config)(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == value


def test_grid_is_rows_by_columns():
    assert Config(data=DataConfig(crop=(32, 160))).grid == (2, 10)


# --- published tables ----------------------------------------------------------------------------


def test_single_dimensions_override_the_named_size():
    changed = ModelConfig(name="vit_giant", width=176, depth=3, predictor_depth=2).architecture
    # a changed width brings MLPs of four times the width, as everywhere but in vit_giant
    assert changed == Architecture(width=176, depth=3, heads=16, mlp_hidden=704, predictor_depth=2)
    assert ModelConfig(name="vit_giant", width=176, mlp_hidden=10).architecture.mlp_hidden == 10
    assert ModelConfig(name="vit_base", heads=4).architecture.heads == 4


RELEASED = [
    # preset, model, patch, crop, truncation group, epochs, warm-up, predictor depth
    ("vith14_in1k", "vit_huge", 14, 224, 128, 300, 40, 12),
    ("vith16_448_in1k", "vit_huge", 16, 448, 16, 300, 40, 12),
    ("vith14_in22k", "vit_huge", 14, 224, 32, 66, 3, 12),
    ("vitg16_in22k", "vit_giant", 16, 224, 16, 44, 3, 16),
    # not released: the community recipe
    ("vitb16_in1k", "vit_base", 16, 224, 128, 600, 40, 6),
    ("vitl16_in1k", "vit_large", 16, 224, 128, 600, 40, 12),
]


@pytest.mark.parametrize(
    ("name", "model", "patch", "crop", "group", "epochs", "warmup", "depth"), RELEASED
)
def test_presets_are_the_published_configurations(
    name, model, patch, crop, group, epochs, warmup, depth
):
    config = preset(name)
    assert config.model.name == model
    assert config.model.patch_size == patch
    assert config.model.predictor_width == 384
    assert config.model.architecture.predictor_depth == depth
    assert config.model.architecture.width == ARCHITECTURES[model].width
    assert config.data.crop == crop
    assert config.data.scale == (0.3, 1.0)
    assert config.data.ratio == (3 / 4, 4 / 3)
    assert config.data.mean == (0.485, 0.456, 0.406)
    assert config.data.std == (0.229, 0.224, 0.225)
    assert config.batch.global_ == 2048
    optim = config.optim
    assert (optim.epochs, optim.warmup, optim.ipe_scale) == (epochs, warmup, 1.0)
    assert (optim.start_lr, optim.lr, optim.final_lr) == (2e-4, 1e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (optim.momentum, optim.final_momentum) == (0.996, 1.0)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.999, 1e-8)
    assert (optim.loss, optim.precision, optim.lr_scaling) == ("smooth_l1", "bfloat16", "none")
    assert optim.lr_reference_batch == 2048
    masks = config.masks
    assert (masks.geometry, masks.truncation_group, masks.min_keep) == ("published", group, 10)
    assert (masks.num_targets, masks.target_scale, masks.target_aspect) == (
        4,
        (0.15, 0.2),
        (0.75, 1.5),
    )
    assert (masks.num_contexts, masks.context_scale, masks.context_aspect) == (
        1,
        (0.85, 1.0),
        (1.0, 1.0),
    )


def test_all_presets_exist_and_write_to_folders_of_their_own():
    ours = ["demo", "fashion_mnist", "fashion_mnist_published", "vits16"]
    names = [*ours, *(row[0] for row in RELEASED)]
    assert sorted(PRESETS) == sorted(names)
    assert {preset(name).out for name in names} == {f"runs/{name}" for name in names}


def test_an_unknown_preset_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"preset must be one of demo, .*, vits16, .*, got 'vitb'"):
        preset("vitb")


# --- flags over YAML over preset -----------------------------------------------------------------


DEMO = ("--preset", "demo")


def _yaml(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def _config(*arguments: str) -> Config:
    return parse(arguments).config


def test_flags_win_over_yaml_and_yaml_over_preset(tmp_path):
    file = _yaml(
        tmp_path,
        "optim: {lr: 0.5, epochs: 70}\n"
        "data: {scale: [0.4, 0.9], crop: 448, root: /yaml}\n"
        "log: {to: [tensorboard]}\n",
    )
    start = _config("--preset", "vith14_in1k")
    config = _config("--preset", "vith14_in1k", "--config", file)
    assert (config.optim.lr, config.optim.epochs) == (0.5, 70)
    assert (config.data.scale, config.data.crop, config.data.root) == ((0.4, 0.9), 448, "/yaml")
    assert config.log.to == ("tensorboard",)
    assert config.model == start.model
    assert config.optim.warmup == start.optim.warmup
    config = _config(
        *("--optim.lr", "0.25", "--preset=vith14_in1k", f"--config={file}"),
        *("--data.scale", "0.5", "0.6", "--data", "/flag", "--log.to", "mlflow", "wandb"),
        *("--data.crop", "224", "448"),
    )
    assert (config.optim.lr, config.optim.epochs) == (0.25, 70)
    assert (config.data.scale, config.data.crop) == ((0.5, 0.6), (224, 448))
    assert config.data.root == "/flag"
    assert config.log.to == ("mlflow", "wandb")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data", "/some/where"],
        ["--data=/some/where"],
        ["--data.root", "/some/where"],
        ["--data.root=/some/where"],
        ["--seed", "3", "--data", "/some/where", "--data.crop", "32"],
    ],
)
def test_data_is_short_for_the_root(arguments):
    assert _config(*arguments).data.root == "/some/where"
    config = _config(*DEMO, *arguments)
    assert config.data.root == "/some/where"
    # of the preset's own images
    assert config.eval == EvalConfig(seconds=preset("demo").eval.seconds)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--batch-size", "32"], "batch.global", 32),
        (["--batch_size=32"], "batch.global", 32),
        (["--epochs", "9"], "optim.epochs", 9),
        (["--lr=0.5"], "optim.lr", 0.5),
        (["--workers", "3"], "data.threads", 3),
        (["--num-workers", "3"], "data.threads", 3),
        (["--model", "vit_base"], "model.name", "vit_base"),
    ],
)
def test_short_names(arguments, name, value):
    assert flatten(as_dict(_config(*DEMO, *arguments)))[name] == value


def test_resume_takes_everything_from_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    asked = ("--preset", "vits16", "--seed", "7", "--data", "/images", "--allow-changed-recipe")
    (run / "config.yaml").write_text(dump_yaml(_config(*asked, "--out", "/elsewhere")))
    config = _config("--resume", str(run), "--max-steps", "3")
    # nobody has allowed a changed recipe this time
    told = {"out": str(run), "max_steps": 3, "allow_changed_recipe": False}
    assert config == replace(_config(*asked), **told)
    for more in (["--config", "a.yaml"], ["--preset", "demo"]):
        message = _refused(["--resume", str(run), *more], capsys)
        assert message == f"{more[0]} must be left out with --resume, got {more[1]}"
    message = _refused(["--resume", str(tmp_path)], capsys)
    assert message == f"--resume must name the folder of a run, got {tmp_path}"


def test_a_file_of_an_older_version_keeps_the_behaviour_of_then(tmp_path, monkeypatch):
    """What it lacks is not taken from the preset, nor from the defaults of today."""
    today = _config("--preset", "vits16", "--data", "/images")
    tree = yaml.safe_load(dump_yaml(today))
    assert tree["version"] == __version__
    for name in ("loss", "lr"):
        del tree["optim"][name]
    monkeypatch.setitem(cli.BEFORE, "optim.loss", "l2")
    file = _yaml(tmp_path, yaml.safe_dump(tree))
    config = _config("--config", file)
    assert (config.optim.loss, config.optim.lr) == ("l2", OptimConfig().lr)
    assert replace(config.optim, loss="smooth_l1") == today.optim
    # nor is it a changed recipe for the run itself
    old = {key: value for key, value in tree.items() if key != "version"}
    assert recipe_difference(old, as_dict(config)) == []
    assert recipe_difference(old, as_dict(today)) == ["optim.loss: l2 -> smooth_l1"]


@pytest.mark.parametrize("text", ["1e-3", "2E-4", ".5e-3", "1.5e-3", "0.001", "1", "'1e-3'"])
def test_yaml_floats_in_every_notation(tmp_path, text):
    # PyYAML reads 1e-3, without a dot, as a string
    file = _yaml(tmp_path, f"optim: {{lr: {text}, final_lr: 0}}")
    config = _config(*DEMO, "--config", file)
    assert (config.optim.lr, config.optim.final_lr) == (float(text.strip("'")), 0.0)


def test_yaml_none_and_negative_numbers_and_special_characters(tmp_path):
    settings = {
        "data": {"threads": None, "mean": [-0.5, 0.0, 1e-9], "root": "/a b/[x] ü"},
        "batch": {"global": 128, "device": "auto"},
        "model": {"width": None},
    }
    config = _config("--config", _yaml(tmp_path, yaml.safe_dump(settings, allow_unicode=True)))
    assert config.data.threads is None
    assert config.data.mean == (-0.5, 0.0, 1e-9)
    assert config.data.root == "/a b/[x] ü"
    assert (config.batch.global_, config.batch.device) == (128, "auto")
    assert config.model.width is None


def test_an_empty_yaml_file_changes_nothing(tmp_path):
    assert _config(*DEMO, "--config", _yaml(tmp_path, "# nothing\n")) == preset("demo")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_printed_configuration_reads_back(name, tmp_path, capsys):
    arguments = ["--preset", name, "--optim.lr", "3e-7", "--data.crop", "112", "336", "--seed", "9"]
    assert train.main([*arguments, "--print-config"]) == 0
    printed = capsys.readouterr().out
    # over another preset, so that nothing may be missing
    other = "vits16" if name == "demo" else "demo"
    again = _config("--preset", other, "--config", _yaml(tmp_path, printed))
    assert again == _config(*arguments)
    assert again.optim.lr == 3e-7
    assert yaml.safe_load(dump_yaml(again)) == yaml.safe_load(printed)


# --- wrong input: one line, exit code 2, no data touched -----------------------------------------


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs main and returns its one line on stderr."""
    assert train.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "group"),
    [
        (["--preset", "vitb16_in1k", "--batch.global", "64"], 64),
        (["--preset", "vitb16_in1k", "--batch.global=96"], 96),
        (["--preset", "vitb16_in1k", "--batch.global", "192"], 96),
        (["--preset", "vitb16_in1k", "--batch.global", "1024"], 128),
        (["--preset", "vith16_448_in1k", "--batch.global", "40"], 10),
        # a prime beyond the preset's: contexts whole
        (["--preset", "vitb16_in1k", "--batch.global", "131"], 1),
        ([*DEMO, "--batch.global", "48", "--batch.device", "auto"], 48),
    ],
)
def test_a_group_that_is_not_given_fits_the_batch(arguments, group, tmp_path):
    (tmp_path / "batch.yaml").write_text("batch: {global: 7}\nmasks: {min_keep: 5}\n")
    start = preset(arguments[1]).masks.truncation_group
    for more, keep in (([], None), (["--config", str(tmp_path / "batch.yaml")], 5)):
        invocation = parse([*arguments, *more])
        config = invocation.config
        assert config.masks.truncation_group == group
        assert keep is None or config.masks.min_keep == keep
        assert config.batch.global_ % group == 0
        said = [note for note in invocation.notes if f"truncation_group {group} instead" in note]
        assert invocation.notes == tuple(said)
        assert len(said) == (group != start)
        # what a run writes down and reads again says the group, and needs no note
        (tmp_path / "config.yaml").write_text(dump_yaml(config))
        again = parse([*arguments[:2], "--config", str(tmp_path / "config.yaml")])
        assert (again.config, again.notes) == (config, ())


@pytest.mark.parametrize(
    "flag", ["--masks.truncation-group=16", "--masks.truncation_group", "--masks.truncation-group"]
)
def test_a_group_that_is_given_stays(flag, tmp_path, capsys):
    given = [flag] if "=" in flag else [flag, "16"]
    asked = ["--preset", "vitb16_in1k", "--batch.global"]
    invocation = parse([*asked, "64", *given])
    assert (invocation.config.masks.truncation_group, invocation.notes) == (16, ())
    (tmp_path / "group.yaml").write_text("masks: {truncation_group: 16}\n")
    for way in (given, ["--config", str(tmp_path / "group.yaml")]):
        message = _refused([*asked, "72", *way], capsys)
        assert "masks.truncation_group (16): change either, or give no group" in message
        assert message.endswith(", got 72")


def test_a_fitted_group_is_said(tmp_path, capsys):
    said = "masks.truncation_group 48 instead of 64: none is given, and it must divide"
    arguments = [*DEMO, "--batch.global", "48", "--batch.device", "auto"]
    assert train.main([*arguments, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"# {said}")
    assert yaml.safe_load(text)["masks"]["truncation_group"] == 48
    arguments += ["--out", str(tmp_path / "run")]
    assert train.main([*arguments, "--dry-run", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(said)
    assert "(truncation group 48)" in text
    # the preset's own is what help shows
    with pytest.raises(SystemExit):
        train.main([*DEMO, "--help"])
    assert re.search(r"truncation-group INT.*?default: 64", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.scale", "0.3", "1.2"],
            "data.scale must be two ascending numbers above 0 and at most 1, got (0.3, 1.2)",
        ),
        (
            ["--batch.global", "96", "--batch.device", "auto", "--masks.truncation-group", "64"],
            "batch.global must be divisible by masks.truncation_group (64): change either, or give "
            "no group, got 96",
        ),
        (
            ["--optim.warmup", "9"],
            "optim.warmup must be at most optim.epochs * optim.ipe_scale (8), got 9.0",
        ),
    ],
)
def test_contradictions_are_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*DEMO, *arguments, "--data", str(tmp_path / "missing"), "--out", str(out)]
    assert _refused(arguments, capsys) == message
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--optim.lr", "fast"], ["--optim.lr must be a number, got 'fast'"]),
        (["--seed", "3.5"], ["--seed must be a whole number, got '3.5'"]),
        (["--optim.lr"], ["--optim.lr must be followed by a value, got none"]),
        (["--batch.device", "x"], ["--batch.device must be INT|{auto}, got 'x'"]),
        (
            ["--model.name", "vit_hug"],
            ["--model.name must be one of 'vit_tiny', ", "got 'vit_hug'"],
        ),
        (["--data.scale", "0.5"], ["--data.scale must be followed by 2 values, got fewer"]),
        (["--data.scale", "0.5", "x"], ["--data.scale must be float, float, got '0.5', 'x'"]),
        (["--data"], ["data.root must be a path or several, got ()"]),
        (["--preset", "vitb"], ["preset", "vitb16_in1k", "'vitb'"]),
        (["word"], ["unexpected argument word"]),
        (["--xyzzyx", "1"], ["unknown option --xyzzyx; see --help for the valid ones"]),
        (["--config", "/none.yaml"], ["--config must be a readable YAML file, got /none.yaml"]),
    ],
)
def test_unreadable_values_name_the_option(arguments, parts, capsys):
    message = _refused(arguments, capsys)
    assert all(part in message for part in parts)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "seed must be in 0..2**63-1, got -1"),
        (["--seed", "x"], "--seed must be a whole number, got 'x'"),
        (
            ["--optim.loss", "huber"],
            "--optim.loss must be one of 'smooth_l1', 'l2', 'l1', got 'huber'",
        ),
    ],
)
def test_messages_do_not_depend_on_the_terminal(arguments, message, encoding, monkeypatch):
    # tyro draws its messages in a box, with other characters for other encodings
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as caught:
        parse(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("option", "near"),
    [
        ("--optim.lrr", "--optim.lr"),
        ("--optim.weight-deacy", "--optim.weight-decay"),
        ("--optim.weight_deacy=0.1", "--optim.weight-decay"),
        ("--modle.name", "--model.name"),
        ("--bach-size", "--batch-size"),
        ("--data.croop", "--data.crop"),
        ("--batch.global_", "--batch.global"),
        ("--log.no-sampels", "--log.samples"),
        ("--no-seed", "--seed"),
        ("--presett", "--preset"),
        ("--dryrun", "--dry-run"),
    ],
)
def test_an_unknown_option_names_the_nearest(option, near, capsys):
    message = _refused([option, "1"], capsys)
    assert message == f"unknown option {option.partition('=')[0]}; did you mean {near}?"


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("optim: {lrr: 1}", "optim.lrr", "optim.lr"),
        ("optm: {lr: 1}", "optm.lr", "optim.lr"),
        ("lr: 1", "lr", "optim.lr"),
        ("data: {crop: 64, scael: [1, 1]}", "data.scael", "data.scale"),
        ("sead: 3", "sead", "seed"),
        ("masks: {min-keep: 3}", "masks.min-keep", "masks.min_keep"),
        ("version: 9\nsead: 3", "sead (of version 9, this is 0.1.0)", "seed"),
    ],
)
def test_an_unknown_yaml_key_names_the_nearest(text, key, near, tmp_path, capsys):
    file = _yaml(tmp_path, text)
    assert (
        _refused(["--config", file], capsys) == f"{file}: unknown key {key}; did you mean {near}?"
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n- 2\n", "must hold a mapping, got list"),
        ("optim: {lr: [\n", "must be a readable YAML file"),
        ("optim: !!python/object/apply:os.getcwd []\n", "must be a readable YAML file"),
        ("data: {crop: 97}\n", "data.crop must be a multiple of model.patch_size (4), got 97"),
        ("optim: {lr: yes}\n", "--optim.lr"),
        ("optim: {lr: [1, 2]}\n", "2"),
        ("out: no\n", "out"),
        ("seed: 1.5\n", "--seed"),
        ("seed: 1\noptim: {lr: 1, lr: 2}\n", "a key must stand once, got 'lr' again in line 2"),
    ],
)
def test_wrong_yaml_is_one_line(text, part, tmp_path, capsys):
    arguments = [*DEMO, "--print-config", "--config", _yaml(tmp_path, text)]
    assert part in _refused(arguments, capsys)


def test_masks_that_the_grid_cannot_hold_are_refused_before_data(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*DEMO, "--data.crop", "8", "--data", str(tmp_path / "missing"), "--out", str(out)]
    message = _refused(arguments, capsys)
    assert message.startswith("masks.")
    assert "grid of 2x2" in message
    assert not out.exists()


def test_help_names_options_and_presets(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("--preset", "--config", "--dry-run", "--optim.lr", "--batch.global", *PRESETS):
        assert word in text


# --- dry run -------------------------------------------------------------------------------------


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text}"
    return float(found.group(1))


def test_dry_run_prints_sizes_and_hours_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number}.jpg")
    out = tmp_path / "run"
    arguments = ["--preset", "fashion_mnist_published", "--data", str(folder), "--out", str(out)]
    arguments += ["--data.crop", "32", "--masks.truncation-group", "4", "--optim.epochs", "3"]
    arguments += ["--batch.global", "8", "--batch.device", "4", "--device", "cpu"]
    arguments += ["--masks.min-keep", "4"]
    assert train.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[1:])) <= 100
    text = " ".join(printed.split())
    assert not out.exists()
    # 6 blocks of 12 * 192^2 + 13 * 192, patches of 48 values, a final norm
    encoder = 6 * (12 * 192**2 + 13 * 192) + 49 * 192 + 2 * 192
    # 4 blocks 96 wide, in and out projections, mask token, final norm
    predictor = 4 * (12 * 96**2 + 13 * 96) + 193 * 96 + 97 * 192 + 96 + 2 * 96
    assert _number(r"encoder ([\d.]+) M", text) == pytest.approx(encoder / 1e6, abs=0.05)
    assert _number(r"predictor ([\d.]+) M", text) == pytest.approx(predictor / 1e6, abs=0.05)
    # the target encoder alone: 64 tokens through all matrices, and attention
    target = 6 * (64 * 2 * 12 * 192**2 + 4 * 64 * 64 * 192) + 2 * 64 * 48 * 192
    total = _number(r"GFLOP/image +([\d.]+)", text) * 1e9
    shares = [_number(rf"{part} (\d+) %", text) for part in ("target", "context", "predictor")]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert all(share > 0 for share in shares)
    assert total * shares[0] / 100 == pytest.approx(target, rel=0.1)
    assert "grid 8 x 8" in text
    assert 4 < _number(r"context ([\d.]+) \(truncation group 4\)", text) < 49
    # on 8 x 8 patches a target block has 3x3 to 4x3 of them
    assert 9 <= _number(r"target block ([\d.]+)", text) <= 12
    assert "global 8 = 1 rank x 4 on the device x 2 accumulated" in text
    # weights, gradients, moments and averages in float32, weights and targets in bfloat16
    fixed = 4 * (4 * (encoder + predictor) + encoder) + 2 * (2 * encoder + predictor)
    shown = _number(r"([\d.]+) weights and optimiser", text)
    assert shown == pytest.approx(fixed / 2**30, abs=0.006)
    image = _number(r"4 images x ([\d.]+) MiB", text)
    assert 0 < _number(r"\(([\d.]+) for the backward pass", text) < image
    total = _number(r"estimate +([\d.]+) GiB a rank", text)
    assert total == pytest.approx(shown + 4 * image / 2**10, abs=0.011)
    assert "fast, memory none, bfloat16, shard none" in text
    assert 0 < _number(r"the fast path leaves out (\d+) %", text) < 50
    # floor(20 / 8) = 2 steps an epoch
    assert "20 images, 6 steps; less than a minute at 40 %" in text


def test_dry_run_of_a_missing_folder_is_one_line(tmp_path, capsys):
    path = str(tmp_path / "missing")
    assert path in _refused([*DEMO, "--eval.data=None", "--data", path, "--dry-run"], capsys)


def test_fashion_mnist_is_the_released_recipe_on_a_small_scale():
    """Marks were measured with it; `fashion_mnist` differs in crops, masks and learning rate."""
    config, released = preset("fashion_mnist_published"), preset("vitb16_in1k")
    assert config.grid == (7, 7)
    assert config.masks == replace(released.masks, truncation_group=256)
    assert (config.data.scale, config.data.ratio) == (released.data.scale, released.data.ratio)
    for name in ("lr", "weight_decay", "final_weight_decay", "momentum", "final_momentum", "loss"):
        assert getattr(config.optim, name) == getattr(released.optim, name), name
    schedules = Schedules.of(config.optim, global_batch=256, steps_per_epoch=60_000 // 256)
    assert config.max_steps == 2400 <= schedules.run_steps
    # the schedules end where the run does
    assert schedules.at(2400).lr == pytest.approx(config.optim.final_lr, rel=1e-3)
    assert schedules.at(2399).lr > config.optim.final_lr
    ours = preset("fashion_mnist")
    same = {"data": config.data, "masks": config.masks, "optim": config.optim, "out": config.out}
    assert replace(ours, **same) == config
    assert ours.data == replace(config.data, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert ours.masks != config.masks
    assert ours.optim == replace(config.optim, lr=config.optim.lr / 2)
