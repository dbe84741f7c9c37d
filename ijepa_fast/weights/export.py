"""Weights out: ``ijepa-fast export RUN OUT --format hf|timm|torch|onnx``.

- ``hf``: a folder for ``transformers.IJepaModel.from_pretrained``, without remote code. Names are
  those of the hub's files, which versions 4 and 5 read; LayerNorm's eps is written out, as the
  library's default is another.
- ``timm``: a folder for ``timm.create_model("local-dir:OUT")``; its ``model.safetensors``
  has timm's plain names.
- ``torch``: ``model.safetensors`` with context encoder, target encoder and predictor under our
  names, to start another run from (``--init``).
- ``onnx``: ``model.onnx``, see `onnx_model`.

Each comes with a model card. The folder is written beside its place and renamed;
``--push`` uploads it then.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor

from ijepa_fast.atomic import atomic_write
from ijepa_fast.callbacks import read_rows
from ijepa_fast.config import AnyPath, call_of, require_choices, run_command
from ijepa_fast.errors import UsageError, require
from ijepa_fast.model import NORM_EPS
from ijepa_fast.weights.encoder import Weights, as_pretrained, load_encoder
from ijepa_fast.weights.hub import list_folder, push_folder, require_hub
from ijepa_fast.weights.model_card import model_card
from ijepa_fast.weights.names import hugging_face_names
from ijepa_fast.weights.onnx_model import require_onnx, write_onnx
from ijepa_fast.weights.pretrained import METADATA, EncoderKind, Pretrained, Shape
from ijepa_fast.weights.read import read_weights

__all__ = ["export", "main"]

Format = Literal["hf", "timm", "torch", "onnx"]
_BILINEAR = 2


def _hugging_face(
    weights: Pretrained, state: Mapping[str, Tensor], folder: Path, kind: EncoderKind | None
) -> None:
    shape = weights.shape
    height, width = shape.image_size
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_hidden,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": shape.patch_size,
        "num_channels": shape.in_channels,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(weights.mean),
        "image_std": list(weights.std),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", processor)
    _write_tensors(folder, hugging_face_names(state), weights, kind)


def timm_arguments(shape: Shape) -> dict[str, Any]:
    """What timm's VisionTransformer is built from."""
    ratio = shape.mlp_hidden / shape.width
    while int(shape.width * ratio) < shape.mlp_hidden:
        # timm cuts the product off
        ratio += 1e-9
    return {
        "img_size": list(shape.image_size),
        "patch_size": shape.patch_size,
        "in_chans": shape.in_channels,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": ratio,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    }


def _timm(
    weights: Pretrained, state: Mapping[str, Tensor], folder: Path, kind: EncoderKind | None
) -> None:
    shape = weights.shape
    config = {
        # any of its vision transformers; all dimensions are arguments
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": shape.width,
        "global_pool": "avg",
        "model_args": timm_arguments(shape),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [shape.in_channels, *shape.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": list(weights.mean),
            "std": list(weights.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    _write_json(folder / "config.json", config)
    _write_tensors(folder, state, weights, kind)


def _torch(weights: Pretrained, folder: Path) -> None:
    tensors = {
        f"{name}.{key}": tensor
        for name, network in weights.networks.items()
        for key, tensor in network.items()
    }
    _write_tensors(folder, tensors, weights, weights.only)


def _onnx(weights: Pretrained, which: EncoderKind, folder: Path, kind: EncoderKind | None) -> None:
    told = _told(weights, kind) | {"patch_size": weights.shape.patch_size, "step": weights.step}
    encoder = load_encoder(weights, encoder=which)
    write_onnx(encoder, folder / "model.onnx", {METADATA: json.dumps(told)})


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


def _told(weights: Pretrained, kind: EncoderKind | None) -> dict[str, Any]:
    """What shapes do not tell. `kind`: which encoder it is, where the file holds one."""
    return {
        **({"encoder": kind} if kind else {}),
        "image_size": list(weights.shape.image_size),
        "heads": weights.shape.heads,
        "mean": list(weights.mean),
        "std": list(weights.std),
    }


def _write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], weights: Pretrained, kind: EncoderKind | None
) -> None:
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {"format": "pt", METADATA: json.dumps(_told(weights, kind))}
    save_file(contiguous, folder / "model.safetensors", metadata=metadata)


def export(
    weights: Weights,
    /,
    out: Annotated[AnyPath, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    *,
    format: Format = "hf",
    encoder: EncoderKind = "target",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    push: str | None = None,
    push_dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
) -> Path:
    """Writes a run's weights for other libraries into a new folder, and reads them back to see that
    nothing changed.

    Args:
        weights: A run's folder, one of its checkpoints, or any weights that `evaluate` takes.
        out: Folder to write; it must not exist, or be empty.
        format: `hf`: for transformers' IJepaModel; `timm`: for timm; `torch`: all three networks;
            `onnx`: for onnxruntime, features checked to 1e-4.
        encoder: Which of a run's two encoders; the target encoder has the better features.
        image_size: Height and width that the weights were trained at, where their file does not
            tell.
        heads: Attention heads, where the file does not tell.
        mean: Mean of the image channels in 0-1 units, instead of what the file tells.
        std: Their standard deviation, likewise.
        push: OWNER/NAME on huggingface.co to upload the folder to; made, and private, if new.
        push_dry_run: Only list what push would upload, and the model card.

    Returns:
        The folder.

    Raises:
        UsageError: the folder is there and not empty, there is no such encoder, a package or the
            hub's token is missing.
        CheckpointError: a checkpoint is damaged.
        OSError: it cannot be written; ConnectionError: it is written but not uploaded.

    Example:
        >>> folder = ijepa_fast.export("runs/mine", "hf-mine", format="hf")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors', 'preprocessor_config.json']
    """
    require_choices(export, locals())
    out, layout, which = Path(out), format, encoder
    if layout == "torch" and which != "target":
        raise UsageError(f"encoder must be left out with format torch (all go), got {which}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"OUT must be a new or empty folder, got {out}")
    require(push is not None or not push_dry_run, "push_dry_run", "given with push", push_dry_run)
    if push is not None:
        require_hub(push, token=not push_dry_run)
    if layout == "onnx":
        require_onnx()
    weights = as_pretrained(weights, image_size=image_size, heads=heads, mean=mean, std=std)
    state, kind = weights.encoder(which), weights.kind(which)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as folder:
        folder.mkdir()
        if layout == "hf":
            _hugging_face(weights, state, folder, kind)
        elif layout == "timm":
            _timm(weights, state, folder, kind)
        elif layout == "torch":
            _torch(weights, folder)
        else:
            _onnx(weights, which, folder, kind)
        metrics = _run_metrics(weights.run) if weights.run else {}
        card = model_card(weights, layout=layout, which=which, metrics=metrics, repo=push)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if layout != "onnx":
            _check(folder, weights, state, layout)
    if push is not None:
        (list_folder if push_dry_run else push_folder)(out, push)
    return out


def _check(folder: Path, weights: Pretrained, state: Mapping[str, Tensor], layout: Format) -> None:
    """What was written is read back: names, shapes and every number."""
    back = read_weights(folder if layout == "hf" else folder / "model.safetensors")
    expected = weights.networks if layout == "torch" else {"target_encoder": state}
    same = (back.shape, back.mean, back.std, back.networks.keys()) == (
        weights.shape,
        weights.mean,
        weights.std,
        expected.keys(),
    )
    for name, given in expected.items() if same else ():
        read = back.networks[name]
        same &= given.keys() == read.keys()
        same = same and all(torch.equal(given[key], read[key]) for key in given)
    if not same:
        raise OSError(f"what was written to {folder} is not what is read back")


def _run_metrics(run: Path) -> dict[str, float]:
    """The kNN accuracies that the run itself measured at its start and its end; those of the data
    and of as many images as it measured last.
    """
    rows = [row for row in read_rows(run / "metrics.jsonl") if isinstance(row.get("knn"), dict)]
    if not rows:
        return {}
    data, images = rows[-1].get("data"), rows[-1].get("images")
    part = f" ({images[0]} training and {images[1]} test images)" if images else ""
    alike = [row for row in rows if (row.get("data"), row.get("images")) == (data, images)]
    return {
        f"kNN on {Path(str(data)).name}{part}, {name}": value
        for row in (alike[0], alike[-1])
        for name, value in row["knn"].items()
    }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(call_of(export), _tell, argv, "export")


def _tell(call: tuple[Any, Any]) -> None:
    """Exports, and says what."""
    (weights,), named = call
    reading = {name: named.pop(name) for name in ("image_size", "heads", "mean", "std")}
    read = as_pretrained(weights, **reading)
    out = export(read, **named)
    size = sum(path.stat().st_size for path in out.iterdir())
    what = "all networks" if named["format"] == "torch" else read.title(named["encoder"])
    print(f"{what} of {read.source} written to {out} ({size / 2**20:.1f} MiB) and read back")
