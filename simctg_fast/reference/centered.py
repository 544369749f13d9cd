"""Contrastive search's penalty between states less their mean, as it is defined: a sequence at a time, nothing kept.

Before the mean is taken out all states of a model point much the same way, and cosines tell less than they could; with
μ the mean of the real positions of the history, the penalty of a candidate h is max_j cos(h − μ, h_j − μ).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["centered_penalty", "centered_scan"]

FEWEST = 3  # positions with a mean that says anything: of fewer the penalty is 0
_NOTHING = 1e-6  # relative length under which a difference is the rounding of whatever made the states


def centered_scan(candidates: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of ``candidates (k, D)`` with ``history (n, D)``, both less the mean of the history, and its
    earliest position, ``(k,)`` each; in float64. Raw states of one sequence, all of them real."""
    candidates, history = candidates.double(), history.double()
    if len(history) < FEWEST:
        return torch.zeros(len(candidates), dtype=torch.float64), torch.zeros(len(candidates), dtype=torch.int64)
    mean = history.mean(dim=0)
    best = (_direction(candidates, mean) @ _direction(history, mean).mT).max(dim=-1)
    return best.values, best.indices


def _direction(states: Tensor, mean: Tensor) -> Tensor:
    """``states (n, D)`` less ``mean (D,)``, of length 1, or 0 where nothing is left."""
    rest = states - mean
    length = rest.norm(dim=-1, keepdim=True)
    return torch.where(length > _NOTHING * states.norm(dim=-1, keepdim=True), rest / length, 0.0)


def centered_penalty(history: Tensor, candidates: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """As `reference.contrastive_search.degeneration_penalty`, between states less their mean: of ``history (N, L, D)``
    with ``candidates (N, D)``, ``(N,)``; ``attention_mask (N, L)``: 1 for real positions, which alone count."""
    penalties = []
    for row, candidate in enumerate(candidates):
        real = slice(None) if attention_mask is None else attention_mask[row].bool()
        penalties.append(centered_scan(candidate[None], history[row, real])[0][0])
    return torch.stack(penalties).to(candidates.dtype)
