"""Figures of text: how much of it repeats, how diverse it is, how far apart its hidden states lie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from .checks import is_integer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["diversity", "isotropy", "repetition"]


def repetition(tokens: Sequence[Hashable], n: int) -> float:
    """rep-n: the share of n-grams seen before, ``1 - distinct / all``, in [0, 1); 0.0 for fewer than ``n`` tokens.

    Args:
        tokens: ids or words in order: a list, a string (of characters), an array or tensor of one dimension.
        n: at least 1.

    Raises:
        TypeError: tokens that have no order and length, or that cannot be counted. ValueError: another ``n``.

    Source: Welleck et al. 2020; Su et al. 2022, section 4.2 (there in percent).
    """
    if not is_integer(n, 1):
        raise ValueError(f"n must be an integer of at least 1, got {n!r:.80}")
    tokens = _sequence(tokens)
    total = len(tokens) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(total)}) / total


def _sequence(tokens: Sequence[Hashable]) -> Sequence[Hashable]:
    """Arrays and tensors as lists: their elements are new objects at every look, which equal nothing."""
    if hasattr(tokens, "tolist"):
        if getattr(tokens, "ndim", 1) != 1 or getattr(tokens, "is_meta", False):
            raise TypeError(f"tokens must have one dimension and values, got {tokens!r:.80}")
        tokens = tokens.tolist()
    if not isinstance(tokens, Sequence):
        raise TypeError(f"tokens must be a sequence of token ids or words, got {type(tokens).__name__}")
    wrong = next((token for token in tokens if not isinstance(token, Hashable)), None)
    if wrong is not None:
        raise TypeError(f"tokens must be one sequence of token ids or words, but holds {wrong!r:.80}")
    return tokens


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
        TypeError: an argument that is no tensor.
        ValueError: another shape or dtype; no sequence has two real tokens.

    A zero vector has cosine 0 to everything. NaN where a real state is not finite.

    Source: Su and Collier 2023, "Contrastive Search Is What You Need For Neural Text Generation", section 3.
    """
    import torch

    for name, value in (("hidden_states", hidden_states), ("attention_mask", attention_mask)):
        if not isinstance(value, torch.Tensor) and (name == "hidden_states" or value is not None):
            raise TypeError(f"{name} is {value!r:.80}, must be a tensor")
        if value is not None and (value.layout != torch.strided or value.is_meta):
            raise ValueError(f"{name} is {value.layout} on {value.device}, must be {torch.strided} and have values")
    if hidden_states.dim() != 3 or not hidden_states.dtype.is_floating_point:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)} and dtype {hidden_states.dtype}, must be "
            "(batch, length, width) of floats"
        )
    states = hidden_states.detach().double()
    if attention_mask is None:
        attention_mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if attention_mask.shape != states.shape[:2] or attention_mask.device != states.device:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} on {attention_mask.device}, must be "
            f"{tuple(states.shape[:2])} on {states.device} as hidden_states has"
        )
    states = states.masked_fill(attention_mask.eq(0).unsqueeze(-1), 0.0)
    if states.shape[2]:  # the largest component is divided out first: no square overflows or vanishes
        largest = states.abs().amax(dim=-1, keepdim=True)
        states = states / torch.where(largest > 0, largest, 1.0)
    length = states.square().sum(dim=-1, keepdim=True).sqrt()
    unit = states / torch.where(length == 0, 1.0, length)
    count = attention_mask.ne(0).sum(dim=1).double()
    if not bool((count >= 2).any()):
        raise ValueError(
            "hidden_states and attention_mask must have a sequence of at least 2 real tokens, got lengths "
            f"{count.long().tolist()}"
        )
    # The sum over all pairs is the squared length of the sum of the unit vectors; the diagonal is taken off again.
    pairs = unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))
    long_enough = count >= 2
    mean_cosine = pairs[long_enough] / (count * (count - 1))[long_enough]
    return float(1.0 - mean_cosine.mean())
