"""ijepa-fast: faithful and fast I-JEPA pretraining."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_encoder`, imported when it is asked for: importing the package imports nothing."""
    if name == "load_encoder":
        return importlib.import_module("ijepa_fast.weights.encoder").load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
