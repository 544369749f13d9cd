"""Candidates of a step in a row of their own each: as many of every sequence, or of each as many as can win."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Which of candidates ``(rows, k)`` are run: of each row the first so many, one behind the other.

    Attributes:
        counts: of each row, at least 1. All on the CPU: offsets: ``(rows + 1,)`` int64, the rows' first places, and how
            many there are in all. owners: ``(n,)``, of each place its row.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = list(counts)
        self.offsets = torch.tensor([0, *itertools.accumulate(self.counts)])
        self.owners = torch.arange(len(self.counts)).repeat_interleave(self.offsets.diff())


# In the following None is: all of them.


def run_of(candidates: Tensor, packing: Packing | None) -> Tensor:
    """Of ``candidates (rows, k)`` those that are run, ``(n,)``."""
    if packing is None:
        return candidates.reshape(-1)
    return torch.cat([row[:count] for row, count in zip(candidates, packing.counts, strict=True)])


def by_sequence(states: Tensor, rows: int, k: int, packing: Packing | None) -> Tensor:
    """``states (n, D)`` as ``(rows, k, D)``, a row's last standing for those that were not run."""
    if packing is None:
        return states.view(rows, k, -1)
    places = torch.minimum(packing.offsets[:-1, None] + torch.arange(k), packing.offsets[1:, None] - 1)
    return states[places.to(states.device)]


def owners_of(rows: int, k: int, packing: Packing | None, device: torch.device) -> Tensor:
    """Of each place its row, ``(n,)``."""
    if packing is None:
        return torch.arange(rows, device=device).repeat_interleave(k)
    return packing.owners.to(device)


def first_places(rows: int, k: int, packing: Packing | None, device: torch.device) -> Tensor:
    """Of each row its first place, ``(rows,)``."""
    if packing is None:
        return torch.arange(rows, device=device) * k
    return packing.offsets[:-1].to(device)
