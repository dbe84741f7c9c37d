"""Configuration of a run: frozen, keyword-only dataclasses, validated on creation.

A field's text is its ``--help`` text. Defaults are the published recipe (arXiv 2301.08243,
appendix A) where it has a value. Nothing here touches data or a device, so that a wrong value
fails at once.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

from ijepa_fast.errors import require

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "AttentionName",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
]


# back ends of the fast path's attention; `fast.attention` has what they are
AttentionName = Literal["auto", "xformers", "varlen", "fa3", "fa4", "sdpa"]


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a ViT: width D, depth, heads H, MLP width F; and the predictor's depth."""

    width: int
    depth: int
    heads: int
    mlp_hidden: int
    predictor_depth: int


ARCHITECTURES = {
    "vit_tiny": Architecture(192, 12, 3, 768, 6),
    "vit_small": Architecture(384, 12, 6, 1536, 6),
    "vit_base": Architecture(768, 12, 12, 3072, 6),
    "vit_large": Architecture(1024, 24, 16, 4096, 12),
    "vit_huge": Architecture(1280, 32, 16, 5120, 12),
    "vit_giant": Architecture(1408, 40, 16, 6144, 16),
}


# what Python or torch counts in 32 bits somewhere
_MANY = 2**31 - 1
# masks of a whole group are drawn together: as of a GPU's batch
_LARGEST_GROUP = 65_536
# seconds: more than a machine's timers take
_LONGEST_WAIT = 1_000_000
# of networks and crops larger than any machine's, whose sizes alone take minutes to work out
_DEEPEST, _WIDEST, _LONGEST_SIDE, _MOST_PATCHES, _MOST_BLOCKS = 256, 65_536, 16_384, 16_384, 16


def _require_counts(section: str, config: object, *names: str, high: int = _MANY) -> None:
    """Whole numbers from 1 on, or None, which is a default."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            full = f"{section}{name.rstrip('_')}"
            require(value >= 1, full, "at least 1", value)
            require(value <= high, full, f"at most {high}", value)


def _require_path(name: str, value: str) -> None:
    """Every file that names it is UTF-8, and no file system has NUL in names."""
    known = "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
    require(known, name, "text in UTF-8 without NUL", value)


def _require_range(name: str, bounds: tuple[float, float], low: float, high: float) -> None:
    ordered = low < bounds[0] <= bounds[1] <= high
    require(ordered, name, f"two ascending numbers above {low:g} and at most {high:g}", bounds)


def _require_choices(section: str, config: object) -> None:
    """Literal fields hold one of their values; type checkers see it, Python does not."""
    for name, hint in get_type_hints(type(config)).items():
        value, several = getattr(config, name), get_origin(hint) is tuple
        choices = get_args(hint)[0] if several else hint
        for one in (value if several else [value]) if get_origin(choices) is Literal else ():
            if one not in get_args(choices):
                require(False, f"{section}{name}", f"one of {', '.join(get_args(choices))}", one)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and predictor dimensions.

    Example:
        >>> ijepa_fast.ModelConfig(name="vit_tiny", depth=6).architecture
        Architecture(width=192, depth=6, heads=3, mlp_hidden=768, predictor_depth=6)
    """

    name: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"] = (
        "vit_base"
    )
    """Named size; the fields below override single dimensions of it."""
    patch_size: int = 16
    """Side of a square patch, pixels."""
    width: int | None = None
    """Encoder width D."""
    depth: int | None = None
    """Encoder blocks."""
    heads: int | None = None
    """Attention heads of encoder and predictor."""
    mlp_hidden: int | None = None
    """Width of the encoder's MLPs."""
    predictor_width: int = 384
    """Predictor width P."""
    predictor_depth: int | None = None
    """Predictor blocks."""

    def __post_init__(self) -> None:
        _require_choices("model.", self)
        _require_counts("model.", self, "patch_size", high=_LONGEST_SIDE)
        a = self.architecture
        _require_counts("model.", a, "depth", "predictor_depth", high=_DEEPEST)
        _require_counts("model.", a, "width", "heads", high=_WIDEST)
        _require_counts("model.", a, "mlp_hidden", high=16 * _WIDEST)
        for name, width in (("width", a.width), ("predictor_width", self.predictor_width)):
            full, rule = f"model.{name}", f"a positive multiple of 4, at most {_WIDEST}"
            require(width % 4 == 0 and 0 < width <= _WIDEST, full, rule, width)
            rule = f"divisible by the number of heads ({a.heads})"
            require(width % a.heads == 0, f"model.{name}", rule, width)

    @property
    def architecture(self) -> Architecture:
        """The named size with the overrides applied."""
        base = ARCHITECTURES[self.name]
        if self.width is not None:
            base = replace(base, mlp_hidden=4 * self.width)
        given = {name: getattr(self, name) for name in vars(base)}
        return replace(base, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Multi-block masks (paper, section 3 and appendix A).

    Example:
        >>> masks = ijepa_fast.MaskConfig(num_targets=6, target_scale=(0.08, 0.12))
        >>> ijepa_fast.preset("demo").masks == masks
        False
    """

    geometry: Literal["published", "unbiased"] = "published"
    """`published`: as the released sampler, which never uses the last row and column;
    `unbiased`: every position equally likely, scale and aspect drawn independently."""
    num_targets: int = 4
    """Target blocks M of an image."""
    num_contexts: int = 1
    """Context blocks of an image."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Area of a target block, as a share of the grid."""
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Height over width of a target block."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area of a context block before the targets are removed, as a share of the grid."""
    context_aspect: tuple[float, float] = (1.0, 1.0)
    """Height over width of a context block."""
    min_keep: int = 10
    """A context must keep more than this many patches."""
    truncation_group: int = 128
    """Contexts of so many consecutive images of the global batch are cut to their shortest
    (published: of one GPU's batch); 1 = every context whole. Left out, it fits batch.global."""

    def __post_init__(self) -> None:
        _require_choices("masks.", self)
        _require_counts("masks.", self, "num_targets", "num_contexts", high=_MOST_BLOCKS)
        _require_counts("masks.", self, "truncation_group", high=_LARGEST_GROUP)
        require(self.min_keep >= 0, "masks.min_keep", "at least 0", self.min_keep)
        for name in ("target_scale", "context_scale"):
            _require_range(f"masks.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("target_aspect", "context_aspect"):
            _require_range(f"masks.{name}", getattr(self, name), 0.0, 100.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and their augmentation (paper, appendix A: random resized crops only).

    Example:
        >>> ijepa_fast.DataConfig(root=("/photographs", "/more"), crop=64).crop_size
        (64, 64)
    """

    root: str | tuple[str, ...] = ""
    """A folder of images (any nesting), a list file (.txt, .tsv), tar shards
    (`train-{0000..0099}.tar`) or several of these; or a name, `fashion_mnist_10k` (embedded) or
    `fashion_mnist`. `--data` is short for it. Empty: must still be given."""
    crop: int | tuple[int, int] = 224
    """Side of the training crop in pixels, or its height and width."""
    scale: tuple[float, float] = (0.3, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop (log-uniform)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means in 0-1 units, subtracted on the training device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Channel standard deviations in 0-1 units, divided by on the training device."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """`auto` is DALI where it is installed and Pillow elsewhere."""
    threads: int | None = None
    """Decoder threads of each rank; by default half of the machine's cores, at most 8."""
    prefetch: int = 3
    """Batches decoded ahead of the step."""
    timeout: float = 25.0
    """The run stops after so many seconds without a batch, and says which files it waits for; an
    image that takes longer to decode is left out."""
    max_bad_share: float = 0.001
    """The run stops once more than this share of the files (and more than one file) is unusable."""
    allow_missing: bool = False
    """Train on what is left where a tar shard is damaged or a folder cannot be listed."""

    def __post_init__(self) -> None:
        _require_choices("data.", self)
        require(self.root != (), "data.root", "a path or several", self.root)
        for root in self.sources:
            _require_path("data.root", root)
        require(min(self.crop_size) >= 1, "data.crop", "at least 1 pixel", self.crop)
        rule = f"at most {_LONGEST_SIDE} pixels"
        require(max(self.crop_size) <= _LONGEST_SIDE, "data.crop", rule, self.crop)
        _require_range("data.scale", self.scale, 0.0, 1.0)
        _require_range("data.ratio", self.ratio, 0.0, 100.0)
        for value in self.mean:
            require(math.isfinite(value), "data.mean", "finite", self.mean)
        for value in self.std:
            require(0 < value < math.inf, "data.std", "positive and finite", self.std)
        _require_counts("data.", self, "threads", "prefetch", high=4096)
        rule = f"positive and at most {_LONGEST_WAIT} seconds"
        require(0 < self.timeout <= _LONGEST_WAIT, "data.timeout", rule, self.timeout)
        share = self.max_bad_share
        require(0 <= share <= 1, "data.max_bad_share", "between 0 and 1", share)

    @property
    def sources(self) -> tuple[str, ...]:
        """What `root` names; empty where it must still be given."""
        roots = (self.root,) if isinstance(self.root, str) else self.root
        return tuple(root for root in roots if root)

    @property
    def crop_size(self) -> tuple[int, int]:
        """Height and width of the training crop, pixels."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Loss, AdamW and the three schedules (paper, appendix A).

    Example:
        >>> ijepa_fast.OptimConfig(epochs=100, lr=-1)
        Traceback (most recent call last):
        ijepa_fast.errors.UsageError: optim.lr must be at least 0, got -1
    """

    epochs: int = 600
    """Passes over the data; a run has epochs * floor(images / batch.global) steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    start_lr: float = 2e-4
    """Learning rate at the start of the warm-up."""
    final_lr: float = 1e-6
    """Learning rate at the end."""
    warmup: float = 40
    """Epochs of linear warm-up."""
    weight_decay: float = 0.04
    """Weight decay at the start (cosine to the final value)."""
    final_weight_decay: float = 0.4
    """Weight decay at the end."""
    momentum: float = 0.996
    """Momentum of the target encoder at the start (linear to the final value)."""
    final_momentum: float = 1.0
    """Momentum of the target encoder at the end."""
    ipe_scale: float = 1.0
    """Stretches the schedules, not the run."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.999
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added outside the square root."""
    loss: Literal["smooth_l1", "l2", "l1"] = "smooth_l1"
    """Distance between predicted and target features; the paper writes l2, its trainer uses
    smooth_l1.
    """
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """`bfloat16` autocasts matrix products; weights, moments, norms and loss stay float32 in
    both.
    """
    residual: Literal["float32", "bfloat16"] = "float32"
    """Residual stream of the fast path's networks; the published runs keep it in float32."""
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    """How the three learning rates follow a changed batch.global."""
    lr_reference_batch: int = 2048
    """The global batch that the learning rates belong to."""

    def __post_init__(self) -> None:
        _require_choices("optim.", self)
        half = self.precision == "bfloat16" or self.residual == "float32"
        rule = "float32 where optim.precision is float32"
        require(half, "optim.residual", rule, self.residual)
        _require_counts("optim.", self, "epochs", "lr_reference_batch")
        for name in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "warmup"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"optim.{name}", "at least 0", value)
        for name in ("momentum", "final_momentum", "beta1", "beta2"):
            value = getattr(self, name)
            high = 1.0 if "momentum" in name else math.nextafter(1.0, 0.0)
            require(0 <= value <= high, f"optim.{name}", "between 0 and 1", value)
        for name in ("eps", "ipe_scale"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optim.{name}", "positive and finite", value)
        rule = f"at most optim.epochs * optim.ipe_scale ({self.epochs * self.ipe_scale:g})"
        require(self.warmup <= self.epochs * self.ipe_scale, "optim.warmup", rule, self.warmup)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The recipe's batch and the hardware's.

    Example:
        >>> batch = ijepa_fast.BatchConfig(global_=256, device=64)
        >>> batch.global_ // batch.device  # micro-steps on one rank
        4
    """

    global_: Annotated[int, tyro.conf.arg(name="global")] = 2048
    """Images of one optimiser step over all ranks; sets steps per epoch, schedules and mask
    groups.
    """
    device: int | Literal["auto"] = "auto"
    """Images of one forward pass on one rank; the rest is gradient accumulation. `auto` takes
    the largest that the memory estimate allows."""

    def __post_init__(self) -> None:
        _require_counts("batch.", self, "global_")
        if self.device != "auto":
            _require_counts("batch.", self, "device")
            rule = f"a divisor of batch.global ({self.global_})"
            require(self.global_ % self.device == 0, "batch.device", rule, self.device)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training.

    Example:
        >>> ijepa_fast.LogConfig(interval=1).interval  # a row of metrics a step
        1
    """

    interval: int = 20
    """Optimiser steps between two lines of metrics."""
    to: tuple[Literal["jsonl", "tensorboard", "wandb", "mlflow"], ...] = ("jsonl",)
    """Where the metrics go: jsonl is OUT/metrics.jsonl, which is written in any case, as a resume,
    the curves and the report read it; tensorboard is OUT/tensorboard; wandb and mlflow are set up
    by their own environment variables.
    """
    samples: bool = False
    """Also write which samples every step took, into OUT/samples-rank<r>.jsonl."""

    def __post_init__(self) -> None:
        _require_counts("log.", self, "interval")
        _require_choices("log.", self)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Example:
        >>> ijepa_fast.CheckpointConfig(minutes=30).keep
        3
    """

    minutes: float = 10.0
    """Write one after this many minutes (and at the run's end, and on a signal)."""
    keep: int = 3
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Also write and keep one at every so many epochs, once the one before it is written."""

    def __post_init__(self) -> None:
        require(self.minutes > 0, "checkpoint.minutes", "positive", self.minutes)
        _require_counts("checkpoint.", self, "keep", "keep_every")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of the features, at the start, the end and in between: kNN accuracy on labelled
    images, and monitors that need no labels. None without `data` or `every`.

    Example:
        >>> ijepa_fast.EvalConfig(data="fashion_mnist_10k", every=500).whole
        False
    """

    data: str | None = None
    """A folder with one sub-folder a class, or the name of a set, for the kNN accuracy."""
    every: int | None = None
    """Steps between two evaluations; by default as often as a small part of a percent of the run
    pays for.
    """
    whole: bool = False
    """End with a table of kNN and ridge regression on all labelled images, whatever that costs;
    otherwise, and before, kNN is of at most 2,048 training and 512 test images.
    """
    seconds: float = 10.0
    """The most seconds of an evaluation on a part of the images, which gets smaller where it would
    take longer. A run whose steps take less than this is not evaluated, unless `every` or `whole`
    asks for it; 0 is no limit.
    """

    def __post_init__(self) -> None:
        _require_counts("eval.", self, "every")
        _require_path("eval.data", self.data or "")
        finite = 0 <= self.seconds < math.inf
        require(finite, "eval.seconds", "at least 0 and finite", self.seconds)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. Everything is the recipe but where and how it runs, what is logged and saved
    (`NOT_RECIPE` in `state/run_folder.py`).

    Raises:
        UsageError: a value is wrong, or two contradict each other.

    Example:
        >>> config = ijepa_fast.Config(data=ijepa_fast.DataConfig(root="images", crop=224))
        >>> config.grid, config.optim.lr
        ((14, 14), 0.001)
    """

    out: str = "runs/demo"
    """The run's folder; the same command on the same folder resumes."""
    seed: int = 0
    """Seed of everything random."""
    max_steps: int | None = None
    """Stop after so many steps, schedules unchanged."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` is CUDA where there is one."""
    path: Literal["fast", "reference"] = "fast"
    """`fast` trains with fused kernels on packed rows, `reference` in plain PyTorch; same
    mathematics, and either resumes the other's checkpoints.
    """
    attention: AttentionName = "auto"
    """Back end of attention on the fast path; `auto` takes cuDNN where all lengths are equal
    (Hopper and later) and flash attention elsewhere, or what is installed and 10 % faster.
    """
    graphs: Literal["auto", "on", "off"] = "auto"
    """Capture the fast path's step as CUDA graphs, one for each shape. `auto` captures the target
    encoder's blocks alone, whose shapes never change, until a GPU has shown the rest to be right.
    """
    memory: Literal["none", "full"] = "none"
    """What the fast path recomputes in the backward pass: nothing but norms and GELUs, or whole
    blocks.
    """
    target_precision: Literal["same", "fp8"] = "same"
    """Matrix products of the fast path's target encoder: `same` as optim.precision, or float8
    (e4m3), which the published runs do not have. Needs bfloat16, whole weights and, on a GPU,
    compute capability 8.9.
    """
    shard: Literal["auto", "none", "full", "hybrid"] = "auto"
    """Split weights and optimiser state over all ranks (`full`) or over those of a machine
    (`hybrid`); `auto` is `full` with several ranks. The reference path never does.
    """
    rank_timeout: float = 30.0
    """With several ranks: seconds without a sign of life of one after which all leave (exit code
    6), so that the job can be started again.
    """
    init: str | None = None
    """Weights to start from: a run, a checkpoint, or a file of `ijepa_fast.weights`; moments and
    schedules start anew. An encoder alone becomes both encoders.
    """
    allow_changed_recipe: bool = False
    """Resume although the recipe differs from the one the run was started with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        _require_choices("", self)
        require(0 <= self.seed < 2**63, "seed", "in 0..2**63-1", self.seed)
        require(bool(self.out), "out", "a folder", self.out)
        _require_path("out", self.out)
        _require_path("init", self.init or "")
        _require_counts("", self, "max_steps")
        rule = f"between 1 and {_LONGEST_WAIT} seconds"
        require(1 <= self.rank_timeout <= _LONGEST_WAIT, "rank_timeout", rule, self.rank_timeout)
        for side in self.data.crop_size:
            rule = f"a multiple of model.patch_size ({self.model.patch_size})"
            require(side % self.model.patch_size == 0, "data.crop", rule, side)
        height, width = self.grid
        rule = f"of at most {_MOST_PATCHES} patches"
        require(height * width <= _MOST_PATCHES, "data.crop", rule, self.data.crop)
        if self.path == "reference":
            self._check_reference()
        if self.target_precision == "fp8":
            self._check_float8()
        group = self.masks.truncation_group
        rule = f"divisible by masks.truncation_group ({group}): change either, or give no group"
        require(self.batch.global_ % group == 0, "batch.global", rule, self.batch.global_)

    def _check_reference(self) -> None:
        """What is asked of the fast path alone must not be ignored in silence."""
        for name, plain in (
            ("attention", ("auto", "sdpa")),
            ("graphs", ("auto", "off")),
            ("memory", ("none",)),
            ("target_precision", ("same",)),
            ("shard", ("auto", "none")),
        ):
            value = getattr(self, name)
            require(value in plain, name, f"{' or '.join(plain)} with path reference", value)
        residual = self.optim.residual
        require(residual == "float32", "optim.residual", "float32 with path reference", residual)

    def _check_float8(self) -> None:
        name = "target_precision"
        precision, shard, a = self.optim.precision, self.shard, self.model.architecture
        require(precision == "bfloat16", name, f"same where optim.precision is {precision}", "fp8")
        require(shard in ("auto", "none"), name, f"same where shard is {shard}", "fp8")
        for width in (a.width, a.mlp_hidden):
            rule = "same where a width of the encoder is not a multiple of 16"
            require(width % 16 == 0, name, f"{rule} ({width})", "fp8")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a crop: rows, columns."""
        height, width = self.data.crop_size
        return height // self.model.patch_size, width // self.model.patch_size
