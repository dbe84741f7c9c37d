"""Part `step`: parity of the reference path in float32 and bfloat16, then images/s of its step at
batch 128 for B/16, L/16 and H/14, and where an H/14 step's device time goes. Needs torch, numpy,
safetensors and tyro; no data set.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check.files import write_json
from benchmarks.harness import machine
from ijepa_fast import parity
from ijepa_fast.config import BatchConfig
from ijepa_fast.estimate import estimate
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import sample_masks
from ijepa_fast.metrics import peak_flops
from ijepa_fast.model import build_models
from ijepa_fast.presets import preset
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import Schedules

GOLDEN = Path(__file__).parents[2] / "tests" / "golden" / "p8_64.safetensors"
WARMUP_STEPS, TIMED_STEPS, REPEATS = 3, 8, 5


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Replays the recording in both precisions."""
    results = []
    for dtype in ("float32", "bfloat16"):
        report = parity.replay(GOLDEN, dtype=dtype, device=device)
        worst: dict[str, float] = {}
        for row in report.rows:
            worst[row.kind] = max(worst.get(row.kind, 0.0), row.error)
        results.append({"dtype": dtype, "ok": report.ok, "worst": worst})
        print(report.table().splitlines()[-1], flush=True)
    return results


def _seconds(device: torch.device, body: Callable[[], None]) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    body()
    return time.perf_counter() - began


def time_reference(name: str, batch: int, device: torch.device) -> dict[str, Any]:
    """Images/s of the reference step: bf16, published masks, random images, no data loading."""
    recipe = preset(name)
    group = min(recipe.masks.truncation_group, batch)
    config = replace(
        recipe,
        masks=replace(recipe.masks, truncation_group=group),
        batch=BatchConfig(global_=batch, device=batch),
    )
    generator = torch_generator(0, Stream.INIT)
    encoder, predictor = build_models(config.model, config.data.crop_size, generator)
    training = ReferenceStep(
        encoder.to(device),
        predictor.to(device),
        config.optim,
        mean=config.data.mean,
        std=config.data.std,
    )
    schedules = Schedules.of(config.optim, global_batch=batch, steps_per_epoch=1000)
    height, width = config.data.crop_size
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, device=device)
    masks = [
        sample_masks(
            config.masks, grid=config.grid, seed=0, step=step, positions=np.arange(batch)
        ).to(device)
        for step in range(TIMED_STEPS)
    ]

    def steps(count: int) -> None:
        for step in range(count):
            targets = masks[step].target_index
            rows = batch * config.masks.num_contexts * targets.shape[1] * targets.shape[2]
            elements = rows * config.model.architecture.width
            training.accumulate(images, masks[step], elements)
            training.update(schedules.at(step + 1))

    steps(WARMUP_STEPS)
    times = [_seconds(device, lambda: steps(TIMED_STEPS)) / TIMED_STEPS for _ in range(REPEATS)]
    seconds = statistics.median(times)
    peak = peak_flops(device, "bfloat16")
    needed = estimate(config)
    cuda = device.type == "cuda"
    return {
        "preset": name,
        "batch": batch,
        "truncation_group": group,
        "precision": config.optim.precision,
        "step_ms": round(1e3 * seconds, 3),
        "spread_ms": round(1e3 * (max(times) - min(times)), 3),
        "repeats": REPEATS,
        "images_per_second": round(batch / seconds, 1),
        "mfu": round(batch / seconds * needed.flops / peak, 4) if peak else None,
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if cuda else None,
        "estimated_gib": round(needed.memory(batch) / 2**30, 2),
        "steps_skipped": int(training.skipped[2]),
        "profile": _profile(device, lambda: steps(1)),
    }


def _or_error(name: str, batch: int, device: torch.device) -> dict[str, Any]:
    """The same, or what went wrong: of what does not fit the GPU nothing is known, but said."""
    try:
        return time_reference(name, batch, device)
    except torch.OutOfMemoryError as error:
        return {"preset": name, "batch": batch, "error": str(error).splitlines()[0]}


def _profile(device: torch.device, body: Callable[[], None], rows: int = 25) -> list[str]:
    """A Markdown table of the operations that take most of the device's time in one step."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    try:
        activities = [activity.CUDA if cuda else activity.CPU]
        with torch.profiler.profile(activities=activities, acc_events=True) as found:
            body()
            if cuda:
                torch.cuda.synchronize(device)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda e: -getattr(e, key))
        total = sum(getattr(e, key) for e in events)
    except (RuntimeError, AttributeError, AssertionError) as error:
        return [f"not measured: {error}"]  # the times of the step are not lost with it
    if not total:
        return ["not measured: the profiler recorded no device time"]
    lines = ["| operation | calls | ms | share |", "|---|---|---|---|"]
    for event in events[:rows]:
        time = getattr(event, key)
        name = event.key[:90].replace("|", "/")
        lines.append(f"| `{name}` | {event.count} | {time / 1e3:.3f} | {time / total:.1%} |")
    return lines


def write(folder: Path, result: dict[str, Any]) -> None:
    """Flushes what is known so far."""
    write_json(folder / "step.json", result)
    lines = [
        f"{result['machine']['device']}, torch {result['machine']['torch']}",
        "",
        "| preset | batch | ms/step | images/s | MFU | peak GiB | estimated GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['preset']} | {r['batch']} | {r['step_ms']} | {r['images_per_second']} "
        f"| {_known(r['mfu'])} | {_known(r['peak_gib'])} | {r['estimated_gib']} |"
        if "error" not in r
        else f"| {r['preset']} | {r['batch']} | not measured: {r['error']} | | | | |"
        for r in result["steps"]
    ]
    for r in (r for r in result["steps"] if "error" not in r):
        lines += ["", f"{r['preset']}, one step by operation:", "", *r["profile"]]
    (folder / "step.md").write_text("\n".join(lines) + "\n")


def _known(value: float | None) -> str:
    return "not measured" if value is None else str(value)


def run(out: Path, device: torch.device, presets: Sequence[str], batch: int) -> bool:
    """The whole part; True if nothing failed."""
    result: dict[str, Any] = {"machine": machine(), "parity": check_parity(device)}
    result["steps"] = []
    write(out, result)
    if not all(p["ok"] for p in result["parity"]):
        print("error: parity fails, so nothing is timed", file=sys.stderr)
        return False
    for name in presets:
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        result["steps"].append(_or_error(name, batch, device))
        write(out, result)
        print(json.dumps(result["steps"][-1]), flush=True)
    return all("error" not in r for r in result["steps"])
