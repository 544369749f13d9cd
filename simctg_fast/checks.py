"""What several arguments have to be. NaN, infinity and bool are no numbers here."""

from __future__ import annotations

import os
import sys
from numbers import Integral, Real
from pathlib import Path
from typing import Any

__all__ = [
    "check_choice",
    "check_devices",
    "check_margin",
    "check_positive",
    "check_real",
    "check_weight",
    "is_integer",
    "is_number",
    "require",
    "user_path",
]

_LARGEST = sys.float_info.max


def is_integer(value: Any, low: float = -_LARGEST, high: float = _LARGEST) -> bool:
    """Whether it is an integer of Python or numpy from ``low`` to ``high``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_number(value: Any, low: float = -_LARGEST, high: float = _LARGEST, *, above: bool = False) -> bool:
    """Whether it is a real number of Python or numpy from ``low``, or with ``above`` from beyond it, to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return bool(low <= value <= high) and not (above and value == low)  # type: ignore[operator]


def require(valid: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ValueError where an argument is not what it has to be, with its name, the value, and what is allowed."""
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r:.80}")


def check_margin(value: Any) -> None:
    if not is_number(value, -1, 1):
        what = "must lie in" if is_number(value) else "must be a number of Python or numpy in"
        raise ValueError(f"margin is {value!r:.80}, {what} [-1, 1]")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r:.80}, must be one of {', '.join(map(repr, allowed))}")


def check_devices(owner: str, value: Any, **others: Any) -> None:
    """Raises a ValueError unless every other tensor, or None, is on the device of `value`, the argument `owner`."""
    for name, other in others.items():
        if other is not None and other.device != value.device:
            raise ValueError(f"{name} is on {other.device}, {owner} on {value.device}; one device is needed")


def check_positive(name: str, value: Any) -> float:
    """A temperature or a scale as a float: a number from 1e-30 to 1e30, beyond which floats overflow.

    Raises:
        TypeError: no real number: a bool, a string, a tensor (which would lose its gradient).
        ValueError: outside.
    """
    check_real(name, value, "a positive number from 1e-30 to 1e30")
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name} is {value}, must be positive, from 1e-30 to 1e30")
    return float(value)


def check_weight(name: str, value: Any) -> float:
    """A logit that is added, as a float: at most 1e30; -inf is allowed.

    Raises:
        TypeError: no real number.
        ValueError: NaN, or above 1e30.
    """
    check_real(name, value, "a number up to 1e30 or -inf")
    if not value <= 1e30:
        raise ValueError(f"{name} is {value}, must be a number up to 1e30 or -inf")
    return float(value)


def check_real(name: str, value: Any, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r:.80}, must be {allowed}")


def user_path(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and ``~name`` expanded, also where no shell has seen them (``--out=~/run``).

    Raises:
        ValueError: there is no such user.
    """
    name = os.fspath(path)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{name!r} begins with ~, but {error}; write ./~… for a folder of that name") from error
