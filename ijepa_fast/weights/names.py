"""Names of the same weights in timm (which are ours), on Hugging Face's hub, and in wrappers."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ijepa_fast.errors import UsageError

__all__ = ["hugging_face_names", "our_names"]

# parts of other models: with them the rest would not compute what it was trained for
_FOREIGN = ("cls_token", "reg_token", "dist_token", "fc_norm.", "norm_pre.", ".ls1.", ".q_norm.")
# Hugging Face's names, as its hub has them and as the models of version 5 call them
_BLOCK = (
    (r"attention\.(?:attention\.)?(query|key|value)|attention\.([qkv])_proj", "attn.qkv"),
    (r"attention\.output\.dense|attention\.o_proj", "attn.proj"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"intermediate\.dense|mlp\.fc1", "mlp.fc1"),
    (r"output\.dense|mlp\.fc2", "mlp.fc2"),
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OUTSIDE = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def our_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Our names, float32; heads of classifiers are left out.

    Raises:
        UsageError: there is more in it than an I-JEPA encoder, a name with control characters, or
            a tensor that is not plain, not of floating-point numbers, or not finite.
    """
    plain: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        if not full.isprintable():
            raise UsageError(f"names of weights must be printable, got {full!r} in {path}")
        name = re.sub(r"^(?:module\.|_orig_mod\.|ijepa\.)+", "", full)
        if name.startswith(("head.", "classifier.", "pooler.")) or name == "embeddings.mask_token":
            continue
        if any(part in f"{name}." for part in _FOREIGN):
            raise UsageError(f"weights must be of an I-JEPA encoder, got {full} in {path}")
        if tensor.dtype not in _DTYPES or not _is_plain(tensor):
            raise UsageError(
                f"weights must be plain tensors of float16, bfloat16, float32 or float64, got "
                f"{full} of {tensor.dtype}, {tensor.layout} on {tensor.device} in {path}"
            )
        if not tensor.isfinite().all():
            raise UsageError(f"weights must be finite, got {full} in {path} that is not")
        value = tensor.detach().float().contiguous()
        block = re.fullmatch(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)", name)
        if name in _OUTSIDE:
            plain[_OUTSIDE[name]] = value
        elif block is None:
            plain[name] = value
        else:
            number, part, kind = block.groups()
            for pattern, ours in _BLOCK:
                if found := re.fullmatch(pattern, part):
                    key = f"blocks.{number}.{ours}.{kind}"
                    if ours == "attn.qkv":
                        which = next(group for group in found.groups() if group)[0]
                        thirds.setdefault(key, {})[which] = value
                    else:
                        plain[key] = value
                    break
            else:
                raise UsageError(f"weights must be of an I-JEPA encoder, got {full} in {path}")
    for key, third in thirds.items():
        shapes = [tuple(value.shape) for value in third.values()]
        if len(set(shapes)) > 1 or () in shapes:
            raise UsageError(f"thirds of {key} must have the same shape, got {shapes} in {path}")
        if len(third) == 3:
            plain[key] = torch.cat([third[which] for which in "qkv"])
    return plain


def _is_plain(tensor: Tensor) -> bool:
    """Numbers in memory, one after the other: not sparse, nested, quantised, or without any."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_nested
    )


def hugging_face_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An encoder's weights under the names of the hub's files, which versions 4 and 5 of
    transformers read.
    """
    named = {theirs: state[ours] for theirs, ours in _OUTSIDE.items()}
    parts = {
        "attn.proj": "attention.output.dense",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for key, value in state.items():
        if not key.startswith("blocks."):
            continue
        _, number, rest = key.split(".", 2)
        part, _, kind = rest.rpartition(".")
        block = f"encoder.layer.{number}"
        if part == "attn.qkv":
            for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[f"{block}.attention.attention.{name}.{kind}"] = third
        else:
            named[f"{block}.{parts[part]}.{kind}"] = value
    return named
