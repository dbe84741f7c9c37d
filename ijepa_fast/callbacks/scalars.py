"""A row of metrics under the names that all loggers use."""

from collections.abc import Mapping
from typing import Any

__all__ = ["scalars"]


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, flat.

    Args:
        row: of `Callback.on_step`: train/loss, train/step_ms and so on, timing included; or of
            `Callback.on_evaluation`: monitors/rankme, knn/target encoder and so on.
    """
    groups = {"train": {**row, **row.get("timing", {})}}
    if "monitors" in row:
        # of "target encoder, step 100" the network: the step changes
        knn = {name.partition(",")[0]: value for name, value in row.get("knn", {}).items()}
        groups = {"monitors": row["monitors"], "knn": knn}
    return {
        f"{group}/{name}": value
        for group, numbers in groups.items()
        for name, value in numbers.items()
        if isinstance(value, int | float) and name != "step"
    }
