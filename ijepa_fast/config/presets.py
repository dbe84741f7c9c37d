"""Named recipes as functions. The released ones follow the paper's appendix A and its
configurations.
"""

from collections.abc import Callable
from dataclasses import replace

from ijepa_fast.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
)
from ijepa_fast.errors import UsageError

__all__ = ["PRESETS", "preset"]


def demo() -> Config:
    """A small network on the embedded 8,000 images: it learns within minutes on two cores."""
    return Config(
        model=ModelConfig(
            name="vit_tiny",
            patch_size=4,
            width=128,
            depth=4,
            heads=2,
            predictor_width=64,
            predictor_depth=3,
        ),
        # images whole; crops of so few pixels cost accuracy
        data=DataConfig(root="fashion_mnist_10k", crop=28, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        masks=MaskConfig(num_targets=6, target_scale=(0.08, 0.12), min_keep=4, truncation_group=64),
        # many CPUs have no bfloat16 products
        optim=OptimConfig(
            epochs=8,
            warmup=1,
            start_lr=1e-4,
            lr=3e-4,
            lr_reference_batch=64,
            precision="float32",
        ),
        batch=BatchConfig(global_=64),
        eval=EvalConfig(data="fashion_mnist_10k", whole=True),
        out="runs/demo",
        log=LogConfig(interval=20),
    )


def fashion_mnist() -> Config:
    """Fashion-MNIST with a small network, our best recipe there: images whole, six target blocks of
    a tenth of the grid, half the learning rate. 2,400 steps in about 24 minutes on two cores with
    bfloat16 products.
    """
    published = fashion_mnist_published()
    return replace(
        published,
        # crops of so few pixels cost accuracy (docs/log/learning.md)
        data=replace(published.data, scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        masks=replace(published.masks, num_targets=6, target_scale=(0.08, 0.12), min_keep=6),
        optim=replace(published.optim, lr=5e-4),
        out="runs/fashion_mnist",
    )


def fashion_mnist_published() -> Config:
    """The released recipe on Fashion-MNIST, its random crops too, with a small network: 2,400 steps
    in 23 minutes on two cores with bfloat16 products.
    """
    return Config(
        model=ModelConfig(
            name="vit_tiny", patch_size=4, depth=6, predictor_width=96, predictor_depth=4
        ),
        data=DataConfig(root="fashion_mnist", crop=28),
        masks=MaskConfig(truncation_group=256),
        # the schedules end at the last of 2,400 steps, in the eleventh epoch
        optim=OptimConfig(epochs=11, ipe_scale=2400 / 2574, warmup=1, lr_reference_batch=256),
        max_steps=2400,
        batch=BatchConfig(global_=256),
        eval=EvalConfig(data="fashion_mnist"),
        out="runs/fashion_mnist_published",
    )


def _imagenet(
    preset_name: str,
    model: ModelConfig,
    *,
    crop: int = 224,
    group: int = 128,
    epochs: int = 600,
    warmup: float = 40,
) -> Config:
    """The paper's appendix A; `group` is the released run's images of one GPU, of 2,048 in all."""
    return Config(
        model=model,
        data=DataConfig(crop=crop),
        masks=MaskConfig(truncation_group=group),
        optim=OptimConfig(epochs=epochs, warmup=warmup),
        # every four epochs of ImageNet-1k
        eval=EvalConfig(every=2500),
        out=f"runs/{preset_name}",
    )


def vits16() -> Config:
    """ViT-S/16 at 224: small enough for one modest GPU; not a released configuration."""
    return _imagenet("vits16", ModelConfig(name="vit_small"), epochs=300, warmup=15)


def vitb16_in1k() -> Config:
    """ViT-B/16, the community recipe for ImageNet-1k: predictor depth 6, 600 epochs."""
    return _imagenet("vitb16_in1k", ModelConfig(name="vit_base"))


def vitl16_in1k() -> Config:
    """ViT-L/16, the community recipe for ImageNet-1k: predictor depth 12, 600 epochs."""
    return _imagenet("vitl16_in1k", ModelConfig(name="vit_large"))


def vith14_in1k() -> Config:
    """ViT-H/14 on ImageNet-1k: 300 epochs, released at 128 images a GPU on 16 GPUs."""
    return _imagenet("vith14_in1k", ModelConfig(name="vit_huge", patch_size=14), epochs=300)


def vith16_448_in1k() -> Config:
    """ViT-H/16 at 448 on ImageNet-1k: 300 epochs, released at 16 images a GPU on 128 GPUs."""
    model = ModelConfig(name="vit_huge")
    return _imagenet("vith16_448_in1k", model, crop=448, group=16, epochs=300)


def vith14_in22k() -> Config:
    """ViT-H/14 on ImageNet-22k: 66 epochs, released at 32 images a GPU on 64 GPUs."""
    model = ModelConfig(name="vit_huge", patch_size=14)
    return _imagenet("vith14_in22k", model, group=32, epochs=66, warmup=3)


def vitg16_in22k() -> Config:
    """ViT-g/16 on ImageNet-22k: 44 epochs, released at 16 images a GPU on 128 GPUs."""
    model = ModelConfig(name="vit_giant")
    return _imagenet("vitg16_in22k", model, group=16, epochs=44, warmup=3)


PRESETS: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        demo,
        fashion_mnist,
        fashion_mnist_published,
        vits16,
        vitb16_in1k,
        vitl16_in1k,
        vith14_in1k,
        vith16_448_in1k,
        vith14_in22k,
        vitg16_in22k,
    )
}
"""The named recipes, each a function without arguments; docs/scaling.md has them in a table."""


def preset(name: str) -> Config:
    """The named recipe.

    Raises:
        UsageError: there is no such preset.

    Example:
        >>> config = ijepa_fast.preset("vith14_in1k")
        >>> config.model.name, config.data.crop, config.batch.global_
        ('vit_huge', 224, 2048)
    """
    if name not in PRESETS:
        raise UsageError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()
