"""The frame of a chart: axes with round numbers, in SVG whose colours are the page's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..heat_map import ticks
from .markup import number

__all__ = ["Chart"]

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40


@dataclass(frozen=True)
class Chart:
    """A field of values on ``width`` × ``height`` units, below ``top``."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 440
    height: float = 270
    top: float = TOP

    @classmethod
    def around(cls, xs: Iterable[float], ys: Iterable[float], **options: float) -> Chart:
        """With some room around the values."""
        return cls(_padded(list(xs)), _padded(list(ys)), **options)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(self.height - BOTTOM - (value - low) / (high - low) * (self.height - self.top - BOTTOM), 1)

    def frame(self, x_label: str, y_label: str, *, whole_x: bool = False) -> str:
        """Grid lines, numbers and names of both axes; ``whole_x``: whole numbers only."""
        parts, floor, edge = [], self.height - BOTTOM, self.width - RIGHT
        y_ticks, x_ticks = ticks(*self.y_range), ticks(*self.x_range)
        for tick in y_ticks:
            at = self.y(tick)
            parts.append(f'<path class="grid" d="M{LEFT} {at}H{edge}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{at}" dy=".35em" text-anchor="end">{_tick(tick, y_ticks)}</text>')
        parts.append(f'<path class="axis" d="M{LEFT} {floor}H{edge}"/>')
        for tick in x_ticks:
            if whole_x and tick != int(tick):
                continue
            at = self.x(tick)
            parts.append(f'<path class="axis" d="M{at} {floor}v4"/>')
            parts.append(f'<text x="{at}" y="{floor + 17}" text-anchor="middle">{_tick(tick, x_ticks)}</text>')
        parts.append(f'<text class="name" x="{edge}" y="{floor + 33}" text-anchor="end">{x_label}</text>')
        turned = f'transform="translate(11 {self.top}) rotate(-90)" text-anchor="end"'
        parts.append(f'<text class="name" {turned}>{y_label}</text>')
        return "".join(parts)

    def drawn(self, inside: str, name: str, about: str, key: str) -> str:
        """The whole picture; ``name`` and ``about`` are its alternative text, escaped already."""
        return (
            f'<svg class="chart" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-labelledby="{key}-name" aria-describedby="{key}-about"><title id="{key}-name">{name}</title>'
            f'<desc id="{key}-about">{about}</desc>{inside}</svg>'
        )


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _digits(values: list[float]) -> int:
    """Digits behind the point that write each of a few round numbers exactly."""
    return next((n for n in range(8) if all(abs(round(v, n) - v) < 1e-9 for v in values)), 8)


def _tick(value: float, all_of_them: list[float]) -> str:
    return number(value, _digits(all_of_them))
