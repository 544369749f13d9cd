"""How uncertain a model is at a step, and medians of how uncertain it was before: what adaptive searches go by.

Everything is a tensor operation on rows of a fixed shape, so that a captured step holds it. Schedules are in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probs: Tensor, inside: float = 0.0) -> Tensor:
    """``−Σ p ln(p + inside)`` over the last dimension, in nats and float64; 0 · ln 0 is 0."""
    products = torch.special.entr(probs) if inside == 0.0 else -(probs * torch.log(probs + inside))
    return products.sum(dim=-1, dtype=torch.float64)


def bounded_atanh(x: Tensor, limit: float) -> Tensor:
    """``atanh`` of ``x``, which is brought into ±``limit`` first."""
    return torch.atanh(x.clamp(-limit, limit))


def insert_sorted(values: Tensor, counts: Tensor, new: Tensor) -> Tensor:
    """``values (rows, C)``, of which the first ``counts (rows,)`` are sorted, with ``new (rows,)`` among them."""
    place = torch.arange(values.shape[1], device=values.device)
    used = place < counts[:, None]
    at = (used & (values <= new[:, None])).sum(dim=-1, keepdim=True)
    shifted = torch.roll(values, 1, dims=1)
    return torch.where(place < at, values, torch.where(place == at, new[:, None], shifted))


def middle(values: Tensor, counts: Tensor) -> Tensor:
    """The median ``(rows,)`` of the first ``counts`` of sorted ``values (rows, C)``, of an even number the mean of the
    two in the middle; 0 where there are none."""
    low = ((counts - 1) // 2).clamp(min=0)[:, None]
    high = (counts // 2).clamp(max=values.shape[1] - 1)[:, None]
    median = (values.gather(1, low) + values.gather(1, high))[:, 0] / 2
    return torch.where(counts > 0, median, 0.0)


def lower_median_of_last(values: Tensor, counts: Tensor) -> Tensor:
    """The lower median ``(rows,)`` of the last ``counts (rows,)`` of ``values (rows, C)``."""
    place = torch.arange(values.shape[1], device=values.device)
    inside = place >= values.shape[1] - counts[:, None]
    ranked = torch.where(inside, values, torch.inf).sort(dim=-1).values
    return ranked.gather(1, ((counts - 1) // 2).clamp(min=0)[:, None])[:, 0]
