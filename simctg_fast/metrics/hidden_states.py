"""How far apart the hidden states of texts lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["isotropy"]


def isotropy(hidden_states: Tensor, attention_mask: Tensor | None = None) -> float:
    """``1 -`` the mean cosine over all pairs of different positions of each sequence, averaged over sequences.

    Near 1 the states spread over all directions; near 0 they share one cone and every cosine is close to 1. Every
    sequence counts once here; in `isotropy_by_layer`, as in the paper's code, every pair does.

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
