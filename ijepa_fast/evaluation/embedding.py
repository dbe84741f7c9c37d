"""Features of all images of a folder, labelled or not, as a file:
``ijepa-fast embed RUN_OR_WEIGHTS --data DIR --out features.npy``.
"""

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ijepa_fast import __version__
from ijepa_fast.atomic import atomic_write
from ijepa_fast.config import AnyPath, call_of, require_choices, run_command
from ijepa_fast.data import open_index
from ijepa_fast.errors import UsageError, require
from ijepa_fast.evaluation.features import LAST, LAST_FOUR, pooled_layers, shown
from ijepa_fast.evaluation.labelled import Split, data_of, precision_of
from ijepa_fast.weights import EncoderKind, Weights, as_pretrained, load_encoder

__all__ = ["Embedded", "embed", "main"]

Layers = Literal["last", "last-4"]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Features of the images of a folder.

    Attributes:
        features: float32 (n, width), averaged over patches; width is D, or 4 D for four layers.
        paths: n, in the same order, that of the data set's table (sorted, for a folder): relative
            to the folder, with the member's name behind a tar shard's.
        left_out: paths of the images that cannot be used; the log says why.

    Example:
        >>> found = ijepa_fast.embed("runs/mine", "images")
        >>> found.features.shape, found.paths[0], found.left_out
        ((40, 32), 'class0/000.jpg', ())
    """

    features: NDArray[np.float32]
    paths: tuple[str, ...]
    left_out: tuple[str, ...]


def embed(
    weights: Weights,
    /,
    data: AnyPath,
    *,
    out: AnyPath | None = None,
    layers: Layers = "last",
    batch: int = 128,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    decoder: Literal["auto", "dali", "pillow"] = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    encoder: EncoderKind = "target",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
) -> Embedded:
    """Features of all images of a folder, cropped centrally to the shape that the weights were
    trained at; written into a file, and the images' paths into a JSON file of the same name.

    Args:
        weights: A run's folder, a checkpoint, a Hugging Face folder, or a file of weights.
        data: Folder, list file or tar shards, labelled or not, or the name of a set: its training
            images.
        out: File to write: features.npy (a NumPy array), or features.safetensors (tensor
            `features`). Row i is of the image `paths[i]` of features.json beside it. Neither may
            exist.
        layers: The last layer, or the last four one after the other, each after the final norm;
            averaged over patches.
        batch: Images at once.
        device: Where to compute; `auto` is CUDA where there is one.
        decoder: As data.decoder.
        precision: Of the encoder's products; `auto` is the run's, and float32 for weights without a
            run.
        encoder: Which of a run's two encoders; the target encoder has the better features.
        image_size: Height and width that the weights were trained at, where their file does not
            tell.
        heads: Attention heads, where the file does not tell.
        mean: Mean of the image channels in 0-1 units, instead of what the file tells.
        std: Their standard deviation, likewise.

    Returns:
        Features float32 (n, D), n paths, and the images that were left out.

    Raises:
        UsageError: the weights or the data are none, an argument is out of range, or a file is
            there.
        CheckpointError: a checkpoint is damaged.
        ValueError: less than half of the images can be used.

    Example:
        >>> encoder = ijepa_fast.load_encoder("runs/mine")
        >>> ijepa_fast.embed(encoder, "images", out="features.npy").features.shape
        (40, 32)
    """
    require_choices(embed, locals())
    require(batch >= 1, "batch", "at least 1", batch)
    cuda = torch.cuda.is_available()
    rule = "auto or cpu where torch sees no CUDA device"
    require(cuda or device != "cuda", "device", rule, device)
    if out is not None:
        _check_new(Path(out))
    read = as_pretrained(weights, image_size=image_size, heads=heads, mean=mean, std=std)
    place = torch.device("cuda" if cuda and device == "auto" else device.replace("auto", "cpu"))
    network = load_encoder(read, encoder=encoder).to(place)
    try:
        # what is missing is listed with what cannot be used
        index = open_index(data, allow_missing=True)[0]
    except ValueError as error:
        raise UsageError(str(error).replace("data.root", "data")) from None
    everything = Split(
        index=index,
        rows=np.arange(len(index)),
        data=replace(data_of(read), decoder=decoder),
        device=place,
    )
    half = precision_of(read, precision) == "bfloat16"
    key = LAST if layers == "last" else LAST_FOUR
    features, rows = [], []
    batches = everything.batches(batch)
    for images, _, kept in shown(batches, "features", len(index), bar=True):
        pooled = pooled_layers(network, images, four=layers != "last", half=half, at_once=batch)
        features.append(pooled[key].numpy())
        rows.append(kept)
    used = np.concatenate(rows)
    unused = np.setdiff1d(everything.rows, used)
    found = Embedded(
        features=np.concatenate(features),
        paths=tuple(index.name(int(row)) for row in used),
        left_out=(*(index.name(int(row)) for row in unused), *(name for name, _ in index.bad)),
    )
    if out is not None:
        about = {"weights": read.source, "encoder": read.kind(encoder), "layers": layers}
        _write_files(found, Path(out), {**about, "data": str(data)})
    return found


def _check_new(out: Path) -> None:
    require(out.suffix in (".npy", ".safetensors"), "out", ".npy or .safetensors", out)
    for path in (out, out.with_suffix(".json")):
        if path.exists():
            raise UsageError(f"out must be a new file, got {path}, which is there")
    if not out.parent.is_dir():
        raise UsageError(f"out must lie in a folder that exists, got {out}")


def _write_files(found: Embedded, out: Path, about: dict[str, Any]) -> None:
    told = {
        **about,
        "ijepa_fast": __version__,
        "left_out": found.left_out,
        "paths": found.paths,
    }
    with atomic_write(out.with_suffix(".json")) as path:
        path.write_text(json.dumps(told, indent=0) + "\n")
    with atomic_write(out) as path:
        if path.suffix == ".npy":
            np.save(path, found.features)
        else:
            save_file({"features": found.features}, path)


def _tell(call: tuple[Any, Any]) -> None:
    """Embeds, and says what was written."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    positional, named = call
    if named["out"] is None:
        raise UsageError("out must be given: --out features.npy")
    found, out = embed(*positional, **named), Path(named["out"])
    (rows, width), beside = found.features.shape, out.with_suffix(".json")
    print(f"features of {rows} images, {width} wide, written to {out}, paths to {beside}")
    if found.left_out:
        print(f"{len(found.left_out)} images left out, see left_out in {beside}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(call_of(embed), _tell, argv, "embed")
