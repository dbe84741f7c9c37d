"""Reading weights of every kind; see the package. Shape letters: N patches, D encoder width."""

import json
import math
import os
import pickle  # for the name of an error only
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ijepa_fast.config import ARCHITECTURES, DataConfig, from_tree
from ijepa_fast.errors import UsageError
from ijepa_fast.state import checkpoint
from ijepa_fast.weights.fit import require_whole
from ijepa_fast.weights.names import our_names
from ijepa_fast.weights.pretrained import (
    METADATA,
    NETWORKS,
    Pretrained,
    Shape,
    channel_values,
)

__all__ = ["read_weights"]

_TORCH_FILES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
_HEADS = {a.width: a.heads for a in ARCHITECTURES.values()}
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_MOST_JSON = 2**24
# tensors of a file may share memory, as two encoders that are still the same do; without end they
# would fill the machine's
_MOST_SHARING = 8
# what reading a PyTorch file that someone has bent raises, besides its own error
_BENT = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    pickle.UnpicklingError,
)


def read_weights(
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
) -> Pretrained:
    """Reads weights of any of the kinds above.

    Args:
        path: file or folder.
        image_size: height and width in pixels that the weights were trained at, for files that do
            not tell; by default a square.
        heads: attention heads, for files that do not tell; by default those of the named size.
            Neither may differ from what the file tells.

    Raises:
        UsageError: no such kind of file, not an I-JEPA encoder, or a dimension that cannot be told.
        CheckpointError: a checkpoint is damaged.

    Example:
        >>> weights = ijepa_fast.read_weights("runs/mine")
        >>> ijepa_fast.load_encoder(weights, encoder="context").width
        32
    """
    path = Path(path)
    if (path / "checkpoints").is_dir() or (path / "state.safetensors").is_file():
        return _own(path)
    if (path / "config.json").is_file():
        config = _json(path / "config.json")
        read = _timm if "architecture" in config else _hugging_face
        tensors, told = read(path, config)
        return _described({"target_encoder": tensors}, path, image_size, heads, told)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.is_file() and path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path)
        networks, told = _divided(tensors)
        told |= _told(metadata.get(METADATA), path)
        return _described(networks, path, image_size, heads, told)
    if path.is_file() and path.suffix in _TORCH_FILES:
        networks, told = _torch_file(path)
        return _described(networks, path, image_size, heads, told)
    if (path / "config.yaml").is_file():
        raise UsageError(f"RUN must have a checkpoint, got none in {path}")
    raise UsageError(
        "weights must be a run's folder, a checkpoint, a Hugging Face folder, or a .safetensors or "
        f"{'/'.join(_TORCH_FILES)} file, got {path}{'' if path.exists() else ', which is missing'}"
    )


def _own(path: Path) -> Pretrained:
    if (path / "state.safetensors").is_file():
        state: checkpoint.State | None = checkpoint.read(path)
    else:
        state = checkpoint.load_latest(path / "checkpoints")
    if state is None:
        raise UsageError(f"RUN must have a checkpoint, got none in {path}")
    if "config" not in state.meta:
        raise UsageError(f"checkpoint must hold its run's configuration, got none in {path}")
    config, images = from_tree(state.meta["config"]), state.meta.get("images")
    networks = {
        name: our_names(
            {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in state.tensors.items()
                if key.startswith(f"{name}.")
            },
            path,
        )
        for name in NETWORKS
    }
    a = config.model.architecture
    shape = Shape(
        image_size=config.data.crop_size,
        patch_size=config.model.patch_size,
        width=a.width,
        depth=a.depth,
        heads=a.heads,
        mlp_hidden=a.mlp_hidden,
    )
    require_whole(networks, shape, str(path))
    return Pretrained(
        networks=networks,
        shape=shape,
        mean=channel_values("mean", config.data.mean, f" for {path}"),
        std=channel_values("std", config.data.std, f" for {path}"),
        source=f"step {state.step} of {path}",
        run=path if (path / "checkpoints").is_dir() else None,
        config=config,
        step=state.step,
        images=images if isinstance(images, int) else None,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes, more than {_MOST_JSON}")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} must be a JSON file, got {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold a mapping, got {type(tree).__name__}")
    return tree


def _hugging_face(
    path: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, and what the folder tells of them."""
    if config.get("model_type") != "ijepa":
        kind = config.get("model_type")
        raise UsageError(f"model_type must be ijepa, got {kind!r} in {path / 'config.json'}")
    tensors, told = _folder_tensors(path)
    for key, rule in (("qkv_bias", True), ("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        # the library's own default of eps is another
        got = config.get(key, 1e-12 if key == "layer_norm_eps" else rule)
        if got != rule:
            raise UsageError(f"{key} must be {rule}, got {got!r} in {path / 'config.json'}")
    told |= {
        "image_size": _square(config.get("image_size", 224)),
        "patch_size": config.get("patch_size", 16),
        "heads": config.get("num_attention_heads", 12),
    }
    for key, name in (
        ("depth", "num_hidden_layers"),
        ("width", "hidden_size"),
        ("mlp_hidden", "intermediate_size"),
    ):
        if name in config:
            told[key] = config[name]
    processor = path / "preprocessor_config.json"
    if processor.is_file():
        settings = _json(processor)
        told |= {k: settings[f"image_{k}"] for k in ("mean", "std") if f"image_{k}" in settings}
    return tensors, told


def _timm(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A folder of `timm.models.push_to_hf_hub`, or of our export: likewise."""
    arguments, settings = config.get("model_args", {}), config.get("pretrained_cfg", {})
    if not isinstance(arguments, dict) or not isinstance(settings, dict):
        raise UsageError(
            "model_args and pretrained_cfg must be mappings, got "
            f"{type(arguments).__name__} and {type(settings).__name__} in {path / 'config.json'}"
        )
    for key, rule in (("act_layer", "gelu"), ("norm_layer", "layernorm")):
        # their weights would have the same names and shapes
        if arguments.get(key, rule) not in (rule, None):
            raise UsageError(
                f"model_args.{key} must be {rule}, got {arguments[key]!r} in {path / 'config.json'}"
            )
    tensors, told = _folder_tensors(path)
    told |= {key: settings[key] for key in ("mean", "std") if key in settings}
    for key, name in (("heads", "num_heads"), ("depth", "depth"), ("width", "embed_dim")):
        if name in arguments:
            told[key] = arguments[name]
    if "img_size" in arguments:
        told["image_size"] = _square(arguments["img_size"])
    return tensors, told


def _square(size: object) -> object:
    return size if isinstance(size, list) else [size, size]


def _folder_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors beside a config.json; and which encoder they are, if the file is ours."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        table = _json(index).get("weight_map")
        given = list(table.values()) if isinstance(table, dict) else [table]
        names = [name for name in given if isinstance(name, str)]
        # a name from a file must not lead out of the folder
        if len(names) != len(given) or any(n in ("", "..") or Path(n).name != n for n in names):
            raise UsageError(f"weight_map must name files beside it, got {given[:3]} in {index}")
        return {
            k: v for name in sorted(set(names)) for k, v in _safetensors(path / name)[0].items()
        }, {}
    if (path / "model.safetensors").is_file():
        tensors, metadata = _safetensors(path / "model.safetensors")
        told = _told(metadata.get(METADATA), path)
        return tensors, {key: told[key] for key in ("encoder",) if key in told}
    if (path / "pytorch_model.bin").is_file():
        return _torch_file(path / "pytorch_model.bin")[0]["target_encoder"], {}
    raise UsageError(f"a folder of weights must have model.safetensors, got none in {path}")


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise UsageError(f"weights must be a safetensors file, got {path}: {error}") from None


def _divided(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The networks of a file that may hold one or all three, and which encoder it is if one."""
    if not any(key.startswith("target_encoder.") for key in tensors):
        return {"target_encoder": dict(tensors)}, {}
    networks: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.partition(".")
        networks.setdefault(name, {})[rest] = tensor
    return _with_target({name: networks[name] for name in NETWORKS if name in networks})


def _told(text: str | None, path: Path) -> dict[str, Any]:
    """What our own export wrote beside the tensors."""
    try:
        tree = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise UsageError(f"the metadata entry {METADATA} must be a JSON object, got {path}")
    return tree


def _torch_file(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Networks of a PyTorch file, and which encoder it is if there is one; only plain data is read,
    never code.
    """
    try:
        _require_stored(path)
        with warnings.catch_warnings():
            # on dtypes and protocols that are refused anyway
            warnings.simplefilter("ignore")
            try:
                # mapped: optimiser state of ten gigabytes is not read
                tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):
                # files of the format before PyTorch 1.6 cannot be mapped
                tree = torch.load(path, map_location="cpu", weights_only=True)
    except _BENT as error:
        raise UsageError(
            f"weights must be a PyTorch file of tensors and plain values, got {path}: {_why(error)}"
        ) from None
    if not isinstance(tree, dict):
        raise UsageError(f"weights must hold a mapping, got {type(tree).__name__} in {path}")
    networks, told = _networks(tree)
    size = sum(t.numel() * t.element_size() for n in networks.values() for t in n.values())
    if size > _MOST_SHARING * path.stat().st_size:
        raise UsageError(
            f"weights must be tensors with numbers of their own, got {size} bytes of tensors in "
            f"{path.stat().st_size} bytes of {path}"
        )
    return networks, told


def _require_stored(path: Path) -> None:
    """PyTorch stores what it packs as it is; what is compressed may be endless.

    Raises:
        ValueError: the file is a compressed archive, or its entries overlap.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        # of the old format, or no such file at all
        return
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size or any(entry.compress_type for entry in entries):
        raise ValueError("its entries must be stored, not compressed")


def _why(error: BaseException) -> str:
    """In one line, without the advice to run what the file holds."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds {found[1]}" if found else "it is not a pickle of such values"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _networks(
    tree: Mapping[Any, Any],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The networks, and which encoder it is if there is one."""
    if isinstance(tree.get("target_encoder"), dict) or isinstance(tree.get("encoder"), dict):
        networks = {n: _tensors(tree[n]) for n in NETWORKS if isinstance(tree.get(n), dict)}
        return _with_target(networks)
    inner = next((tree[k] for k in ("state_dict", "model") if isinstance(tree.get(k), dict)), tree)
    return {"target_encoder": _tensors(inner)}, {}


def _with_target(
    networks: dict[str, dict[str, Tensor]],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The context encoder takes the place of a target encoder that is missing."""
    if "target_encoder" in networks:
        return networks, {"encoder": "target"}
    networks["target_encoder"] = networks.pop("encoder")
    return networks, {"encoder": "context"}


def _tensors(tree: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(k): v for k, v in tree.items() if isinstance(v, Tensor)}


def _described(
    networks: Mapping[str, Mapping[str, Tensor]],
    path: Path,
    image_size: tuple[int, int] | None,
    heads: int | None,
    told: Mapping[str, Any],
) -> Pretrained:
    """Tells the dimensions from names and shapes, and from what stands beside them."""
    _agree(path, "image_size", None if image_size is None else list(image_size), told)
    _agree(path, "heads", heads, told)
    if told.get("encoder") not in (None, "target", "context"):
        raise UsageError(f"encoder must be target or context, got {told['encoder']!r} for {path}")
    ours = {name: our_names(tensors, path) for name, tensors in networks.items()}
    state = ours["target_encoder"]
    for key in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "norm.weight"):
        if key not in state:
            first = next(iter(networks["target_encoder"]), "nothing")
            raise UsageError(
                f"weights must be of an I-JEPA encoder with {key}, got {first} ... in {path}"
            )
    kernel, table = state["patch_embed.proj.weight"], state["pos_embed"]
    mlp = state["blocks.0.mlp.fc1.weight"]
    # checked before anything is built of these dimensions
    if (
        kernel.ndim != 4
        or kernel.shape[2] != kernel.shape[3]
        or table.ndim != 3
        or table.shape[0::2] != (1, kernel.shape[0])
        or mlp.ndim != 2
        or 0 in (*kernel.shape, *table.shape, *mlp.shape)
    ):
        raise UsageError(
            "weights must have square patches (D, channels, side, side), a position table "
            "(1, N, D) and MLPs (F, D), got "
            f"{tuple(kernel.shape)}, {tuple(table.shape)} and {tuple(mlp.shape)} in {path}"
        )
    if kernel.shape[1] != 3:
        raise UsageError(
            f"weights must be for images of 3 channels, got {kernel.shape[1]} in {path}"
        )
    width, patch, patches = kernel.shape[0], kernel.shape[2], table.shape[1]
    if told.get("patch_size", patch) not in (patch, [patch, patch]):
        raise UsageError(
            f"patch_size must be {patch}, the side of {tuple(kernel.shape)}, got "
            f"{told['patch_size']!r} for {path}"
        )
    side = math.isqrt(patches) * patch
    size = told.get("image_size", image_size or (side, side))
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(type(pixels) is int and pixels > 0 for pixels in size)
        or any(pixels % patch for pixels in size)
        or (size[0] // patch) * (size[1] // patch) != patches
    ):
        raise UsageError(
            f"image_size must give {patches} patches of {patch} x {patch} pixels, got {size!r} for "
            f"{path}"
        )
    number = told.get("heads", heads or _HEADS.get(width))
    if number is None:
        raise UsageError(
            f"heads must be given (--heads): the width {width} does not tell in {path}"
        )
    if type(number) is not int or number < 1 or width % number:
        raise UsageError(f"heads must divide the width ({width}), got {number!r} for {path}")
    shape = Shape(
        image_size=(size[0], size[1]),
        patch_size=patch,
        width=width,
        # of the numbers, not the highest of them: a network of that many would be built
        depth=len({found[1] for key in state if (found := _BLOCK.match(key))}),
        heads=number,
        mlp_hidden=mlp.shape[0],
        in_channels=kernel.shape[1],
    )
    for key in ("width", "depth", "mlp_hidden"):
        if told.get(key, getattr(shape, key)) != getattr(shape, key):
            raise UsageError(
                f"{key} must be {getattr(shape, key)}, that of the tensors, got {told[key]!r} for "
                f"{path}"
            )
    require_whole(ours, shape, str(path))
    return Pretrained(
        networks=ours,
        shape=shape,
        mean=channel_values("mean", told.get("mean", DataConfig.mean), f" for {path}"),
        std=channel_values("std", told.get("std", DataConfig.std), f" for {path}"),
        source=str(path),
        only=told.get("encoder"),
    )


def _agree(path: Path, name: str, given: object, told: Mapping[str, Any]) -> None:
    """What is given for files that do not tell must not contradict one that does."""
    if given is not None and told.get(name, given) != given:
        raise UsageError(f"{name} must be {told[name]}, which {path} tells, got {given}")
