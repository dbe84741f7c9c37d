"""Curves of `metrics.jsonl`: of one run, or of several over each other."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ijepa_fast.callbacks import read_rows
from ijepa_fast.errors import UsageError
from ijepa_fast.visualize.figure import pyplot, save

__all__ = ["Line", "draw_curves", "panels_of", "read_runs"]

Row = Mapping[str, Any]


class Line(NamedTuple):
    """A curve of one run. Points are marked where there are few; a level has no steps."""

    steps: list[int]
    values: list[float]
    name: str = ""


# title of a panel -> where a row holds its number
NUMBERS = {
    "loss": ("loss",),
    "learning rate": ("lr",),
    "weight decay": ("weight_decay",),
    "momentum": ("momentum",),
    "feature std": ("feature_std",),
    "images/s": ("timing", "images_per_second"),
    "RankMe": ("monitors", "rankme"),
    "LiDAR": ("monitors", "lidar"),
    "prediction cosine": ("monitors", "prediction_cosine"),
}


def panels_of(rows: Sequence[Row]) -> dict[str, list[Line]]:
    """The lines of one run by the titles of panels. Accuracies at a part of the labelled images are
    lower than at all of them, and stand apart.
    """
    numbers = {title: _numbers(rows, keys) for title, keys in NUMBERS.items()}
    whole, part = (
        [row for row in rows if ("images" in row) == is_part] for is_part in (False, True)
    )
    knn = {"kNN, %": _accuracies(whole), "kNN on a part of the images, %": _accuracies(part)}
    return {"loss": numbers.pop("loss"), **knn, **numbers}


def _numbers(rows: Sequence[Row], keys: Sequence[str]) -> list[Line]:
    steps, values = [], []
    for row in rows:
        value: Any = row
        for key in keys:
            value = (value or {}).get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(row["step"])
            values.append(value)
    return [Line(steps, values)] if steps else []


def _accuracies(rows: Sequence[Row]) -> list[Line]:
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
        Line([s for s, _ in sorted(found)], [v for _, v in sorted(found)], name)
        for name, found in points.items()
    ]
    return lines + [Line([], [value], name) for name, value in levels.items()]


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


def draw_curves(path: Path, runs: Mapping[str, Sequence[Row]]) -> list[str]:
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
    panels = [panels_of(rows) for rows in runs.values()]
    titles = [title for title in panels[0] if any(of_run[title] for of_run in panels)]
    if not titles:
        raise ValueError("runs must hold at least one number to draw, got none")
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    plt = pyplot()
    columns = min(4, len(titles))
    count = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(3.4 * columns, 2.8 * count + 0.4), squeeze=False
    )
    tab10 = plt.get_cmap("tab10").colors
    colours = [tab10[number % len(tab10)] for number in range(len(runs))]
    for axis, title in zip(axes.flat, titles, strict=False):
        values = []
        for of_run, colour in zip(panels, colours, strict=True):
            for line in of_run[title]:
                _draw(axis, line, colour)
                values += line.values
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
        if title == "loss" and min(values) > 0 and max(values) > 5 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
    for axis in axes.flat[len(titles) :]:
        axis.set_axis_off()
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, 0.35 / height if len(runs) > 1 else 0, 1, 1))
    if len(runs) > 1:
        handles = [Line2D([], [], color=colour) for colour in colours]
        figure.legend(handles, list(runs), loc="lower center", ncols=6, fontsize=9, frameon=False)
    save(figure, path, dpi=100)
    return titles


def _draw(axis: Any, line: Line, colour: Any) -> None:
    if line.steps:
        marker = "o" if len(line.steps) < 20 else None
        axis.plot(line.steps, line.values, color=colour, lw=1.2, marker=marker, markersize=3)
    else:
        level = line.values[0]
        axis.axhline(level, color=colour, linestyle=":", linewidth=1)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "top"}
        axis.annotate(line.name, (0.99, level), fontsize=7, color=colour, **where)
