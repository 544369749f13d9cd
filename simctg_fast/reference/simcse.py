"""The SimCSE losses as they are usually written: the whole matrix of similarities, one cross-entropy."""

from __future__ import annotations

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


def simcse_sup_loss(embeddings: Tensor, temperature: float = 0.05, symmetric: bool = False) -> Tensor:
    """Mean cross-entropy of anchors (rows 3i) to positives (3i+1) among all positives and all negatives (3i+2)."""
    anchors, positives, negatives = (embeddings[i::3] for i in range(3))
    targets = torch.arange(anchors.shape[0], device=embeddings.device)
    loss = F.cross_entropy(_cosines(anchors, torch.cat([positives, negatives])) / temperature, targets)
    if symmetric:
        loss = (loss + F.cross_entropy(_cosines(positives, anchors) / temperature, targets)) / 2
    return loss
