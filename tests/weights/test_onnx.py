"""ONNX files in onnxruntime, against PyTorch."""

import importlib.util
import json
import re
from typing import Any

import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch
from PIL import Image

from ijepa_fast.errors import UsageError
from ijepa_fast.weights import export, load_encoder, onnx_model
from tests.trainer import tiny
from tests.weights.test_weights import MEAN, SMALL, STD, WIDE, _near, _network, _pretrained


def _session(folder):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def _photographs(size, count):
    """Pieces of a photograph: uint8 (count, height, width, 3)."""
    height, width = size
    whole = skimage.data.astronaut()
    corners = [(40 * i, 60 * i) for i in range(count)]
    return np.stack([whole[y : y + height, x : x + width] for y, x in corners])


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["square", "rectangle"])
def test_features_are_those_of_pytorch(tmp_path, shape, capfd):
    export.export(_pretrained(shape), tmp_path / "a", format="onnx")
    assert capfd.readouterr() == ("", "")
    session = _session(tmp_path / "a")
    network = _network(shape)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    noise = np.random.default_rng(0).integers(0, 256, (5, *shape.image_size, 3), dtype=np.uint8)
    for images in (noise[:1], noise[:3], noise, _photographs(shape.image_size, 3)):
        features, patches = session.run(["features", "patches"], {"images": images})
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            expected = network((pixels - mean) / std)
        _near(torch.from_numpy(patches), expected)
        _near(torch.from_numpy(features), expected.mean(dim=1))
    told = json.loads(session.get_modelmeta().custom_metadata_map["ijepa_fast"])
    assert told == {
        "encoder": "target",
        "image_size": [*shape.image_size],
        "patch_size": 8,
        "heads": 2,
        "mean": [*MEAN],
        "std": [*STD],
        "step": None,
    }


def test_a_run_and_what_its_card_says(tmp_path, monkeypatch, capsys):
    data = tiny.write_images(tmp_path / "images", classes=4)
    assert tiny.run(data, tmp_path / "run", max_steps=2) == 0
    argv = [str(tmp_path / name) for name in ("run", "onnx")]
    assert export.main([*argv, "--format", "onnx", "--encoder", "context"]) == 0
    assert "context encoder of step 2 of" in capsys.readouterr().out
    encoder = load_encoder(tmp_path / "run", encoder="context")
    image = Image.fromarray(_photographs((120, 120), 1)[0])
    image.save(tmp_path / "onnx" / "image.jpg", quality=100, subsampling=0)
    card = (tmp_path / "onnx" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "onnx")
    there: dict[str, Any] = {}
    exec(code, there)
    with torch.no_grad():
        expected = encoder(encoder.preprocess(["image.jpg"]))
    _near(torch.from_numpy(there["features"]), expected)


def test_large_weights_are_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "_INLINE_BYTES", 0)
    export.export(_pretrained(SMALL), tmp_path / "a", format="onnx")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "model.onnx", "model.onnx.data"]
    # found beside the file, under the folder's last name
    images = _photographs(SMALL.image_size, 1)
    assert _session(tmp_path / "a").run(["features"], {"images": images})[0].shape == (1, 32)


def test_a_file_that_computes_otherwise_is_not_left(tmp_path, monkeypatch):
    right = onnxruntime.InferenceSession.run

    def wrong(session, *arguments):
        return [right(session, *arguments)[0] + 1e-3, *right(session, *arguments)[1:]]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", wrong)
    with pytest.raises(OSError, match=r"features of model.onnx must differ by at most 0.0001"):
        export.export(_pretrained(SMALL), tmp_path / "a", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UsageError, match=r"needs onnxscript: pip install 'ijepa-fast\[onnx\]'"):
        export.export("no such weights", tmp_path / "a", format="onnx")
