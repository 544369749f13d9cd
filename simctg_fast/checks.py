"""What several arguments have to be. NaN, infinity and bool are no numbers here."""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import Any

__all__ = ["check_choice", "check_margin", "is_integer", "is_number"]

_LARGEST = sys.float_info.max


def is_integer(value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> bool:
    """Whether it is an integer of Python or numpy from ``low`` to ``high``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_number(value: Any, low: float = -_LARGEST, high: float = _LARGEST, *, above: bool = False) -> bool:
    """Whether it is a real number of Python or numpy from ``low``, or with ``above`` from beyond it, to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(low <= value <= high) and not (above and value == low)  # type: ignore[operator]


def check_margin(value: Any) -> None:
    if not is_number(value, -1, 1):
        raise ValueError(f"margin is {value!r:.80}, must lie in [-1, 1]")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r:.80}, must be one of {', '.join(map(repr, allowed))}")
