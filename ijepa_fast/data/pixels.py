"""From an encoded file to RGB pixels with Pillow: the one conversion rule that both decoders share.

- The first frame of a file; EXIF orientation is ignored, as the published loader does.
- Grey and 1-bit pixels are repeated into three channels, palettes are looked up.
- Alpha and palette transparency are dropped (no background is mixed in).
- 16-bit samples keep their high byte, ``v >> 8``; this is also what Pillow itself does where it
  reads 16-bit RGB as 8-bit.
- CMYK by Pillow's arithmetic conversion; ICC profiles and PNG gamma are ignored.
- Floating-point pixels have no agreed range and are refused.
"""

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "EXTENSIONS",
    "LEAST_SCAN",
    "MOST_SCANNED",
    "check_mode",
    "check_pixels",
    "check_scans",
    "decode_window",
    "describe",
    "is_complete",
    "is_plain",
    "open_image",
    "to_rgb",
]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""File names taken for images, any case. The format itself is read from the header."""

_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
_CONVERTIBLE = frozenset(
    ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
)
_INTEGER = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N"))
# A PNG starts with 8 bytes signature, then IHDR: 4 length, 4 name, 4 width, 4 height, 1 depth.
_PNG_DEPTH_AT = 24
MOST_SCANNED = 1 << 31
"""Pixels times scans of a JPEG: each scan passes over all of its pixels. A progressive file has
about ten, so the largest images have half of it; it takes a core seconds."""
LEAST_SCAN = 10
"""Bytes of a scan's header."""
# the end, or a scan of 1 to 4 components
_SCAN = re.compile(rb"\xff(?:\xd9|\xda..([\x01-\x04]))", re.DOTALL)
_MOST_SCANS = 1000
_RGB_COMPONENTS = (ord("R"), ord("G"), ord("B"))


def open_image(file: Any) -> "Image.Image":
    """Opens an image lazily, bytes or a file: only its header is read.

    Raises:
        Exception: anything that Pillow raises on a file that it cannot read.
    """
    from PIL import Image

    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS)


def check_mode(image: "Image.Image") -> None:
    """Raises ValueError if the pixels have no stated conversion to RGB."""
    if image.mode not in _CONVERTIBLE and image.mode not in _INTEGER:
        raise ValueError(
            f"pixels must have a stated conversion to RGB, got Pillow mode {image.mode!r}"
        )


def check_pixels(width: int, height: int) -> None:
    """Raises ValueError for more pixels than Pillow's limit (it only warns, up to twice of it)."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"an image must have at most {limit} pixels, got {width}x{height}")


def check_scans(encoded: bytes, width: int, height: int) -> None:
    """Raises ValueError for a JPEG of so many scans that its decoding would not end in seconds."""
    if width * height * (len(encoded) // LEAST_SCAN) <= MOST_SCANNED:
        return
    values = np.frombuffer(encoded, np.uint8)
    marked = np.flatnonzero(values[:-1] == 0xFF)
    scans = int(np.count_nonzero(values[marked + 1] == 0xDA))
    if scans * width * height > MOST_SCANNED:
        raise ValueError(
            f"pixels times scans of a JPEG must be at most {MOST_SCANNED}, got {width}x{height} "
            f"pixels in {scans} scans"
        )


def is_complete(encoded: bytes) -> bool:
    """Whether the scans of a progressive JPEG hold every bit of the coefficients: where some are
    missing, each decoder smooths in its own way.
    """
    missing: dict[tuple[int, int], int] = {}
    # from the frame's header on, which is behind any thumbnail, to the end marker
    scans = _SCAN.finditer(encoded, max(encoded.find(b"\xff\xc2"), 0))
    for scan in itertools.islice(scans, _MOST_SCANS):
        ids = 2 * scan[1][0] if scan[1] else 0
        header = encoded[scan.end() : scan.end() + ids + 3]
        if not ids or len(header) < ids + 3:
            break
        first, last, bits = header[ids:]
        missing |= {(c, k): bits & 15 for c in header[:ids:2] for k in range(first, last + 1)}
    return len(missing) % 64 == 0 and not any(missing.values())


def is_plain(image: "Image.Image", header: bytes) -> bool:
    """Whether every decoder reads these pixels alike, so that DALI may.

    Plain are 8-bit grey or YCbCr JPEG and 8-bit grey or RGB PNG without transparency or animation.
    JPEG that stores RGB is not: GPU decoders take its channels for YCbCr.

    Args:
        image: opened, not loaded.
        header: at least the first 25 bytes of the file.
    """
    if image.mode not in ("L", "RGB"):
        return False
    if image.format in ("JPEG", "MPO"):
        components = tuple(layer[0] for layer in getattr(image, "layer", ()))
        return image.info.get("adobe_transform") != 0 and components != _RGB_COMPONENTS
    if image.format == "PNG":
        depth = header[_PNG_DEPTH_AT] if len(header) > _PNG_DEPTH_AT else 0
        # of an animation Pillow takes the first frame, DALI the picture behind it
        still = not getattr(image, "is_animated", False)
        return depth == 8 and still and "transparency" not in image.info
    return False


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Converts to mode RGB by the rule above.

    Raises:
        ValueError: the mode has no stated conversion.
    """
    from PIL import Image

    if image.mode == "RGB":
        return image
    check_mode(image)
    if image.mode in _INTEGER:
        # Mode I holds 16-bit values in 32 bits (PGM, for one).
        high = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(high.astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)
    return image.convert("RGB")


def decode_window(encoded: bytes, window: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Decodes, cuts the window out and converts to RGB.

    The whole file is decoded whatever the window, so that its validity does not depend on the crop.

    Args:
        encoded: the file.
        window: (4,) top, left, height, width, pixels.

    Returns:
        uint8 (height, width, 3).

    Raises:
        ValueError: the window does not lie in the image.
        Exception: anything that Pillow raises on a file that it cannot read.
    """
    top, left, height, width = (int(value) for value in window)
    with open_image(encoded) as image:
        image_w, image_h = image.size
        if top < 0 or left < 0 or top + height > image_h or left + width > image_w:
            rule = f"inside the image ({image_w}x{image_h}: has the file changed?)"
            raise ValueError(f"the crop window must lie {rule}, got {top, left, height, width}")
        # Headers are compared with the table before; a file that has changed since is not trusted.
        check_pixels(image_w, image_h)
        crop = image.crop((left, top, left + width, top + height))
    return np.asarray(to_rgb(crop))


def describe(error: BaseException) -> str:
    """One line on what is wrong with a file, the same in every run (no memory addresses)."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image: no header of JPEG, PNG, BMP, WebP, TIFF or PPM"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    # Control characters and lone surrogates from a hostile header do not reach a log.
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    # most plain ones are ours, and say it all
    kind = "" if text and type(error) is ValueError else type(error).__name__
    return ": ".join(filter(None, (kind, text)))
