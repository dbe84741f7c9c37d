"""The model card of exported weights: what they are, how they were trained, how to use them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml

from ijepa_fast import __version__
from ijepa_fast.config import as_dict
from ijepa_fast.weights.pretrained import EncoderKind, Pretrained

__all__ = ["model_card"]

_RECIPE = ("model", "masks", "optim", "batch")
_USE = {
    "hf": """```python
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, IJepaModel

folder = "{place}"
processor, model = AutoImageProcessor.from_pretrained(folder), IJepaModel.from_pretrained(folder)
image = Image.open("image.jpg").convert("RGB")
image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BILINEAR)
inputs = processor(image, return_tensors="pt")
features = model(**inputs).last_hidden_state.mean(dim=1)
```

Use the **mean of last_hidden_state**: there is no class token, and no pooler was trained.""",
    "timm": """```python
import timm

model = timm.create_model("{timm}:{place}", pretrained=True)
features = model(images)  # the mean over patches; model.forward_features(images) has them all
```

There is no class token: the features of an image are the mean over its patches.""",
    "torch": """```python
import ijepa_fast
{hub}
encoder = ijepa_fast.load_encoder({folder})
features = encoder(encoder.preprocess(["image.jpg"]))  # (1, D)
```

`ijepa-fast train --init FOLDER` goes on from all three networks.""",
    "onnx": """```python
import numpy as np
import onnxruntime
{hub}from PIL import Image, ImageOps

session = onnxruntime.InferenceSession({model})
image = Image.open("image.jpg").convert("RGB")
image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.BILINEAR)
features, patches = session.run(None, {{"images": np.asarray(image)[None]}})
```

The input is uint8 (batch, {height}, {width}, 3), and is normalised inside. `features`
(batch, D) is the mean over `patches` (batch, N, D): there is no class token.""",
}
_LIBRARIES = {"hf": "transformers", "timm": "timm", "torch": "ijepa-fast", "onnx": "onnx"}


def model_card(
    weights: Pretrained,
    *,
    layout: Literal["hf", "timm", "torch", "onnx"],
    which: EncoderKind,
    metrics: Mapping[str, float],
    repo: str | None = None,
) -> str:
    """The card as Markdown with the hub's YAML header.

    Args:
        weights: what was exported.
        layout: for which library.
        which: the encoder.
        metrics: name -> accuracy in 0..1.
        repo: on the hub, if that is where it goes.
    """
    shape, config = weights.shape, weights.config
    height, width = shape.image_size
    folder = f'snapshot_download("{repo}")'
    use = _USE[layout].format(
        place=repo or ".",
        timm="hf-hub" if repo else "local-dir",
        folder=folder if repo else '"."',
        model=f'{folder} + "/model.onnx"' if repo else '"model.onnx"',
        hub="from huggingface_hub import snapshot_download\n" if repo else "",
        height=height,
        width=width,
    )
    lines = [
        "---",
        f"library_name: {_LIBRARIES[layout]}",
        "pipeline_tag: image-feature-extraction",
        "tags: [ijepa, self-supervised-learning]",
        "---",
        "",
        "# I-JEPA encoders and predictor"
        if layout == "torch"
        else f"# I-JEPA {weights.title(which)}",
        "",
        f"A ViT of {shape.depth} blocks, {shape.width} wide, {shape.heads} heads, patches of "
        f"{shape.patch_size} x {shape.patch_size} pixels, for images of {height} x {width}; "
        "trained without labels by I-JEPA (Assran et al., 2023, "
        "[arXiv 2301.08243](https://arxiv.org/abs/2301.08243)).",
        "",
        "## Use",
        "",
        use if repo else f"In the folder of this file:\n\n{use}",
        "",
        f"Images: the largest central window, resized to {height} x {width} (bilinear, "
        "antialiased), divided by 255, mean "
        f"{_numbers(weights.mean)}, std {_numbers(weights.std)}.",
        "",
        "## Training",
        "",
    ]
    if config is None:
        lines.append(f"Converted from {Path(weights.source).name}; see where that came from.")
    else:
        names = ", ".join(Path(source).name for source in config.data.sources)
        settings = {k: v for k, v in as_dict(config).items() if k in _RECIPE}
        settings["data"] = {k: as_dict(config.data)[k] for k in ("crop", "scale", "ratio")}
        settings["seed"] = config.seed
        recipe = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100)
        images = "" if weights.images is None else f", {weights.images:,} images"
        lines += [
            f"Data: {names}{images}. {weights.step:,} steps of {config.batch.global_} images with "
            f"ijepa-fast {__version__}:",
            "",
            "```yaml",
            recipe.rstrip(),
            "```",
        ]
        if config.init:
            lines += ["", f"Started from {Path(config.init).name}."]
    lines += ["", "## Metrics", ""]
    if metrics:
        lines += ["| | accuracy |", "|---|---|"]
        lines += [f"| {name} | {100 * value:.1f} % |" for name, value in metrics.items()]
    else:
        lines.append("None were measured with the export: `ijepa-fast evaluate`.")
    lines += [
        "",
        "## Licence",
        "",
        "That of whoever trained these weights, and of the data. The I-JEPA weights that were "
        "published with the paper are CC BY-NC 4.0: whatever is converted from them, or was "
        "started from them, stays under that licence and is not for commercial use.",
        "",
    ]
    return "\n".join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
