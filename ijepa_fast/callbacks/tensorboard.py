"""TensorBoard: events in OUT/tensorboard."""

from collections.abc import Mapping
from typing import Any

from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.scalars import scalars

__all__ = ["TensorBoard"]


class TensorBoard(Callback):
    """Writes every row's numbers as scalars; `tensorboard --logdir OUT` shows them."""

    def on_start(self, info: RunInfo) -> None:
        """Opens the folder; events of steps that are done again are dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(info.out / "tensorboard"), purge_step=info.step + 1)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Writes the row's scalars into the file at once: a kill may follow."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    on_evaluation = on_step

    def on_end(self, status: Status, step: int) -> None:
        """Writes what is left."""
        self._writer.close()
