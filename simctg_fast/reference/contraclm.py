"""ContraCLM's token-level loss and the cosine regulariser, pair by pair as the papers write them, in loops."""

from __future__ import annotations

import torch
from torch import Tensor


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    """0 where one of the two is a zero vector."""
    norms = left.square().sum() * right.square().sum()
    return (left @ right) / norms.sqrt() if norms > 0 else (left * 0).sum() + (right * 0).sum()


def _real(states: Tensor, attention_mask: Tensor | None, b: int) -> list[int]:
    return [t for t in range(states.shape[1]) if attention_mask is None or bool(attention_mask[b, t] != 0)]


def contraclm_token_loss(
    hidden_states: Tensor,
    hidden_states_2: Tensor,
    attention_mask: Tensor | None = None,
    temperature: float = 0.05,
    reduction: str = "sequences",
) -> Tensor:
    """``-log(exp(s_it / τ) / sum over v != i of exp(s_iv / τ))``, t the twin of i, over both views of each sequence.

    ``"sequences"``: mean over the states of a sequence, then over the sequences; ``"tokens"``: mean over all states.
    """
    total, states_seen = hidden_states[:0].sum(), 0
    for b in range(hidden_states.shape[0]):
        real = _real(hidden_states, attention_mask, b)
        vectors = [hidden_states[b, t] for t in real] + [hidden_states_2[b, t] for t in real]
        states_seen += len(vectors)
        if len(real) < 2:
            continue
        losses = []
        for i, own in enumerate(vectors):
            twin = (i + len(real)) % len(vectors)
            logits = {v: _cosine(own, other) / temperature for v, other in enumerate(vectors) if v != i}
            losses.append(torch.logsumexp(torch.stack(list(logits.values())), dim=0) - logits[twin])
        summed = torch.stack(losses).sum()
        total = total + (summed / len(vectors) if reduction == "sequences" else summed)
    return total / max(1, hidden_states.shape[0] if reduction == "sequences" else states_seen)


def cosine_regularization(hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean of the cosines over the pairs i != j of a sequence, then over the sequences; 0 for one without a pair."""
    total = hidden_states[:0].sum()
    for b in range(hidden_states.shape[0]):
        real = _real(hidden_states, attention_mask, b)
        cosines = [_cosine(hidden_states[b, i], hidden_states[b, j]) for i in real for j in real if i != j]
        if cosines:
            total = total + torch.stack(cosines).mean()
    return total / max(1, hidden_states.shape[0])
