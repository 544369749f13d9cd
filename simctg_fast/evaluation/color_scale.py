"""The colours of cosines, from dark blue to light yellow, and PNG files of them; nothing but the standard library."""

from __future__ import annotations

import functools
import itertools
import math
import struct
import zlib
from collections.abc import Iterable, Sequence

__all__ = ["BLANK", "LEVELS", "MISSING", "levels", "palette", "png"]

LEVELS = 254  # what a byte holds beside the two below
MISSING, BLANK = 254, 255  # a value that is not finite; the paper between the parts of a picture

# Lightness rises all the way, so the order survives every kind of colour blindness and a printer without colours.
_ANCHORS = ("#21134d", "#2b3f88", "#1f7391", "#35a67c", "#96cf57", "#fdf08c")
_MISSING, _BLANK = b"\x99\x99\x99", b"\xff\xff\xff"


@functools.cache
def palette() -> bytes:
    """256 × 3 bytes of sRGB: the ramp, its steps of one length in Oklab (Ottosson 2020), then MISSING and BLANK."""
    places = [_oklab(anchor) for anchor in _ANCHORS]
    lengths = [math.dist(a, b) for a, b in itertools.pairwise(places)]
    colors = bytearray()
    for level in range(LEVELS):
        rest, piece = sum(lengths) * level / (LEVELS - 1), 0
        while piece < len(lengths) - 1 and rest > lengths[piece]:
            rest -= lengths[piece]
            piece += 1
        share = rest / lengths[piece]
        colors += _srgb([a + (b - a) * share for a, b in zip(places[piece], places[piece + 1], strict=True)])
    return bytes(colors) + _MISSING + _BLANK


def _oklab(color: str) -> list[float]:
    linear = []
    for i in (1, 3, 5):
        value = int(color[i : i + 2], 16) / 255
        linear.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    r, g, b = linear
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    medium = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    ]


def _srgb(lab: Sequence[float]) -> bytes:
    lightness, a, b = lab
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    gamma = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    return bytes(min(255, max(0, round(255 * value))) for value in gamma)


def levels(values: Iterable[float], low: float, high: float) -> bytes:
    """Each value between ``low`` and ``high`` as one of the LEVELS, those beyond as the nearest end."""
    step = (LEVELS - 1) / (high - low)
    return bytes(
        min(LEVELS - 1, max(0, int((value - low) * step + 0.5))) if math.isfinite(value) else MISSING
        for value in values
    )


def png(rows: Sequence[bytes]) -> bytes:
    """A PNG file of rows of levels, all of one length."""
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)  # 8 bits, a palette, not interlaced
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", header), (b"PLTE", palette()), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
