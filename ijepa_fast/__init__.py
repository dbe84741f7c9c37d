"""ijepa-fast: faithful and fast I-JEPA pretraining.

    import ijepa_fast

    run = ijepa_fast.pretrain(data="/images", out="runs/mine")
    encoder = ijepa_fast.load_encoder(run)
    features = ijepa_fast.embed(encoder, "/images").features

The commands `ijepa-fast train`, `evaluate`, `embed` and `export` are these functions, with the same
arguments. Importing the package imports nothing: torch comes with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ijepa_fast.callbacks import Callback, RunInfo
    from ijepa_fast.config import (
        PRESETS,
        BatchConfig,
        CheckpointConfig,
        Config,
        DataConfig,
        EvalConfig,
        LogConfig,
        MaskConfig,
        ModelConfig,
        OptimConfig,
        preset,
    )
    from ijepa_fast.errors import UsageError
    from ijepa_fast.evaluation import Embedded, FinetuneSettings, embed, evaluate
    from ijepa_fast.train import RunResult, pretrain
    from ijepa_fast.weights import Encoder, Pretrained, load_encoder, read_weights
    from ijepa_fast.weights.export import export

__version__ = "0.1.0"

# where each public name comes from, as above, which only type checkers see; the others are settings
_MODULES = {
    "Callback": "callbacks",
    "Embedded": "evaluation",
    "Encoder": "weights",
    "FinetuneSettings": "evaluation",
    "Pretrained": "weights",
    "RunInfo": "callbacks",
    "RunResult": "train",
    "UsageError": "errors",
    "embed": "evaluation",
    "evaluate": "evaluation",
    "export": "weights.export",
    "load_encoder": "weights",
    "pretrain": "train",
    "read_weights": "weights",
}

__all__ = [
    "PRESETS",
    "BatchConfig",
    "Callback",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "Embedded",
    "Encoder",
    "EvalConfig",
    "FinetuneSettings",
    "LogConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "Pretrained",
    "RunInfo",
    "RunResult",
    "UsageError",
    "embed",
    "evaluate",
    "export",
    "load_encoder",
    "preset",
    "pretrain",
    "read_weights",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _MODULES.get(name, "config")
        return getattr(importlib.import_module(f"ijepa_fast.{module}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
