"""Curves of `metrics.jsonl`: of one run, or of several over each other."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_fast.errors import UsageError
from ijepa_fast.state import read_rows
from ijepa_fast.visualize.figure import pyplot, save

__all__ = ["draw_curves", "draw_runs", "read_runs"]

Row = Mapping[str, Any]


def draw_curves(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG of loss, learning rate, weight decay, momentum, feature std and images/s over
    the step.

    Args:
        path: the PNG file.
        rows: rows of `metrics.jsonl`; kNN rows are drawn too where there are any.
    """
    plt = pyplot()
    training = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in training]
    panels = [
        ("loss", [row["loss"] for row in training]),
        ("learning rate", [row["lr"] for row in training]),
        ("weight decay", [row["weight_decay"] for row in training]),
        ("momentum of the target encoder", [row["momentum"] for row in training]),
        ("feature std of the target encoder", [row["feature_std"] for row in training]),
        ("images/s", [row["timing"]["images_per_second"] for row in training]),
    ]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for axis, (title, values) in zip(axes.flat, panels, strict=True):
        axis.plot(steps, values, color="tab:blue", linewidth=1.2)
        _label(axis, title)
    scored = [row for row in rows if "knn" in row]
    if scored:
        alike = [row for row in scored if row.get("images") == scored[-1].get("images")]
        scored = [alike[0], *alike[1:][-1:]]
        of = "" if _whole(scored[-1]) else " of a part of the images"
        text = "   ".join(
            f"step {row['step']}: {name} {100 * value:.1f} %"
            for row in scored
            for name, value in row["knn"].items()
        )
        figure.text(0.01, 0.005, f"kNN{of}: {text}", fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, path, dpi=110)


def _label(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)


class _Line(NamedTuple):
    """A curve of one run. Points are marked where there are few; a level has no steps."""

    steps: list[int]
    values: list[float]
    style: str = "-"
    name: str = ""


class _Panel(NamedTuple):
    title: str
    lines: Callable[[Sequence[Row]], list[_Line]]
    log: bool = False


def _of(read: Callable[[Row], Any]) -> Callable[[Sequence[Row]], list[_Line]]:
    """Lines of a number that some rows hold."""

    def lines(rows: Sequence[Row]) -> list[_Line]:
        found = [(row["step"], read(row)) for row in rows]
        found = [(step, value) for step, value in found if isinstance(value, int | float)]
        return [_Line([s for s, _ in found], [v for _, v in found])] if found else []

    return lines


def _monitor(name: str) -> Callable[[Sequence[Row]], list[_Line]]:
    return _of(lambda row: (row.get("monitors") or {}).get(name))


def _whole(row: Row) -> bool:
    """Whether a look was at all labelled images: against fewer, kNN accuracies are lower."""
    return "images" not in row


def _knn(rows: Sequence[Row]) -> list[_Line]:
    return _accuracies([row for row in rows if _whole(row)])


def _knn_of_part(rows: Sequence[Row]) -> list[_Line]:
    return _accuracies([row for row in rows if not _whole(row)])


def _accuracies(rows: Sequence[Row]) -> list[_Line]:
    """The encoder's accuracy, from the untrained network at step 0 on, and the level of what does
    not change with the step (raw pixels).
    """
    points: dict[str, list[tuple[int, float]]] = {}
    levels: dict[str, float] = {}
    for row in rows:
        knn, step = row.get("knn") or {}, row["step"]
        # a run that began with other weights: the untrained network is a level
        started = "target encoder, step 0" in knn
        for name, value in knn.items():
            named = re.fullmatch(r"(.+), step (\d+)", name)
            if named:
                points.setdefault(named[1], []).append((int(named[2]), 100 * value))
            elif name.startswith("untrained") and step == 0 and not started:
                points.setdefault("target encoder", []).append((0, 100 * value))
            else:
                levels[name] = 100 * value
    lines = [
        _Line([s for s, _ in sorted(found)], [v for _, v in sorted(found)], "-", name)
        for name, found in points.items()
    ]
    return lines + [_Line([], [value], ":", name) for name, value in levels.items()]


PANELS = (
    _Panel("loss", _of(lambda row: row.get("loss")), log=True),
    _Panel("learning rate", _of(lambda row: row.get("lr"))),
    _Panel("weight decay", _of(lambda row: row.get("weight_decay"))),
    _Panel("momentum of the target encoder", _of(lambda row: row.get("momentum"))),
    _Panel("feature std of the target encoder", _of(lambda row: row.get("feature_std"))),
    _Panel("images/s", _of(lambda row: (row.get("timing") or {}).get("images_per_second"))),
    _Panel("kNN accuracy, %", _knn),
    _Panel("kNN accuracy, %, part of the images", _knn_of_part),
    _Panel("RankMe", _monitor("rankme")),
    _Panel("LiDAR", _monitor("lidar")),
    _Panel("cosine of prediction and target", _monitor("prediction_cosine")),
)


def read_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Rows of several runs, by the names of their folders (as much of the path as tells them
    apart).

    Raises:
        UsageError: a folder is given twice or holds no rows of metrics.
    """
    whole = [folder.resolve() for folder in folders]
    names: dict[str, Path] = {}
    for given, folder in zip(folders, whole, strict=True):
        same = [other for other in whole if other.name == folder.name]
        depth = 1
        while len({other.parts[-depth:] for other in same}) < len(set(same)):
            depth += 1
        name = "/".join(folder.parts[-depth:])
        if name in names:
            raise UsageError(f"RUN must name each run once, got {given} twice")
        names[name] = folder
    rows = {name: read_rows(folder / "metrics.jsonl") for name, folder in names.items()}
    for name, found in rows.items():
        if not found:
            raise UsageError(f"RUN must hold metrics.jsonl with rows, got none in {names[name]}")
    return rows


def draw_runs(path: Path, runs: Mapping[str, Sequence[Row]]) -> list[str]:
    """Writes a PNG of the curves of several runs over each other, with a legend; quantities that
    no run has are left out.

    Args:
        path: the PNG file.
        runs: name -> rows of `metrics.jsonl`.

    Returns:
        Titles of the panels drawn.

    Raises:
        ValueError: no row holds anything to draw.
    """
    found = [(p, {name: p.lines(rows) for name, rows in runs.items()}) for p in PANELS]
    found = [(p, lines) for p, lines in found if any(lines.values())]
    if not found:
        raise ValueError("runs must hold at least one number to draw, got none")
    from matplotlib.ticker import LogLocator

    plt = pyplot()
    columns = min(3, len(found))
    count = -(-len(found) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(4 * columns, 2.8 * count + 0.4), squeeze=False
    )
    colours = plt.get_cmap("tab10").colors
    handles: dict[str, Any] = {}
    for axis, (what, of_run) in zip(axes.flat, found, strict=False):
        for number, (name, lines) in enumerate(of_run.items()):
            colour = colours[number % len(colours)]
            for line in lines:
                handle = _draw(axis, line, colour)
                if line.steps:
                    handles.setdefault(name, handle)
        _label(axis, what.title)
        values = [v for lines in of_run.values() for line in lines for v in line.values]
        if what.log and min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        ncols=6,
        fontsize=9,
        frameon=False,
    )
    save(figure, path, dpi=100)
    return [what.title for what, _ in found]


def _draw(axis: Any, line: _Line, colour: Any) -> Any:
    if not line.steps:
        level = line.values[0]
        handle = axis.axhline(level, color=colour, linestyle=line.style, linewidth=1)
        axis.annotate(
            line.name, (0.99, level), xycoords=("axes fraction", "data"), fontsize=7, ha="right",
            va="top", color=colour,
        )  # fmt: skip
        return handle
    marker = "o" if len(line.steps) < 20 else None
    (handle,) = axis.plot(
        line.steps,
        line.values,
        line.style,
        color=colour,
        linewidth=1.2,
        marker=marker,
        markersize=3,
    )
    return handle
