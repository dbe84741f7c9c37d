"""A small folder of JPEG files and a loader over it, for the tests of loader and quarantine."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ijepa_fast.config import DataConfig
from ijepa_fast.data import Loader
from ijepa_fast.data.index import mark

IMAGES = 37
HAS_DALI = (
    importlib.util.find_spec("nvidia") is not None
    and importlib.util.find_spec("nvidia.dali") is not None
)
DECODERS = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")),
]


def jpeg(seed, size=(60, 48)):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def folder(root, count=IMAGES):
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"{i:03d}.jpg").write_bytes(jpeg(i, (60 + i % 3, 48 + i % 5)))
    return root


def spoil(index, rows):
    """Files that look good to the index and cannot be decoded."""
    for row in rows:
        data = b"\0" * int(index.length[row])
        Path(index.path(row)).write_bytes(data)
        index.mark[row] = mark(data, len(data))


def make_loader(index, *, decoder="pillow", prefetch=3, timeout=25.0, given=None, **options):
    """With a decoder by its name, or a given one."""
    config = DataConfig(
        decoder=decoder,
        prefetch=prefetch,
        crop=32,
        threads=2,
        max_bad_share=0.2,
        timeout=timeout,
    )
    sizes = {"seed": 7, "global_batch": 8, "device_batch": 8, "steps": 10}
    return Loader(index, config, decoder=given, **{**sizes, **options})


def run(index, **options):
    with make_loader(index, **options) as loader:
        return [(batch.ids.tolist(), batch.images.clone()) for batch in loader]


def sample_ids(index, **options):
    return [ids for ids, _ in run(index, **options)]
