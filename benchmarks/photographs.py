"""JPEG files of ImageNet's size, cut from the photographs in the scikit-image wheel."""

import io
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["SIZE", "write_copies", "write_photographs"]

SIZE = (500, 375)
_MOST_BYTES = 118_000
_NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
    "brick.png",
    "grass.png",
    "gravel.png",
)


def write_photographs(folder: Path, count: int = 256) -> Path:
    """Writes `count` photographs of 500x375 pixels, about 110 kB each, unless they are there.

    Sensor noise is added, and the quality chosen so that the file comes near its size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*.jpg"))) == count:
        return folder
    import skimage

    data = Path(skimage.__file__).parent / "data"
    sources = [Image.open(data / name).convert("RGB") for name in _NAMES]
    width, height = SIZE
    rng = np.random.default_rng(0)
    for number in range(count):
        image = sources[number % len(sources)]
        scale = max(width / image.width, height / image.height) * rng.uniform(1.01, 1.3)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32)
        noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        for quality in range(97, 50, -1):
            buffer = io.BytesIO()
            Image.fromarray(noisy).save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= _MOST_BYTES:
                break
        (folder / f"{number:05d}.jpg").write_bytes(buffer.getvalue())
    return folder


def write_copies(source: Path, folder: Path, count: int) -> Path:
    """Writes `count` files, copies of those of `source` in turn.

    Raises:
        ValueError: there are none.
    """
    pictures = sorted(source.glob("*.jpg"))
    if not pictures:
        raise ValueError(f"{source} must hold photographs (*.jpg), found none")
    folder.mkdir(parents=True)
    for number in range(count):
        shutil.copyfile(pictures[number % len(pictures)], folder / f"{number:05d}.jpg")
    return folder
