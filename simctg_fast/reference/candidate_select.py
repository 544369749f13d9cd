"""Candidates against the history of hidden states, a sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def candidate_scan(
    hidden_states: Tensor, history: Tensor, length: int, mask: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`simctg_fast.ops.candidate_select.candidate_scan` in float64: the largest cosine ``(B, k)`` and its earliest
    position; -inf and 0 where a row has no real position. Trusts its arguments."""
    batch, k, _ = hidden_states.shape
    penalty = torch.full((batch, k), -torch.inf, dtype=torch.float64)
    position = torch.zeros(batch, k, dtype=torch.int64)
    for b in range(batch):
        end = length if lengths is None else int(lengths[b])
        seen = torch.arange(end) if mask is None else mask[b, :end].nonzero().flatten()
        if len(seen):
            unit = torch.nn.functional.normalize(hidden_states[b].double(), dim=-1)
            best = (unit @ history[b, seen].double().mT).max(dim=-1)
            penalty[b], position[b] = best.values, seen[best.indices]
    return penalty, position
