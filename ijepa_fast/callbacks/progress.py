"""What a person sees of a run: a progress bar on a terminal, and a line for each row."""

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ijepa_fast.callbacks.callback import Callback, RunInfo, Status

__all__ = ["Progress", "evaluation_lines", "line"]

_logger = logging.getLogger(__name__)

# columns that a line for a person fits in
_WIDTH = 100


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def line(row: Mapping[str, Any], last_step: int, epochs: int) -> str:
    """One row of training metrics for a person: what there is room for, the most wanted first."""
    timing, wait = row["timing"], row["timing"]["data_wait_ms"]
    parts = [
        f"step {row['step']}/{last_step}",
        f"epoch {row['epoch'] + 1}/{epochs}",
        f"loss {row['loss']:.5f}",
        f"lr {row['lr']:.2e}",
        f"{timing['images_per_second']:.0f} img/s",
        f"ETA {_clock(timing['eta_seconds'])}",
    ]
    # of these, what is out of order comes first
    more = {
        f"SKIPPED {row['skipped']} (not finite)": row["skipped"] > 0,
        f"data wait {wait:.0f} ms": wait > 0.1 * timing["step_ms"],
        f"MFU {100 * (timing['mfu'] or 0):.1f} %": timing["mfu"] is not None,
        f"std {row['feature_std']:.3f}": True,
        f"{timing['memory_gib']:.2f} GiB": True,
    }
    for part, wanted in more.items():
        if wanted and len("  ".join([*parts, part])) <= _WIDTH:
            parts.append(part)
    return "  ".join(parts)


def evaluation_lines(row: Mapping[str, Any]) -> list[str]:
    """One evaluation of the features for a person."""
    numbers, title = row["monitors"], f"evaluation at step {row['step']}"
    parts = [
        title,
        f"std {numbers['feature_std']:.3f}",
        f"RankMe {numbers['rankme']:.1f}",
        *([f"LiDAR {numbers['lidar']:.1f}"] if "lidar" in numbers else []),
        f"cosine {numbers['prediction_cosine']:.3f} (constant {numbers['mean_target_cosine']:.3f})",
    ]
    lines = ["  ".join(parts)]
    if knn := row.get("knn"):
        scores = (f"kNN {100 * value:.1f} % ({name})" for name, value in knn.items())
        lines.append("  ".join([title, *scores]))
        if "images" in row:
            lines[-1] += f"  of {row['images'][0]} and {row['images'][1]} images"
    return lines


class Progress(Callback):
    """A progress bar on a terminal; the rows as lines of the log everywhere.

    Attributes:
        bar: rich's, on a terminal only.
    """

    bar: Any = None

    def on_start(self, info: RunInfo) -> None:
        """Shows the bar."""
        self._ends = info.last_step, info.config.optim.epochs
        if sys.stdout.isatty():
            from rich import progress

            self.bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=20),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[status]}"),
            )
            self._task = self.bar.add_task(
                "preparing", total=info.last_step, completed=info.step, status=""
            )
            self.bar.start()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        if self.bar:
            self.bar.update(self._task, description="training", completed=step)

    def doing(self, what: str) -> None:
        """The bar names something else than training until the next step."""
        if self.bar:
            self.bar.update(self._task, description=what)

    def on_step(self, row: Mapping[str, Any]) -> None:
        """One line."""
        _logger.info("%s", line(row, *self._ends))
        if self.bar:
            status = f"loss {row['loss']:.4f}  {row['timing']['images_per_second']:.0f} img/s"
            self.bar.update(self._task, status=status)

    def on_evaluation(self, row: Mapping[str, Any]) -> None:
        """A line for the monitors and, where there are labels, one for kNN."""
        for text in evaluation_lines(row):
            _logger.info("%s", text)

    def on_end(self, status: Status, step: int) -> None:
        """Ends the bar."""
        if self.bar:
            self.bar.stop()
