"""What a data set consists of, for people and for programs."""

import hashlib
import logging
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ijepa_fast.data.build import lost_parts
from ijepa_fast.data.index import FORMATS, Index
from ijepa_fast.data.reading import thread_pool

__all__ = ["as_text", "duplicates", "summary"]

logger = logging.getLogger(__name__)

# upper ends of the histogram's bins
_KILOBYTES = (10, 30, 100, 300, 1000, 3000)
_SIDES = (64, 128, 224, 256, 384, 512, 1024)
_SHOWN = 10


def duplicates(index: Index, *, threads: int = 8) -> list[list[int]]:
    """Groups of rows with the same bytes, each sorted, by first row.

    Only rows whose length and end agree are read.

    Args:
        index: the table.
        threads: threads that read.
    """
    order = np.argsort(index.mark, kind="stable")
    marks = index.mark[order]
    same = np.zeros(len(order), dtype=np.bool_)
    same[1:] = marks[1:] == marks[:-1]
    same[:-1] |= same[1:].copy()
    candidates = np.sort(order[same]).tolist()

    def content(row: int) -> bytes | None:
        try:
            return hashlib.sha256(index.read(row)).digest()
        except OSError as error:
            logger.warning("%r is not compared with others: %s", index.name(row), error)
            return None

    groups: dict[bytes, list[int]] = defaultdict(list)
    with thread_pool(threads, "ijepa-duplicates") as pool:
        for row, digest in zip(candidates, pool.map(content, candidates), strict=True):
            if digest is not None:
                groups[digest].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def summary(index: Index, *, max_bad_share: float, threads: int = 8) -> dict[str, Any]:
    """Counts, sizes, formats, classes, bad files and duplicates as plain JSON values.

    Args:
        index: the table.
        max_bad_share: share of unusable files that is allowed; one always is.
        threads: threads that read possible duplicates.
    """
    rows = len(index)
    files = rows + len(index.bad)
    limit = max(1, int(max_bad_share * files + 1e-9))
    same = duplicates(index, threads=threads)
    labels = index.label
    counts = np.bincount(labels[labels >= 0], minlength=len(index.classes))
    per_class = dict(zip(index.classes, counts.tolist(), strict=True))
    conflicts = [group for group in same if len({int(labels[row]) for row in group} - {-1}) > 1]
    shortest = np.minimum(index.width, index.height)
    formats = np.bincount(index.format, minlength=len(FORMATS))
    lost = lost_parts(index)
    reasons: dict[str, int] = defaultdict(int)
    for _, reason in index.bad:
        reasons[reason] += 1
    return {
        "sources": list(index.roots),
        "images": rows,
        "files": len(index.paths),
        "shards": len(index.shard_files),
        "bytes": int(index.length.sum(dtype=np.int64)),
        "mean_bytes": round(float(index.length.mean(dtype=np.float64)), 1),
        "classes": len(index.classes),
        "images_without_class": int((labels < 0).sum()),
        "smallest_class": min(per_class.items(), key=lambda item: item[1], default=None),
        "largest_class": max(per_class.items(), key=lambda item: item[1], default=None),
        "formats": {
            name: int(count) for name, count in zip(FORMATS, formats, strict=True) if count
        },
        "decoded_by_dali": int(index.plain.sum()),
        "kilobytes": _histogram(index.length / 1000, _KILOBYTES),
        "shorter_side": _histogram(shortest, _SIDES),
        "smallest": _size(index, int(shortest.argmin())),
        "largest": _size(index, int((index.width.astype(np.int64) * index.height).argmax())),
        "verified": int(index.verified.sum()),
        "other_files": index.ignored,
        "bad": [{"file": name, "reason": reason} for name, reason in index.bad],
        "bad_reasons": dict(sorted(reasons.items(), key=lambda item: -item[1])),
        "bad_limit": limit,
        "too_many_bad": len(index.bad) - len(lost) > limit,
        "lost": lost,
        "duplicates": [[index.name(row) for row in group] for group in same],
        "duplicate_images": sum(len(group) - 1 for group in same),
        "duplicates_of_several_classes": len(conflicts),
        "digest": index.digest(),
    }


def _histogram(values: NDArray[Any], ends: tuple[int, ...]) -> dict[str, int]:
    """Counts below each end, and above the last."""
    places = np.searchsorted(np.array(ends), values, side="right")
    counts = np.bincount(places, minlength=len(ends) + 1).tolist()
    names = [f"below {end}" for end in ends] + [f"{ends[-1]} and more"]
    return dict(zip(names, counts, strict=True))


def _size(index: Index, row: int) -> dict[str, Any]:
    width, height = int(index.width[row]), int(index.height[row])
    return {"file": index.name(row), "width": width, "height": height}


def as_text(found: dict[str, Any]) -> str:
    """A report for a person; names with control characters are shown escaped."""
    lines = [f"sources     {', '.join(map(repr, found['sources']))}"]
    shards = f" in {found['shards']} shards" if found["shards"] else ""
    lines.append(
        f"images      {found['images']:,}{shards}, {found['bytes'] / 2**30:,.2f} GiB, "
        f"{found['mean_bytes'] / 1000:,.1f} kB each"
    )
    if found["classes"]:
        small, large = found["smallest_class"], found["largest_class"]
        lines.append(
            f"classes     {found['classes']:,}, from {small[1]:,} images ({small[0]!r}) "
            f"to {large[1]:,} ({large[0]!r}), {found['images_without_class']:,} without one"
        )
    else:
        lines.append("classes     none")
    formats = ", ".join(f"{name} {count:,}" for name, count in found["formats"].items())
    lines.append(f"formats     {formats}; {found['decoded_by_dali']:,} may be decoded by DALI")
    lines.append(f"verified    {found['verified']:,} decoded wholly (--verify does all)")
    lines.append(f"other files {found['other_files']:,}")
    for title, key in (("kilobytes", "kilobytes"), ("shorter side, pixels", "shorter_side")):
        lines.append(f"{title}:")
        for name, count in found[key].items():
            bar = "#" * round(40 * count / found["images"])
            lines.append(f"  {name:>14} {count:>12,} {bar}")
    for name in ("smallest", "largest"):
        size = found[name]
        lines.append(f"{name:<11} {size['width']}x{size['height']} {size['file']!r}")
    lines.append(
        f"duplicates  {found['duplicate_images']:,} images repeat another's bytes, in "
        f"{len(found['duplicates']):,} groups, {found['duplicates_of_several_classes']:,} of them "
        "with several classes"
    )
    lines += [f"  {' = '.join(map(repr, group))}" for group in found["duplicates"][:_SHOWN]]
    bad = found["bad"]
    lines.append(f"unusable    {len(bad):,}, allowed are {found['bad_limit']:,}")
    lines += [f"  {count:,} x {reason}" for reason, count in found["bad_reasons"].items()]
    lines += [f"  {entry['file']!r}: {entry['reason']}" for entry in bad[:_SHOWN]]
    if len(bad) > _SHOWN:
        lines.append(f"  and {len(bad) - _SHOWN:,} more (--json lists all)")
    for name, count in found["lost"].items():
        about = f"about {count:,} images are missing" if count else "its images are missing"
        lines.append(f"not whole   {name!r}: {about}")
    return "\n".join(lines)
