"""What ops and training step have to reach, on an H100, held against measured results."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.harness import Result, machine

__all__ = ["missed", "missed_steps"]

# percent of the copy bandwidth, at H/14
OF_COPY = {
    "ema_update_": 90.0,
    "adamw_ema_": 90.0,
    "latent_loss": 85.0,
    "add_layer_norm": 85.0,
}
HOST_US = 25.0

# the fast step, times as fast as others (aim beside compiled blocks: 1.15); whole contexts cost the
# reference its padding
SPEED = {
    "published": {"released-style": 2.0, "reference": 1.25, "reference+compile": 1.0},
    "whole": {"released-style": 2.0, "reference": 1.5, "reference+compile": 1.0},
}
# images/s of an H100 or H200, contexts cut to the batch's shortest
IMAGES_PER_SECOND = {"H/14": 700.0, "B/16": 2700.0}
# memory beside the reference's
MEMORY = {"fast": 0.75}


def missed(results: Iterable[Result]) -> list[str]:
    """A line for each of our results that is slower than another provider's or misses its target;
    results without a GPU have none.
    """
    results = [r for r in results if r.percent_of_copy is not None]
    lines = []
    for ours in (r for r in results if r.provider == "ours"):
        case = (ours.op, ours.shape, ours.direction)
        name = f"{'/'.join(case)}: {ours.median_us:.1f} us"
        lines += [
            f"{name}, {r.provider} {r.median_us:.1f} us"
            for r in results
            if (r.op, r.shape, r.direction) == case and r.median_us < ours.median_us
        ]
        percent = ours.percent_of_copy or 0.0
        target = OF_COPY.get(ours.op, 0.0) if ours.shape == "H/14" else 0.0
        if percent < target:
            lines.append(f"{name}, {percent:.1f} % of copy bandwidth, target {target:.0f} %")
        floor = ours.median_us * percent / 100
        if ours.op.startswith("patchify") and ours.median_us > max(2 * floor, floor + 5):
            lines.append(f"{name}, byte floor {floor:.1f} us, target max(2 x, + 5 us)")
        if ours.host_us is not None and ours.host_us > HOST_US:
            lines.append(f"{name}, host {ours.host_us:.1f} us, target {HOST_US:.0f} us")
    return lines


def missed_steps(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each target that the fast step misses; without a GPU there is one, not to be
    slower than the reference.

    Args:
        rows: of `step_report`.
    """
    found = {(_case(row), row["provider"]): row for row in rows if "ms" in row}
    lines = []
    for (case, provider), row in found.items():
        on_gpu, speed = "peak_gib" in row, row["speed"]
        name = f"{case}, {provider}: {row['ms']:.1f} ms"
        if provider == "fast":
            wanted = SPEED[row["mode"]] if on_gpu else {"reference": 1.0}
            lines += [
                f"{name}, {speed[other]:.2f} x {other}, target {least:g} x"
                for other, least in wanted.items()
                if speed.get(other, least) < least
            ]
            rate, least = row["images_per_second"], IMAGES_PER_SECOND.get(row["model"], 0.0)
            h100 = re.search("H[12]00", str(machine()["device"])) and row["mode"] == "published"
            if on_gpu and h100 and rate < least:
                lines.append(f"{name}, {rate:.0f} images/s, target {least:.0f}")
        reference = found.get((case, "reference"))
        if on_gpu and provider in MEMORY and reference:
            share, most = row["peak_gib"] / reference["peak_gib"], MEMORY[provider]
            if share > most:
                lines.append(f"{name}, {share:.2f} x the reference's memory, target {most:g} x")
    return lines


def _case(row: Mapping[str, Any]) -> str:
    return ", ".join(str(row[key]) for key in ("model", "batch", "precision", "mode"))
