"""Texts as the metrics take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["as_texts"]


def as_texts(texts: Any, name: str = "texts") -> list[str]:
    """A list of strings; of one for a single string.

    Raises:
        ValueError: anything else; the message has its index.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | bytearray | dict | set | frozenset):
        raise ValueError(f"{name} must be a string or a list of strings, got {texts!r:.80}")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string or a list of strings, but {name}[{index}] is {text!r:.80}")
    return found
