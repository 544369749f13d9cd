"""Frustratingly simple decoding as the paper writes it: one text, nothing kept from one token to the next.

Source: Yang et al. 2023, "A Frustratingly Simple Decoding Method for Neural Text Generation" (arXiv 2305.12675),
sections 3.1 to 3.3; the smoothing of section 3.2 as in the authors' code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch

from .one_text import Text, lead, most_probable, until_end


def ngram_penalty(tokens: list[int], v: int, n: int, beta: float) -> float:
    """The smoothed probability of `v` after `tokens` by the n-grams of `tokens`."""
    if len(tokens) < n - 1:
        return 0.0
    penalty, remaining = 0.0, 1.0
    for size in range(n - 1, -1, -1):  # of the context
        context = tokens[len(tokens) - size :]
        followers = Counter(tokens[j] for j in range(size, len(tokens)) if tokens[j - size : j] == context)
        if followers[v] == 0:
            continue
        if size == 0:
            penalty += remaining * followers[v] / len(tokens)
        else:
            penalty += remaining * beta * followers[v] / (sum(followers.values()) + 1)
            remaining *= 1 - beta
    return penalty


def vector_penalty(states: torch.Tensor, tokens: list[int], v: int, n: int) -> float:
    """The largest cosine, within [0, 1], of the last n − 1 `states (T, D)` with those before each `v`."""
    newest = states[len(tokens) - n + 1 :].flatten()
    cosines = [
        float(torch.cosine_similarity(newest, states[j - n + 1 : j].flatten(), dim=0))
        for j in range(n - 1, len(tokens))
        if tokens[j] == v
    ]
    return min(max(cosines, default=0.0), 1.0) if max(cosines, default=0.0) > 0 else 0.0


def fsd(
    model: Any,
    ids: list[int],
    *,
    kind: str,
    n: int,
    k: int,
    alpha: float,
    beta: float = 0.9,
    stop_tokens: Collection[int] = (),
    max_new_tokens: int,
    eos_token_id: int | None = None,
    **text_options: Any,
) -> Text:
    """`max_new_tokens` tokens after `ids`, or up to the end of the text."""
    text = Text(model, list(ids), **text_options)

    def step() -> None:
        p, states = text.look()
        candidates, margin = most_probable(p, k)

        def score(v: int) -> float:
            if v in stop_tokens:
                penalty = 0.0
            elif kind == "ngram":
                penalty = ngram_penalty(text.ids, v, n, beta)
            else:
                penalty = vector_penalty(states, text.ids, v, n)
            return (1 - alpha) * float(p[v]) - alpha * penalty

        scores = [score(v) for v in candidates]
        text.write(candidates[scores.index(max(scores))], min(margin, lead(scores)))

    return until_end(text, max_new_tokens, eos_token_id, step)
