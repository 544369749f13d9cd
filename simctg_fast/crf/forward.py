"""What both CRFs have in common: their potentials, and what they make of a forward filter, log-probabilities of paths,
token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..ops.crf_common import take_along
from .spans import Span

NEVER = float("-inf")
REDUCTIONS = ("mean", "sum", "none", "token_mean")


@dataclass(frozen=True)
class Chain:
    """The potentials of a CRF, of low rank or dense, every item from position 0 on."""

    scores: torch.Tensor  # (B, T, K)
    span: Span
    past: torch.Tensor | None  # (B, T): positions that do not exist

    @property
    def lengths(self) -> torch.Tensor | None:
        """`(B,)`, from 0 on."""
        return self.span.lengths

    def step(self, t: int) -> torch.Tensor:
        """Transitions from position t - 1 to t, source first: `(B, K, K)` or `(K, K)`."""
        raise NotImplementedError

    def edges(self, paths: torch.Tensor) -> torch.Tensor:
        """Transitions along paths `(B, T, N)`: `(B, T - 1, N)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Filtered:
    """A filter's result (`ops.crf_filter`, `ops.crf_dense`). `alpha (B, T, K)` has a largest value of 0 everywhere."""

    messages: torch.Tensor
    norms: torch.Tensor
    alpha: torch.Tensor
    last_total: torch.Tensor  # (B,): the log-sum-exp of each item's last alpha


def filtered(messages: torch.Tensor, norms: torch.Tensor, p: Chain) -> Filtered:
    lengths, alpha = p.lengths, messages + p.scores - norms[:, :, None]
    if lengths is None:
        last = alpha[:, -1]
    else:
        last = alpha[torch.arange(alpha.shape[0], device=alpha.device), (lengths - 1).clamp(min=0)]
    total = torch.logsumexp(last, 1)
    if lengths is not None:
        total = total.masked_fill(lengths == 0, 0)
    return Filtered(messages, norms, alpha, total)


def no_gradient_at_never(values: torch.Tensor) -> torch.Tensor:
    """The same values, those of -inf as constants: what is forbidden has no gradient."""
    return torch.where(values > NEVER, values, values.detach())


def along(values: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """`values (B, T, K)` at `paths (B, T, N)`."""
    return no_gradient_at_never(take_along(values, paths))


def path_scores(p: Chain, paths: torch.Tensor) -> torch.Tensor:
    """What each position adds to the score of paths `(B, T, N)` of slots; 0 where they hold -1."""
    inside = paths.clamp(min=0)
    return (along(p.scores, inside) + pad(p.edges(inside), (0, 0, 1, 0))).masked_fill(paths < 0, 0)


def conditionals(p: Chain, f: Filtered, paths: torch.Tensor) -> torch.Tensor:
    """log p(y_t | y_{t+1}), `(B, T, N)`: alpha_t(y_t) + transition - message_{t+1}(y_{t+1}); 0 beyond the lengths.

    `paths (B, T, N)` are slots. A path that is not allowed has -inf.
    """
    paths = paths.clamp(min=0)
    messages = take_along(f.messages, paths)[:, 1:]
    live = messages > NEVER  # otherwise no path leads there
    follows = torch.where(live, no_gradient_at_never(p.edges(paths)) - torch.where(live, messages, 0), NEVER)
    follows = pad(follows, (0, 0, 0, 1))
    position = torch.arange(paths.shape[1], device=paths.device)
    ends = position == (paths.shape[1] if p.lengths is None else p.lengths[:, None]) - 1
    result = along(f.alpha, paths) + torch.where(ends[..., None], -f.last_total[:, None, None], follows)
    return result if p.past is None else result.masked_fill(p.past[:, :, None], 0)


def missing_paths(paths: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """`(B, N)`: which of the n best `paths (B, T, N)` do not exist; an item of length 0 has one, the first, empty."""
    missing = paths[:, 0] < 0
    if lengths is None:
        return missing
    return missing & ((lengths > 0)[:, None] | (torch.arange(paths.shape[2], device=paths.device) > 0))


def reduced(loss: torch.Tensor, reduction: str, positions: Callable[[], torch.Tensor | int]) -> torch.Tensor:
    """A loss `(B,)` by one of `REDUCTIONS`; of no items, or no positions, 0."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, must be one of {', '.join(map(repr, REDUCTIONS))}")
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(1, loss.shape[0])
    count = positions()
    return loss.sum() / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(1, count))
