"""Weights made to fit a network at another resolution. Shape letters: N grid patches, D width."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.config import Config
from ijepa_fast.errors import UsageError
from ijepa_fast.weights.pretrained import Pretrained
from ijepa_fast.weights.read import read_weights

__all__ = ["fit_to", "resample_positions", "start_weights"]


def resample_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position table for another grid, by bicubic interpolation over patch centres
    (antialiased where the grid gets smaller).

    Args:
        table: (1, N, D), row by row.
        old: its rows and columns.
        new: those wanted.

    Returns:
        float32 (1, rows * columns, D); the table itself where the grids are the same.

    Raises:
        ValueError: the table does not have the rows of the old grid.
    """
    if table.ndim != 3 or table.shape[:2] != (1, old[0] * old[1]):
        raise ValueError(
            f"position table must be (1, {old[0]} x {old[1]}, D), got {tuple(table.shape)}"
        )
    if old == new:
        return table
    image = table.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
    return image.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).contiguous()


def start_weights(path: str, config: Config, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Weights to start a run from, at the run's resolution.

    Args:
        path: see `read_weights`.
        config: of the run.
        shapes: of its checkpoints' tensors `encoder.*`, `target_encoder.*`, `predictor.*`.

    Returns:
        Tensors of these names; those of the predictor only if the file has one.

    Raises:
        UsageError: the weights do not fit the configuration.
        CheckpointError: a checkpoint is damaged.
    """
    size = config.data.crop_size
    read = _read_for(path, config)
    networks = dict(read.networks)
    networks.setdefault("encoder", networks["target_encoder"])
    if read.shape.heads != config.model.architecture.heads:
        raise UsageError(
            f"init must have model.heads ({config.model.architecture.heads}) attention heads, "
            f"got {read.shape.heads} in {read.source}"
        )
    new = (size[0] // config.model.patch_size, size[1] // config.model.patch_size)
    start: dict[str, Tensor] = {}
    for name, given in networks.items():
        prefix = f"{name}."
        wanted = {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}
        fitted = fit_to(given, wanted, old=read.shape.grid, new=new, source=read.source)
        start |= {prefix + key: tensor for key, tensor in fitted.items()}
    return start


def _read_for(path: str, config: Config) -> Pretrained:
    """Reads weights whose file may tell neither heads nor a rectangular grid: as many patches as
    the run's are taken for its grid, others for a square. What the file tells goes first.
    """
    heads, size = config.model.architecture.heads, config.data.crop_size
    for image_size in (size, None) if size[0] != size[1] else (None,):
        try:
            return read_weights(path, heads=heads, image_size=image_size)
        except UsageError:
            continue
    return read_weights(path)


def fit_to(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor | torch.Size],
    *,
    old: tuple[int, int],
    new: tuple[int, int],
    source: str,
) -> dict[str, Tensor]:
    """Weights that fit a network, its position table resampled where the grids differ.

    Args:
        given: the weights.
        wanted: the network's state, or its shapes.
        old, new: grids of both.
        source: what the weights are, for the error.

    Raises:
        UsageError: a name is missing or too much, or a shape differs; both shapes are named.
    """
    try:
        fitted = {
            key: resample_positions(tensor, old, new) if key.endswith("pos_embed") else tensor
            for key, tensor in given.items()
        }
    except ValueError as error:
        raise UsageError(f"weights must fit the network: {error} in {source}") from None
    for key in sorted(wanted.keys() | fitted.keys()):
        need: object = "absent"
        if key in wanted:
            target = wanted[key]
            need = tuple(target.shape if isinstance(target, Tensor) else target)
        got: object = tuple(fitted[key].shape) if key in fitted else "none"
        if need != got:
            raise UsageError(
                f"weights must fit the network: {key} must be {need}, got {got} in {source}"
            )
    return fitted
