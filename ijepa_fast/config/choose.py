"""Settings for any folder of images where no preset is named: a rule over what the data and the
machine are.

The recipe is the published one; the rule fits its sizes. Whatever is given stays, and the rest is
fitted to it. Networks and lengths on a CPU are those of the presets `demo` and `fashion_mnist`.
"""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ijepa_fast.config.schema import Config
from ijepa_fast.errors import UsageError

__all__ = ["CHOSEN", "EVALUATION", "EXAMPLE", "Facts", "choose", "describe"]

EVALUATION = ("eval.data", "eval.whole")
CHOSEN = (
    *("model.name", "model.width", "model.depth", "model.heads", "model.mlp_hidden"),
    *(
        "model.predictor_width",
        "model.predictor_depth",
        "model.patch_size",
        "data.crop",
        "data.scale",
        "data.ratio",
    ),
    *("batch.global", "masks.truncation_group", "masks.min_keep", "optim.epochs", "optim.warmup"),
    *("optim.lr", "optim.start_lr", "optim.final_lr", "optim.lr_reference_batch"),
    *("optim.precision", *EVALUATION, "eval.every"),
)
"""What the rule may set."""

_SHOWN = (
    *("model.name", "model.width", "model.depth", "model.patch_size", "data.crop", "batch.global"),
    *("masks.truncation_group", "optim.epochs", "optim.lr", "optim.precision", "eval.data"),
)

_RECIPE = Config()
# with fewer cores a CPU gets half a network and crops of 64 pixels: hours instead of days
_MANY_CORES = 16
# ViT-B/16 from so many images and so much memory of a GPU on
_MANY_IMAGES, _MUCH_MEMORY = 500_000, 20 * 2**30
# fewer teach little from scratch
_FEW_IMAGES = 5_000
_PATCHES = (16, 8, 4, 2, 1)
# patches along a side: Fashion-MNIST's 7 to the published 14
_GRID = (7, 14)
# square images of at most so many pixels a side are taken whole (docs/log/learning.md)
_FEW_PIXELS = 40
_EPOCHS = 400
# the linear rule gives less below 512 images; a batch of 256 learnt best with twice as much
_LOWEST_LR = 2.5e-4
# an evaluation without labels costs as much as 80 trained images
_EVALUATIONS, _BETWEEN = 10, 20_000


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rule looks at.

    Attributes:
        images: how many there are.
        height, width: their medians, pixels.
        device: `cpu` or `cuda`.
        memory: bytes of one rank.
        cores: of one rank.
        bfloat16: whether the device has products in it.
        world: number of ranks.
        labelled: the images as a labelled data set, None where they are none.
        network: settings of the network whose weights the run starts from, if it does.
    """

    images: int
    height: int
    width: int
    device: str
    memory: int
    cores: int
    bfloat16: bool
    world: int = 1
    labelled: str | None = None
    network: Mapping[str, Any] | None = None


EXAMPLE = Facts(
    images=10**6, height=256, width=256, device="cpu", memory=2**34, cores=2, bfloat16=True
)
"""Stands for data that nobody has looked at yet, so that a wrong flag is refused before."""


def choose(
    facts: Facts, given: Mapping[str, Sequence[str]], wanted: Collection[str] = CHOSEN
) -> dict[str, Any]:
    """Settings by the rule, under their flat names.

    Args:
        facts: of the data and the machine.
        given: the words of every flag that is given; wrong ones are left to the parser.
        wanted: which settings; none that is given.

    Raises:
        UsageError: no patch size makes a grid of the crop that is given.
    """
    chosen: dict[str, Any] = {"eval.data": facts.labelled, "eval.whole": False}
    if chosen.keys() >= set(wanted):
        return {key: chosen[key] for key in wanted}
    cpu = facts.device == "cpu"
    slow = cpu and facts.cores < _MANY_CORES
    if facts.network:
        chosen |= facts.network
        given = {"model.patch_size": (str(facts.network["model.patch_size"]),), **given}
    elif "model.name" not in given:
        chosen |= _network(facts, cpu, slow)
    side = min(facts.height, facts.width)
    patch, crop = _grid(min(side, 64 if slow else 96 if cpu else 224), given)
    patches = (crop[0] // patch) * (crop[-1] // patch)
    chosen |= {"model.patch_size": patch, "data.crop": crop}
    chosen["masks.min_keep"] = min(_RECIPE.masks.min_keep, patches // 4)
    square = max(facts.height, facts.width) <= 1.1 * side
    if side <= _FEW_PIXELS and square and not {"data.scale", "data.ratio"} & given.keys():
        chosen |= {"data.scale": (1.0, 1.0), "data.ratio": (1.0, 1.0)}

    batch = _batch(facts, cpu, given)
    group = max(n for n in range(1, _RECIPE.masks.truncation_group + 1) if batch % n == 0)
    steps_per_epoch = max(facts.images // batch, 1)
    run_steps = 3_000 if slow else 10_000 if cpu else 60_000
    scale = _number(given, "optim.ipe_scale") or 1.0
    # no shorter than a warm-up that is given
    shortest = math.ceil((_number(given, "optim.warmup") or 0) / scale)
    epochs = max(min(round(run_steps / steps_per_epoch), _EPOCHS), shortest, 1)
    epochs = _whole(given, "optim.epochs") or epochs
    share = _RECIPE.optim.warmup / _RECIPE.optim.epochs
    reference = _whole(given, "optim.lr_reference_batch") or batch
    lr = max(_RECIPE.optim.lr * reference / _RECIPE.optim.lr_reference_batch, _LOWEST_LR)
    lr = _number(given, "optim.lr") or lr
    # a CPU makes a kernel for every shape, which few rows do not pay for
    half = facts.bfloat16 and (batch >= 64 or not cpu)
    half = half or "bfloat16" in given.get("optim.residual", ())
    chosen |= {
        "batch.global": batch,
        "masks.truncation_group": group,
        "optim.epochs": epochs,
        "optim.warmup": round(share * epochs * scale, 3),
        "optim.lr": lr,
        "optim.start_lr": float(f"{lr * _RECIPE.optim.start_lr / _RECIPE.optim.lr:.6g}"),
        "optim.final_lr": float(f"{lr * _RECIPE.optim.final_lr / _RECIPE.optim.lr:.6g}"),
        "optim.lr_reference_batch": reference,
        "optim.precision": "bfloat16" if half else "float32",
    }
    if facts.labelled is None and "eval.data" not in given:
        steps = epochs * steps_per_epoch
        chosen["eval.every"] = math.ceil(max(steps / _EVALUATIONS, _BETWEEN / batch))
    return {key: chosen[key] for key in CHOSEN if key in chosen and key in wanted}


def _network(facts: Facts, cpu: bool, slow: bool) -> dict[str, Any]:
    if not cpu:
        large = facts.images >= _MANY_IMAGES and facts.memory >= _MUCH_MEMORY
        return {"model.name": "vit_base" if large else "vit_small"}
    narrow = {"model.name": "vit_tiny", "model.predictor_width": 96}
    return narrow | ({"model.depth": 6, "model.predictor_depth": 4} if slow else {})


def _grid(size: int, given: Mapping[str, Sequence[str]]) -> tuple[int, tuple[int, ...]]:
    """Patch size and crop for images of so many pixels: a grid of 7 to 14 patches a side."""
    least, most = _GRID
    # smaller images are enlarged
    size = max(size, least)
    patch = _whole(given, "model.patch_size")
    words = given.get("data.crop", ())
    crop = tuple(int(word) for word in words if word.isdecimal() and 0 < len(word) < 10)
    crop = crop if all(crop) else ()
    if not crop:
        patch = patch or next(p for p in _PATCHES if size // p >= least)
        return patch, (patch * min(max(size // patch, least), most),)
    if not patch:
        grids = [n for n in range(most, least - 1, -1) if min(crop) % n == 0]
        patches = (min(crop) // n for n in grids)
        fits = [n for n in patches if all(side % n == 0 for side in crop)]
        if not fits:
            raise UsageError(
                f"data.crop must be {least} to {most} patches where model.patch_size is not given, "
                f"got {' '.join(words)}"
            )
        patch = max((n for n in fits if n <= _PATCHES[0]), default=fits[0])
    return patch, crop


def _batch(facts: Facts, cpu: bool, given: Mapping[str, Sequence[str]]) -> int:
    """The global batch: a 64th of the images, or a quarter where they are few; a power of two for
    each rank, and whole truncation groups.
    """
    if total := _whole(given, "batch.global"):
        return total
    least, most = (64, 256) if cpu else (256, 2048)
    size = max(min(facts.images // 64, most), min(facts.images // 4, least), 1)
    device = _whole(given, "batch.device") or 1
    unit = math.lcm(device * facts.world, _whole(given, "masks.truncation_group") or 1)
    return unit * 2 ** int(math.log2(max(size // unit, 1)))


def _number(given: Mapping[str, Sequence[str]], key: str) -> float | None:
    """A number that is given and may be right; None for anything else."""
    try:
        value = float(given[key][0])
    except (KeyError, IndexError, ValueError):
        return None
    return value if 1e-9 < value < 1e9 else None


def _whole(given: Mapping[str, Sequence[str]], key: str) -> int:
    """As `_number`, 0 for anything that is no whole number."""
    value = _number(given, key) or 0
    return int(value) if value == int(value) else 0


def describe(facts: Facts, chosen: Mapping[str, Any]) -> list[str]:
    """Lines of at most 100 columns that say what was chosen, and why.

    Args:
        facts: of the data and the machine.
        chosen: the settings.
    """
    if chosen.keys() <= set(EVALUATION):
        return [f"eval.data {facts.labelled}: the preset evaluates on other images"]
    device = "GPU" if facts.device != "cpu" else f"CPU, {facts.cores} cores"
    ranks = f", for each of {facts.world} ranks" if facts.world > 1 else ""
    why = (
        f"{facts.images:,} images of about {facts.width} x {facts.height} pixels; {device}, "
        f"{facts.memory / 2**30:.0f} GiB{ranks}. No preset, so chosen:"
    )
    settings = ", ".join(f"{key} {_text(chosen[key])}" for key in _SHOWN if key in chosen)
    # a setting and its value stay on one line
    text = settings.replace(" ", "\0").replace(",\0", ", ")
    lines = [*_wrapped(why, ""), *_wrapped(text, "    ")]
    if facts.images < _FEW_IMAGES and not facts.network:
        lines.append(
            f"{facts.images:,} images: expect little; start from published weights with --init FILE"
        )
    return [line.replace("\0", " ") for line in lines]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        100,
        initial_indent=indent,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
