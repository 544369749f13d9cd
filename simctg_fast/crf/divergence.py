"""Entropy and Kullback-Leibler divergence of the laws of paths, by one forward recursion.

With p(k | j) the chance that slot k precedes slot j, a quantity that adds up along a path obeys
``F_{t+1}(j) = sum_k p(k | j) (F_t(k) + f(k, j))``, where f is -log p(k | j) for the entropy and log p(k | j) - log q(k
| j) for the divergence. Every term is a difference of log-probabilities of one position, so nothing of the size of the
log-partition cancels. Steps are recomputed in the backward pass: memory grows with T K, not with T K².

A score of -inf forbids. It is a very low number here (`_lowest`), which no other number moves: exponentials of it are
0, and its gradient is 0 where that of -inf would be NaN.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from ..ops.crf_common import inside
from .forward import Chain


def entropy(p: Chain) -> torch.Tensor:
    """`(B,)`; 0 for an item of length 0, NaN for one without a path of finite score."""
    alpha = _start(p.scores[:, 0])
    value = torch.zeros_like(alpha)
    for t in range(1, p.scores.shape[1]):
        value, alpha = _recomputed(_entropy_step, p, t, value, alpha)
    last = _law(alpha)
    return _empty(_mean(last.exp(), value - last), p.lengths)


def kl(p: Chain, q: Chain) -> torch.Tensor:
    """`(B,)`: KL(p || q) for potentials of the same slots; inf where q forbids what p allows; else as `entropy`."""
    alpha, beta = _start(p.scores[:, 0]), _start(q.scores[:, 0])
    low = _lowest(alpha)
    # Values are of the moves that q allows, so that they and their gradients are finite; which prefixes hold another
    # move is carried beside them.
    value, infinite = torch.zeros_like(alpha), torch.zeros_like(alpha, dtype=torch.bool)
    for t in range(1, p.scores.shape[1]):
        value, infinite, alpha, beta = _recomputed(_kl_step, p, q, t, value, infinite, alpha, beta)
    last, forbidden = _law(alpha), beta <= low
    result = _mean(last.exp(), value + last - _law(beta).masked_fill(forbidden, 0))
    infinite = ((alpha > low) & (infinite | forbidden)).any(1)
    return _empty(result.masked_fill(infinite, float("inf")), p.lengths)


def _recomputed(step, *arguments):
    """`step` of the arguments, computed again in the backward pass; `torch.func` cannot do that, and keeps it all."""
    if torch._C._are_functorch_transforms_active():
        return step(*arguments)
    return checkpoint(step, *arguments, use_reentrant=False, preserve_rng_state=False)


def _entropy_step(p, t, value, alpha):
    here = inside(p.lengths, t)
    log_p, following = _backward_law(p, t, alpha, here)[1:]
    result = _mean(log_p.exp(), value[:, :, None] - log_p)
    return (result if here is None else torch.where(here, result, value)), following


def _kl_step(p, q, t, value, infinite, alpha, beta):
    here, low = inside(p.lengths, t), _lowest(alpha)
    total_p, log_p, next_alpha = _backward_law(p, t, alpha, here)
    total_q, log_q, next_beta = _backward_law(q, t, beta, here)
    forbidden = total_q <= low
    result = _mean(log_p.exp(), value[:, :, None] + log_p - log_q.masked_fill(forbidden, 0))
    held = ((total_p > low) & (forbidden | infinite[:, :, None])).any(1)
    if here is not None:
        result, held = torch.where(here, result, value), torch.where(here, held, infinite)
    return result, held, next_alpha, next_beta


def _backward_law(chain, t, alpha, here):
    """The scores of coming from k to j, log p(k | j), `(B, K, K)` both, and the next alpha."""
    total = (alpha[:, :, None] + chain.step(t)).clamp(min=_lowest(alpha))
    message = torch.logsumexp(total, 1)
    following = _start(message + chain.scores[:, t])
    return total, total - message[:, None], following if here is None else torch.where(here, following, alpha)


def _lowest(like: torch.Tensor) -> float:
    """What is at least as low counts as forbidden; the sum of any two such is finite."""
    return torch.finfo(like.dtype).min / 8


def _start(score: torch.Tensor) -> torch.Tensor:
    """With a largest value of 0, and nothing below the lowest; NaN where nothing is allowed."""
    low = _lowest(score)
    score = score.clamp(min=low)
    top = score.detach().amax(1, keepdim=True)
    return (score - torch.where(top > low, top, float("nan"))).clamp(min=low)


def _law(alpha: torch.Tensor) -> torch.Tensor:
    return alpha - torch.logsumexp(alpha, 1, keepdim=True)


def _mean(probability: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 1 of p * value, where p = 0 counts for nothing whatever the value is."""
    return (probability * torch.where(probability > 0, value, 0)).sum(1)


def _empty(result: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    return result if lengths is None else result.masked_fill(lengths == 0, 0)
