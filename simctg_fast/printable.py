"""Text that others wrote, on somebody's terminal: a model, a prompt or the name of a file must not steer it."""

from __future__ import annotations

import re

__all__ = ["printable"]

# C0 but newline and tab, DEL, C1, marks that turn the direction of writing, and lone surrogates, which have no bytes.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with control characters as ``\\x1b`` and the like, newlines and tabs as they are."""
    return _STEERING.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
