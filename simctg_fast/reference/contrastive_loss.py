"""The SimCTG contrastive loss as the paper writes it: every pair of positions, in the input's own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("pairs", "paper", "dense")


def contrastive_loss(
    hidden_states: Tensor, attention_mask: Tensor | None = None, margin: float = 0.5, reduction: str = "pairs"
) -> Tensor:
    """Scalar mean of ``max(0, margin - s_ii + s_ij)`` over ``j != i``, with ``s`` the cosine of two hidden states.

    Args:
        hidden_states: ``(B, T, D)``, any floating dtype; pass float64 for ground truth.
        attention_mask: ``(B, T)``, non-zero at real tokens, padding on either side; ``None`` means no padding.
        margin: rho in [-1, 1].
        reduction: ``"pairs"``: the sum over the real pairs of the batch over their number. ``"paper"``: the mean over
            the pairs of each sequence, then over the B sequences; one with fewer than two real tokens counts as 0.
            ``"dense"``: the mean over all ``T * T`` entries of all rows, the diagonal (worth ``max(0, margin)`` each)
            included; it knows no padding.

    A zero vector has similarity 0 to everything, itself included, so its own hinges are ``max(0, margin)``; vectors of
    width 0 are zero vectors. Where there is nothing to average the loss is 0.

    Raises:
        ValueError: a shape, margin or reduction outside the above; ``"dense"`` together with a mask.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", eq. 2.
    """
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states must have shape (B, T, D), got {tuple(hidden_states.shape)}")
    if not -1.0 <= margin <= 1.0:
        raise ValueError(f"margin must lie in [-1, 1], got {margin}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    batch, length, width = hidden_states.shape
    if width == 0:  # zero vectors, which have no largest component
        hidden_states = torch.nn.functional.pad(hidden_states, (0, 1))
    if attention_mask is not None:
        if reduction == "dense":
            raise ValueError("reduction='dense' counts padding as text, so it takes no attention_mask")
        if attention_mask.shape != (batch, length):
            raise ValueError(f"attention_mask must have shape {(batch, length)}, got {tuple(attention_mask.shape)}")
        # Padding is cut out before any arithmetic, so that a NaN in it reaches neither the loss nor a gradient.
        hidden_states = hidden_states.masked_fill(attention_mask.eq(0).unsqueeze(-1), 0.0)

    # The largest component is divided out first: no square can overflow or vanish, and a direction does not change.
    scale = hidden_states.detach().abs().amax(dim=-1, keepdim=True)
    nonzero = scale > 0  # (B, T, 1)
    scaled = hidden_states / torch.where(nonzero, scale, torch.ones_like(scale))
    length_squared = scaled.square().sum(dim=-1, keepdim=True)
    unit = scaled * torch.where(nonzero, length_squared, torch.ones_like(length_squared)).rsqrt()  # (B, T, D)

    similarity = unit @ unit.transpose(1, 2)  # s_ij, (B, T, T)
    self_similarity = nonzero.to(similarity.dtype)  # s_ii, (B, T, 1): 1, or 0 for a zero vector
    hinge = (margin - self_similarity + similarity).clamp_min(0.0)
    diagonal = torch.eye(length, dtype=torch.bool, device=hinge.device)
    if reduction == "dense":
        return hinge.masked_fill(diagonal, max(0.0, margin)).sum() / max(1, hinge.numel())

    pair = (~diagonal).expand(batch, -1, -1)
    if attention_mask is not None:
        real = attention_mask.ne(0)
        pair = pair & real.unsqueeze(1) & real.unsqueeze(2)
    sums = hinge.masked_fill(~pair, 0.0).sum(dim=(1, 2))  # (B,)
    counts = pair.sum(dim=(1, 2))
    if reduction == "pairs":
        return sums.sum() / counts.sum().clamp_min(1)
    return (sums / counts.clamp_min(1)).sum() / max(1, batch)
