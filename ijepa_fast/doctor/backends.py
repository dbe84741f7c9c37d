"""Which back end of kernels, attention and decoding a run takes here, and why not the others."""

from collections.abc import Iterator
from typing import get_args, get_type_hints

import torch
import triton

from ijepa_fast.config import ARCHITECTURES, Config, DataConfig, ModelConfig
from ijepa_fast.data import make_decoder
from ijepa_fast.doctor.findings import Finding
from ijepa_fast.fast import choose_attention

__all__ = ["attention", "decoder", "device", "operations"]


def device() -> torch.device:
    """Where a run trains by default."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def operations() -> Iterator[Finding]:
    """What runs behind the ops of `ijepa_kernels`."""
    name = "ops of ijepa_kernels"
    if device().type == "cpu":
        yield Finding(name, "their PyTorch implementations on the CPU")
    elif triton.knobs.runtime.interpret:
        text = "Triton's interpreter, one element at a time: TRITON_INTERPRET is set"
        yield Finding(name, text, "problem", "unset TRITON_INTERPRET")
    else:
        yield Finding(name, f"Triton {triton.__version__} on CUDA")


def _shapes() -> list[tuple[int, int, int]]:
    """Tokens, heads and head dim of encoders and predictors, one of each head dim that is named."""
    narrow = ModelConfig().predictor_width
    sizes = ARCHITECTURES.values()
    heads = {w // a.heads: a.heads for a in sizes for w in (a.width, narrow)}
    return [(196, heads[dim], dim) for dim in sorted(heads)]


def attention() -> Iterator[Finding]:
    """The back ends of the fast path in bfloat16, and why each other one is not used."""
    where, shapes = device(), _shapes()
    chosen = choose_attention("auto", where, torch.bfloat16, shapes)
    yield Finding("attention of the fast path", f"{chosen} ({chosen.why})")
    # the flash packages last: a trial of theirs changes what PyTorch's own varlen runs
    for name in get_args(get_type_hints(Config)["attention"]):
        if name in ("auto", chosen.packed.name):
            continue
        try:
            choose_attention(name, where, torch.bfloat16, shapes)
            text = "usable, with --attention " + name
        except ValueError as error:
            reason = str(error).partition(", got ")[2].partition(": ")[2]
            text = f"not usable: {reason or error}"
        yield Finding(f"attention {name}", text)


def decoder() -> Iterator[Finding]:
    """The decoder of training images that `auto` takes."""
    made, why = make_decoder(DataConfig(crop=32), device(), max_batch=1)
    made.close()
    text = why.removeprefix("decoder: ")
    if "DALI fails" in text:
        advice = "see DALI below; --data.decoder pillow is slower and always works"
        yield Finding("decoder", text, "problem", advice)
    else:
        yield Finding("decoder", text, "ok" if text.startswith("DALI") else "note")
