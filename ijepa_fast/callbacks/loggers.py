"""The loggers that `log.to` names, and what they share."""

import importlib.util
from collections.abc import Iterable, Mapping

from ijepa_fast.callbacks.callback import Callback
from ijepa_fast.callbacks.mlflow import MLflow
from ijepa_fast.callbacks.tensorboard import TensorBoard
from ijepa_fast.callbacks.wandb import WeightsAndBiases
from ijepa_fast.errors import require

__all__ = ["check_packages", "loggers"]

# by the package that each needs: what it is, and the extra that brings the package
_LOGGERS: Mapping[str, tuple[type[Callback], str]] = {
    "tensorboard": (TensorBoard, "log"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}


def _named(names: Iterable[str]) -> list[str]:
    # metrics.jsonl is there anyway
    return [name for name in dict.fromkeys(names) if name != "jsonl"]


def check_packages(names: Iterable[str]) -> None:
    """Refuses loggers whose package is not installed.

    Args:
        names: `log.to`.

    Raises:
        UsageError: one is missing; names the extra that brings it.
    """
    for name in _named(names):
        spec = importlib.util.find_spec(name)
        rule = f"what is installed: pip install 'ijepa-fast[{_LOGGERS[name][1]}]'"
        # a mere folder of this name has no origin: W&B makes one where it runs
        require(spec is not None and spec.origin is not None, "log.to", rule, name)


def loggers(names: Iterable[str]) -> list[Callback]:
    """A logger for each name of `log.to`, once."""
    return [_LOGGERS[name][0]() for name in _named(names)]
