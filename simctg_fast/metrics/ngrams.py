"""How often runs of tokens come again: rep-n, diversity and distinct-n. Nothing here needs a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from ..checks import check_choice, is_integer, require
from .published import published_diversity, published_repetition

__all__ = ["corpus_distinct_n", "distinct_n", "diversity", "repetition", "token_list"]


def repetition(tokens: Sequence[Hashable], n: int, *, paper_compatible: bool = False) -> float:
    """rep-n: the share of n-grams seen before, ``1 - distinct / all``, in [0, 1); 0.0 for fewer than ``n`` tokens.

    Args:
        tokens: ids or words in order: a list, a string (of characters), an array or tensor of one dimension. With
            ``paper_compatible`` texts: a list of strings, or one.
        n: at least 1.
        paper_compatible: what the published script prints, **in percent**, rounded to two decimals: words between
            white space, the last n-gram of every text left out, both counts summed over the texts. 0.0 where no text
            has more than ``n`` words (the script divides by zero).

    Raises:
        TypeError: tokens that have no order and length, or that cannot be counted. ValueError: another ``n``; with
            ``paper_compatible`` anything but texts.

    Source: Welleck et al. 2020; Su et al. 2022, section 4.2 (there in percent). The script: ``simctg/evaluation.py``
    of yxuansu/SimCTG, which Su and Collier 2023 and Li et al. 2023 use too.
    """
    require(is_integer(n, 1), "n", n, "an integer of at least 1")
    if paper_compatible:
        return published_repetition(tokens, n)
    grams, total = _grams(token_list(tokens), n)
    return 1.0 - len(grams) / total if total else 0.0


def diversity(tokens: Sequence[Hashable], *, paper_compatible: bool = False) -> float:
    """The product over n = 2, 3, 4 of ``1 - rep-n``, in (0, 1]: 1.0 when nothing repeats, near 0 in a loop.

    Args:
        tokens: as `repetition`'s.
        paper_compatible: what the published script prints, **in percent**, rounded to two decimals: the product of the
            three rates of ``repetition(texts, n, paper_compatible=True)``, each of them rounded before.

    Raises:
        TypeError, ValueError: as `repetition`.

    Source: Su et al. 2022, section 4.2.
    """
    if paper_compatible:
        return published_diversity(tokens)
    tokens, product = token_list(tokens), 1.0
    for n in (2, 3, 4):
        product *= 1.0 - repetition(tokens, n)
    return product


def repeated_tokens(tokens: Sequence[Hashable], n: int) -> list[bool]:
    """For each token, whether it lies in an n-gram that the text has had before: what `repetition` counts, to be shown.

    Arguments and errors as `repetition`.
    """
    require(is_integer(n, 1), "n", n, "an integer of at least 1")
    tokens = token_list(tokens)
    seen: set[tuple[Hashable, ...]] = set()
    marks = [False] * len(tokens)
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        if gram in seen:
            marks[start : start + n] = [True] * n
        seen.add(gram)
    return marks


def distinct_n(tokens: Sequence[Hashable], n: int, *, per: str = "tokens") -> float:
    """distinct-n of one text: different n-grams over all *tokens*, in [0, 1]; 0.0 for fewer than ``n`` tokens.

    Args:
        tokens: as `repetition`'s.
        n: at least 1.
        per: ``"tokens"``, as published; ``"ngrams"`` divides by the n-grams, as many scripts do: 1 - rep-n then,
            where there is an n-gram.

    Raises:
        TypeError: as `repetition`. ValueError: another ``n`` or ``per``.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    return corpus_distinct_n([tokens], n, per=per)


def corpus_distinct_n(texts: Iterable[Sequence[Hashable]], n: int, *, per: str = "tokens") -> float:
    """distinct-n of texts together: n-grams that differ anywhere in the corpus over its tokens; none spans two texts.

    It falls as a corpus grows: compare corpora of one size. 0.0 where no text has ``n`` tokens, or there is no text.

    Args:
        texts: each of them tokens as `repetition`'s, not a string that is still to be split.
        n, per: as `distinct_n`'s.

    Raises:
        TypeError, ValueError: as `distinct_n`.

    Source: Li et al. 2016, who count over all responses.
    """
    require(is_integer(n, 1), "n", n, "an integer of at least 1")
    check_choice("per", per, ("tokens", "ngrams"))
    if isinstance(texts, str):
        raise TypeError(f"texts must be a list of token lists, got the string {texts!r:.80}")
    distinct: set[tuple[Hashable, ...]] = set()
    count = 0
    for text in texts:
        tokens = token_list(text)
        grams, total = _grams(tokens, n)
        distinct |= grams
        count += len(tokens) if per == "tokens" else total
    return len(distinct) / count if count else 0.0


def _grams(tokens: Sequence[Hashable], n: int) -> tuple[set[tuple[Hashable, ...]], int]:
    """The different n-grams, and how many there are in all."""
    total = max(0, len(tokens) - n + 1)
    return {tuple(tokens[i : i + n]) for i in range(total)}, total


def token_list(tokens: Sequence[Hashable], name: str = "tokens") -> Sequence[Hashable]:
    """Arrays and tensors as lists: their elements are new objects at every look, which equal nothing.

    Raises:
        TypeError: no sequence of one dimension, or elements that cannot be counted.
    """
    if hasattr(tokens, "tolist"):
        if getattr(tokens, "ndim", 1) != 1 or getattr(tokens, "is_meta", False):
            raise TypeError(f"{name} must have one dimension and values, got {tokens!r:.80}")
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence):
        raise TypeError(f"{name} must be a sequence of token ids or words, got {type(tokens).__name__}")
    wrong = next((token for token in tokens if not isinstance(token, Hashable)), None)
    if wrong is not None:
        raise TypeError(f"{name} must be one sequence of token ids or words, but holds {wrong!r:.80}")
    return tokens
