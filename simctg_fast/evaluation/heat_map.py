"""Pictures of cosine matrices, as in the papers on contrastive search: a PNG, or an SVG that stands alone."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..checks import is_integer, require
from ..printable import printable
from .color_scale import BLANK, LEVELS, levels, png

__all__ = ["Scale", "bar", "heat_map_png", "heat_map_svg", "heat_maps_svg", "panel", "rows_of", "scale_of", "ticks"]

SIDE = 360  # of a panel, in units of the SVG
LABELLED = 40  # tokens, at most, whose texts are written at the axes
_ROOM = 1.01  # cosines computed in 16 bits go a little beyond 1
_NO_XML = re.compile("[\ufffe\uffff]")


@dataclass(frozen=True)
class Scale:
    """What the two ends of the colours stand for."""

    low: float
    high: float = 1.0

    def levels(self, values: Iterable[float]) -> bytes:
        return levels(values, self.low, self.high)


def heat_map_png(cosines: Any) -> bytes:
    """A PNG file of a cosine matrix, without axes, and the scale of its colours beside it (its low end: `scale_of`).

    Args:
        cosines: ``(T, T)`` of [-1, 1]: lists, an array or a tensor. NaN and infinity are grey.

    Raises:
        ValueError: no square matrix, an empty one, or a value beyond 1.
    """
    rows = rows_of(cosines)
    scale, zoom = scale_of([rows]), max(1, 480 // len(rows))
    pixels = _zoomed([scale.levels(row) for row in rows], zoom)
    height = len(pixels)
    gap, width = bytes([BLANK]) * max(4, height // 30), max(4, height // 24)
    colors = [bytes([round((LEVELS - 1) * (1 - y / max(1, height - 1)))]) * width for y in range(height)]
    return png([row + gap + color for row, color in zip(pixels, colors, strict=True)])


def heat_map_svg(
    cosines: Any,
    labels: Sequence[str] | None = None,
    title: str = "Cosine similarity of the hidden states",
    prompt_tokens: int | None = None,
) -> str:
    """An SVG file of a cosine matrix with axes and the scale of its colours.

    Args:
        cosines: as of `heat_map_png`.
        labels: the T tokens' texts, written at the axes where there are at most 40.
        title: above it, and its name for a screen reader.
        prompt_tokens: how many of the T are the prompt; lines are drawn behind them.

    Raises:
        ValueError: as `heat_map_png`; as many labels, or at most as many tokens of a prompt, as rows are needed.
    """
    return _document([(title, cosines, labels)], prompt_tokens)


def heat_maps_svg(maps: Sequence[tuple[str, Any, Sequence[str] | None]]) -> str:
    """Several ``(title, cosines, labels)`` side by side in one SVG file, with one scale for all: before, after.

    Raises:
        ValueError: as `heat_map_svg`; there are none.
    """
    require(len(maps) > 0, "maps", maps, "at least one (title, cosines, labels)")
    return _document(maps, None)


def rows_of(cosines: Any) -> list[list[float]]:
    """The matrix as lists of floats. Raises ValueError as `heat_map_png` says."""
    if hasattr(cosines, "tolist"):
        cosines = cosines.tolist()
    try:
        rows = [[math.nan if value is None else float(value) for value in row] for row in cosines]
    except (TypeError, ValueError):
        rows = []
    if not rows or any(len(row) != len(rows) for row in rows):
        raise ValueError(f"cosines must be a square matrix of at least one row, got {cosines!r:.80}")
    if beyond := [value for row in rows for value in row if math.isfinite(value) and abs(value) > _ROOM]:
        raise ValueError(f"cosines must lie in [-1, 1], got {beyond[0]}")
    return rows


def scale_of(matrices: Iterable[list[list[float]]]) -> Scale:
    """From the smallest value, down to a tenth, to 1."""
    smallest = min((v for rows in matrices for row in rows for v in row if math.isfinite(v)), default=0.0)
    return Scale(max(-1.0, min(0.9, math.floor(smallest * 10 + 1e-9) / 10)))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``, at about that many places."""
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / about))
    step *= min((1, 2, 5, 10), key=lambda factor: abs(span / (step * factor) - about))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def panel(rows: list[list[float]], scale: Scale, prompt_tokens: int | None = None) -> str:
    """The SVG elements of a matrix in SIDE × SIDE units from (0, 0): its picture and the end of the prompt."""
    size = len(rows)
    pixels = png(_zoomed([scale.levels(row) for row in rows], max(1, 240 // size)))
    parts = [_image(pixels, SIDE, SIDE)]
    if prompt_tokens is not None and 0 < prompt_tokens < size:
        at = _number(prompt_tokens * SIDE / size)
        path = f'd="M{at} 0V{SIDE}M0 {at}H{SIDE}" fill="none"'
        parts.append(f'<path {path} stroke="#000" stroke-width="2.4"/>')  # white on black shows on every colour
        parts.append(f'<path {path} stroke="#fff" stroke-width="1.2" stroke-dasharray="5 3"/>')
    parts.append(f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="currentColor" stroke-opacity=".35"/>')
    return "".join(parts)


def axes(size: int, labels: Sequence[str] | None) -> str:
    """The SVG elements at the left and the lower edge of a panel: tokens' texts, or numbers where they are many."""
    cell = SIDE / size
    if labels is not None and size <= LABELLED:
        font = _number(min(11.0, cell * 0.95))
        marks = []
        for i, label in enumerate(labels):
            middle, name = _number((i + 0.5) * cell), _xml(_short(label))
            marks.append(f'<text x="-5" y="{middle}" dy=".35em" text-anchor="end">{name}</text>')
            turned = f'transform="translate({middle} {SIDE + 5}) rotate(-90)"'
            marks.append(f'<text {turned} dy=".35em" text-anchor="end">{name}</text>')
        return f'<g font-size="{font}" fill="currentColor">{"".join(marks)}</g>'
    marks = []
    for tick in (int(value) for value in ticks(0, size - 1, 6) if value == int(value)) if size > 1 else ():
        middle = _number((tick + 0.5) * cell)
        marks.append(f'<path d="M0 {middle}h-4M{middle} {SIDE}v4" stroke="currentColor" stroke-opacity=".6"/>')
        marks.append(f'<text x="-7" y="{middle}" dy=".35em" text-anchor="end">{tick}</text>')
        marks.append(f'<text x="{middle}" y="{SIDE + 16}" text-anchor="middle">{tick}</text>')
    return f'<g font-size="11" fill="currentColor">{"".join(marks)}</g>'


def bar(scale: Scale, length: float, *, across: bool = False) -> str:
    """The SVG elements of the scale: upright, or lying with ``across``; its colours are 12 units wide."""
    column = [bytes([level]) for level in range(LEVELS - 1, -1, -1)]
    marks = []
    for tick in ticks(scale.low, scale.high):
        share, name = (tick - scale.low) / (scale.high - scale.low), f"{tick:.12g}".replace("-", "−")
        if across:
            at = _number(share * length)
            marks.append(f'<path d="M{at} 12v4" stroke="currentColor" stroke-opacity=".6"/>')
            marks.append(f'<text x="{at}" y="27" text-anchor="middle">{name}</text>')
        else:
            at = _number((1 - share) * length)
            marks.append(f'<path d="M12 {at}h4" stroke="currentColor" stroke-opacity=".6"/>')
            marks.append(f'<text x="20" y="{at}" dy=".35em">{name}</text>')
    picture = _image(png([b"".join(reversed(column))]), length, 12) if across else _image(png(column), 12, length)
    return f'{picture}<g font-size="11" fill="currentColor">{"".join(marks)}</g>'


def _document(maps: Sequence[tuple[str, Any, Sequence[str] | None]], prompt_tokens: int | None) -> str:
    matrices = [rows_of(cosines) for _, cosines, _ in maps]
    for (_, _, labels), rows in zip(maps, matrices, strict=True):
        if labels is not None and len(labels) != len(rows):
            raise ValueError(f"labels must be {len(rows)} texts, one a row of cosines, got {len(labels)}")
    size = len(matrices[0])
    valid = prompt_tokens is None or is_integer(prompt_tokens, 0, size)
    require(valid, "prompt_tokens", prompt_tokens, f"an integer from 0 to {size}")
    scale = scale_of(matrices)
    written = any(labels is not None and len(labels) <= LABELLED for _, _, labels in maps)
    margin = 84 if written else 34
    columns = len(maps) if len(maps) <= 3 else math.ceil(math.sqrt(len(maps)))
    width, height = SIDE + margin + 24, SIDE + margin + 44
    lines = math.ceil(len(maps) / columns)
    whole = (columns * width + 64, lines * height)
    parts = []
    for i, ((title, _, labels), rows) in enumerate(zip(maps, matrices, strict=True)):
        x, y = (i % columns) * width + margin, (i // columns) * height + 36
        head = f'<text y="-12" font-size="14" font-weight="600" fill="currentColor">{_xml(title)}</text>'
        inside = head + panel(rows, scale, prompt_tokens) + axes(len(rows), labels)
        parts.append(f'<g transform="translate({x} {y})">{inside}</g>')
    parts.append(f'<g transform="translate({columns * width + 4} 36)">{bar(scale, SIDE)}</g>')
    name = _xml("; ".join(title for title, _, _ in maps))
    about = f"Cosines from {scale.low:g} (dark) to {scale.high:g} (light) of {'×'.join([str(size)] * 2)} tokens."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole[0]}" height="{whole[1]}" '
        f'viewBox="0 0 {whole[0]} {whole[1]}" role="img" color="#1b1f24" '
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">'
        f'<title>{name}</title><desc>{about}</desc><rect width="100%" height="100%" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _zoomed(rows: Sequence[bytes], zoom: int) -> list[bytes]:
    """Every pixel ``zoom`` times as wide and high, so that no viewer has to blur it."""
    if zoom == 1:
        return list(rows)
    table = [bytes([level]) * zoom for level in range(256)]
    return [wide for row in rows for wide in [b"".join(table[level] for level in row)] * zoom]


def _image(data: bytes, width: float, height: float) -> str:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    size = f'width="{_number(width)}" height="{_number(height)}" preserveAspectRatio="none"'
    return f'<image {size} image-rendering="pixelated" href="{url}"/>'


def _short(label: str) -> str:
    """A token's text at an axis: without white space around it, which alone has signs."""
    shown = label.strip() or label.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return shown if len(shown) <= 12 else f"{shown[:11]}…"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _xml(text: str) -> str:
    return escape(_NO_XML.sub("\ufffd", printable(text)))
