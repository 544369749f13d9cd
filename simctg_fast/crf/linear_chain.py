"""`LinearChainCRF`: one dense matrix of transitions between tags, as sequence taggers use."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.crf_common import take_along
from ..ops.crf_dense import dense_log_partition, dense_viterbi
from .arguments import as_lengths, as_paths, beyond, check_device, check_emissions, check_scores, check_tokens
from .low_rank import REDUCTIONS
from .results import TagPath


class LinearChainCRF(nn.Module):
    """A linear-chain CRF over `num_tags` tags.

    Parameters `transitions (K, K)` from row to column, `start_transitions (K,)`, `end_transitions (K,)`. `emissions`
    are `(B, T, K)`, `lengths (B,)`: padding is on the right. Computed in fp32, or fp64 for fp64 emissions.
    """

    def __init__(self, num_tags: int, *, impl: str = "auto") -> None:
        super().__init__()
        if num_tags < 1:
            raise ValueError(f"num_tags is {num_tags}, must be at least 1")
        self.num_tags, self.impl = num_tags, impl
        self.start_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.end_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags).uniform_(-0.1, 0.1))

    def extra_repr(self) -> str:
        return f"num_tags={self.num_tags}"

    def viterbi(self, emissions: torch.Tensor, lengths: torch.Tensor | None = None) -> TagPath:
        """The best path; -1 and scores of 0 beyond the lengths."""
        scores, transitions, lengths = self._potentials(emissions, lengths)
        tags = dense_viterbi(scores, transitions, lengths, impl=self.impl)
        position_scores = self._along(scores, transitions, lengths, tags.clamp(min=0))
        return TagPath(tags, position_scores.sum(1), position_scores)

    def log_partition(self, emissions: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """`(B,)`; 0 for an item of length 0."""
        return dense_log_partition(*self._potentials(emissions, lengths), impl=self.impl)

    def nll(
        self,
        emissions: torch.Tensor,
        tags: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> torch.Tensor:
        """Negative log-likelihood of `tags (B, T)`; `reduction` over the sequences: "mean", "sum", "none"."""
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction!r}, must be one of {', '.join(map(repr, REDUCTIONS))}")
        scores, transitions, lengths = self._potentials(emissions, lengths)
        path = as_paths("tags", tags, emissions)
        past = beyond(lengths, emissions.shape[1])
        if emissions.device.type == "cpu":
            check_tokens("tags", path, self.num_tags, past)
        path = path.squeeze(2) if past is None else path.squeeze(2).masked_fill(past, 0)
        loss = dense_log_partition(scores, transitions, lengths, impl=self.impl) - self._along(
            scores, transitions, lengths, path
        ).sum(1)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

    def _potentials(self, emissions, lengths):
        """Start and end transitions are emissions of the first and last position."""
        check_emissions(emissions, self.num_tags)
        check_device("emissions", emissions, self.transitions.device)
        lengths = as_lengths(lengths, emissions)
        dtype = torch.float64 if emissions.dtype == torch.float64 else torch.float32
        length = emissions.shape[1]
        position = torch.arange(length, device=emissions.device)
        last = position == (length - 1 if lengths is None else lengths[:, None] - 1)
        if emissions.device.type == "cpu":
            check_scores(emissions.detach(), beyond(lengths, length), "tag")
        edges = (position == 0)[:, None] * self.start_transitions + last[..., None] * self.end_transitions
        return emissions.to(dtype) + edges.to(dtype), self.transitions.to(dtype), lengths

    def _along(self, scores, transitions, lengths, path):
        """What each position adds to the score of a path, `(B, T)`."""
        result = take_along(scores, path[:, :, None]).squeeze(2)
        result = result + nn.functional.pad(transitions[path[:, :-1], path[:, 1:]], (1, 0))
        past = beyond(lengths, scores.shape[1])
        return result if past is None else result.masked_fill(past, 0)
