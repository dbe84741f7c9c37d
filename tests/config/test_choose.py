"""Any folder of images trains from the first command on: the rule, and what gives way to what."""

import itertools
import json
from dataclasses import replace
from typing import get_type_hints

import pytest
import yaml

from ijepa_fast import settings
from ijepa_fast.config import Config, Facts, as_dict, choose, describe, flatten, parse, preset
from ijepa_fast.errors import UsageError
from ijepa_fast.masks import check_masks
from tests.trainer import tiny

CPU = Facts(images=5000, height=300, width=400, device="cpu", memory=2**34, cores=2, bfloat16=False)
GPU = replace(CPU, device="cuda", memory=80 * 2**30, cores=8, bfloat16=True)

SMALL_GPU = replace(GPU, images=10**6, memory=2**33)


def _config(facts: Facts, *flags: str) -> Config:
    """What a command line becomes on such data and such a machine."""
    argv = ["--data", "x", *flags]
    asked = parse(argv)
    return parse(argv, choose(facts, asked.given, asked.open_)).config


def _built(choices) -> Config:
    """A configuration without the command line, which takes longer."""
    parts: dict = {}
    for key, value in choices.items():
        section, _, name = key.partition(".")
        one = key == "data.crop" and len(value) == 1
        parts.setdefault(section, {})[name.replace("global", "global_")] = (
            value[0] if one else value
        )
    kinds = get_type_hints(Config)
    return Config(**{section: kinds[section](**values) for section, values in parts.items()})


@pytest.mark.parametrize("machine", [CPU, replace(CPU, cores=64, bfloat16=True), GPU])
@pytest.mark.parametrize("images", [1, 3, 27, 450, 5000, 100_000, 1_300_000, 10**7])
def test_every_choice_is_valid(machine, images):
    sides = (4, 13, 16, 28, 32, 40, 57, 96, 224, 500, 4000)
    for height, width, world in itertools.product(sides, sides, (1, 3, 8)):
        facts = replace(machine, images=images, height=height, width=width, world=world)
        config = _built(choose(facts, {}))
        check_masks(config.masks, config.grid)
        batch, optim = config.batch.global_, config.optim
        assert batch % world == 0
        assert batch <= max(images, world)
        assert all(7 <= side <= 14 for side in config.grid)
        assert config.data.crop_size[0] <= max(min(height, width), 8)
        assert 2.5e-4 <= optim.lr <= 1e-3
        # long enough to learn something, if there is something to learn from
        steps = optim.epochs * (images // batch)
        assert images < 27 * world or steps >= 800
        assert optim.precision == ("bfloat16" if facts.device == "cuda" else optim.precision)
        assert max(map(len, describe(facts, choose(facts, {})))) <= 100


@pytest.mark.parametrize(
    ("facts", "name", "patch", "crop", "batch", "epochs", "lr", "precision"),
    [
        (CPU, "vit_tiny", 8, 64, 64, 38, 2.5e-4, "float32"),
        (replace(CPU, images=27, bfloat16=True), "vit_tiny", 8, 64, 4, 400, 2.5e-4, "float32"),
        (replace(CPU, images=450, bfloat16=True), "vit_tiny", 8, 64, 64, 400, 2.5e-4, "bfloat16"),
        (replace(CPU, images=100_000), "vit_tiny", 8, 64, 256, 8, 2.5e-4, "float32"),
        (replace(CPU, height=28, width=28), "vit_tiny", 4, 28, 64, 38, 2.5e-4, "float32"),
        (GPU, "vit_small", 16, 224, 256, 400, 2.5e-4, "bfloat16"),
        (replace(GPU, height=32, width=32), "vit_small", 4, 32, 256, 400, 2.5e-4, "bfloat16"),
        (replace(GPU, images=10**6), "vit_base", 16, 224, 2048, 123, 1e-3, "bfloat16"),
        (SMALL_GPU, "vit_small", 16, 224, 2048, 123, 1e-3, "bfloat16"),
    ],
)  # fmt: skip
def test_the_rule(facts, name, patch, crop, batch, epochs, lr, precision):
    config = _config(facts)
    optim = config.optim
    assert (config.model.name, config.model.patch_size, config.data.crop) == (name, patch, crop)
    assert (config.batch.global_, optim.epochs, optim.lr) == (batch, epochs, lr)
    assert optim.precision == precision
    assert (optim.start_lr, optim.final_lr) == pytest.approx((lr / 5, lr / 1000))
    # images of few pixels are taken whole
    assert config.data.scale == ((1.0, 1.0) if crop < 40 else (0.3, 1.0))
    assert config.out == "runs/x"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--data.crop 96 --out o", {"data.crop": 96, "model.patch_size": 12, "out": "o"}),
        ("--data.crop 64 96", {"data.crop": [64, 96], "model.patch_size": 8}),
        ("--data.crop 448", {"data.crop": 448, "model.patch_size": 32}),
        ("--model.patch-size 14", {"model.patch_size": 14, "data.crop": 98}),
        ("--model.patch-size=16 --data.crop=64", {"masks.min_keep": 4}),
        ("--batch.global 48", {"masks.truncation_group": 48, "optim.epochs": 29}),
        ("--batch.global 2048", {"optim.lr": 1e-3, "optim.lr_reference_batch": 2048}),
        ("--batch.device 12", {"batch.global": 48}),
        ("--masks.truncation-group 24", {"batch.global": 48}),
        ("--optim.epochs 2 --eval.every 7", {"optim.warmup": 0.133, "eval.every": 7}),
        ("--optim.warmup 50", {"optim.warmup": 50.0, "optim.epochs": 50}),
        ("--optim.ipe-scale 0.01", {"optim.warmup": 0.025}),
        ("--optim.lr 1e-2", {"optim.lr": 1e-2, "optim.start_lr": 2e-3}),
        ("--optim.lr-reference-batch 1024", {"optim.lr": 5e-4}),
        ("--optim.residual bfloat16", {"optim.precision": "bfloat16"}),
        ("--model.name vit_small", {"model.depth": None, "model.predictor_width": 384}),
        ("--model.depth 2 --data.ratio 1 1", {"model.name": "vit_tiny", "data.scale": [0.3, 1.0]}),
        ("--eval.data None", {"eval.data": None, "eval.every": None}),
    ],
)  # fmt: skip
def test_what_is_given_stays_and_the_rest_is_fitted_to_it(flags, expected):
    flat = flatten(as_dict(_config(CPU, *flags.split())))
    assert {key: flat[key] for key in expected} == expected


def test_a_file_gives_settings_as_flags_do(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {crop: 96}\noptim: {epochs: 2}\neval: {data: null}")
    flags = ("--data.crop", "96", "--optim.epochs", "2", "--eval.data", "None")
    assert _config(CPU, "--config", str(tmp_path / "own.yaml")) == _config(CPU, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data must name images where no --preset brings its own"),
        (["--data", "x", "--data.crop", "97"], "data.crop must be 7 to 14 patches where model.pat"),
        (["--data", "x", "--data.crop", "999999937"], "data.crop must be"),
        (["--data", "x", "--data.crop", "0"], "data.crop must be at least 1 pixel, got 0"),
        (["--data", "x", "--optim.epochs", "0"], "optim.epochs must be at least 1, got 0"),
        (["--data", "x", "--batch.global", "0.5"], "--batch.global"),
        (["--data", "x", "--optim.warmup", "1e400"], "optim.warmup must be"),
    ],
)
def test_wrong_flags_are_refused_before_the_data_are_known(flags, message):
    with pytest.raises(UsageError) as error:
        parse(flags)
    assert message in str(error.value)


# --- runs ----------------------------------------------------------------------------------------

FAST = ["--model.width", "48", "--model.depth", "1", "--model.predictor-width", "24"]
FAST += ["--model.predictor-depth", "1", "--data.decoder", "pillow", "--data.threads", "1"]


def test_a_folder_trains_and_resumes_with_what_was_chosen(tmp_path, monkeypatch, capsys):
    data, out = tiny.write_images(tmp_path / "photos", 27), tmp_path / "run"
    argv = ["--data", str(data), "--out", str(out), *FAST]
    assert tiny._main([*argv, "--max-steps", "2"], pictures=False) == 0
    said = capsys.readouterr().out
    assert "27 images of about 40 x 37 pixels; CPU, " in said
    assert "batch.global 4" in said
    assert "27 images: expect little" in said
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["data"]["crop"], config["optim"]["epochs"]) == (36, 400)
    # too few for an accuracy
    assert config["eval"]["data"] is None
    # its weights start another run, whose network is theirs
    init = ["--data", str(data), "--init", str(out), "--out", str(tmp_path / "second")]
    assert tiny._main([*init, "--print-config"], pictures=False) == 0
    said = capsys.readouterr().out
    assert "expect little" not in said
    shown = ("width", "depth", "heads", "predictor_width", "predictor_depth", "patch_size")
    second = yaml.safe_load(said)["model"]
    assert [second[name] for name in shown] == [48, 1, 3, 24, 1, config["model"]["patch_size"]]
    # on another machine the same run goes on
    monkeypatch.setattr(settings, "_facts", lambda *_: GPU)
    assert tiny._main([*argv, "--max-steps", "3"], pictures=False) == 0
    said = capsys.readouterr().out
    assert f"settings that are not given are those of {out}/config.yaml" in said
    assert "resumed from the checkpoint at step 2" in said
    again = yaml.safe_load((out / "config.yaml").read_text())
    assert {**again, "max_steps": 2} == config
    # with other images it does not
    tiny.write_images(tmp_path / "photos", 28)
    assert tiny._main([*argv, "--max-steps", "4"], pictures=False) == 2
    assert "differ from those that the run was started with" in capsys.readouterr().err


@pytest.mark.parametrize("named", [(), ("--preset", "demo")])
@pytest.mark.parametrize("classes", [True, False])
def test_class_folders_are_what_is_evaluated(named, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(settings, "MIN_LABELLED", 30)
    data = tiny.write_images(tmp_path / "photos", 40)
    if not classes:
        for number, path in enumerate(sorted(data.glob("*/*"))):
            path.rename(data / f"{number}.jpg")
    argv = [*named, "--data", str(data), "--out", str(tmp_path / "run")]
    assert tiny._main([*argv, "--print-config"], pictures=False) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["eval"]["data"] == (str(data) if classes else None)
    assert not found["eval"]["whole"]
    # without labels the features are still watched
    assert (found["eval"]["every"] is None) == bool(classes or named)
    if named:
        asked = json.loads(json.dumps(as_dict(preset("demo"))))
        assert all(found[key] == asked[key] for key in ("model", "masks", "optim", "batch"))


def test_dry_run_says_what_is_chosen(tmp_path, capsys):
    data = tiny.write_images(tmp_path / "photos", 8)
    argv = ["--data", str(data), "--out", str(tmp_path / "run"), "--dry-run", "--device", "cpu"]
    assert tiny._main(argv, pictures=False) == 0
    said = capsys.readouterr().out
    assert "8 images of about 40 x 37 pixels" in said
    assert "8 images, 1,600 steps" in said
    assert not (tmp_path / "run").exists()
