"""Adaptive contrastive search as the paper writes it: one text, everything anew for every token.

Source: Garces Arias et al. 2024, "Adaptive Contrastive Search: Uncertainty-Guided Decoding for Open-Ended Text
Generation" (arXiv 2407.18698), with the settings of its section 3 and medians of this text alone.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch

from .one_text import Text, lead, most_probable, until_end


def _entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def _share(now: float, earlier: list[float], most: float, q: float) -> float:
    delta = (now - statistics.median(earlier)) / most if earlier else 0.0
    delta = min(max(delta, -1 + 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-q * math.atanh(delta)))


def _to_boundary(x: float) -> float:
    """How far a number is from where it would be rounded to another integer."""
    return abs(x - math.floor(x) - 0.5)


def adaptive_contrastive_search(
    model: Any,
    ids: list[int],
    *,
    q: float = 1.0,
    k_range: tuple[int, int] = (5, 15),
    top_k: int | None = None,
    max_new_tokens: int,
    eos_token_id: int | None = None,
    **text_options: Any,
) -> Text:
    """`max_new_tokens` tokens after `ids`, or up to the end of the text; `top_k`: k stays, only alpha moves. A choice
    within 1e-4 of another rounding of k or alpha has that as its margin, over 100."""
    text = Text(model, list(ids), **text_options)
    entropies: list[float] = []
    of_candidates: list[float] = []

    def step() -> None:
        p, _ = text.look()
        entropies.append(_entropy(p.tolist()))
        low, high = k_range if top_k is None else (top_k, top_k)
        exact_k = low + (high - low) * _share(entropies[-1], entropies[:-1], math.log(len(p)), q)
        k = round(exact_k)
        candidates, margin = most_probable(p, k)
        first = [float(p[v]) for v in candidates]
        of_candidates.append(_entropy([x / sum(first) for x in first]))
        exact_alpha = _share(of_candidates[-1], of_candidates[:-1], math.log(k), q)
        alpha = round(exact_alpha, 2)
        scores = []
        for v, states in zip(candidates, text.ahead(candidates), strict=True):
            cosines = torch.cosine_similarity(states[:-1], states[-1:], dim=-1)
            scores.append((1 - alpha) * float(p[v]) - alpha * float(cosines.max()))
        rounded = min(_to_boundary(exact_k) if low < high else 1.0, _to_boundary(100 * exact_alpha) / 100)
        if len(entropies) == 1:  # the middle of both ranges, exactly
            rounded = 1.0
        margin = min(margin, lead(scores), rounded / 100 if rounded < 1e-4 else 1.0)
        text.write(candidates[scores.index(max(scores))], margin)

    return until_end(text, max_new_tokens, eos_token_id, step)
