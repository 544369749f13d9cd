"""How contrastive search picks among candidates (Su et al. 2022, arXiv 2202.06417, equation 5): for every caller."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ops.candidate_select import contrastive_scores


@dataclass
class Choice:
    """``selected (rows,)``: index of each row's winner; ``scores (rows, k)``, −inf for what cannot be chosen, and what
    they became with noise, ``ranked``; ``penalty`` and the ``position`` it comes from, both ``(rows, k)``."""

    selected: Tensor
    scores: Tensor
    ranked: Tensor
    penalty: Tensor
    position: Tensor


def choose_candidate(
    probs: Tensor,
    similarity: tuple[Tensor, Tensor],
    penalty_alpha: float | Tensor,
    temperature: float | Tensor | None = None,
    noise: Tensor | None = None,
) -> Choice:
    """The candidate with the largest score; of equal ones the more probable, which comes first.

    Args:
        probs: ``(rows, k)``, the most probable first; 0 for what must not be chosen.
        similarity: largest cosine with the history, and its position, both ``(rows, k)``.
        penalty_alpha: a number or ``(rows, 1)``.
        temperature, noise: with Gumbel noise ``(rows, k)`` the choice is a draw by ``exp(score / temperature)``.
    """
    penalty, position = similarity
    scores = contrastive_scores(probs.to(penalty.device), penalty, penalty_alpha)
    scores = scores.nan_to_num_(nan=float("-inf"), neginf=float("-inf"))  # a hidden state that overflowed loses
    ranked = scores if noise is None or temperature is None else scores / temperature + noise.to(scores.device)
    return Choice(ranked.argmax(dim=-1), scores, ranked, penalty, position)


def gumbel(noise: Tensor) -> Tensor:
    """Gumbel noise of exponential noise, in place."""
    return noise.log_().neg_()
