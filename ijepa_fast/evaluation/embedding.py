"""Features of all images of a folder, labelled or not, as a file:
``ijepa-fast embed RUN_OR_WEIGHTS --data DIR --out features.npy``.
"""

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ijepa_fast import __version__
from ijepa_fast.atomic import atomic_write
from ijepa_fast.config import run_command
from ijepa_fast.data import open_index
from ijepa_fast.errors import UsageError, require
from ijepa_fast.evaluation.features import LAST, LAST_FOUR, pooled_layers, shown
from ijepa_fast.evaluation.labelled import Split, data_of, precision_of
from ijepa_fast.weights import EncoderKind, Pretrained, ReadOptions, load_encoder, read_weights

__all__ = ["EmbedArgs", "Embedded", "embed", "main"]

Layers = Literal["last", "last-4"]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Features of the images of a folder.

    Attributes:
        features: float32 (n, width), averaged over patches; width is D, or 4 D for four layers.
        paths: n, in the same order, that of the data set's table (sorted, for a folder): relative
            to the folder, with the member's name behind a tar shard's.
        left_out: paths of the images that cannot be used; the log says why.
    """

    features: NDArray[np.float32]
    paths: tuple[str, ...]
    left_out: tuple[str, ...]


@torch.no_grad()
def embed(
    weights: str | Path | Pretrained,
    data: str | Path,
    *,
    encoder: EncoderKind = "target",
    layers: Layers = "last",
    batch: int = 128,
    device: str = "auto",
    decoder: Literal["auto", "dali", "pillow"] = "auto",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
) -> Embedded:
    """Features of every image of a data set, cropped centrally to the shape that the weights were
    trained at.

    Args:
        weights: anything that `load_encoder` takes.
        data: a folder, list file or tar shards, or the name of a set; classes do not matter.
        encoder: which of a run's two.
        layers: the last layer, or the last four one after the other; each after the final norm.
        batch: images at once.
        device: `auto` is CUDA where there is one.
        decoder: as `data.decoder`.
        precision: of the products; `auto` is the run's, and float32 for weights without a run.

    Raises:
        UsageError: the weights or the data are none, or an argument is out of range.
        CheckpointError: a checkpoint is damaged.
        ValueError: less than half of the images can be used.
    """
    require(batch >= 1, "batch", "at least 1", batch)
    read = weights if isinstance(weights, Pretrained) else read_weights(weights)
    cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    rule = "auto or cpu where torch sees no CUDA device"
    require(cuda or not device.startswith("cuda"), "device", rule, device)
    network = load_encoder(read, encoder=encoder).to(device)
    try:
        # what is missing is listed with what cannot be used
        index = open_index(data, allow_missing=True)[0]
    except ValueError as error:
        raise UsageError(str(error).replace("data.root", "data")) from None
    everything = Split(
        index=index,
        rows=np.arange(len(index)),
        data=replace(data_of(read), decoder=decoder),
        device=torch.device(device),
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
    return Embedded(
        features=np.concatenate(features),
        paths=tuple(index.name(int(row)) for row in used),
        left_out=(*(index.name(int(row)) for row in unused), *(name for name, _ in index.bad)),
    )


@dataclass(frozen=True, kw_only=True)
class EmbedArgs(ReadOptions):
    """Writes features of all images of a folder into a file, and their paths into a JSON file of
    the same name.
    """

    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]
    """A run's folder, a checkpoint, a Hugging Face folder, or a file of weights."""
    data: str
    """Folder, list file or tar shards, labelled or not, or the name of a set: its training
    images."""
    out: Path
    """File to write: features.npy (a NumPy array), or features.safetensors (tensor `features`).
    Row i is of the image `paths[i]` of features.json beside it. Neither may exist."""
    layers: Layers = "last"
    """The last layer, or the last four one after the other; averaged over patches."""
    batch: int = 128
    """Images at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` is CUDA where there is one."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """As data.decoder."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the encoder's products; `auto` is the run's, and float32 for weights without a run."""


def _embed(args: EmbedArgs) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    beside = args.out.with_suffix(".json")
    require(args.out.suffix in (".npy", ".safetensors"), "out", ".npy or .safetensors", args.out)
    for path in (args.out, beside):
        if path.exists():
            raise UsageError(f"out must be a new file, got {path}, which is there")
    if not args.out.parent.is_dir():
        raise UsageError(f"out must lie in a folder that exists, got {args.out}")
    weights = args.read(args.weights)
    found = embed(
        weights,
        args.data,
        encoder=args.encoder,
        layers=args.layers,
        batch=args.batch,
        device=args.device,
        decoder=args.decoder,
        precision=args.precision,
    )
    about = {
        "weights": weights.source,
        "encoder": weights.kind(args.encoder),
        "layers": args.layers,
        "data": args.data,
        "ijepa_fast": __version__,
        "left_out": found.left_out,
        "paths": found.paths,
    }
    with atomic_write(beside) as path:
        path.write_text(json.dumps(about, indent=0) + "\n")
    with atomic_write(args.out) as path:
        if path.suffix == ".npy":
            np.save(path, found.features)
        else:
            save_file({"features": found.features}, path)
    rows, width = found.features.shape
    print(f"features of {rows} images, {width} wide, written to {args.out}, paths to {beside}")
    if found.left_out:
        print(f"{len(found.left_out)} images left out, see left_out in {beside}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return run_command(EmbedArgs, _embed, argv, "embed")
