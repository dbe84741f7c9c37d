"""Configuration files of the released trainer (sections data, mask, meta, optimization, logging) to
our settings, with a line for every key: what it became, or why it is not needed.

Its `data.batch_size` is that of one GPU, and the file does not say how many there are.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ijepa_fast.config.schema import ARCHITECTURES, ModelConfig

__all__ = ["Conversion", "convert", "is_released"]

# of which our own files have none
MARKS = {"mask", "meta", "optimization"}
# all released runs: the file gives the batch of one GPU
RELEASED_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a file became.

    Attributes:
        settings: flat settings under our names.
        notes: a line for each of the file's keys, and for each that it lacks.
    """

    settings: dict[str, Any]
    notes: tuple[str, ...]


def is_released(tree: Mapping[Any, Any]) -> bool:
    """Whether a file has the released trainer's sections (at least two of its own)."""
    return len(MARKS & tree.keys()) >= 2


# --- values --------------------------------------------------------------------------------------


def _wrong(key: str, rule: str, value: object) -> ValueError:
    return ValueError(f"{key} must be {rule}, got {value!r}")


def _number(key: str, value: object) -> float:
    # YAML 1.1 reads 1e-6 as text
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise _wrong(key, "a number", value)


def _whole(key: str, value: object) -> int:
    number = _number(key, value)
    if number != int(number):
        raise _wrong(key, "a whole number", value)
    return int(number)


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


def _pair(key: str, value: object) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _wrong(key, "two numbers", value)
    return [_number(key, item) for item in value]


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "text", value)
    return value


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = "null" if value is None else str(value)
    # a line is a line
    return text if text.isprintable() else repr(text)


# --- keys ----------------------------------------------------------------------------------------

# one key, one setting: kind of value, and our name
PLAIN: dict[str, tuple[Callable[[str, object], Any], str]] = {
    "data.crop_scale": (_pair, "data.scale"),
    "data.crop_size": (_whole, "data.crop"),
    "logging.folder": (_text, "out"),
    "mask.aspect_ratio": (_pair, "masks.target_aspect"),
    "mask.enc_mask_scale": (_pair, "masks.context_scale"),
    "mask.min_keep": (_whole, "masks.min_keep"),
    "mask.num_enc_masks": (_whole, "masks.num_contexts"),
    "mask.num_pred_masks": (_whole, "masks.num_targets"),
    "mask.patch_size": (_whole, "model.patch_size"),
    "mask.pred_mask_scale": (_pair, "masks.target_scale"),
    "meta.pred_emb_dim": (_whole, "model.predictor_width"),
    "optimization.epochs": (_whole, "optim.epochs"),
    "optimization.final_lr": (_number, "optim.final_lr"),
    "optimization.final_weight_decay": (_number, "optim.final_weight_decay"),
    "optimization.ipe_scale": (_number, "optim.ipe_scale"),
    "optimization.lr": (_number, "optim.lr"),
    "optimization.start_lr": (_number, "optim.start_lr"),
    "optimization.warmup": (_number, "optim.warmup"),
    "optimization.weight_decay": (_number, "optim.weight_decay"),
}
# true would be another method than the published one: why it is refused
ABSENT = {
    "data.use_color_distortion": "colour distortion is not part of the published recipe",
    "data.use_gaussian_blur": "blur is not part of the published recipe",
    "data.use_horizontal_flip": "random flips are not part of the published recipe",
    "mask.allow_overlap": "context blocks never overlap targets in the published recipe",
}
IGNORED = {
    "data.color_jitter_strength": "there is no colour distortion",
    "data.num_workers": "decoding is a pool of threads, data.threads",
    "data.pin_mem": "not needed here",
    "logging.write_tag": "a run has a folder of its own, with fixed names in it",
}
# what several settings come of
OTHERS = (
    "data.batch_size",
    "data.image_folder",
    "data.root_path",
    "meta.copy_data",
    "meta.load_checkpoint",
    "meta.model_name",
    "meta.pred_depth",
    "meta.read_checkpoint",
    "meta.use_bfloat16",
    "optimization.ema",
)
KNOWN = (*PLAIN, *ABSENT, *IGNORED, *OTHERS)
# the file says nothing of data or folder without them, which is no gap in the recipe
OPTIONAL = {*ABSENT, *IGNORED, "data.image_folder", "data.root_path", "logging.folder"} | {
    f"meta.{key}" for key in ("copy_data", "load_checkpoint", "read_checkpoint")
}


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    sections = sorted({key.partition(".")[0] for key in KNOWN})
    for section, content in tree.items():
        if section not in sections:
            raise ValueError(
                f"unknown section {section}: a file with the released sections has no others than "
                + ", ".join(sections)
            )
        if not isinstance(content, Mapping):
            raise ValueError(f"{section} must hold a mapping, got {content!r}")
        flat |= {f"{section}.{key}": value for key, value in content.items()}
    for key in flat:
        if key not in KNOWN:
            raise ValueError(f"unknown key {key}{_nearest(key, KNOWN)}")
    return flat


def convert(tree: Mapping[Any, Any], *, batch_given: bool = False) -> Conversion:
    """A released file's content to our settings; what it lacks keeps the published value.

    Args:
        tree: the sections, as YAML gives them.
        batch_given: the global batch is given elsewhere, so that none is guessed.

    Raises:
        ValueError: an unknown key, a value of the wrong kind, or one that asks for something that
            is not done here.
    """
    flat = _flatten(tree)
    settings: dict[str, Any] = {}
    notes: list[str] = []

    def becomes(key: str, what: str) -> None:
        notes.append(f"{key} {_shown(flat[key])} -> {what}")

    for key, value in flat.items():
        if key in PLAIN:
            kind, name = PLAIN[key]
            settings[name] = kind(key, value)
            becomes(key, f"{name} {_shown(settings[name])}")
        elif key in ABSENT:
            if _flag(key, value):
                raise ValueError(f"{key} must be false, got true: {ABSENT[key]}")
            notes.append(f"{key} false: off, as here")
        elif key in IGNORED:
            notes.append(f"ignored: {key} {_shown(value)} ({IGNORED[key]})")
        elif key == "optimization.ema":
            first, last = _pair(key, value)
            settings |= {"optim.momentum": first, "optim.final_momentum": last}
            becomes(key, f"optim.momentum {first}, optim.final_momentum {last}")
        elif key == "meta.use_bfloat16":
            settings["optim.precision"] = "bfloat16" if _flag(key, value) else "float32"
            becomes(key, f"optim.precision {settings['optim.precision']}")
        elif key == "meta.copy_data":
            text = "images are read where they lie" if _flag(key, value) else "off, as here"
            notes.append(f"{key} {_shown(value)}: {text}")
    _batch(flat, settings, notes, batch_given)
    _model(flat, settings, becomes)
    _root(flat, settings, notes)
    _start(flat, settings, notes)
    notes += [
        f"not in the file: {key} (the published value is kept)"
        for key in KNOWN
        if key not in flat and key not in OPTIONAL
    ]
    return Conversion(settings=settings, notes=tuple(sorted(notes, key=_section)))


def _section(note: str) -> str:
    return note.removeprefix("ignored: ").removeprefix("not in the file: ").partition(".")[0]


def _batch(
    flat: Mapping[str, Any], settings: dict[str, Any], notes: list[str], given: bool
) -> None:
    key = "data.batch_size"
    if key not in flat:
        return
    size = _whole(key, flat[key])
    if size < 1:
        raise _wrong(key, "at least 1", size)
    settings["masks.truncation_group"] = size
    text = f"{key} {size}, which is per GPU -> masks.truncation_group {size}"
    if given:
        notes.append(f"{text}; batch.global as given")
        return
    if RELEASED_BATCH % size:
        raise ValueError(
            f"{key} must be a divisor of {RELEASED_BATCH}, the released runs' global batch, got "
            f"{size}: it is per GPU and the file does not say how many GPUs, so give --batch.global"
        )
    settings["batch.global"] = RELEASED_BATCH
    notes.append(
        f"{text}, batch.global {RELEASED_BATCH} (as in the released runs, here {size} x "
        f"{RELEASED_BATCH // size} GPUs; the file does not say how many: --batch.global changes it)"
    )


def _model(
    flat: Mapping[str, Any], settings: dict[str, Any], becomes: Callable[[str, str], None]
) -> None:
    name = ModelConfig().name
    if "meta.model_name" in flat:
        name = _text("meta.model_name", flat["meta.model_name"])  # type: ignore[assignment]
        if name not in ARCHITECTURES:
            rule = f"one of {', '.join(ARCHITECTURES)}"
            wrong = _wrong("meta.model_name", rule, name)
            raise ValueError(f"{wrong}{_nearest(name, ARCHITECTURES)}")
        settings["model.name"] = name
        becomes("meta.model_name", f"model.name {name}")
    if "meta.pred_depth" in flat:
        depth = _whole("meta.pred_depth", flat["meta.pred_depth"])
        if depth == ARCHITECTURES[name].predictor_depth:
            becomes("meta.pred_depth", f"nothing to set: it is {name}'s own model.predictor_depth")
        else:
            settings["model.predictor_depth"] = depth
            becomes("meta.pred_depth", f"model.predictor_depth {depth}")


def _root(flat: Mapping[str, Any], settings: dict[str, Any], notes: list[str]) -> None:
    parts = {key: flat.get(key) for key in ("data.root_path", "data.image_folder")}
    named = {key: value for key, value in parts.items() if value not in (None, "")}
    # a placeholder or nothing: --data must be given
    if not named:
        notes += [f"{key} {_shown(flat[key])}: --data says it" for key in parts if key in flat]
        return
    folder = Path(*(_text(key, value) for key, value in named.items()))
    text = ""
    # beside it lies val, which is not trained on
    if (folder / "train").is_dir():
        folder, text = folder / "train", " (the folder train in it)"
    settings["data.root"] = str(folder)
    shown = " + ".join(f"{key} {_shown(value)}" for key, value in named.items())
    notes.append(f"{shown} -> data.root {_shown(str(folder))}{text}")


def _start(flat: Mapping[str, Any], settings: dict[str, Any], notes: list[str]) -> None:
    load, read = "meta.load_checkpoint", "meta.read_checkpoint"
    file = flat.get(read)
    wanted = load in flat and _flag(load, flat[load])
    if file is not None:
        file = _text(read, file)
    if wanted and file:
        settings["init"] = file
        notes.append(f"{load} true, {read} {_shown(file)} -> init")
        return
    if load in flat:
        text = "a run goes on from its own folder's checkpoints, always" if wanted else "off"
        notes.append(f"{load} {_shown(wanted)}: {text}")
    if read in flat:
        unused = f" ({load} is not true)" if file else ""
        notes.append(f"ignored: {read} {_shown(file)}{unused}")
