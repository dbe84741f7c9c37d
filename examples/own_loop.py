"""A trainer of one's own from the parts of `ijepa_fast`: networks, masks, loader, schedules, step.

    python examples/own_loop.py

Trains a tiny network for 50 steps on embedded images. Its losses are those of
`ijepa_fast.pretrain` with the same settings, bit for bit.
"""

import torch

from ijepa_fast import BatchConfig, Config, DataConfig, MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.data import Loader, open_index, positions, steps_per_epoch
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.schedules import Schedules
from ijepa_fast.step import make_step

STEPS, BATCH = 50, 16
CONFIG = Config(
    model=ModelConfig(name="vit_tiny", width=48, depth=2, patch_size=4, predictor_depth=1),
    data=DataConfig(root="fashion_mnist_10k", crop=28),
    masks=MaskConfig(min_keep=4, truncation_group=BATCH),
    optim=OptimConfig(epochs=1, warmup=0.1, lr=1e-3, precision="float32"),
    batch=BatchConfig(global_=BATCH, device=BATCH),
)


def train(config: Config, steps: int, device: str) -> list[float]:
    """Trains from the first step on; returns the loss of every step."""
    index, _ = open_index(config.data.sources)
    generator = torch_generator(config.seed, Stream.INIT)
    encoder, predictor = build_models(config.model, config.data.crop_size, generator)
    step = make_step(config, encoder, predictor, torch.device(device))
    batch, width = config.batch.global_, config.model.architecture.width
    schedules = Schedules.of(
        config.optim, global_batch=batch, steps_per_epoch=steps_per_epoch(len(index), batch)
    )
    loader = Loader(
        index,
        config.data,
        seed=config.seed,
        global_batch=batch,
        device_batch=batch,
        steps=steps,
        device=device,
    )
    own, losses = positions(0, 1, 0, batch), []
    with loader:
        for number, images in enumerate(loader):
            masks = sample_masks(
                config.masks, grid=config.grid, seed=config.seed, step=number, positions=own
            )
            prepared = step.prepare(masks)
            elements = masks.elements(batch, width)
            loss, _ = step.accumulate(images.images, prepared, elements)
            step.update(schedules.at(number + 1))
            losses.append(float(loss))
    return losses


if __name__ == "__main__":
    losses = train(CONFIG, STEPS, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps")
