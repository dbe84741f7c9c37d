"""One picture of any kind, cropped centrally, as evaluation makes those of a data set."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ijepa_fast.data.crops import central_windows
from ijepa_fast.data.pillow_decoder import resize
from ijepa_fast.data.pixels import check_pixels, check_scans, describe, open_image, to_rgb
from ijepa_fast.errors import UsageError, require

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Picture", "central_picture"]

Picture: TypeAlias = Union[str, "os.PathLike[str]", "Image.Image", Tensor, NDArray[np.uint8]]


def central_picture(picture: Picture, size: tuple[int, int]) -> Tensor:
    """The largest central window of a size's shape, resized to it (bilinear, antialiased).

    Args:
        picture: a file's path, a PIL image, or uint8 (height, width, 3).
        size: height and width, pixels.

    Returns:
        uint8 (H, W, 3), on the CPU.

    Raises:
        UsageError: it is no picture, or cannot be decoded.
        OSError: the file cannot be read.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8:
        picture = torch.from_numpy(picture.copy())
    if isinstance(picture, Tensor):
        right = picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        got = f"{picture.dtype} {tuple(picture.shape)}"
        require(right and picture.numel() > 0, "an image", "uint8 (height, width, 3)", got)
        top, left, height, width = _window(picture.shape[1], picture.shape[0], size)
        return resize(picture.cpu()[top : top + height, left : left + width], size)
    if isinstance(picture, str | os.PathLike):
        name, encoded = os.fspath(picture), Path(picture).read_bytes()
    else:
        name = type(picture).__name__
        known = isinstance(picture, Image.Image)
        require(known, "an image", "a path, a PIL image or uint8 (height, width, 3)", name)
        encoded = b""
    try:
        image = picture if isinstance(picture, Image.Image) else open_image(encoded)
        if image.format in ("JPEG", "MPO"):
            check_scans(encoded, *image.size)
        check_pixels(*image.size)
        top, left, height, width = _window(*image.size, size)
        inner = to_rgb(image.crop((left, top, left + width, top + height)))
        # a copy: Pillow's pixels are read-only, which torch does not know
        return resize(torch.from_numpy(np.array(inner)), size)
    # Pillow raises nearly anything on a hostile file
    except Exception as error:  # noqa: BLE001
        raise UsageError(f"an image must be decodable, got {name}: {describe(error)}") from None


def _window(width: int, height: int, size: tuple[int, int]) -> list[int]:
    return central_windows([width], [height], size)[0].tolist()
