"""Truth for `LinearChainCRF`: every path of an item in float64, with forbidden moves; shares no recursion with it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from simctg_fast import LinearChainCRF

NEVER = float("-inf")


@dataclass(frozen=True)
class Law:
    """All paths `(P, L)` of one item and their scores, best first; those of -inf are left out."""

    paths: torch.Tensor
    scores: torch.Tensor

    @property
    def log_partition(self) -> torch.Tensor:
        return torch.logsumexp(self.scores, 0)

    @property
    def log_probs(self) -> torch.Tensor:
        return self.scores - self.log_partition

    def marginals(self, tags: int) -> torch.Tensor:
        probs = self.log_probs.exp()
        return torch.stack(
            [torch.stack([probs[self.paths[:, t] == k].sum() for k in range(tags)]) for t in range(self.paths.shape[1])]
        )

    def entropy(self) -> torch.Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum()

    def given_next(self, path: list[int], t: int) -> torch.Tensor:
        """log p(y_t | y_{t+1}), the last position unconditionally."""
        later = slice(t + 1, t + 2)
        condition = (self.paths[:, later] == torch.tensor(path[later], dtype=torch.int64)).all(1)
        both = condition & (self.paths[:, t] == path[t])
        return torch.logsumexp(self.log_probs[both], 0) - torch.logsumexp(self.log_probs[condition], 0)


def score(crf, emissions, path, start, end, transitions):
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


def law(crf: LinearChainCRF, emissions: torch.Tensor, temperature: float = 1.0) -> Law:
    """For `emissions (L, K)`, L >= 1, of one item."""
    start, end, transitions = parameters(crf)
    emissions = emissions.double()
    kept, scores = [], []
    for path in itertools.product(range(emissions.shape[1]), repeat=emissions.shape[0]):
        value = score(crf, emissions, path, start, end, transitions) / temperature
        if float(value) > NEVER:
            kept.append(path)
            scores.append(value)
    assert kept, "the case has no path"
    values = torch.stack(scores)
    order = values.detach().sort(descending=True, stable=True).indices
    return Law(torch.tensor(kept)[order], values[order])
