"""What both CRFs make of a forward filter: log-probabilities of paths, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..ops.crf_common import take_along

NEVER = float("-inf")
REDUCTIONS = ("mean", "sum", "none", "token_mean")


@dataclass(frozen=True)
class Filtered:
    """A filter's result (`ops.crf_filter`, `ops.crf_dense`). `alpha (B, T, K)` has a largest value of 0 everywhere."""

    messages: torch.Tensor
    norms: torch.Tensor
    alpha: torch.Tensor
    last_total: torch.Tensor  # (B,): the log-sum-exp of each item's last alpha


def filtered(
    messages: torch.Tensor, norms: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor | None
) -> Filtered:
    alpha = messages + scores - norms[:, :, None]
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


def conditionals(
    f: Filtered, paths: torch.Tensor, edges: torch.Tensor, lengths: torch.Tensor | None, past: torch.Tensor | None
) -> torch.Tensor:
    """log p(y_t | y_{t+1}), `(B, T, N)`: alpha_t(y_t) + transition - message_{t+1}(y_{t+1}); 0 at `past`.

    `paths (B, T, N)` are slots, `edges (B, T - 1, N)` the transitions along them. A path that is not allowed has -inf.
    """
    messages = take_along(f.messages, paths)[:, 1:]
    live = messages > NEVER  # otherwise no path leads there
    follows = torch.where(live, no_gradient_at_never(edges) - torch.where(live, messages, 0), NEVER)
    follows = pad(follows, (0, 0, 0, 1))
    position = torch.arange(paths.shape[1], device=paths.device)
    ends = position == (paths.shape[1] if lengths is None else lengths[:, None]) - 1
    result = along(f.alpha, paths) + torch.where(ends[..., None], -f.last_total[:, None, None], follows)
    return result if past is None else result.masked_fill(past[:, :, None], 0)


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
