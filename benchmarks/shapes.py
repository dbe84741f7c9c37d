"""Shapes of the published models at batch 128: what the benchmarks of the ops run on."""

from dataclasses import dataclass

__all__ = ["MODELS", "SMALL", "Model"]


@dataclass(frozen=True)
class Model:
    """One training step's sizes; contexts and target blocks at their median over 200 batches of
    128 images with contexts cut to a common length.
    """

    name: str
    patch: int
    grid: int  # side, patches
    width: int  # D
    heads: int
    depth: int
    predictor_depth: int
    context: int  # K
    target: int  # T
    batch: int = 128  # B
    blocks: int = 4  # M
    predictor_width: int = 384  # P

    @property
    def patches(self) -> int:
        """N, patches of an image."""
        return self.grid**2

    @property
    def side(self) -> int:
        """Of the square image, pixels."""
        return self.grid * self.patch


MODELS = {
    model.name: model
    for model in (
        Model("B/16", 16, 14, 768, 12, 12, 6, context=51, target=35),
        Model("L/16", 16, 14, 1024, 16, 24, 12, context=51, target=35),
        Model("H/14", 14, 16, 1280, 16, 32, 12, context=69, target=42),
    )
}
# for machines without a GPU
SMALL = Model(
    "small", 8, 6, 192, 3, 2, 2, context=12, target=6, batch=8, blocks=4, predictor_width=96
)
