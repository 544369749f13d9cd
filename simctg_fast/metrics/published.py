"""The figures of ``simctg/evaluation.py`` (yxuansu/SimCTG) and of the scripts that call it, to the digit.

It differs from the formula in the papers: the loop over n-grams ends one too early, so the last n-gram of every text is
missing; counts are summed over the texts, so a long text weighs more; n-grams that two texts share do not repeat; and
each rate is rounded to two decimals of a percent before the product is taken.
"""

from __future__ import annotations

from typing import Any

from .texts import as_texts

__all__ = ["published_diversity", "published_repetition"]


def published_repetition(texts: Any, n: int) -> float:
    """In percent, two decimals; 0.0 where no text has more than ``n`` words."""
    different = total = 0
    for text in as_texts(texts):
        words = text.split()
        count = max(0, len(words) - n)
        different += len({tuple(words[start : start + n]) for start in range(count)})
        total += count
    return round((1 - different / total) * 100, 2) if total else 0.0


def published_diversity(texts: Any) -> float:
    """In percent, two decimals; 100.0 where no text has more than two words."""
    texts, product = as_texts(texts), 1.0
    for n in (2, 3, 4):
        product *= 1 - published_repetition(texts, n) / 100
    return round(product * 100, 2)
