"""Texts, numbers and data of others as HTML. Whatever the page shows has been through here."""

from __future__ import annotations

import json
import math
import re
from html import escape
from typing import Any

from ...checks import is_number
from ...printable import printable

__all__ = ["MISSING", "data", "escaped", "interval", "isolated", "listed", "number", "shown", "visible"]

MISSING = "–"
_NO_HTML = re.compile("[\ufdd0-\ufdef\ufffe\uffff]")  # no characters: validators refuse them


def escaped(text: Any) -> str:
    """``text`` for HTML, inside and outside of attributes; control characters are written out (`printable`)."""
    return escape(_plain(str(text)))


def _plain(text: str) -> str:
    return _NO_HTML.sub("\ufffd", printable(text))


def isolated(text: Any) -> str:
    """A name whose direction of writing does not reach beyond it."""
    return f"<bdi>{escaped(text)}</bdi>"


def visible(text: str) -> str:
    """A token's text, not escaped yet, with signs for white space."""
    return _plain(text.replace("\n", "⏎").replace("\t", "⇥"))


def shown(value: Any) -> bool:
    """Whether there is a finite number to show."""
    return is_number(value) and math.isfinite(value)


def number(value: Any, digits: int) -> str:
    """``value`` with so many digits behind the point, ``–`` where there is none."""
    if not shown(value):
        return MISSING
    text = f"{value:.{digits}f}"
    if not text.strip("-0."):
        text = text.lstrip("-")
    whole, point, rest = text.partition(".")
    if len(whole.lstrip("-")) > 4:
        whole = f"{int(whole):,}".replace(",", "\u202f")
    return (whole + point + rest).replace("-", "−")


def interval(low: Any, high: Any, digits: int) -> str:
    """``91.0–93.6``; empty where there is none."""
    if not shown(low) or not shown(high):
        return ""
    between = " to " if low < 0 or high < 0 else "–"
    return f"{number(low, digits)}{between}{number(high, digits)}"


def listed(names: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def data(value: Any) -> str:
    """JSON for a ``<script>``: ASCII without ``<``, ``>`` and ``&``, so nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
