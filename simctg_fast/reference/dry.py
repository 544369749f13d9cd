"""DRY by its definition, quadratic, one text at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def repeated_suffix(tokens: Sequence[int]) -> list[int]:
    """For each position j, how many tokens the texts before j and the whole text have in common at their ends."""
    lengths = []
    for j in range(len(tokens)):
        n = 0
        while n < j and tokens[j - 1 - n] == tokens[len(tokens) - 1 - n]:
            n += 1
        lengths.append(n)
    return lengths


def ends_breaker(
    tokens: Sequence[int], breakers: Collection[int | bytes], pieces: Sequence[bytes] | None = None
) -> bool:
    """Whether the last token is a breaker, or completes one in the text that the tokens' ``pieces`` make."""
    if tokens[-1] in breakers:
        return True
    texts = [breaker for breaker in breakers if isinstance(breaker, bytes)]
    if not texts:
        return False
    assert pieces is not None
    before, last = b"".join(pieces[token] for token in tokens[:-1]), pieces[tokens[-1]]
    # Where it ends within the last piece it has at least one byte there.
    return any(text in before[max(0, len(before) - len(text) + 1) :] + last for text in texts)


def dry_penalties(
    tokens: Sequence[int],
    multiplier: float = 0.8,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: Collection[int | bytes] = (),
    penalty_range: int = -1,
    pieces: Sequence[bytes] | None = None,
) -> dict[int, float]:
    """What each token that is penalised loses of its logit behind ``tokens``, which are without padding.

    m · b^min(n − a, ⌊ln(1e30 / m) / ln b⌋) for a token v with n ≥ a, where n is the longest repetition, behind the last
    breaker, that v would go on with.
    """
    if multiplier == 0:
        return {}
    if penalty_range > 0:
        tokens = tokens[-penalty_range:]
    behind = 0  # tokens behind the last breaker
    while behind < len(tokens) and not ends_breaker(tokens[: len(tokens) - behind], breakers, pieces):
        behind += 1
    longest: dict[int, int] = {}
    for token, n in zip(tokens, repeated_suffix(tokens), strict=True):
        longest[token] = max(longest.get(token, 0), min(n, behind))
    most = math.inf if base == 1 else math.floor(math.log(1e30 / multiplier) / math.log(base))
    return {
        token: multiplier * base ** min(n - allowed_length, most)
        for token, n in longest.items()
        if n >= allowed_length and not ends_breaker([*tokens, token], breakers, pieces)
    }
