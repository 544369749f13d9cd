"""Figures of text: how much of it repeats, how diverse it is, how far apart its hidden states lie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["diversity", "isotropy", "repetition"]


def repetition(tokens: Sequence[Hashable], n: int) -> float:
    """rep-n: the share of n-grams seen before, ``1 - distinct / all``, in [0, 1); 0.0 for fewer than ``n`` tokens.

    Source: Welleck et al. 2020; Su et al. 2022, section 4.2 (there in percent).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


def diversity(tokens: Sequence[Hashable]) -> float:
    """The product over n = 2, 3, 4 of ``1 - rep-n``, in (0, 1]: 1.0 when nothing repeats, near 0 in a loop.

    Source: Su et al. 2022, section 4.2.
    """
    product = 1.0
    for n in (2, 3, 4):
        product *= 1.0 - repetition(tokens, n)
    return product


def isotropy(hidden_states: Tensor, attention_mask: Tensor | None = None) -> float:
    """``1 -`` the mean cosine over all pairs of different positions of each sequence, averaged over sequences.

    Near 1 the states spread over all directions; near 0 they share one cone and every cosine is close to 1.

    Args:
        hidden_states: ``(B, T, D)``, any floating dtype; computed in float64.
        attention_mask: ``(B, T)``, non-zero at real tokens.

    Raises:
        ValueError: no sequence has two real tokens.

    Source: Su and Collier 2023, "Contrastive Search Is What You Need For Neural Text Generation", section 3.
    """
    import torch

    states = hidden_states.detach().double()
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:2], device=states.device)
    unit = torch.nn.functional.normalize(states, dim=-1)
    unit = unit.masked_fill(attention_mask.eq(0).unsqueeze(-1), 0.0)
    count = attention_mask.ne(0).sum(dim=1).double()
    if not bool((count >= 2).any()):
        raise ValueError(f"isotropy needs a sequence of at least 2 real tokens, got lengths {count.long().tolist()}")
    # The sum over all pairs is the squared length of the sum of the unit vectors; the diagonal is taken off again.
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    long_enough = count >= 2
    mean_cosine = pairs[long_enough] / (count * (count - 1))[long_enough]
    return float(1.0 - mean_cosine.mean())
