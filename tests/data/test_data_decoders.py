"""Both decoders: agreement on every kind of file, the conversion rule, failures that name rows."""

import io
import logging
import struct
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from ijepa_fast.config import DataConfig
from ijepa_fast.data import (
    DaliDecoder,
    DecodeError,
    PillowDecoder,
    make_decoder,
    pillow_decoder,
    pixels,
)
from ijepa_fast.data.pixels import is_plain, open_image
from tests.trainer.small_folder import HAS_DALI

PHOTOGRAPHS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
JPEG = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "low quality": {"quality": 20},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "RGB stored": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
    **{f"EXIF {turn}": {"orientation": turn} for turn in (3, 6, 8)},
}
OTHER = {
    "PNG": {"fmt": "PNG"},
    "PNG grey": {"fmt": "PNG", "mode": "L"},
    "PNG alpha": {"fmt": "PNG", "mode": "RGBA"},
    "PNG palette": {"fmt": "PNG", "mode": "P"},
    "WebP": {"fmt": "WEBP"},
    "BMP": {"fmt": "BMP"},
    "TIFF": {"fmt": "TIFF"},
}

needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


def _photograph(name):
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    # A profile for RGB in a grey file makes libpng complain on stderr.
    image.info.pop("icc_profile", None)
    return image


def _encode(image, fmt="JPEG", mode="RGB", orientation=None, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    if fmt == "JPEG":
        options = {"quality": 90, **options}
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


def _window(rng, image_w, image_h, share):
    height, width = max(int(image_h * share), 1), max(int(image_w * share), 1)
    top, left = rng.integers(0, image_h - height + 1), rng.integers(0, image_w - width + 1)
    return [top, left, height, width]


def _plain(encoded):
    return np.array([is_plain(open_image(data), data) for data in encoded])


def _psnr(a, b):
    error = (a.double() - b.double()).square().mean().item()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def chelsea():
    return _photograph("chelsea.png")


@pytest.fixture(scope="module")
def pillow():
    decoder = PillowDecoder((64, 48), threads=2)
    yield decoder
    decoder.close()


@pytest.fixture(scope="module")
def dali():
    decoder = DaliDecoder((64, 48), threads=2, max_batch=32)
    yield decoder
    decoder.close()


@needs_dali
@pytest.mark.parametrize("share", [0.09, 0.3, 0.8, 1.0])  # the first enlarges, the others reduce
def test_decoders_agree_on_photographs_and_every_variety(chelsea, pillow, dali, share):
    files = {name: _encode(_photograph(name), quality=95) for name in PHOTOGRAPHS}
    files |= {name: _encode(chelsea, **options) for name, options in {**JPEG, **OTHER}.items()}
    encoded = list(files.values())
    plain = _plain(encoded)
    dropped = {"CMYK", "RGB stored", "PNG alpha", "PNG palette", "WebP", "BMP", "TIFF"}
    assert {name for name, ok in zip(files, plain, strict=True) if not ok} == dropped
    rng = np.random.default_rng(int(share * 100))
    for _ in range(2):
        sizes = [open_image(data).size for data in encoded]
        windows = np.array([_window(rng, *size, share) for size in sizes], dtype=np.int32)
        a, b = pillow.decode(encoded, windows, plain), dali.decode(encoded, windows, plain)
        assert a.dtype == b.dtype == torch.uint8
        assert a.shape == b.shape == (len(encoded), 64, 48, 3)
        psnr = {name: _psnr(a[row], b[row]) for row, name in enumerate(files)}
        # one libjpeg, one resize: the same bytes, the file cut or whole
        differ = {name: db for name, db in psnr.items() if db < float("inf")}
        assert not differ, sorted(differ.items(), key=lambda item: item[1])


@pytest.mark.parametrize("decoder_name", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_pixels_do_not_depend_on_the_batch_or_its_size(chelsea, request, decoder_name):
    decoder = request.getfixturevalue(decoder_name)
    encoded = [_encode(chelsea, quality=q, mode=m) for q in (50, 90) for m in ("RGB", "CMYK", "L")]
    windows = np.array([[i, 2 * i, 150 + 20 * i, 100 + 30 * i] for i in range(6)], dtype=np.int32)
    plain = _plain(encoded)
    together = decoder.decode(encoded, windows, plain)
    kept = together.clone()
    for rows in ([5, 0, 3], [2], [4, 1]):
        part = decoder.decode([encoded[r] for r in rows], windows[rows], plain[rows])
        assert torch.equal(part, together[rows])
    # A batch that was handed out is not overwritten by later ones.
    assert torch.equal(together, kept)


def test_pillow_crops_first_and_resizes_then(chelsea, pillow):
    # `resize(box=...)` would look at pixels around the window: here they are white, inside black.
    image = Image.new("RGB", (200, 200), "white")
    image.paste("black", (50, 50, 150, 150))
    window = np.array([[50, 50, 100, 100]], dtype=np.int32)
    out = pillow.decode([_encode(image, "PNG")], window)
    assert out.max() == 0
    window = np.array([[30, 40, 200, 300]], dtype=np.int32)
    out = pillow.decode([_encode(chelsea, "PNG")], window)
    cropped = chelsea.crop((40, 30, 340, 230)).resize((48, 64), Image.Resampling.BILINEAR)
    # torch's arithmetic, Pillow's to within one level
    assert np.abs(out[0].numpy().astype(int) - np.asarray(cropped)).max() <= 1


def _png(width, height, depth, colour, rows):
    def chunk(name, data):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def _save(array_or_image, fmt, **options):
    image = (
        array_or_image
        if isinstance(array_or_image, Image.Image)
        else Image.fromarray(array_or_image)
    )
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def _conversions():
    """name -> (file, the RGB pixels that it must give); all 8 x 4, taken whole."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (8, 4, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (8, 4, 1), dtype=np.uint8)
    grey = rgb[..., 0]
    wide = rng.integers(0, 65536, (8, 4), dtype=np.uint16)
    wide_rgb = rng.integers(0, 65536, (8, 4, 3), dtype=np.uint16)
    high = np.repeat((wide >> 8).astype(np.uint8)[..., None], 3, axis=2)
    grey_rgb = np.repeat(grey[..., None], 3, axis=2)
    palette = Image.fromarray((np.arange(32) % 3).astype(np.uint8).reshape(8, 4), "L")
    palette = Image.frombytes("P", (4, 8), palette.tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    looked_up = (np.eye(3, dtype=np.uint8) * 255)[(np.arange(32) % 3).reshape(8, 4)]
    cmyk = np.concatenate([rgb, alpha], axis=2)
    keyed = tuple(int(v) for v in rgb[0, 0])
    rgba = np.concatenate([rgb, alpha], axis=2)
    other = Image.fromarray(255 - rgb)
    arithmetic = np.asarray(Image.frombytes("CMYK", (4, 8), cmyk.tobytes()).convert("RGB"))
    # R = (255 - C) * (255 - K) / 255, up to rounding.
    exact = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    assert np.abs(arithmetic - exact).max() <= 1
    return {
        "rgb": (_save(rgb, "PNG"), rgb),
        "grey": (_save(grey, "PNG"), grey_rgb),
        "alpha dropped": (_save(rgba, "PNG"), rgb),
        "grey + alpha": (_save(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"), grey_rgb),
        "colour key ignored": (_save(rgb, "PNG", transparency=keyed), rgb),
        "palette": (_save(palette, "PNG"), looked_up),
        "palette + transparency": (_save(palette, "PNG", transparency=b"\0\x80\xff"), looked_up),
        "16-bit grey PNG": (_save(wide, "PNG"), high),
        "16-bit grey TIFF": (_save(wide, "TIFF"), high),
        "16-bit big-endian TIFF": (
            _save(Image.frombytes("I;16B", (4, 8), wide.astype(">u2").tobytes()), "TIFF"),
            high,
        ),
        "16-bit PGM": (_save(wide, "PPM"), high),
        "16-bit RGB PNG": (
            _png(4, 8, 16, 2, [row.astype(">u2").tobytes() for row in wide_rgb]),
            (wide_rgb >> 8).astype(np.uint8),
        ),
        "1 bit": (
            _save(Image.fromarray(grey > 127), "PNG"),
            np.repeat((grey > 127)[..., None], 3, axis=2).astype(np.uint8) * 255,
        ),
        "CMYK TIFF": (
            _save(Image.frombytes("CMYK", (4, 8), cmyk.tobytes()), "TIFF"),
            arithmetic,
        ),
        "first frame": (
            _save(Image.fromarray(rgb), "TIFF", save_all=True, append_images=[other]),
            rgb,
        ),
    }


@pytest.mark.parametrize("decoder_name", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_conversion_rule(decoder_name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cases = _conversions()
    decoder = PillowDecoder((8, 4), 1) if decoder_name == "pillow" else DaliDecoder((8, 4), 1, 32)
    encoded = [data for data, _ in cases.values()]
    windows = np.array([[0, 0, 8, 4]] * len(encoded), dtype=np.int32)
    out = decoder.decode(encoded, windows, _plain(encoded)).numpy()
    decoder.close()
    for row, (name, (_, expected)) in enumerate(cases.items()):
        assert np.array_equal(out[row], expected), name


def test_exif_orientation_is_ignored(chelsea, pillow):
    window = np.array([[0, 0, 300, 451]] * 2, dtype=np.int32)
    upright, turned = _encode(chelsea), _encode(chelsea, orientation=6)
    out = pillow.decode([upright, turned], window)
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("decoder_name", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_failures_name_rows_and_the_decoder_lives_on(chelsea, request, decoder_name):
    decoder = request.getfixturevalue(decoder_name)
    good, alpha = _encode(chelsea), _encode(chelsea, "PNG", "RGBA")
    windows = np.array([[0, 0, 200, 200]] * 6, dtype=np.int32)
    before = decoder.decode([good] * 6, windows, np.ones(6, dtype=bool))
    bad = [good, b"<html>", good[: len(good) // 4], alpha, b"", alpha[:2000]]
    plain = np.array([True, True, True, False, True, False])
    rounds = []
    # DALI's pipeline is dead after a bad file; both kinds of bad rows may need a round each.
    while bad:
        try:
            decoder.decode(bad, windows[: len(bad)], plain[: len(bad)])
            break
        except DecodeError as error:
            rounds.append(error)
            bad = [good if row in error.failures else data for row, data in enumerate(bad)]
    named = {row: reason for error in rounds for row, reason in error.failures.items()}
    assert sorted(named) == [1, 2, 4, 5]
    assert "not an image" in named[1]
    assert "truncated" in named[2]
    assert all("row" in str(error) for error in rounds)
    assert torch.equal(decoder.decode([good] * 6, windows, np.ones(6, dtype=bool)), before)


@pytest.mark.parametrize("decoder_name", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_a_window_outside_the_image_is_the_files_fault(chelsea, request, decoder_name):
    # The file has become smaller since it was indexed.
    decoder = request.getfixturevalue(decoder_name)
    windows = np.array([[0, 0, 50, 50], [200, 0, 200, 50]], dtype=np.int32)
    with pytest.raises(DecodeError, match="451x300: has the file changed") as caught:
        decoder.decode([_encode(chelsea)] * 2, windows, np.ones(2, dtype=bool))
    assert list(caught.value.failures) == [1]


def test_an_image_has_its_time(chelsea, monkeypatch):
    """The thread that is at it is left to itself; the batch goes on without that image."""
    real, release, slow = pixels.decode_window, threading.Event(), _encode(chelsea, "PNG")

    def decode_window(encoded, window):
        if encoded == slow:
            release.wait(60)
        return real(encoded, window)

    monkeypatch.setattr(pillow_decoder, "decode_window", decode_window)
    decoder = PillowDecoder((32, 32), 2, limit=0.2)
    good, windows = _encode(chelsea), np.array([[0, 0, 99, 99]] * 5, dtype=np.int32)
    try:
        with pytest.raises(DecodeError, match=r"longer than 0.2 s \(data.timeout\)") as caught:
            decoder.decode([good, good, slow, good, good], windows)
        assert list(caught.value.failures) == [2]
        assert len(decoder.decode([good] * 5, windows)) == 5
    finally:
        release.set()
        decoder.close()


@needs_dali
def test_batches_that_only_dali_refuses(chelsea, monkeypatch, caplog):
    decoder, pillow = DaliDecoder((32, 32), 1, max_batch=4), PillowDecoder((32, 32), 1)

    class Refusing:
        def run(self, **_):
            raise RuntimeError(
                "Critical error in pipeline:\n\nno luck\nCurrent pipeline object ..."
            )

    good, windows = [_encode(chelsea)] * 2, np.array([[0, 0, 99, 99]] * 2, dtype=np.int32)
    plain = np.ones(2, dtype=bool)
    real = decoder._build
    monkeypatch.setattr(decoder, "_build", lambda _: Refusing())
    decoder._pipeline = None
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            images = decoder.decode(good, windows, plain)
            assert torch.equal(images, pillow.decode(good, windows))
    assert [record.getMessage() for record in caplog.records] == [
        "DALI failed, this batch was decoded by Pillow: no luck"
    ] * 2
    # In between it works again: the count starts anew.
    monkeypatch.setattr(decoder, "_build", real)
    decoder.decode(good, windows, plain)
    monkeypatch.setattr(decoder, "_build", lambda _: Refusing())
    decoder._pipeline = None
    decoder.decode(good, windows, plain)
    decoder.decode(good, windows, plain)
    with pytest.raises(RuntimeError, match=r"3 batches in a row.*data.decoder=pillow.*no luck"):
        decoder.decode(good, windows, plain)
    decoder.close()
    pillow.close()


@needs_dali
def test_a_batch_over_the_maximum_is_refused(chelsea, dali):
    with pytest.raises(ValueError, match=r"max_batch \(32\).*33"):
        dali.decode([b""] * 33, np.zeros((33, 4), dtype=np.int32), np.ones(33, dtype=bool))


def test_make_decoder(monkeypatch):
    decoder, reason = make_decoder(DataConfig(decoder="pillow", crop=32), "cpu", max_batch=4)
    assert isinstance(decoder, PillowDecoder)
    assert reason.endswith("as asked")
    assert decoder.crop_size == (32, 32)
    decoder.close()
    if HAS_DALI:
        for choice, words in (("auto", "default"), ("dali", "as asked")):
            decoder, reason = make_decoder(DataConfig(decoder=choice), "cpu", max_batch=4)
            assert isinstance(decoder, DaliDecoder)
            assert words in reason
            decoder.close()
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    decoder, reason = make_decoder(DataConfig(), "cpu", max_batch=4)
    assert isinstance(decoder, PillowDecoder)
    assert "DALI cannot be imported" in reason
    decoder.close()
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        make_decoder(DataConfig(decoder="dali"), "cpu", max_batch=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_dali
def test_gpu_decoder_agrees_with_pillow(chelsea, pillow):
    decoder = DaliDecoder((64, 48), 4, max_batch=32, device="cuda")
    files = {name: _encode(chelsea, **options) for name, options in {**JPEG, **OTHER}.items()}
    encoded = list(files.values())
    windows = np.array([[10, 20, 240, 300]] * len(encoded), dtype=np.int32)
    images = decoder.decode(encoded, windows, _plain(encoded))
    assert images.device.type == "cuda"
    expected = pillow.decode(encoded, windows)
    psnr = {name: _psnr(images[row].cpu(), expected[row]) for row, name in enumerate(files)}
    assert min(psnr.values()) >= 45, sorted(psnr.items(), key=lambda item: item[1])[:3]
    with pytest.raises(DecodeError):
        decoder.decode([b"x"], windows[:1], np.ones(1, dtype=bool))
    assert torch.equal(decoder.decode(encoded, windows, _plain(encoded)), images)
    decoder.close()
