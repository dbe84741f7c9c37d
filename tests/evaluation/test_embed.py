"""Features of a folder as a file, held against `load_encoder` by hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from ijepa_fast import load_encoder
from ijepa_fast.evaluation import embedding as command
from tests.trainer import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    data = tiny.write_images(root / "data", classes=4)
    assert tiny.run(data, root / "run", max_steps=3, model__depth=5) == 0
    return root / "run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images without classes, of the network's own size, some of them in a sub-folder; one broken
    and one that is no image.
    """
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (root / "train").mkdir()
    for name in ("b", "a", "train/z", "train/y", "c"):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    tiny.bad_png(root / "bad.png")
    (root / "empty.jpg").touch()
    return root


def _by_hand(encoder, folder, paths, count):
    rows = []
    for path in paths:
        image = torch.from_numpy(np.asarray(Image.open(folder / path)).copy())[None]
        layers = encoder.get_intermediate_layers(encoder.normalise(image), count)
        rows.append(torch.cat([layer.mean(dim=1)[0] for layer in layers]))
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("which", ["target", "context"])
@pytest.mark.parametrize(
    ("suffix", "layers", "count"), [(".npy", "last", 1), (".safetensors", "last-4", 4)]
)
def test_features_are_those_of_load_encoder(
    which, suffix, layers, count, run, folder, tmp_path, capsys
):
    out = tmp_path / f"features{suffix}"
    argv = [str(run), "--data", str(folder), "--out", str(out)]
    argv += ["--encoder", which, "--layers", layers, "--batch", "2", "--decoder", "pillow"]
    assert command.main(argv) == 0
    printed = capsys.readouterr()
    assert f"features of 5 images, {32 * count} wide, written to {out}" in printed.out
    about = json.loads((tmp_path / "features.json").read_text())
    assert about["paths"] == ["a.png", "b.png", "c.png", "train/y.png", "train/z.png"]
    assert sorted(about["left_out"]) == ["bad.png", "empty.jpg"]
    assert (about["encoder"], about["layers"]) == (which, layers)
    assert "2 images left out" in printed.err
    found = np.load(out) if suffix == ".npy" else load_file(out)["features"]
    expected = _by_hand(load_encoder(run, encoder=which), folder, about["paths"], count)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32
    assert not list(tmp_path.glob(".*"))
    # nothing is written over
    before = out.read_bytes()
    assert command.main(argv) == 2
    assert "error: out must be a new file" in capsys.readouterr().err
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--out": "x.txt"}, "out must be .npy or .safetensors, got "),
        ({"--out": "none/x.npy"}, "out must lie in a folder that exists"),
        ({"--data": "nowhere"}, "data must be an existing folder"),
        ({"--batch": "0"}, "batch must be at least 1, got 0"),
        ({"--device": "cuda"}, "device must be auto or cpu where torch sees no CUDA device"),
    ],
)
def test_wrong_arguments(change, message, run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = {"--data": str(folder), "--out": "x.npy", **change}
    assert command.main([str(run), *(word for pair in argv.items() for word in pair)]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
