"""Which back end of kernels, attention and decoding a run takes here, and why not the
others.
"""

from typing import get_args, get_type_hints

import torch
import triton

import ijepa_kernels
from ijepa_fast.config import ARCHITECTURES, Config, DataConfig, ModelConfig
from ijepa_fast.data import make_decoder
from ijepa_fast.doctor.findings import Finding, Level, first_line
from ijepa_fast.fast import choose_attention

__all__ = ["attention", "decoder", "device", "operations"]

# what the package offers beside its ops
NOT_OPS = {"debug_checks", "pad_patch_weight", "target_rows", "Float8Rows"}


def device() -> torch.device:
    """Where a run trains by default."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _finding(name: str, text: str, level: Level = "ok", advice: str = "") -> Finding:
    return Finding(section="back ends", name=name, level=level, text=text, advice=advice)


def operations() -> list[Finding]:
    """What runs behind the ops of `ijepa_kernels`."""
    names = ", ".join(sorted(set(ijepa_kernels.__all__) - NOT_OPS))
    where = device()
    if triton.knobs.runtime.interpret and where.type == "cuda":
        return [
            _finding(
                names,
                "Triton's interpreter, one element at a time: TRITON_INTERPRET is set",
                "problem",
                "unset TRITON_INTERPRET",
            )
        ]
    if where.type == "cuda":
        return [_finding(names, f"Triton {triton.__version__} on CUDA")]
    text = "their PyTorch implementations on the CPU"
    if triton.knobs.runtime.interpret:
        text += (
            "; TRITON_INTERPRET is set, so the self test and ijepa_kernels.testing.launch_on_cpu "
            "run the kernels in the interpreter"
        )
        return [_finding(names, text, "note")]
    return [_finding(names, text)]


def _shapes() -> list[tuple[int, int, int]]:
    """Tokens, heads and head dim of encoders and predictors, one of each head dim that is named."""
    narrow = ModelConfig().predictor_width
    sizes = ARCHITECTURES.values()
    heads = {w // a.heads: a.heads for a in sizes for w in (a.width, narrow)}
    return [(196, heads[dim], dim) for dim in sorted(heads)]


def attention() -> list[Finding]:
    """The back ends of the fast path in bfloat16, and why each other one is not used."""
    where, shapes = device(), _shapes()
    chosen = choose_attention("auto", where, torch.bfloat16, shapes)
    found = [_finding("attention of the fast path", f"{chosen} ({chosen.why})")]
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
        found.append(_finding(f"attention {name}", text))
    return found


def decoder() -> list[Finding]:
    """The decoder of training images that `auto` takes."""
    where = device()
    try:
        made, why = make_decoder(DataConfig(crop=32), where, max_batch=1)
    except (ImportError, RuntimeError) as error:
        return [_finding("decoder", first_line(error), "problem", "--data.decoder pillow")]
    made.close()
    text = why.removeprefix("decoder: ")
    if text.startswith("DALI"):
        kind = "mixed: on the GPU" if where.type == "cuda" else "on the CPU"
        return [_finding("decoder", f"{text}; decodes {kind}")]
    failing = "DALI fails" in text
    advice = "see DALI above; --data.decoder pillow is slower and always works" if failing else ""
    return [_finding("decoder", text, "problem" if failing else "note", advice)]
