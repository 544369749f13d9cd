"""Tokens that come again within the last ℓ, rep/ℓ and wrep/ℓ of Welleck et al. 2020."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from ..checks import is_integer, require
from .ngrams import token_list

__all__ = ["token_repetition", "wrong_token_repetition"]


def token_repetition(
    tokens: Sequence[Hashable], window: int = 128, references: Sequence[Hashable] | None = None
) -> float:
    """rep/ℓ: the share of tokens that are among the ``window`` before them, in [0, 1]; 0.0 for no tokens.

    Args:
        tokens: ids or words of a text; or, with ``references``, what a model predicted for each of those.
        window: ℓ, at least 1.
        references: the true tokens, as many. A prediction is then looked for among the *references* before it, which
            are what the model had read: the published figure, of predictions under teacher forcing.

    Raises:
        TypeError: as `repetition`. ValueError: another ``window``, or another number of references.

    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training" (ℓ of 16, 32, 128 and
    512, averaged).
    """
    tokens = token_list(tokens)
    past = tokens if references is None else _references(tokens, references)
    return _share(tokens, past, window, None)


def wrong_token_repetition(tokens: Sequence[Hashable], references: Sequence[Hashable], window: int = 128) -> float:
    """wrep/ℓ: the share of all tokens that repeat as rep/ℓ counts it and are *not* the true token at that place.

    In [0, 1], at most ``token_repetition(tokens, window, references)``; 0.0 for no tokens.

    Args:
        tokens: what a model predicted for each of ``references``, which it had read up to there.
        references: the true tokens, as many.
        window: ℓ, at least 1.

    Raises:
        TypeError, ValueError: as `token_repetition`.

    Source: the same.
    """
    tokens = token_list(tokens)
    references = _references(tokens, references)
    return _share(tokens, references, window, references)


def _references(tokens: Sequence[Hashable], references: Sequence[Hashable]) -> Sequence[Hashable]:
    references = token_list(references, "references")
    if len(references) != len(tokens):
        raise ValueError(f"references must hold {len(tokens)} tokens, one for each of tokens, got {len(references)}")
    return references


def _share(tokens: Sequence[Hashable], past: Sequence[Hashable], window: int, true: Sequence[Hashable] | None) -> float:
    """Of ``tokens``, those among the ``window`` of ``past`` before them, and other than in ``true``."""
    require(is_integer(window, 1), "window", window, "an integer of at least 1")
    recent: Counter[Hashable] = Counter()
    found = 0
    for place, token in enumerate(tokens):
        found += recent[token] > 0 and (true is None or token != true[place])
        recent[past[place]] += 1
        if place >= window:
            recent[past[place - window]] -= 1
    return found / len(tokens) if len(tokens) else 0.0
