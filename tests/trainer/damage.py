"""Damage to bytes, to pictures and to what describes weights, from a seed."""

import copy
import io
import itertools
import re
import struct
import zlib
from typing import Any

from PIL import Image

__all__ = ["bend", "mutate", "mutate_picture", "picture_files"]

_EXTREMES = (0, 1, 2, 127, 255, 256, 0x3FFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_ODD: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    float("nan"),
    "",
    "x" * 5000,
    [],
    {},
    [[]],
)


def mutate(data, rng):
    """One of: flipped bits, other bytes, a cut, a piece left out, repeated or zeroed."""
    damaged = bytearray(data)
    kind = int(rng.integers(7))
    begin = int(rng.integers(0, max(len(data), 1)))
    length = int(rng.integers(1, 65))
    if kind == 0:
        for _ in range(int(rng.integers(1, 5))):
            damaged[int(rng.integers(len(damaged)))] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        damaged[begin : begin + length] = rng.bytes(len(damaged[begin : begin + length]))
    elif kind == 2:
        del damaged[begin:]
    elif kind == 3:
        del damaged[begin : begin + length]
    elif kind == 4:
        damaged[begin:begin] = damaged[begin : begin + length] * int(rng.integers(1, 50))
    elif kind == 5:
        damaged[begin : begin + length] = bytes(len(damaged[begin : begin + length]))
    else:
        # numbers are what lengths and offsets are made of
        digits = [n for n, byte in enumerate(damaged) if 48 <= byte <= 57]
        for _ in range(min(3, len(digits))):
            damaged[digits[int(rng.integers(len(digits)))]] = 48 + int(rng.integers(10))
    return bytes(damaged)


def picture_files(images):
    """Extension -> files of RGB images (H, W, 3) in every kind that their format is written in."""
    kinds: dict[str, tuple[dict[str, Any], ...]] = {
        "jpg": ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}),
        "png": ({}, {"optimize": True}),
        "webp": ({}, {"lossless": True}),
        "tif": ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}),
    }
    modes = {"jpg": "L CMYK", "png": "L RGBA P I;16 1", "webp": "RGBA", "tif": "L RGBA P CMYK 1"}
    files: dict[str, list[bytes]] = {}
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        for extension, options in kinds.items():
            mode = ("RGB", *modes[extension].split())[number % (1 + len(modes[extension].split()))]
            for option in options:
                buffer = io.BytesIO()
                if mode in ("P", "1", "RGBA", "CMYK", "I;16"):
                    option = {k: v for k, v in option.items() if v != "jpeg"}  # noqa: PLW2901
                shown = (
                    image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
                )
                shown.save(
                    buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension), **option
                )
                files.setdefault(extension, []).append(buffer.getvalue())
    return files


def _parts(data):
    """A picture cut at its JPEG markers, PNG or WebP chunks, or TIFF directory entries."""
    cuts = {0, len(data)}
    if data[:2] == b"\xff\xd8":
        cuts |= {found.start() for found in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xfe]", data)}
    elif data[:2] in (b"II", b"MM"):
        order = "<" if data[:2] == b"II" else ">"
        (at,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, at)
        cuts |= {at, *range(at + 2, at + 3 + 12 * count, 12)}
    else:
        png = data[:4] == b"\x89PNG"
        at = 8 if png else 12
        while at + 8 <= len(data):
            cuts.add(at)
            length = struct.unpack_from(">I" if png else "<I", data, at + 4 * (not png))[0]
            at += 12 + length if png else 8 + length + length % 2
    ends = sorted(cut for cut in cuts if cut <= len(data))
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def mutate_picture(data, other, rng):
    """Bytes as `mutate`; or parts repeated, swapped, left out or taken from another picture, or
    numbers of their headers (sizes, counts, offsets) set to extreme ones. A PNG's checksums fit.
    """
    kind = int(rng.integers(8))
    if kind < 2:
        return mutate(data, rng)
    parts, donors = _parts(data), _parts(other)
    one, two = (int(n) for n in rng.integers(0, len(parts), 2))
    if kind == 2:
        parts[one] *= int(rng.choice([2, 3, 20, 500]))
    elif kind == 3:
        parts[one], parts[two] = parts[two], parts[one]
    elif kind == 4:
        del parts[one]
    elif kind == 5:
        parts.insert(one, donors[int(rng.integers(len(donors)))])
    else:
        for _ in range(int(rng.integers(1, 3))):
            part = bytearray(parts[one])
            size = int(rng.choice([1, 2, 4]))
            # what says how large a picture is stands at the start of a part
            at = int(rng.integers(2, 30))
            value = int(rng.choice(_EXTREMES)) & (256**size - 1)
            part[at : at + size] = value.to_bytes(size, "little" if rng.integers(2) else "big")
            parts[one] = bytes(part)
    if data[:4] == b"\x89PNG":
        for number, part in enumerate(parts):
            if len(part) >= 12 and part[:4] != b"\x89PNG":
                parts[number] = part[:-4] + struct.pack(">I", zlib.crc32(part[4:-4]))
    return b"".join(parts)


def bend(tree, rng):
    """A JSON tree with one value changed, left out, doubled or renamed, wherever it stands."""
    tree = copy.deepcopy(tree)
    places = [tree]
    for node in places:
        inner = node.values() if isinstance(node, dict) else node
        places += [value for value in inner if isinstance(value, dict | list) and value]
    node = places[int(rng.integers(len(places)))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key, other = (keys[int(n)] for n in rng.integers(0, len(keys), 2))
    kind = int(rng.integers(5))
    if kind == 0:
        del node[key]
    elif kind == 1:
        node[key] = node[other]
    elif kind == 2 and isinstance(key, str):
        node[f"{key}."[: int(rng.integers(1, len(key) + 2))]] = node.pop(key)
    elif kind == 3 and type(node[key]) is int:
        node[key] += int(rng.integers(-9, 10))
    else:
        node[key] = _ODD[int(rng.integers(len(_ODD)))]
    return tree
