"""Weights of other libraries in and out, held against those libraries' own code."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ijepa_fast
from ijepa_fast.config import ARCHITECTURES
from ijepa_fast.config.cli import parse
from ijepa_fast.errors import CheckpointError, UsageError
from ijepa_fast.model import Predictor, initialise
from ijepa_fast.state import checkpoint
from ijepa_fast.weights import (
    Pretrained,
    Shape,
    export,
    load_encoder,
    model_card,
    network_of,
    read_weights,
    start_weights,
)
from ijepa_fast.weights.fit import fit_to, resample_positions
from tests.trainer import tiny

SMALL = Shape(image_size=(24, 24), patch_size=8, width=32, depth=2, heads=2, mlp_hidden=48)
WIDE = Shape(image_size=(16, 40), patch_size=8, width=32, depth=2, heads=2, mlp_hidden=48)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def _network(shape, seed=0):
    """Random weights everywhere, norms and biases too."""
    network = network_of(shape)
    generator = torch.Generator().manual_seed(seed)
    initialise(network, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def _pretrained(shape, seed=0):
    state = _network(shape, seed).state_dict()
    return Pretrained(
        networks={"target_encoder": state}, shape=shape, mean=MEAN, std=STD, source="here"
    )


def _latest(folder):
    state = checkpoint.load_latest(folder)
    assert state is not None
    return state


def _images(shape, count=2):
    return torch.randn(count, 3, *shape.image_size, generator=torch.Generator().manual_seed(5))


def _near(a, b, limit=1e-5):
    assert a.shape == b.shape
    difference = float((a - b).norm() / b.norm())
    assert difference <= limit, difference


def _released(path, shape, *, prefix="module.", seed=0, predictor=True):
    """A file laid out as the published ones."""
    context, target = _network(shape, seed), _network(shape, seed + 1)
    tree = {
        "encoder": {prefix + k: v for k, v in context.state_dict().items()},
        "target_encoder": {prefix + k: v for k, v in target.state_dict().items()},
        "opt": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}},
        "scaler": {"scale": 65536.0},
        "epoch": 7,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }
    guesser = None
    if predictor:
        guesser = Predictor(
            grid=shape.grid,
            encoder_width=shape.width,
            width=16,
            depth=1,
            heads=shape.heads,
            mlp_hidden=64,
        )
        initialise(guesser, torch.Generator().manual_seed(seed + 2))
        tree["predictor"] = {prefix + k: v for k, v in guesser.state_dict().items()}
    torch.save(tree, path)
    return context, target, guesser


# --- the released layout -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_the_released_layout(tmp_path, prefix):
    path = tmp_path / "in1k_vith14_ep300.pth.tar"
    context, target, guesser = _released(path, SMALL, prefix=prefix)
    read = read_weights(path, heads=2)
    assert read.shape == SMALL
    assert set(read.networks) == {"encoder", "target_encoder", "predictor"}
    for key, value in guesser.state_dict().items():
        assert torch.equal(read.networks["predictor"][key], value), key
    for which, network in (("target", target), ("context", context)):
        encoder = ijepa_fast.load_encoder(path, encoder=which, heads=2)
        assert torch.equal(encoder.forward_features(_images(SMALL)), network(_images(SMALL)))


def test_a_file_before_pytorch_1_6(tmp_path):
    """It cannot be mapped into memory."""
    path = tmp_path / "old.pth"
    network = _network(SMALL)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_encoder(path, heads=2)(_images(SMALL)), network(_images(SMALL)).mean(1))


class _Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL_MARK"],))


def test_a_file_that_runs_code_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_MARK", str(tmp_path / "ran"))
    path = tmp_path / "evil.pth.tar"
    torch.save({"encoder": _Evil()}, path)
    with pytest.raises(UsageError, match=r"tensors and plain values, got .*evil.pth.tar"):
        read_weights(path)
    path.write_bytes(pickle.dumps(_Evil(), protocol=2))
    with pytest.raises(UsageError, match="tensors and plain values"):
        read_weights(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_torn_file_is_an_error(tmp_path, size):
    path = tmp_path / "torn.pth"
    torch.save(_network(SMALL).state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UsageError, match=r"torn\.pth"):
        read_weights(path)


# --- Hugging Face --------------------------------------------------------------------------------


def _hf_config(shape):
    size = list(shape.image_size)
    return transformers.IJepaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_hidden,
        layer_norm_eps=1e-6,
        image_size=size[0] if size[0] == size[1] else size,
        patch_size=shape.patch_size,
    )


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["square", "rectangle"])
def test_their_model_to_ours(tmp_path, shape):
    torch.manual_seed(0)
    theirs = transformers.IJepaModel(_hf_config(shape)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_encoder(tmp_path / "hf")
    images = _images(shape)
    with torch.no_grad():
        _near(ours.forward_features(images), theirs(images).last_hidden_state)


def test_names_of_version_5_are_read_too(tmp_path):
    """As `state_dict()` has them, rather than files."""
    torch.manual_seed(0)
    theirs = transformers.IJepaModel(_hf_config(SMALL)).eval()
    state = {f"module.{k}": v.contiguous() for k, v in theirs.state_dict().items()}
    assert any("q_proj" in key for key in state)
    save_file(state, tmp_path / "model.safetensors")
    ours = load_encoder(tmp_path / "model.safetensors", heads=2)
    with torch.no_grad():
        _near(ours.forward_features(_images(SMALL)), theirs(_images(SMALL)).last_hidden_state)


def test_shards(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.IJepaModel(_hf_config(SMALL)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        expected = theirs(_images(SMALL)).last_hidden_state
    _near(load_encoder(tmp_path).forward_features(_images(SMALL)), expected)
    index = tmp_path / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"]["x"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(tree))
    with pytest.raises(UsageError, match="weight_map must name files beside it"):
        load_encoder(tmp_path)


def test_their_default_eps_is_refused(tmp_path):
    config = _hf_config(SMALL)
    config.layer_norm_eps = 1e-12
    transformers.IJepaModel(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="layer_norm_eps must be 1e-06, got 1e-12"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["square", "rectangle"])
def test_our_folder_to_their_model(tmp_path, shape):
    export.export(_pretrained(shape), tmp_path / "hf", format="hf")
    loaded: Any = transformers.IJepaModel.from_pretrained(
        tmp_path / "hf", output_loading_info=True, trust_remote_code=False
    )
    theirs, told = loaded
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    network = _network(shape)
    with torch.no_grad():
        _near(theirs.eval()(_images(shape)).last_hidden_state, network(_images(shape)))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_size_computes_the_same_there(tmp_path, name):
    """Full width, heads and MLP of every named size (giant: 6144); one block says it all."""
    a = ARCHITECTURES[name]
    patch = 14 if name == "vit_huge" else 16
    shape = Shape(
        image_size=(2 * patch, 3 * patch),
        patch_size=patch,
        width=a.width,
        depth=1,
        heads=a.heads,
        mlp_hidden=a.mlp_hidden,
    )
    export.export(_pretrained(shape), tmp_path / "hf", format="hf")
    theirs = transformers.IJepaModel.from_pretrained(tmp_path / "hf").eval()
    back = load_encoder(tmp_path / "hf")
    with torch.no_grad():
        expected = _network(shape)(_images(shape))
        _near(theirs(_images(shape)).last_hidden_state, expected)
        assert torch.equal(back.forward_features(_images(shape)), expected)


def test_their_processor_prepares_images_as_we_do(tmp_path):
    export.export(_pretrained(SMALL), tmp_path / "hf", format="hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    image = np.random.default_rng(0).integers(0, 256, (*SMALL.image_size, 3), dtype=np.uint8)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = load_encoder(tmp_path / "hf").normalise(torch.from_numpy(image)[None])
    _near(theirs, ours, 1e-6)
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["image_mean"] == [
        *MEAN
    ]


# --- timm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_timm_gets_our_mlp_width(name):
    """It computes int(width * ratio)."""
    a = ARCHITECTURES[name]
    for hidden in (a.mlp_hidden, a.mlp_hidden + 1, 2 * a.width - 1):
        shape = Shape(
            image_size=(32, 32),
            patch_size=16,
            width=a.width,
            depth=1,
            heads=a.heads,
            mlp_hidden=hidden,
        )
        arguments = export.timm_arguments(shape)
        assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == hidden


def test_a_timm_classifier_loses_its_head(tmp_path):
    state = dict(_network(SMALL).state_dict())
    state |= {"head.weight": torch.randn(10, 32), "head.bias": torch.randn(10)}
    save_file(state, tmp_path / "a.safetensors")
    encoder = load_encoder(tmp_path / "a.safetensors", heads=2)
    assert torch.equal(encoder.forward_features(_images(SMALL)), _network(SMALL)(_images(SMALL)))


# --- our own -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images") / "data", classes=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert tiny.run(data, out, max_steps=6) == 0
    return out


def _config(run):
    return parse(["--config", str(run / "config.yaml")]).config


def _export(run, out, capsys, *flags):
    code = export.main([str(run), str(out), *flags])
    return code, capsys.readouterr()


def test_a_run_a_checkpoint_and_all_exports_agree(run, tmp_path, capsys):
    state = _latest(run / "checkpoints")
    images = torch.randint(0, 256, (2, *_config(run).data.crop_size, 3), dtype=torch.uint8)
    for which, name in (("target", "target_encoder"), ("context", "encoder")):
        ours = load_encoder(run, encoder=which)
        prefix = f"{name}."
        for key, value in ours.network.state_dict().items():
            assert torch.equal(value, state.tensors[prefix + key])
        expected = ours(ours.normalise(images))
        again = load_encoder(run / "checkpoints" / "step-00000006", encoder=which)
        assert torch.equal(again(again.normalise(images)), expected)
        for layout in ("hf", "timm"):
            out = tmp_path / f"{which}-{layout}"
            code, printed = _export(run, out, capsys, "--format", layout, "--encoder", which)
            assert code == 0, printed.err
            assert f"{which} encoder of step 6 of {run} written to {out}" in printed.out
            there = load_encoder(out if layout == "hf" else out / "model.safetensors")
            assert torch.equal(there(there.normalise(images)), expected)
    code, printed = _export(run, tmp_path / "all", capsys, "--format", "torch")
    assert code == 0
    everything = read_weights(tmp_path / "all" / "model.safetensors")
    for name, network in everything.networks.items():
        for key, value in network.items():
            assert torch.equal(value, state.tensors[f"{name}.{key}"])
    assert {"encoder", "target_encoder", "predictor"} == set(everything.networks)


def test_the_card_tells_recipe_data_metrics_and_licence(run, data, tmp_path, capsys):
    rows = [
        {"step": 3, "data": "/a/x", "knn": {"target encoder, half": 0.1}, "images": [20, 10]},
        {"step": 6, "data": "/a/y", "knn": {"elsewhere": 0.2}},
        {"step": 6, "data": "/a/x", "knn": {"target encoder": 0.4321}},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert _export(run, tmp_path / "out", capsys)[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "mean of last_hidden_state",
        "CC BY-NC 4.0",
        "| kNN on x, target encoder | 43.2 % |",
        "6 steps of",
        "truncation_group:",
        "seed: 3",
        data.name,
    ):
        assert text in card, text
    # of a part of the images, and of other data
    assert "half" not in card
    assert "elsewhere" not in card
    # a card goes to the public: no paths of this machine
    assert str(data.parent) not in card
    assert str(run.parent) not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    image = tmp_path / "out" / "image.jpg"
    from PIL import Image

    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(image)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = code + "\nprint(tuple(features.shape))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=tmp_path / "out",
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    width = _config(run).model.architecture.width
    assert ran.stdout.strip().endswith(f"(1, {width})")


def test_nothing_is_overwritten(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    code, printed = _export(run, tmp_path / "out", capsys)
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("error: OUT must be a new or empty folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_checkpoints_mean_is_one_that_an_export_could_hold(run, tmp_path):
    state = _latest(run / "checkpoints")
    state.meta["config"]["data"]["mean"] = [1e18, 0.5, 0.5]
    path = checkpoint.write(tmp_path, state)
    with pytest.raises(UsageError, match=r"mean must be 3 numbers, got \(1e\+18, .*step-00000006"):
        read_weights(path)


def test_a_checkpoint_of_integers_is_no_weights(run, tmp_path):
    """With hashes that fit: whoever forges it can compute them."""
    folder = shutil.copytree(run / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    state = load_file(folder / "state.safetensors")
    state["target_encoder.norm.bias"] = state["target_encoder.norm.bias"].int()
    save_file(state, folder / "state.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    text = (folder / "state.safetensors").read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    manifest["state.safetensors"] = {"bytes": len(text), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((UsageError, CheckpointError), match=r"norm\.bias"):
        read_weights(folder)


def test_what_a_killed_export_left_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        # nobody removes anything after a kill
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        killed.setattr(export, "_check", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            export.export(_pretrained(SMALL), tmp_path / "a", format="timm")
    assert [len(list(left.rglob("model.safetensors"))) for left in tmp_path.iterdir()] == [1]
    export.export(_pretrained(SMALL), tmp_path / "a", format="timm")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_card_without_a_run():
    card = model_card.model_card(_pretrained(SMALL), layout="timm", which="target", metrics={})
    assert "Converted from here" in card
    assert "timm.create_model" in card


# --- another resolution --------------------------------------------------------------------------


def _bicubic(table, old, new):
    """Keys' kernel (a = -0.5, as antialiasing libraries have it) at patch centres; enlargements."""

    def matrix(n, m):
        result = np.zeros((m, n))
        for i in range(m):
            x = (i + 0.5) * n / m - 0.5
            for j in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                d, a = abs(x - j), -0.5
                if d <= 1:
                    w = (a + 2) * d**3 - (a + 3) * d**2 + 1
                elif d < 2:
                    w = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
                else:
                    w = 0.0
                if 0 <= j < n:
                    result[i, j] += w
        return result / result.sum(axis=1, keepdims=True)

    image = table[0].double().numpy().reshape(*old, -1)
    image = np.einsum("ya,xb,abd->yxd", matrix(old[0], new[0]), matrix(old[1], new[1]), image)
    return torch.from_numpy(image.reshape(1, new[0] * new[1], -1)).float()


@pytest.mark.parametrize("new", [(6, 6), (3, 9), (5, 4)])
def test_positions_are_interpolated_bicubically(new):
    table = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(1))
    _near(resample_positions(table, (3, 4), new), _bicubic(table, (3, 4), new))


def test_a_smaller_grid_averages():
    """Antialiased: a table that alternates becomes its mean, not one of its rows."""
    table = torch.tensor([1.0, -1.0]).repeat(8).view(1, 16, 1).repeat(1, 16, 1)
    assert resample_positions(table, (16, 16), (4, 4)).abs().max() < 0.2
    assert resample_positions(table, (16, 16), (16, 16)) is table


def test_the_encoder_takes_other_sizes():
    """At the doubled size, with each patch's own features: only positions differ."""
    network = _network(SMALL)
    encoder = load_encoder(_pretrained(SMALL))
    large = torch.randn(1, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    table = _bicubic(network.pos_embed, (3, 3), (6, 5))
    expected = network.encode(network.patch_embed(large) + table).detach()
    _near(encoder.forward_features(large), expected)
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 47 x 40"):
        encoder(large[:, :, :47])


def test_intermediate_layers():
    network, encoder = _network(SMALL), load_encoder(_pretrained(SMALL))
    images = _images(SMALL)
    first = network.blocks[0](network.embed(images))
    second = network.blocks[1](first)
    layers = encoder.get_intermediate_layers(images, 2)
    assert torch.equal(layers[0], network.norm(first))
    assert torch.equal(layers[1], encoder.forward_features(images))
    (raw,) = encoder.get_intermediate_layers(images, [0], norm=False)
    assert torch.equal(raw, first)
    (shaped,) = encoder.get_intermediate_layers(images, reshape=True)
    assert shaped.shape == (2, SMALL.width, 3, 3)
    assert torch.equal(shaped[0, :, 1, 2], network.norm(second)[0, 5])
    for wrong in (0, 3, [2], [-1], []):
        with pytest.raises(ValueError, match=r"n must name blocks in 0..1"):
            encoder.get_intermediate_layers(images, wrong)


def test_images_are_checked():
    encoder = load_encoder(_pretrained(SMALL))
    with pytest.raises(ValueError, match=r"uint8 \(B, height, width, 3\), got torch.float32"):
        encoder.normalise(torch.zeros(1, 24, 24, 3))


# --- what does not fit ---------------------------------------------------------------------------


def test_both_shapes_are_named():
    given, wanted = _network(SMALL).state_dict(), dict(_network(WIDE).state_dict())
    wanted["norm.weight"] = torch.zeros(7)
    with pytest.raises(UsageError, match=r"norm.weight must be \(7,\), got \(32,\) in there"):
        fit_to(given, wanted, old=(3, 3), new=(2, 5), source="there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": torch.zeros(1, 1, 32)}, "I-JEPA encoder, got cls_token"),
        ({"norm\n\x1b[2J": torch.zeros(1)}, r"must be printable, got 'norm\\n\\x1b\[2J' in"),
        ({"pos_embed": None}, "with pos_embed"),
        ({"pos_embed": torch.zeros(1, 10, 32)}, "image_size must give 10 patches of 8 x 8"),
        ({"blocks.1.norm1.bias": None}, r"blocks.1.norm1.bias must be \(32,\), got none"),
        ({"blocks.1.ls1.gamma": torch.ones(32)}, "got blocks.1.ls1.gamma"),
        ({"norm.bias": torch.full((32,), float("nan"))}, "must be finite, got norm.bias"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 8, 4)}, "square patches"),
    ],
)
def test_other_networks_are_refused(tmp_path, change, message):
    """Wherever they are read: for evaluation, `--init` and export alike."""
    state = dict(_network(SMALL).state_dict()) | change
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=message):
        read_weights(tmp_path / "a.safetensors", heads=2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask_token", None, "mask_token must be (1, 1, 16), got none in predictor of"),
        ("predictor_blocks.0.attn.qkv.bias", None, "qkv.bias must be (48,), got none"),
        (
            "predictor_blocks.2.norm1.bias",
            torch.zeros(16),
            "predictor_blocks.1.attn.proj.bias must be",
        ),
        ("predictor_embed.weight", None, "must have a matrix predictor_embed.weight, got none"),
    ],
)
def test_a_predictor_that_is_not_whole(tmp_path, key, value, message):
    _released(tmp_path / "a.pth", SMALL, prefix="")
    tree = torch.load(tmp_path / "a.pth")
    tree["predictor"][key] = value
    torch.save(tree, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=re.escape(message)):
        read_weights(tmp_path / "a.pth", heads=2)


def test_dimensions_that_a_file_does_not_tell(tmp_path):
    save_file(dict(_network(WIDE).state_dict()), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="heads must be given"):
        read_weights(tmp_path / "a.safetensors", image_size=(16, 40))
    with pytest.raises(UsageError, match="image_size must give 10 patches"):
        read_weights(tmp_path / "a.safetensors", heads=2)
    with pytest.raises(UsageError, match=r"image_size must give 10 .*, got \(16, 44\)"):
        read_weights(tmp_path / "a.safetensors", heads=2, image_size=(16, 44))
    read = read_weights(tmp_path / "a.safetensors", image_size=(16, 40), heads=2)
    assert read.shape == WIDE


@pytest.mark.parametrize("name", ["missing", "folder", "a.txt", "b.safetensors"])
def test_what_is_no_weights(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.safetensors").write_text("x")
    with pytest.raises(UsageError, match=name):
        read_weights(tmp_path / name)


# --- files that were made to do harm -------------------------------------------------------------


def _change(**changes):
    return dict(_network(SMALL).state_dict()) | changes


def _zip_of(pickled, compression=zipfile.ZIP_STORED):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return packed.getvalue()


_FC1, _NORM = "blocks.0.mlp.fc1.weight", "norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # 4 TB in one number; networks of dimensions that cost the file no bytes
        ({_NORM: torch.zeros(1).expand(10**12)}, "numbers of their own"),
        ({_FC1: torch.zeros(10**12, 0)}, r"\(1000000000000, 0\)"),
        ({"pos_embed": torch.zeros(1, 9, 1)}, r"\(1, 9, 1\)"),
        ({"blocks.100000000.norm1.bias": torch.zeros(32)}, "must be absent"),
        ({"blocks.x.norm1.bias": torch.zeros(32)}, "must be absent"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 0, 0)}, "square patches"),
        ({"patch_embed.proj.weight": torch.zeros(32, 1, 8, 8)}, "3 channels, got 1"),
        # what is no plain tensor of numbers
        ({_NORM: torch.ones(32, dtype=torch.int8)}, "got norm.weight of torch.int8"),
        ({_NORM: torch.ones(32, dtype=torch.complex64)}, "got norm.weight of torch.complex64"),
        ({_NORM: torch.ones(32, dtype=torch.float8_e4m3fn)}, "of torch.float8_e4m3fn"),
        ({_NORM: torch.ones(32).to_sparse()}, "torch.sparse_coo"),
        ({_NORM: torch.ones(32, device="meta")}, "on meta"),
        (
            {"layers.0.attention.q_proj.weight": torch.zeros(32, 32)}
            | {"layers.0.attention.k_proj.weight": torch.zeros(32)},
            "must have the same shape",
        ),
    ],
)
def test_tensors_that_would_fill_the_memory_or_are_none(tmp_path, change, message):
    torch.save(_change(**change), tmp_path / "a.pth")
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path / "a.pth", heads=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_zip_of(b"\x80\x02" + b"N0" * 10**6 + b"}.", zipfile.ZIP_DEFLATED), "not compressed"),
        # an empty stack, no tuple, a missing argument, a key that is none, a class that is none
        (_zip_of(b"\x80\x02."), "pop from empty list"),
        (_zip_of(b"\x80\x02K\x01Q."), "saved_id"),
        (_zip_of(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."), "missing 6 required"),
        (_zip_of(b"\x80\x02}}K\x01s."), "unhashable"),
        (_zip_of(b"\x80\x02ctorch._utils\n_rebuild_parameter\n(K\x01K\x02K\x03tR."), "detach"),
        (_zip_of(b"\x80\x02cposix\nsystem\nX\x01\x00\x00\x00x\x85R."), "holds posix.system$"),
    ],
)
def test_bent_pickles(tmp_path, data, message):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        read_weights(tmp_path / "a.pth")
    # neither more lines, nor torch's advice to run it
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"image_size": "24"}', "image_size must give 9 patches"),
        ("config.json", '{"image_size": [-24, -24]}', "image_size must give 9 patches"),
        ("config.json", '{"image_size": 24.0}', "image_size must give 9 patches"),
        ("config.json", '{"patch_size": []}', "patch_size must be 8"),
        ("config.json", '{"patch_size": 16}', r"patch_size must be 8, .* got 16"),
        ("config.json", '{"num_attention_heads": true}', "heads must divide"),
        ("config.json", '{"num_hidden_layers": 3}', "depth must be 2, that of the tensors, got 3"),
        ("config.json", '{"hidden_size": 64}', "width must be 32"),
        ("preprocessor_config.json", '{"image_mean": 5}', "mean must be 3 numbers, got 5"),
        ("preprocessor_config.json", '{"image_mean": [1, 2, NaN]}', "mean must be 3 numbers"),
        ("preprocessor_config.json", '{"image_std": [0, 1, 1]}', "std must be 3 numbers above 0"),
        ("model.safetensors.index.json", '{"weight_map": []}', "weight_map must name files"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}', "weight_map must name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "weight_map must name"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b", "c": 5}}', "weight_map must"),
        ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', "weight_map must name"),
    ],
)
def test_settings_of_wrong_types(tmp_path, name, text, message):
    export.export(_pretrained(SMALL), tmp_path / "hf", format="hf")
    path = tmp_path / "hf" / name
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(given | json.loads(text)))
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path / "hf")


def test_a_settings_file_without_end(tmp_path):
    export.export(_pretrained(SMALL), tmp_path / "hf", format="hf")
    os.truncate(tmp_path / "hf" / "config.json", 2**36)
    with pytest.raises(UsageError, match="more than 16777216"):
        load_encoder(tmp_path / "hf")


# --- folders of exports --------------------------------------------------------------------------


def test_a_folder_that_timm_wrote(tmp_path):
    """Arguments as its `save_for_hf` writes them; a size may be one number."""
    save_file(dict(_network(SMALL).state_dict()), tmp_path / "model.safetensors")
    config: dict[str, Any] = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "model_args": {"img_size": 24, "num_heads": 4, "class_token": False},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_weights(tmp_path)
    assert (read.shape.image_size, read.shape.heads) == ((24, 24), 4)
    assert (read.mean, read.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    (tmp_path / "config.json").write_text('{"architecture": "x", "model_args": 5}')
    with pytest.raises(UsageError, match="model_args and pretrained_cfg must be mappings"):
        read_weights(tmp_path)
    config["model_args"]["act_layer"] = "gelu_tanh"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"act_layer must be gelu, got 'gelu_tanh'"):
        read_weights(tmp_path)


def test_an_encoder_that_is_not_there():
    with pytest.raises(UsageError, match="got context: here: target_encoder"):
        load_encoder(_pretrained(SMALL), encoder="context")


# --- starting from weights -----------------------------------------------------------------------


def _start(data, out, name, **settings):
    """A checkpoint after one step that changes nothing: rate 0, momentum 1."""
    rates = {f"optim__{name}": 0.0 for name in ("lr", "start_lr", "final_lr")}
    rates |= {"optim__momentum": 1.0, "optim__final_momentum": 1.0}
    assert tiny.run(data, out, init=name, max_steps=1, **rates, **settings) == 0
    return _latest(out / "checkpoints").tensors, (out / "train.log").read_text()


def test_init_from_a_run(run, data, tmp_path):
    """All three networks, bit for bit."""
    before = _latest(run / "checkpoints").tensors
    after, log = _start(data, tmp_path / "new", run)
    assert f"weights of encoder, predictor, target_encoder from {run}" in log
    compared = [key for key in before if not key.startswith("exp_avg")]
    assert all(torch.equal(before[key], after[key]) for key in compared)
    assert not torch.equal(before["encoder.norm.bias"], before["target_encoder.norm.bias"])


def test_init_from_an_encoder_at_another_resolution(run, data, tmp_path):
    export.export(read_weights(run), tmp_path / "hf", format="hf")
    patch = _config(run).model.patch_size
    after, log = _start(data, tmp_path / "new", tmp_path / "hf", data__crop=5 * patch)
    assert "; the predictor starts afresh" in log
    given = read_weights(run)
    state = given.encoder()
    table = resample_positions(state["pos_embed"], given.shape.grid, (5, 5))
    for key, value in state.items():
        expected = table if key == "pos_embed" else value
        assert torch.equal(after[f"encoder.{key}"], expected), key
        assert torch.equal(after[f"target_encoder.{key}"], expected), key


def test_init_that_does_not_fit(run, data, tmp_path, capsys):
    argv = {"model__width": 64, "model__heads": 2, "init": run, "max_steps": 1}
    assert tiny.run(data, tmp_path / "new", **argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "must be (64," in error
    assert f"got ({_config(run).model.architecture.width}," in error
    assert tiny.run(data, tmp_path / "new", init=tmp_path / "nowhere") == 2
    assert "init must name weights, got" in capsys.readouterr().err


def test_a_run_from_weights_shows_them_and_an_untrained_network(run, data, tmp_path):
    settings = {"init": run, "max_steps": 1, "eval__data": data}
    assert tiny.run(data, tmp_path / "new", **settings) == 0
    first = next(row for row in tiny.rows(tmp_path / "new") if "knn" in row)
    assert first["knn"].keys() == {"raw pixels", "untrained network", "target encoder, step 0"}
    assert tiny.run(data, tmp_path / "plain", max_steps=1, eval__data=data) == 0
    plain = next(row for row in tiny.rows(tmp_path / "plain") if "knn" in row)
    for name in ("raw pixels", "untrained network"):
        assert first["knn"][name] == plain["knn"][name]


def test_a_resumed_run_does_not_start_again(run, data, tmp_path):
    shutil.copytree(run, tmp_path / "start")
    settings = {"init": tmp_path / "start"}
    assert tiny.run(data, tmp_path / "whole", max_steps=3, **settings) == 0
    assert tiny.run(data, tmp_path / "parts", max_steps=2, **settings) == 0
    # nor does it need the weights any more
    shutil.rmtree(tmp_path / "start")
    assert tiny.run(data, tmp_path / "parts", max_steps=3, **settings) == 0
    whole, parts = (_latest(tmp_path / n / "checkpoints").tensors for n in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_init_from_a_rectangle_that_its_file_does_not_tell(data, tmp_path):
    """As many patches as the run's own are its grid; 16 would also be a square."""
    shape = Shape(image_size=(16, 64), patch_size=8, width=32, depth=1, heads=2, mlp_hidden=128)
    context, target, _ = _released(tmp_path / "wide.pth", shape, predictor=False)
    recipe = tiny.config(data, tmp_path / "run")
    wide = replace(recipe, data=replace(recipe.data, crop=(16, 64)))
    shapes = {f"encoder.{k}": v.shape for k, v in context.state_dict().items()}
    shapes |= {f"target_encoder.{k}": v.shape for k, v in target.state_dict().items()}
    start = start_weights(str(tmp_path / "wide.pth"), wide, shapes)
    for key, value in context.state_dict().items():
        # the table too: it was not taken for one of 4 x 4 patches
        assert torch.equal(start[f"encoder.{key}"], value), key


def test_all_three_networks_know_no_choice_of_encoder(run, tmp_path, capsys):
    code, printed = _export(
        run, tmp_path / "x", capsys, "--format", "torch", "--encoder", "context"
    )
    assert code == 2
    assert "encoder must be left out with format torch" in printed.err
    assert not (tmp_path / "x").exists()


def test_a_folder_that_reads_back_otherwise_is_not_left(run, tmp_path, monkeypatch, capsys):
    def wrong(tensors, *arguments, **options):
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] + 1}, *arguments, **options)

    monkeypatch.setattr("ijepa_fast.weights.export.save_file", wrong)
    code, printed = _export(run, tmp_path / "x", capsys)
    assert code == 2
    assert "is not what is read back" in printed.err
    assert not list(tmp_path.iterdir())
