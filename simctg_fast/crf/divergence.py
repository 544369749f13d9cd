"""Entropy and Kullback-Leibler divergence of the laws of paths, by one forward recursion.

With p(k | j) the chance that slot k precedes slot j, a quantity that adds up along a path obeys
``F_{t+1}(j) = sum_k p(k | j) (F_t(k) + f(k, j))``, where f is -log p(k | j) for the entropy and log p(k | j) - log q(k
| j) for the divergence. Every term is a difference of log-probabilities of one position, so nothing of the size of the
log-partition cancels. Steps are recomputed in the backward pass: memory grows with T K, not with T K².
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..ops.crf_common import inside, transition


def _backward_law(
    alpha: torch.Tensor, score: torch.Tensor, step: torch.Tensor, here: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(k | j) `(B, K, K)`, and the next alpha, normalised."""
    total = alpha[:, :, None] + step
    message = torch.logsumexp(total, 1)
    following = message + score
    following = following - following.detach().amax(1, keepdim=True)
    return total - message[:, None], following if here is None else torch.where(here, following, alpha)


def _weighted(log_p: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Sum over dimension 1 of p * value, where p = 0 counts for nothing whatever the value is."""
    probability = log_p.exp()
    return torch.where(probability > 0, probability * value, 0).sum(1)


def _finite(log_p: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`log_p` where `other` has weight, 0 elsewhere: keeps -inf out of products whose gradient would be NaN."""
    return torch.where(other > float("-inf"), log_p, 0)


def _entropy_step(value, alpha, score, tokens, t, left, right, scale, here):
    log_p, following = _backward_law(alpha, score, transition(tokens, t - 1, left, right, scale), here)
    result = _weighted(log_p, value[:, :, None] - _finite(log_p, log_p))
    return (result if here is None else torch.where(here, result, value)), following


def _kl_step(value, alpha, beta, score, other, tokens, t, tables, scale, other_scale, here):
    left, right, other_left, other_right = tables
    log_p, next_alpha = _backward_law(alpha, score, transition(tokens, t - 1, left, right, scale), here)
    log_q, next_beta = _backward_law(beta, other, transition(tokens, t - 1, other_left, other_right, other_scale), here)
    result = _weighted(log_p, value[:, :, None] + _finite(log_p, log_p) - _finite(log_q, log_p))
    return (result if here is None else torch.where(here, result, value)), next_alpha, next_beta


def _start(score: torch.Tensor) -> torch.Tensor:
    return score - score.detach().amax(1, keepdim=True)


def _empty(result: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    return result if lengths is None else result.masked_fill(lengths == 0, 0)


def entropy(p: Any) -> torch.Tensor:
    """`(B,)` for the potentials p (`low_rank.Potentials`)."""
    alpha = _start(p.scores[:, 0])
    value = torch.zeros_like(alpha)
    for t in range(1, p.scores.shape[1]):
        value, alpha = checkpoint(
            _entropy_step, value, alpha, p.scores[:, t], p.tokens, t, p.left, p.right, p.scale,
            inside(p.lengths, t), use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    last = alpha.log_softmax(1)
    return _empty(_weighted(last, value - _finite(last, last)), p.lengths)


def kl(p: Any, q: Any) -> torch.Tensor:
    """`(B,)`: KL(p || q) for potentials on the same beams."""
    alpha, beta = _start(p.scores[:, 0]), _start(q.scores[:, 0])
    value = torch.zeros_like(alpha)
    tables = (p.left, p.right, q.left, q.right)
    for t in range(1, p.scores.shape[1]):
        value, alpha, beta = checkpoint(
            _kl_step, value, alpha, beta, p.scores[:, t], q.scores[:, t], p.tokens, t, tables, p.scale, q.scale,
            inside(p.lengths, t), use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    last_p, last_q = alpha.log_softmax(1), beta.log_softmax(1)
    return _empty(_weighted(last_p, value + _finite(last_p, last_p) - _finite(last_q, last_p)), p.lengths)
