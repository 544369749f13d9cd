"""Truth for `LinearChainCRF`: every path of an item in float64, with forbidden moves; shares no recursion with it."""

from __future__ import annotations

import itertools

import torch

from simctg_fast import LinearChainCRF
from simctg_fast.reference.crf import Paths

NEVER = float("-inf")


def score(emissions, path, start, end, transitions):
    """Of one path, in float64; -inf where it holds a forbidden move."""
    total = start[path[0]] + end[path[-1]]
    for t, tag in enumerate(path):
        total = total + emissions[t, tag]
        if t > 0:
            total = total + transitions[path[t - 1], tag]
    return total


def parameters(crf):
    """Start, end and transitions in float64 with what is forbidden, differentiable."""
    result = []
    for name in ("start_transitions", "end_transitions", "transitions"):
        forbidden = getattr(crf, "_forbidden_" + name.removesuffix("_transitions"))
        value = getattr(crf, name).double()
        result.append(value if forbidden is None else torch.where(forbidden, torch.tensor(NEVER).double(), value))
    return result


def law(crf: LinearChainCRF, emissions: torch.Tensor, temperature: float = 1.0) -> Paths:
    """All paths of a finite score, best first, for `emissions (L, K)`, L >= 1, of one item."""
    start, end, transitions = parameters(crf)
    emissions = emissions.double()
    kept, scores = [], []
    for path in itertools.product(range(emissions.shape[1]), repeat=emissions.shape[0]):
        value = score(emissions, path, start, end, transitions) / temperature
        if float(value) > NEVER:
            kept.append(path)
            scores.append(value)
    assert kept, "the case has no path"
    values = torch.stack(scores)
    order = values.detach().sort(descending=True, stable=True).indices
    return Paths(torch.tensor(kept)[order], values[order])
