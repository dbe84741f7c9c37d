"""Two decoders with one interface: encoded files and crop windows in, one uint8 tensor out.

Both cut the window out first and resize it then (bilinear, antialiased, to uint8): on the CPU with
torch, which rounds as Pillow does to within 1 and takes half the time, on a GPU with DALI. Files
that are not `plain` (see `pixels`) are decoded by Pillow in either, so that the conversion to RGB
is one rule.
"""

import importlib

import torch

from ijepa_fast.config import DataConfig
from ijepa_fast.data.dali_decoder import DaliDecoder, last_line
from ijepa_fast.data.pillow_decoder import ImageDecoder, PillowDecoder, default_threads

__all__ = ["make_decoder"]


def make_decoder(
    config: DataConfig, device: torch.device | str, *, max_batch: int
) -> tuple[ImageDecoder, str]:
    """The decoder that `config.decoder` asks for.

    Args:
        config: `decoder`, `crop`, `threads` and `timeout` are used.
        device: the training device.
        max_batch: largest batch that will be decoded.

    Returns:
        The decoder, and one line saying which it is and why (to be logged once).

    Raises:
        ImportError: `dali` is asked for and not installed.
        ValueError: `dali` is asked for and cannot start (an old driver, no memory).
    """
    device = torch.device(device)
    size, threads = config.crop_size, config.threads or default_threads()
    used = f"{threads} thread{'s' * (threads > 1)}"

    def pillow(why: str) -> tuple[ImageDecoder, str]:
        made = PillowDecoder(size, threads, device, config.timeout)
        return made, f"decoder: Pillow ({used}), {why}"

    if config.decoder == "pillow":
        return pillow("as asked")
    try:
        version = importlib.import_module("nvidia.dali").__version__
        decoder = DaliDecoder(size, threads, max_batch, device, config.timeout)
    except ImportError as error:
        if config.decoder == "dali":
            raise ImportError(
                "data.decoder must be a decoder that is installed, got 'dali': "
                f"pip install nvidia-dali-cuda130, or data.decoder=pillow ({error})"
            ) from error
        return pillow(f"because DALI cannot be imported: {error}")
    except RuntimeError as error:
        if config.decoder == "dali":
            raise ValueError(
                "data.decoder must be a decoder that works here, got 'dali' "
                f"(data.decoder=pillow does without it): {last_line(error)}"
            ) from error
        return pillow(f"because DALI fails: {last_line(error)}")
    where = f"{used}, {'GPU' if device.type == 'cuda' else 'CPU'}"
    asked = "as asked" if config.decoder == "dali" else "the default where it is installed"
    return decoder, f"decoder: DALI {version}, {asked} ({where})"
