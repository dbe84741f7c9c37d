"""`report.html`: one page about a run, made of what lies in its folder. It needs no network, no
scripts and no other file.
"""

import base64
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import ijepa_fast
from ijepa_fast.atomic import atomic_write
from ijepa_fast.callbacks import read_rows
from ijepa_fast.config import flatten, load_yaml
from ijepa_fast.visualize.curves import Line, panels_of

__all__ = ["next_commands", "write_report"]

Rows = Sequence[Mapping[str, Any]]
# points of a curve: more are not seen
_POINTS = 400
# width and height of a curve, and the place of its labels
_WIDTH, _HEIGHT, _LEFT, _BELOW = 300, 150, 52, 16
_FIGURES = (
    (
        "masks.png",
        "Masks",
        "The first images of the first batch: whole, what the context encoder sees of them, and "
        "the target blocks, whose features the predictor predicts from it.",
    ),
    (
        "pca.png",
        "Patch features",
        "Images, and beside each the first three principal components of its patch features "
        "(target encoder) as red, green and blue: equal colours are similar features.",
    ),
    (
        "neighbours.png",
        "Nearest images",
        "Images, and those whose averaged features are nearest (cosine). Where there are labels, a "
        "green frame is the class of the query, a red frame another one.",
    ),
)
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name, an I-JEPA run</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #fff; --ink: #1d2327; --quiet: #667078; --rule: #e3e4e0;
  --accent: #1f6f8b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2125; --ink: #e4e7e9; --quiet: #98a2aa; --rule: #30373d;
    --accent: #6cc0dc;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.6rem; font-size: 1.25rem; }
h3 { margin: 0 0 0.3rem; font-size: 0.9rem; font-weight: 600; }
p { margin: 0.3rem 0 0.9rem; max-width: 46rem; color: var(--quiet); }
dl, .grid { gap: 0.9rem; margin: 1.5rem 0 0; }
dl { display: flex; flex-wrap: wrap; }
dl div { flex: 1 1 auto; max-width: 100%; }
.grid {
  display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
}
.columns { columns: 17rem; column-gap: 0.9rem; }
.columns .card { margin-bottom: 0.9rem; break-inside: avoid; }
dl div, .card {
  min-width: 0; padding: 0.8rem 1rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: 0.6rem;
}
dt { font-size: 0.8rem; color: var(--quiet); }
dd { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
.card b { float: right; font-weight: 600; color: var(--accent); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 10px; fill: var(--quiet); }
svg path { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
svg circle { fill: var(--accent); }
svg line { stroke: var(--rule); }
svg line.level { stroke: var(--quiet); stroke-dasharray: 4 4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid var(--rule); }
th { font-size: 0.85rem; font-weight: 600; color: var(--quiet); text-align: left; }
td { text-align: right; white-space: nowrap; }
td:first-child { text-align: left; }
td.best { font-weight: 700; color: var(--accent); }
th + th { text-align: right; }
tr > :last-child { padding-right: 0; }
.settings tr:last-child td { border: 0; }
.settings td { white-space: normal; overflow-wrap: anywhere; font-size: 0.85rem; }
.sheet { padding: 0.6rem; overflow-x: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: 0.6rem; }
.sheet img { display: block; max-width: max(100%, 42rem); height: auto; margin: 0 auto; }
pre { overflow-x: auto; font-size: 0.85rem; }
footer { margin-top: 3rem; font-size: 0.85rem; color: var(--quiet); }
</style>
</head>
<body>
<header>
<h1>$name</h1>
<p>$status</p>
</header>
<main>
<dl>
$facts
</dl>
$sections
</main>
<footer>Written by ijepa-fast $version from the files in the run's folder.</footer>
</body>
</html>
""")


def write_report(path: Path, run: Path, status: str = "") -> None:
    """Writes the page.

    Args:
        path: the HTML file.
        run: folder of a run: `config.yaml`, `metrics.jsonl`, and pictures as far as they are there.
        status: how the run ended, in words; by default the last step that has metrics.
    """
    rows, settings = (
        read_rows(run / "metrics.jsonl"),
        load_yaml((run / "config.yaml").read_text(encoding="utf-8")),
    )
    status = status or f"metrics up to step {rows[-1]['step'] if rows else 0}"
    sections = [
        ("Accuracy", *_accuracy(rows)),
        ("Curves", "By step; a dashed line is what does not change.", _curves(rows)),
        ("Evaluations", "Of the target encoder's features while it trained.", _evaluations(rows)),
        *[(title, text, _image(run / name)) for name, title, text in _FIGURES],
        ("Settings", "All of them, as in <code>config.yaml</code>.", _settings(settings)),
        (
            "What comes next",
            "",
            f"<pre>{escape(chr(10).join(next_commands(run, settings)))}</pre>",
        ),
    ]
    page = _PAGE.substitute(
        name=escape(run.resolve().name),
        status=escape(status),
        facts="\n".join(
            f"<div><dt>{name}</dt><dd>{_value(value)}</dd></div>"
            for name, value in _facts(rows, flatten(settings))
        ),
        sections="\n".join(
            f"<section>\n<h2>{title}</h2>\n<p>{text}</p>\n{body}\n</section>"
            for title, text, body in sections
            if body
        ),
        version=ijepa_fast.__version__,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts(rows: Rows, settings: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The most important numbers, each with its name."""
    trained = [row for row in rows if "loss" in row]
    name, patch = settings["model.name"], settings["model.patch_size"]
    yield "encoder", f"{name}/{patch}"
    yield "data", settings["data.root"]
    yield "batch", _number(settings["batch.global"])
    if not trained:
        return
    last = trained[-1]
    yield "steps", _number(last["step"])
    yield "epochs", _number(last["epoch"] + 1)
    yield "loss", f"{trained[0]['loss']:.3f} → {last['loss']:.3f}"
    rates = sorted(row["timing"]["images_per_second"] for row in trained)
    yield "images/s", _number(round(rates[len(rates) // 2]))
    skipped = sum(row.get("skipped") or 0 for row in trained)
    if skipped:
        yield "steps skipped", _number(skipped)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML; the first column is a name."""
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)] if any(heads) else []
    lines += ["".join(f"<td{cell}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table>\n{body}\n</table></div>'


def _accuracy(rows: Rows) -> tuple[str, str]:
    """What it is of, and the table: each subject's accuracies, the best of a column marked."""
    scored = [row for row in rows if "knn" in row]
    if not scored:
        return "", ""
    last = scored[-1]
    alike = [row for row in scored if row.get("images") == last.get("images")]
    scores: dict[str, dict[str, float]] = {
        name: {"kNN": value}
        for row in (alike[0], last)
        for name, value in row["knn"].items()
    }  # fmt: skip
    scores = last.get("table") or scores
    heads = list(dict.fromkeys(head for found in scores.values() for head in found))
    best = {head: max(found.get(head, 0) for found in scores.values()) for head in heads}
    lines = []
    for name, found in scores.items():
        cells = [f">{escape(name)}"]
        for head in heads:
            marked = ' class="best"' if found.get(head) == best[head] else ""
            cells.append(f"{marked}>{100 * found[head]:.1f} %" if head in found else ">–")
        lines.append(cells)
    part = last.get("images")
    of = f" ({part[0]:,} training and {part[1]:,} test images)" if part else ""
    text = f"On {escape(str(last.get('data')))}{of}, with frozen features averaged over patches."
    return text, _table(["", *heads], lines)


def _evaluations(rows: Rows) -> str:
    """A line for each evaluation."""
    heads = {"feature_std": "feature std", "rankme": "RankMe", "lidar": "LiDAR"}
    heads["prediction_cosine"] = "prediction cosine"
    found = [row for row in rows if row.get("monitors")]
    if len(found) < 2:
        return ""
    lines = [
        [f">{row['step']:,}", *(f">{_number(row['monitors'].get(key, '–'))}" for key in heads)]
        for row in found[:: len(found) // -20][::-1]
    ]
    return _table(["step", *heads.values()], lines)


def _settings(settings: Mapping[str, Any]) -> str:
    """A card for each group."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    groups = {"run": plain, **{k: v for k, v in settings.items() if isinstance(v, dict)}}
    cards = []
    for name, group in groups.items():
        lines = [[f">{_value(k)}", f">{_value(v)}"] for k, v in flatten(group).items()]
        cards.append(
            f'<div class="card"><h3>{escape(name)}</h3>{_table([], lines, "settings")}</div>'
        )
    return f'<div class="columns">{"".join(cards)}</div>'


def _value(value: Any) -> str:
    if value is None:
        return "–"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    # where a long name may be broken
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def next_commands(run: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What to type after a run whose `config.yaml` has these settings."""
    name, evaluation = shlex.quote(str(run)), settings.get("eval", {}).get("data")
    root = settings["data"]["root"]
    images, labelled = root[0] if isinstance(root, list) else root, evaluation or "LABELLED_FOLDER"
    # an object of a Python program cannot be typed
    images, labelled = ("DIR" if d.startswith("object:") else d for d in (images, labelled))
    return (
        f"ijepa-fast evaluate {name} --data {shlex.quote(labelled)} --methods knn ridge linear",
        f"ijepa-fast embed {name} --data {shlex.quote(images)} --out features.npy",
        f"ijepa-fast export {name} {shlex.quote(f'hf-{run.resolve().name}')} --format hf",
    )


def _image(path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="sheet"><img alt="{path.stem}" src="data:image/png;base64,{data}"></div>'


def _curves(rows: Rows) -> str:
    charts = [_chart(title, lines) for title, lines in panels_of(rows).items() if lines]
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _chart(title: str, lines: Sequence[Line]) -> str:
    """One panel: SVG that follows the colours of the page."""
    steps = [step for line in lines for step in line.steps] or [0]
    values = [value for line in lines for value in line.values]
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return 6 + (_HEIGHT - _BELOW - 12) * (high - value) / (high - low)

    parts = []
    digits = min(max(1 - math.floor(math.log10(high - low)), 0), 6)
    for value in (high, (low + high) / 2, low):
        at = f'y1="{y(value):.1f}" y2="{y(value):.1f}"'
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" {at}/>')
        parts.append(f'<text x="0" y="{y(value) + 3:.1f}">{value:.{digits}f}</text>')
    below = f'y="{_HEIGHT - 1}"'
    parts.append(f'<text x="{_LEFT}" {below}>{first:,}</text>')
    parts.append(f'<text x="{_WIDTH}" {below} text-anchor="end">step {last:,}</text>')
    for line in lines:
        if not line.steps:
            level = y(line.values[0])
            parts.append(
                f'<line class="level" x1="{_LEFT}" x2="{_WIDTH}" y1="{level}" y2="{level}"/>'
            )
            beside = level + (12 if level < 20 else -3)
            label = f'x="{_WIDTH}" y="{beside:.1f}" text-anchor="end"'
            parts.append(f"<text {label}>{escape(line.name)}</text>")
            continue
        every = -(-len(line.steps) // _POINTS)
        points = list(zip(line.steps, line.values, strict=True))
        points = [*points[:-1:every], points[-1]]
        where = [(x(step), y(value)) for step, value in points]
        parts.append(f'<path d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in where)}"/>')
        if len(where) < 20:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in where]
    shown = next((line.values[-1] for line in lines if line.steps), values[-1])
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
    head = f"<h3><b>{shown:.4g}</b>{escape(title)}</h3>"
    return f'<div class="card">{head}{picture}{"".join(parts)}</svg></div>'
