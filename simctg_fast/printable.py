"""Text that others wrote, on somebody's terminal: a model, a prompt or the name of a file must not steer it."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["json_text", "printable"]

# C0 but newline and tab, DEL, C1, marks that turn the direction of writing, and lone surrogates, which have no bytes.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with control characters as ``\\x1b`` and the like, newlines and tabs as they are."""
    return _STEERING.sub(lambda found: _escape(ord(found[0])), text)


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """JSON that reads as ``value``, with such characters as ``\\u001b`` and the like, and all others as they are."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=allow_nan)
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
