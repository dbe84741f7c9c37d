"""Predicted milliseconds of the fast step, for a GPU's numbers to be held against.

    python -m benchmarks.predict

Every product and every pass over memory is counted at the rows that the recipe has on average, in
bfloat16 with a float32 residual, one context block. A product or attention takes its FLOPs at the
rate of a large product, or its bytes at the bandwidth of a copy if that is longer; a pass takes its
bytes; every kernel takes a floor on top. No kernel reaches these: attention least of all.

Shape letters: B images, N patches, K of a context, T of a target block, U rows that targets need, D
width, F hidden width, P predictor width.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.shapes import MODELS, Model
from ijepa_fast.config import MaskConfig
from ijepa_fast.estimate import Rows
from ijepa_fast.masks import sample_masks

__all__ = ["Work", "of_step", "table"]

# measured on an H200, docs/log/2026-11-27-first-gpu-run.md: FLOP/s, bytes/s
FLOPS, BANDWIDTH = 790e12, 4.2e12
FLOOR_US = 2.5
# of the step of then (commit 05834fc), on the same card: ms
MEASURED = {"B/16": 84.2, "H/14": 207.4}
SAMPLED = 20


@dataclass
class Work:
    """Of one part of a step, in milliseconds but for the launches."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    launches: int = 0

    @property
    def total(self) -> float:
        """With the floor of every launch."""
        floors = self.launches * FLOOR_US / 1e3
        return self.products + self.attention + self.passes + floors

    def product(self, rows: float, inputs: int, outputs: int, times: int = 1) -> None:
        """Matrix products of rows in bfloat16; or of these two to the gradient of a weight."""
        moved = 2 * (rows * inputs + rows * outputs + inputs * outputs)
        self.products += times * _longer(2 * rows * inputs * outputs, moved)
        self.launches += times

    def attend(self, block: "Block", *, backward: bool = False) -> None:
        """Two products and one kernel; backward five and three."""
        products, tensors, kernels = (5, 4, 3) if backward else (2, 2, 1)
        flops = products * 2 * block.after * block.keys / block.sequences * block.width
        moved = tensors * 2 * (block.after + block.keys) * block.width
        self.attention += _longer(flops, moved)
        self.launches += kernels

    def move(self, moved: float, launches: int = 1) -> None:
        """A pass over memory."""
        self.passes += moved / BANDWIDTH * 1e3
        self.launches += launches


def _longer(flops: float, moved: float) -> float:
    return max(flops / FLOPS, moved / BANDWIDTH) * 1e3


@dataclass
class Block:
    """A block's rows: of the first norm, of keys, and those wanted; how many sequences."""

    before: float
    keys: float
    after: float
    sequences: float
    width: int

    def forward(self, work: Work) -> None:
        """Bytes of a row: 12 D of a norm with its addition, 16 D of GELU at F = 4 D."""
        d = self.width
        work.move(12 * d * self.before)
        if self.after < self.keys:
            work.product(self.before, d, 2 * d)
            work.product(self.after, d, d)
            work.move((4 + 8) * d * self.after, 2)  # gathers of normalised rows and residual
        else:
            work.product(self.before, d, 3 * d)
        if self.before < self.keys:
            work.move((12 + 8) * d * self.keys, 2)  # of queries, keys, values, and residual
        work.attend(self)
        work.product(self.after, d, d)
        work.move(12 * d * self.after)
        work.product(self.after, d, 4 * d, 2)
        work.move(16 * d * self.after)

    def backward(self, work: Work) -> None:
        """Bytes of a row: 32 D of GELU, 18 D of a norm, 12 D of joined queries, keys and values;
        each with a kernel more that adds up partial sums.
        """
        d = self.width
        work.product(self.after, d, 4 * d, 4)
        work.move(32 * d * self.after, 2)
        work.move(18 * d * self.after, 2)
        work.product(self.after, d, d, 2)
        work.attend(self, backward=True)
        if self.after < self.keys:
            work.move(4 * d * self.after + 8 * d * self.keys, 4)
            work.product(self.before, d, 2 * d, 2)
            work.product(self.after, d, d, 2)
            # residual and queries' part back in their places, the latter added
            work.move((6 + 2) * d * self.after + (6 + 6) * d * self.keys, 3)
        else:
            work.move(12 * d * self.keys, 2)
            work.product(self.before, d, 3 * d, 2)
        if self.before < self.keys:
            work.move((6 + 4) * d * (self.keys + self.before), 2)
        work.move(18 * d * self.before, 2)


def of_step(model: Model) -> dict[str, Work]:
    """The parts of one step of `model.batch` images."""
    b, n, d, p = model.batch, model.patches, model.width, model.predictor_width
    pixels, blocks = 3 * model.patch**2, model.blocks
    context, target, needed = _rows(model)
    kept, pairs = b * context, blocks * b
    parts = {name: Work() for name in ("target encoder", "context encoder", "predictor")}

    work = parts["target encoder"]
    work.move(3 * pixels * b * n)
    work.product(b * n, pixels, d)
    work.move(6 * d * b * n)  # positions
    for number in range(model.depth):
        wanted = needed if number == model.depth - 1 else n
        Block(b * n, b * n, b * wanted, b, d).forward(work)
    work.move(14 * d * b * needed)

    work = parts["context encoder"]
    work.move(3 * pixels * kept)
    work.product(kept, pixels, d, 2)
    work.move(8 * d * kept)
    block = Block(kept, kept, kept, b, d)
    for _ in range(model.depth):
        block.forward(work)
        block.backward(work)
    work.move(12 * d * kept)
    work.move(14 * d * kept, 2)

    work = parts["predictor"]
    sequence, wanted = pairs * (context + target), pairs * target
    work.product(kept, d, p, 3)
    work.move((8 + 6 + 8) * p * kept, 4)  # positions: gathered, added, put before the mask tokens
    for number in range(model.predictor_depth):
        before = kept + n if number == 0 else sequence
        after = wanted if number == model.predictor_depth - 1 else sequence
        block = Block(before, sequence, after, pairs, p)
        block.forward(work)
        block.backward(work)
    work.move(12 * p * wanted)
    work.move(14 * p * wanted, 2)
    work.product(wanted, p, d, 3)
    work.move(2 * d * wanted, 2)  # column sums

    loss = parts["loss and std"] = Work()
    loss.move(8 * d * wanted, 2)
    loss.move(40 * d * b * needed, 12)

    encoder = (12 * d + 13) * d * model.depth + (pixels + 1) * d
    predictor = (12 * p + 13) * p * model.predictor_depth + (2 * d + 2) * p
    update = parts["update"] = Work()
    update.move(4 * (encoder + predictor), 6)  # norms
    update.move(30 * (encoder + predictor) + 10 * encoder, 12)
    return parts


def _rows(model: Model) -> tuple[float, float, float]:
    """Mean K, T and U."""
    positions, found = np.arange(model.batch), []
    for step in range(SAMPLED):
        masks = sample_masks(
            MaskConfig(), grid=(model.grid,) * 2, seed=0, step=step, positions=positions
        )
        found += Rows.of(masks, model.patches, model.batch)
    names = ("context", "target", "needed")
    context, target, needed = (float(np.mean([getattr(r, x) for r in found])) for x in names)
    return context, target, needed


def table(model: Model) -> str:
    """Of one model, as Markdown."""
    parts = of_step(model)
    whole = Work(*(sum(getattr(w, x) for w in parts.values()) for x in vars(Work())))
    lines = [f"| {model.name} | products | attention | passes | launches | ms |", "|---" * 6 + "|"]
    for name, w in {**parts, "predicted": whole}.items():
        times = f"{w.products:.2f} | {w.attention:.2f} | {w.passes:.2f}"
        lines.append(f"| {name} | {times} | {w.launches} | {w.total:.2f} |")
    lines.append(f"| measured at 05834fc | | | | | {MEASURED.get(model.name, 'never')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(model) for model in MODELS.values()))
