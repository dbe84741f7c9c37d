"""What a run is told: the schema of all settings, named presets, the command line, and the released
trainer's YAML.
"""

from ijepa_fast.config.choose import Facts, choose, describe
from ijepa_fast.config.cli import (
    Invocation,
    TrainArguments,
    as_arguments,
    as_dict,
    completed,
    dump_yaml,
    flatten,
    from_tree,
    load_yaml,
    parse,
    read_yaml,
)
from ijepa_fast.config.command import AnyPath, call_of, one_word, require_choices, run_command
from ijepa_fast.config.presets import PRESETS, preset
from ijepa_fast.config.schema import (
    ARCHITECTURES,
    Architecture,
    AttentionName,
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
)

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "AnyPath",
    "Architecture",
    "AttentionName",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "Facts",
    "Invocation",
    "LogConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainArguments",
    "as_arguments",
    "as_dict",
    "call_of",
    "choose",
    "completed",
    "describe",
    "dump_yaml",
    "flatten",
    "from_tree",
    "load_yaml",
    "one_word",
    "parse",
    "preset",
    "read_yaml",
    "require_choices",
    "run_command",
]
