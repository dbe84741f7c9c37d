"""Encoders in other people's files: the released layout, timm's, Hugging Face's, and our own.

| what | recognised by |
|---|---|
| a run's folder, or one of its checkpoints | ``checkpoints/``, ``state.safetensors`` |
| Hugging Face I-JEPA | a folder with ``config.json`` |
| a folder of timm | a folder with ``config.json`` that names an ``architecture`` |
| timm names (our own names), one encoder or all three networks | a ``.safetensors`` file |
| the folder of an export | ``model.safetensors`` |
| the released layout, or any PyTorch file of tensors | ``.pth.tar``, ``.pth``, ``.pt``, ``.bin`` |

PyTorch files are read with ``weights_only=True``: nothing in them is run.
"""

from ijepa_fast.weights.encoder import Encoder, Weights, as_pretrained, load_encoder, start_weights
from ijepa_fast.weights.pretrained import METADATA, EncoderKind, Pretrained, Shape, network_of
from ijepa_fast.weights.read import read_weights

__all__ = [
    "METADATA",
    "Encoder",
    "EncoderKind",
    "Pretrained",
    "Shape",
    "Weights",
    "as_pretrained",
    "load_encoder",
    "network_of",
    "read_weights",
    "start_weights",
]
