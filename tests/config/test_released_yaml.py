"""Files of the released trainer: each is our preset, and no key is passed over in silence."""

import copy
from typing import Any
from unittest import mock

import pytest
import yaml

from ijepa_fast import train
from ijepa_fast.config.cli import as_dict, flatten, parse
from ijepa_fast.config.presets import preset
from ijepa_fast.config.released_yaml import is_released
from ijepa_fast.errors import UsageError
from ijepa_fast.state.run_folder import NOT_RECIPE
from ijepa_fast.visualize.run_pictures import Pictures
from tests.trainer import tiny

# the table "Released configurations" of the recipe: model, patch, crop, images a GPU, epochs,
# warm-up, predictor depth
RELEASED = {
    "vith14_in1k": ("vit_huge", 14, 224, 128, 300, 40, 12),
    "vith16_448_in1k": ("vit_huge", 16, 448, 16, 300, 40, 12),
    "vith14_in22k": ("vit_huge", 14, 224, 32, 66, 3, 12),
    "vitg16_in22k": ("vit_giant", 16, 224, 16, 44, 3, 16),
}


def _released(name="vith14_in1k") -> dict[str, Any]:
    model, patch, crop, batch, epochs, warmup, depth = RELEASED[name]
    return {
        "data": {
            "batch_size": batch,
            "color_jitter_strength": 0.0,
            "crop_scale": [0.3, 1.0],
            "crop_size": crop,
            "image_folder": "imagenet/",
            "num_workers": 10,
            "pin_mem": True,
            "root_path": "/datasets",
            "use_color_distortion": False,
            "use_gaussian_blur": False,
            "use_horizontal_flip": False,
        },
        "logging": {"folder": "/checkpoints/run", "write_tag": "jepa"},
        "mask": {
            "allow_overlap": False,
            "aspect_ratio": [0.75, 1.5],
            "enc_mask_scale": [0.85, 1.0],
            "min_keep": 10,
            "num_enc_masks": 1,
            "num_pred_masks": 4,
            "patch_size": patch,
            "pred_mask_scale": [0.15, 0.2],
        },
        "meta": {
            "copy_data": False,
            "load_checkpoint": False,
            "model_name": model,
            "pred_depth": depth,
            "pred_emb_dim": 384,
            "read_checkpoint": None,
            "use_bfloat16": True,
        },
        "optimization": {
            "ema": [0.996, 1.0],
            "epochs": epochs,
            "final_lr": 1.0e-06,
            "final_weight_decay": 0.4,
            "ipe_scale": 1.0,
            "lr": 0.001,
            "start_lr": 0.0002,
            "warmup": warmup,
            "weight_decay": 0.04,
        },
    }


def _file(folder, tree, **changes):
    """Writes a file; a change is section__key=value, and ... takes a key out."""
    tree = copy.deepcopy(tree)
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if value is ...:
            del tree[section][key]
        else:
            tree[section][key] = value
    path = folder / "released.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def _convert(folder, *flags, name="vith14_in1k", **changes):
    return parse(["--config", _file(folder, _released(name), **changes), *flags])


def _refused(folder, *flags, **changes) -> str:
    with pytest.raises(UsageError) as caught:
        _convert(folder, *flags, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_file_is_our_preset(name, tmp_path):
    config = _convert(tmp_path, name=name).config
    ours, theirs = flatten(as_dict(preset(name))), flatten(as_dict(config))
    assert (theirs.pop("out"), theirs.pop("data.root")) == (
        "/checkpoints/run",
        "/datasets/imagenet",
    )
    recipe = [key for key in theirs if not key.startswith(NOT_RECIPE)]
    assert len(recipe) > 40
    assert {key: theirs[key] for key in recipe} == {key: ours[key] for key in recipe}


def test_every_value_of_the_file_reaches_the_configuration(tmp_path):
    """Values that are no defaults of ours."""
    config = _convert(
        tmp_path,
        data__batch_size=64,
        data__crop_scale=[0.4, 0.9],
        data__crop_size=112,
        mask__aspect_ratio=[0.8, 1.4],
        mask__enc_mask_scale=[0.7, 0.8],
        mask__min_keep=7,
        mask__num_enc_masks=2,
        mask__num_pred_masks=3,
        mask__patch_size=8,
        mask__pred_mask_scale=[0.1, 0.25],
        meta__model_name="vit_small",
        meta__pred_depth=5,
        meta__pred_emb_dim=192,
        meta__use_bfloat16=False,
        optimization__ema=[0.99, 0.999],
        optimization__epochs=11,
        optimization__final_lr="1e-5",
        optimization__final_weight_decay=0.3,
        optimization__ipe_scale=1.25,
        optimization__lr=0.002,
        optimization__start_lr=0.0001,
        optimization__warmup=2.5,
        optimization__weight_decay=0.05,
    ).config
    assert (config.masks.truncation_group, config.batch.global_) == (64, 2048)
    assert (config.data.scale, config.data.crop) == ((0.4, 0.9), 112)
    masks = config.masks
    assert (masks.target_aspect, masks.context_scale) == ((0.8, 1.4), (0.7, 0.8))
    assert (masks.min_keep, masks.num_contexts, masks.num_targets) == (7, 2, 3)
    assert masks.target_scale == (0.1, 0.25)
    assert (masks.geometry, masks.context_aspect) == ("published", (1.0, 1.0))
    model = config.model
    assert (model.name, model.patch_size, model.predictor_width) == ("vit_small", 8, 192)
    assert model.architecture.predictor_depth == 5
    optim = config.optim
    assert (optim.momentum, optim.final_momentum, optim.precision) == (0.99, 0.999, "float32")
    assert (optim.epochs, optim.ipe_scale, optim.warmup) == (11, 1.25, 2.5)
    assert (optim.start_lr, optim.lr, optim.final_lr) == (1e-4, 2e-3, 1e-5)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.05, 0.3)


def test_every_key_has_its_line(tmp_path):
    invocation = _convert(tmp_path)
    for section, content in _released().items():
        for key in content:
            lines = [line for line in invocation.notes if f"{section}.{key} " in line]
            assert lines, f"{section}.{key}"
    assert not [line for line in invocation.notes if "\n" in line]
    for line in (
        "optimization.ipe_scale 1.0 -> optim.ipe_scale 1.0",
        "meta.use_bfloat16 true -> optim.precision bfloat16",
        "data.root_path /datasets + data.image_folder imagenet/ -> data.root /datasets/imagenet",
        "data.use_horizontal_flip false: off, as here",
        "ignored: data.pin_mem true (not needed here)",
        "optimization.ema [0.996, 1.0] -> optim.momentum 0.996, optim.final_momentum 1.0",
    ):
        assert line in invocation.notes, line
    (batch,) = [line for line in invocation.notes if line.startswith("data.batch_size")]
    assert "masks.truncation_group 128, batch.global 2048 (" in batch
    assert "128 x 16 GPUs" in batch


def test_what_the_file_lacks_is_said_and_stays_published(tmp_path):
    invocation = _convert(
        tmp_path, optimization__warmup=..., meta__pred_depth=..., logging__folder=...
    )
    missing = [line for line in invocation.notes if line.startswith("not in the file")]
    assert missing == [
        "not in the file: meta.pred_depth (the published value is kept)",
        "not in the file: optimization.warmup (the published value is kept)",
    ]
    assert invocation.config.optim.warmup == 40
    assert invocation.config.out == "runs/released"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data__use_horizontal_flip", True, "flip must be false, got true: random flips are not"),
        ("data__use_color_distortion", True, "must be false, got true: colour distortion is not"),
        ("data__use_gaussian_blur", True, "must be false, got true: blur is not part of"),
        ("mask__allow_overlap", True, "must be false, got true: context blocks never overlap"),
        ("optimization__lr", "fast", "optimization.lr must be a number, got 'fast'"),
        ("optimization__lr", True, "optimization.lr must be a number, got True"),
        ("optimization__lr", None, "optimization.lr must be a number, got None"),
        ("optimization__lr", float("nan"), "optimization.lr must be a number, got nan"),
        ("optimization__epochs", 2.5, "optimization.epochs must be a whole number, got 2.5"),
        ("optimization__ema", [0.9], "optimization.ema must be two numbers, got [0.9]"),
        ("optimization__ema", 0.9, "optimization.ema must be two numbers, got 0.9"),
        ("meta__use_bfloat16", 1, "meta.use_bfloat16 must be true or false, got 1"),
        ("meta__use_bfloat16", "yes", "meta.use_bfloat16 must be true or false, got 'yes'"),
        ("data__use_gaussian_blur", "no!", "must be true or false"),
        ("data__batch_size", 0, "data.batch_size must be at least 1, got 0"),
        ("data__root_path", 3, "data.root_path must be text, got 3"),
        ("meta__model_name", "vit_hug", "got 'vit_hug'; did you mean vit_huge?"),
        ("mask__enc_mask_scale", [0.9, 0.1], "masks.context_scale must be two ascending"),
        ("optimization__warmups", 3, "unknown key optimization.warmups; did you mean optimizat"),
        ("data__batch_size", 100, "data.batch_size must be a divisor of 2048"),
        ("optimization__epochs", 10**400, "must be a number"),
    ],
)
def test_wrong_values_are_named(key, value, words, tmp_path):
    assert words in _refused(tmp_path, **{key: value})


def test_unknown_and_malformed_sections_are_named(tmp_path):
    tree = {**_released(), "model": {"name": "vit_huge"}}
    with pytest.raises(UsageError, match=r"released.yaml: unknown section model: .*optimization"):
        parse(["--config", _file(tmp_path, tree)])
    with pytest.raises(UsageError, match=r"meta must hold a mapping, got 3"):
        parse(["--config", _file(tmp_path, {**_released(), "meta": 3})])


def test_flags_win_and_a_given_global_batch_is_not_guessed(tmp_path):
    invocation = _convert(
        *(tmp_path, "--batch.global", "400", "--optim.lr=0.5", "--data", "/mine"),
        data__batch_size=100,
    )
    config = invocation.config
    assert (config.batch.global_, config.masks.truncation_group) == (400, 100)
    assert (config.optim.lr, config.data.root) == (0.5, "/mine")
    assert any("batch.global as given" in line for line in invocation.notes)


def test_the_group_of_a_released_file_fits_a_smaller_batch(tmp_path):
    """The file's batch is its GPUs', as a preset's group is."""
    invocation = _convert(tmp_path, "--batch.global", "96")
    config = invocation.config
    assert (config.batch.global_, config.masks.truncation_group) == (96, 96)
    assert "masks.truncation_group 96 instead of 128" in invocation.notes[-1]
    assert _convert(tmp_path, "--batch.global", "512").config.masks.truncation_group == 128
    message = _refused(tmp_path, "--batch.global", "96", "--masks.truncation-group", "128")
    assert message.startswith("batch.global must be divisible by masks.truncation_group (128): ")


def test_a_preset_beside_a_released_file_is_refused(tmp_path):
    message = _refused(tmp_path, "--preset", "demo")
    assert message.startswith("--preset must be left out, got demo")


def test_only_the_training_part_of_a_folder_is_trained_on(tmp_path):
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "val").mkdir()
    invocation = _convert(tmp_path, data__root_path=str(tmp_path), data__image_folder="set")
    assert invocation.config.data.root == str(tmp_path / "set" / "train")
    assert any("(the folder train in it)" in line for line in invocation.notes)
    none = _convert(tmp_path, data__root_path=None, data__image_folder=...).config
    assert none.data.sources == ()


def test_a_checkpoint_to_start_from(tmp_path):
    changes = {"meta__load_checkpoint": True, "meta__read_checkpoint": "/runs/a.safetensors"}
    assert _convert(tmp_path, **changes).config.init == "/runs/a.safetensors"
    # named and not asked for; asked for and not named
    unused = _convert(tmp_path, meta__read_checkpoint="/runs/a.safetensors").notes
    assert any("/runs/a.safetensors (meta.load_checkpoint is not true)" in n for n in unused)
    resumed = _convert(tmp_path, meta__load_checkpoint=True).notes
    assert any(n.startswith("meta.load_checkpoint true: a run goes on") for n in resumed)


def test_our_own_files_are_not_taken_for_released_ones(tmp_path):
    assert not is_released(tiny.RECIPE)
    # one misspelt section is a misspelling
    path = tmp_path / "ours.yaml"
    path.write_text("mask: {min_keep: 3}\n")
    with pytest.raises(UsageError, match=r"unknown key mask.min_keep; did you mean masks.min_keep"):
        parse(["--config", str(path)])


def test_printed_yaml_reads_back_with_the_report_as_comments(tmp_path, capsys):
    # a line feed in a value must not end the comment
    path = _file(tmp_path, _released(), logging__write_tag="a\nb: c")
    assert train.main(["--config", path, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "# optimization.epochs 300 -> optim.epochs 300\n" in text
    (tmp_path / "again.yaml").write_text(text)
    again = parse(["--config", str(tmp_path / "again.yaml")])
    assert again.config == parse(["--config", path]).config
    assert again.notes == ()


def test_dry_run_and_training_report_it(tmp_path, capsys):
    path = _file(tmp_path, _released(), data__root_path=None, data__image_folder=None)
    assert train.main(["--config", path, "--dry-run", "--device", "cpu"]) == 0
    assert "optimization.epochs 300 -> optim.epochs 300" in capsys.readouterr().out

    images, out = tiny.write_images(tmp_path / "images", 8), tmp_path / "out"
    path = _file(
        tmp_path,
        _released(),
        data__batch_size=8,
        data__crop_size=32,
        mask__min_keep=1,
        mask__patch_size=8,
        meta__model_name="vit_tiny",
        meta__pred_depth=1,
        meta__pred_emb_dim=24,
        meta__use_bfloat16=False,
        optimization__epochs=1,
        optimization__warmup=0,
        logging__folder=str(out),
    )
    flags = ["--batch.global=8", "--data", str(images), "--model.depth=1", "--data.decoder=pillow"]
    with mock.patch.object(Pictures, "_draw", return_value=None):
        assert train.main(["--config", path, *flags, "--device=cpu", "--data.threads=1"]) == 0
    line = "optimization.epochs 1 -> optim.epochs 1"
    assert line in capsys.readouterr().out
    assert line in (out / "train.log").read_text()
