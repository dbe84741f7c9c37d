"""Weights made to fit a network at another resolution. Shape letters: N grid patches, D width."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ijepa_fast.errors import UsageError
from ijepa_fast.model import Predictor
from ijepa_fast.weights.pretrained import Shape, network_of

__all__ = ["fit_to", "require_whole", "resample_positions"]


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


def require_whole(networks: Mapping[str, Mapping[str, Tensor]], shape: Shape, source: str) -> None:
    """Every network has all tensors of its dimensions and no others.

    Args:
        networks: name -> weights under our names.
        shape: of the encoders.
        source: what the weights are, for the error.

    Raises:
        UsageError: a tensor is missing or too much, or has another shape.
    """
    for name, state in networks.items():
        place = f"{name} of {source}" if len(networks) > 1 else source
        # without memory
        with torch.device("meta"):
            whole = _predictor(state, shape, place) if name == "predictor" else network_of(shape)
        fit_to(state, whole.state_dict(), old=shape.grid, new=shape.grid, source=place)


def _predictor(state: Mapping[str, Tensor], shape: Shape, source: str) -> Predictor:
    """A predictor of the dimensions that its tensors say."""
    sizes = []
    for key in ("predictor_embed.weight", "predictor_blocks.0.mlp.fc1.weight"):
        if key not in state or state[key].ndim != 2:
            raise UsageError(f"weights must have a matrix {key}, got none in {source}")
        sizes.append(len(state[key]))
    return Predictor(
        grid=shape.grid,
        encoder_width=shape.width,
        width=sizes[0],
        depth=len({key.split(".")[1] for key in state if key.startswith("predictor_blocks.")}),
        heads=1,
        mlp_hidden=sizes[1],
    )
