"""What parity holds against what, and how far apart they may be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ijepa_fast.config import OptimConfig
from ijepa_fast.schedules import StepValues

__all__ = [
    "FAST_LIMITS",
    "LIMITS",
    "Limits",
    "Report",
    "Row",
    "key_bias_bounds",
    "relative",
]

KEY_THIRD = "(key third, absolute)"
KEY_GRADIENT, KEY_BIAS = "key gradient", "final key bias"
RATIO, TENSOR_RATIO = "against reference bf16", "against reference bf16, each"
# what stands above the rows of a kind, where its name does not say it
HEADINGS = {
    RATIO: "errors as multiples of those of the reference path in bfloat16:",
    KEY_BIAS: (
        "final key bias: zero true gradient, so Adam makes steps of rounding noise; the limit is\n"
        "what they can add up to on both sides. Shows another start or longer steps, no less"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest errors allowed: relative for loss and schedules, relative L2 per tensor elsewhere.

    Attributes:
        loss, schedule, forward, gradient, weights: of the entries so named.
        key_gradient: absolute, for the gradient of qkv biases' key third, which is truly zero.
        target_movement: error of the target encoder, as a share of its own movement from the start.
    """

    loss: float
    schedule: float
    forward: float
    gradient: float
    weights: float
    key_gradient: float
    target_movement: float


LIMITS = {
    "float32": Limits(
        loss=1e-6,
        schedule=1e-9,
        forward=1e-6,
        gradient=5e-6,
        weights=1e-5,
        key_gradient=1e-6,
        target_movement=1e-3,
    ),
    # wide enough for bf16 products on small networks, narrow enough to notice a wrong formula
    "bfloat16": Limits(
        loss=1e-2,
        schedule=1e-9,
        forward=3e-2,
        gradient=1.5e-1,
        weights=3e-2,
        key_gradient=1e-2,
        target_movement=3e-1,
    ),
}

# the fast path sums in another order
FAST_LIMITS = {
    "float32": replace(LIMITS["float32"], gradient=5e-5, weights=5e-5),
    "bfloat16": LIMITS["bfloat16"],
}


# largest errors of the fast path in bfloat16, as multiples of the reference path's: RMS over all
# losses, all gradients, all final weights; and of one gradient or final weight. Single losses are
# not held: each is one number, whose error may be next to nothing by chance.
RMS_RATIO, EACH_RATIO = 1.5, 3.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: which tensor, its error, and the limit it is held to."""

    kind: str
    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit; NaN is not."""
        return self.error <= self.limit

    def line(self) -> str:
        """One line of the table."""
        kind = "f" if self.kind in (RATIO, TENSOR_RATIO) else "e"
        numbers = f"{self.error:10.2{kind}} {self.limit:9.1{kind}}"
        return f"{self.name:<58} {numbers}  {'ok' if self.ok else 'FAIL'}"


@dataclass(kw_only=True)
class Report:
    """All comparisons with one recording."""

    path: str
    dtype: str
    rows: list[Row] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every limit holds and every tensor was used."""
        return not self.unused and all(row.ok for row in self.rows)

    def add(self, kind: str, name: str, error: float, limit: float) -> None:
        """Appends a comparison."""
        self.rows.append(Row(kind=kind, name=name, error=error, limit=limit))

    def add_weights(
        self, kind: str, name: str, actual: Tensor, expected: Tensor, limit: float, key_limit: float
    ) -> None:
        """Appends a gradient or a weight; the key third of qkv biases for itself, with a limit of
        its own.
        """
        if name.endswith("attn.qkv.bias") and actual.shape == expected.shape:
            # softmax does not see a constant added to all keys: only rounding noise is left here
            q, k, v = actual.detach().chunk(3)
            q_, k_, v_ = expected.chunk(3)
            difference = float((k.double().cpu() - k_.double()).abs().max())
            key_kind = KEY_GRADIENT if kind == "gradient" else KEY_BIAS
            self.add(key_kind, f"{name} {KEY_THIRD}", difference, key_limit)
            actual, expected = torch.cat([q, v]), torch.cat([q_, v_])
        self.add(kind, name, relative(actual, expected), limit)

    def add_movement(
        self, limits: Limits, name: str, actual: Tensor, expected: Tensor, initial: Tensor
    ) -> None:
        """The EMA moves little, so an error is also measured against that movement."""
        actual = actual.detach().double().cpu()
        error = math.inf
        if actual.shape == expected.shape:
            difference, movement = actual - expected.double(), expected.double() - initial.double()
            if name.endswith("attn.qkv.bias"):
                difference, movement = (
                    torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (difference, movement)
                )
            error = float(difference.norm() / movement.norm().clamp_min(1e-300))
        self.add("target movement", f"{name} (of its movement)", error, limits.target_movement)

    def add_ratios(self, reference: "Report") -> None:
        """Appends these errors as multiples of another report's, of the same recording.

        A reference error below the reference path's limit in float32 counts as that limit: it says
        nothing about bfloat16 then (it is float32's rounding, or 0 where a loss or a tensor came
        out right by chance), and what errs no more than float32 may needs no comparison. Errors
        of bfloat16 are a hundred times as large.
        """
        exact = LIMITS["float32"]
        for kind, floor, name in (
            ("loss", exact.loss, "all losses"),
            ("gradient", exact.gradient, "all gradients"),
            ("final weights", exact.weights, "all final weights"),
        ):
            mine, theirs = (
                {row.name: row.error for row in report.rows if row.kind == kind}
                for report in (self, reference)
            )
            assert mine.keys() == theirs.keys()
            ratio = _ratio(_rms(mine), _rms(theirs), floor)
            self.add(RATIO, f"{name} (RMS of {len(mine)})", ratio, RMS_RATIO)
            for each in mine if kind != "loss" else ():
                ratio = _ratio(mine[each], theirs[each], floor)
                self.add(TENSOR_RATIO, f"{each} (of reference)", ratio, EACH_RATIO)

    def table(self) -> str:
        """Each step's values and the ratios of RMS line by line, the worst tensor of every other
        kind, and all failures.
        """
        lines = [f"{'entry':<58} {'error':>10} {'limit':>9}  result"]
        for kind in dict.fromkeys(row.kind for row in self.rows):
            rows = [row for row in self.rows if row.kind == kind]
            shown = rows
            if kind in HEADINGS:
                lines.append(HEADINGS[kind])
            if kind not in ("loss", "schedule", "forward", RATIO):
                worst = max(rows, key=lambda r: r.error / r.limit if r.error == r.error else 1e99)
                shown = [r for r in rows if not r.ok or r is worst]
                lines.append(f"{kind}: {len(rows)} tensors, worst:")
            lines += [row.line() for row in shown]
        lines += [f"never used: {name}" for name in self.unused]
        failed = sum(not row.ok for row in self.rows)
        verdict = "PASS" if self.ok else "FAIL"
        lines.append(
            f"{verdict}: {self.path} path, {self.dtype}, {len(self.rows)} comparisons, "
            f"{failed} failed, {len(self.unused)} tensors unused"
        )
        return "\n".join(lines)


def key_bias_bounds(steps: Sequence[StepValues], config: OptimConfig) -> tuple[float, float]:
    """How far apart the final key biases of two right runs of AdamW can be, in exact arithmetic.

    The true gradient is zero, so each run follows its own rounding noise g, and biases do not
    decay. Step t moves a bias by at most lr_t * c_t: with m and v the moments, by Cauchy-Schwarz,

        |m_t| = (1 - b1) |sum_k b1^k g_(t-k)|
             <= (1 - b1) sqrt(sum_k (b1^2 / b2)^k) sqrt(v_t / (1 - b2)),     k = 0 .. t - 1,

    and c_t is that over sqrt(v_t), bias corrections included (1 in the first step, 1.03 in the
    eighth, 7.3 in the end). Two runs may move in opposite directions.

    Args:
        steps: learning rate and momentum of every step.
        config: betas.

    Returns:
        Of the context encoder and the predictor, and of the target encoder, which averages them.
    """
    b1, b2 = config.beta1, config.beta2
    trained = averaged = overlap = 0.0
    for t, values in enumerate(steps, 1):
        overlap = 1 + overlap * b1**2 / b2
        longest = (1 - b1) / (1 - b1**t) * math.sqrt(overlap * (1 - b2**t) / (1 - b2))
        trained += 2 * values.lr * longest
        averaged = values.momentum * averaged + (1 - values.momentum) * trained
    return trained, averaged


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, L2; infinite where the shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().double().cpu(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def _rms(errors: dict[str, float]) -> float:
    return math.sqrt(sum(error * error for error in errors.values()) / len(errors))


def _ratio(mine: float, theirs: float, floor: float) -> float:
    # in this order, a NaN stays one
    return mine / max(theirs, floor)
