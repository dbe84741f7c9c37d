"""What the ops have to reach on an H100, held against measured results."""

from collections.abc import Iterable

from benchmarks.harness import Result

__all__ = ["missed"]

# percent of the copy bandwidth, at H/14
OF_COPY = {
    "ema_update_": 90.0,
    "adamw_ema_": 90.0,
    "latent_loss": 85.0,
    "add_layer_norm": 85.0,
}
HOST_US = 25.0


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
