"""The SimCSE losses as they are usually written: the whole matrix of similarities, one cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    return F.normalize(left, dim=-1) @ F.normalize(right, dim=-1).T


def simcse_unsup_loss(embeddings: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean cross-entropy of the rows of ``(2n, d)`` to their partners (rows 2i and 2i+1), the row itself left out."""
    rows = torch.arange(embeddings.shape[0], device=embeddings.device)
    logits = (_cosines(embeddings, embeddings) / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, rows ^ 1)


def simcse_sup_loss(
    embeddings: Tensor, temperature: float = 0.05, symmetric: bool = False, hard_negative_weight: float = 0.0
) -> Tensor:
    """Mean cross-entropy of anchors (rows 3i) to positives (3i+1) among all positives and all negatives (3i+2)."""
    anchors, positives, negatives = (embeddings[i::3] for i in range(3))
    targets = torch.arange(anchors.shape[0], device=embeddings.device)
    logits = _cosines(anchors, torch.cat([positives, negatives])) / temperature
    logits = logits + hard_negative_weight * torch.eye(*logits.shape, device=logits.device).roll(len(anchors), dims=1)
    loss = F.cross_entropy(logits, targets)
    if symmetric:
        loss = (loss + F.cross_entropy(_cosines(positives, anchors) / temperature, targets)) / 2
    return loss


def ranking_loss(
    anchors: Tensor,
    documents: Sequence[Tensor],
    scale: float,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    hard_negative_weight: float = 0.0,
) -> Tensor:
    """:func:`simctg_fast.ranking.ranking_loss` from whole matrices and masks; a weight of -inf is not for it."""
    rows, columns = anchors.shape[0], len(documents)
    everything = torch.cat(list(documents))
    same = torch.eye(rows, dtype=torch.bool, device=anchors.device)
    same_anchor = same.repeat(1, columns)
    own_positive = torch.cat([same, torch.zeros_like(same_anchor[:, rows:])], dim=1)
    own_hard = same_anchor & ~own_positive
    harder = {
        None: torch.zeros_like(same_anchor),
        "in_batch_negatives": ~same_anchor,
        "hard_negatives": own_hard,
        "all_negatives": ~own_positive,
    }[hardness_mode]
    cosines = _cosines(anchors, everything)
    logits = scale * cosines + hardness_strength * cosines.detach() * harder + hard_negative_weight * own_hard
    parts = {
        "query_to_doc": logits,
        "query_to_query": (scale * _cosines(anchors, anchors)).masked_fill(same, -torch.inf),
        "doc_to_query": scale * _cosines(documents[0], anchors),
        "doc_to_doc": (scale * _cosines(documents[0], everything)).masked_fill(same_anchor, -torch.inf),
    }
    chosen = [part for name, part in parts.items() if name in directions]
    if partition_mode == "joint":
        sums = torch.cat(chosen, dim=1).logsumexp(dim=1)
    else:
        sums = torch.stack([part.logsumexp(dim=1) for part in chosen]).mean(dim=0)
    return (sums - logits[own_positive]).mean()
