"""Searches by the names that the engine and the command line have for them, with their own defaults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .adaptive import AdaptiveContrastiveSearch
from .contrastive_search import ContrastiveSearch
from .fsd import FSD
from .guard import GUARD
from .search import Search

SEARCHES: dict[str, Callable[[], Search]] = {
    "contrastive": ContrastiveSearch,
    "adaptive": AdaptiveContrastiveSearch,
    "fsd": FSD,
    "fsd-vec": partial(FSD, "vector"),
    "guard": GUARD,
}


def as_search(value: Any) -> Search:
    """A search, or the one of this name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Search):
        return value
    if not isinstance(value, str) or value not in SEARCHES:
        raise ValueError(f"strategy must be a search or one of {', '.join(SEARCHES)}, got {value!r:.80}")
    return SEARCHES[value]()
