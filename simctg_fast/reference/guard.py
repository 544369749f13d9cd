"""GUARD as its authors write it: one text, everything anew for every token.

Source: "GUARD: Glocal Uncertainty-Aware Robust Decoding for Effective and Efficient Open-Ended Text Generation" (2025,
arXiv 2508.20757), the constants as in the authors' code.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from .one_text import Text, lead, most_probable, until_end


def schedule(entropies: list[float], most: float, window: int, decay: float) -> tuple[float, float]:
    """How many tokens may come, before it is rounded down, and the factor of those that were there, at the last of the
    steps with these `entropies`; `most`: the largest that there can be."""
    t, now = len(entropies), entropies[-1]
    weights = [decay ** (t - 1 - s) for s in range(t)]
    overall = sum(w * h for w, h in zip(weights, entropies, strict=True)) / sum(weights)
    change = min(abs(now - entropies[-2]) / (entropies[-2] + 1e-4), 1.0) if t > 1 else 0.0
    if t < window:
        local, drift = now - statistics.median_low(entropies), 0.0
    else:
        local = now - statistics.median_low(entropies[-window:])
        lately = statistics.median_low(entropies[-(window - 1) :])
        drift = lately - overall
        change += min(abs(drift) / (lately + 1e-4), 1.0)
    q = 0.9 + 0.1 * (1 + change)

    def share(unit: float) -> float:
        a, b = (q * math.atanh(min(max(x / unit, -1 + 1e-4), 1 - 1e-4)) for x in (local, drift))
        weight = abs(a) / (abs(a) + abs(b) + 1e-4)
        return 1 / (1 + math.exp(-(weight * a + (1 - weight) * b)))

    k = 5 + 10 * share(most)
    return k, share(math.log(k + 1e-4))


def guard(
    model: Any,
    ids: list[int],
    *,
    window: int = 7,
    decay: float = 0.95,
    noise: Callable[[int], list[float]] | None = None,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    **text_options: Any,
) -> Text:
    """`max_new_tokens` tokens after `ids`, or up to the end of the text. `noise`: Gumbel noise for the 15 most probable
    tokens of a step, whose number it is given; None: the largest product is taken. A choice within 1e-4 of another
    number of tokens has that as its margin, over 100."""
    text = Text(model, list(ids), **text_options)
    entropies: list[float] = []

    def step() -> None:
        p, _ = text.look()
        entropies.append(-sum(x * math.log(x + 1e-5) for x in p.tolist()))
        exact_k, alpha = schedule(entropies, math.log(len(p)), window, decay)
        candidates, margin = most_probable(p, math.floor(exact_k))
        drawn = [0.0] * len(candidates) if noise is None else noise(len(entropies) - 1)
        scores = [
            math.log(float(p[v])) + text.ids.count(v) * math.log(alpha) + g
            for v, g in zip(candidates, drawn, strict=False)
        ]
        off = min(exact_k - math.floor(exact_k), math.ceil(exact_k) - exact_k)
        if len(entropies) == 1:  # the middle of the range, exactly
            off = 1.0
        margin = min(margin, lead(scores), off / 100 if off < 1e-4 else 1.0)
        text.write(candidates[scores.index(max(scores))], margin)

    return until_end(text, max_new_tokens, eos_token_id, step)
