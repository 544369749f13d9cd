"""What the methods of the CRF return: tensors, batch first.

`B` items, `T` positions, `K` slots in a beam, `N` paths. Beyond an item's length tokens are `pad_id`, slots -1, scores
0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


class _Result:
    """Shown by shapes and dtypes: the numbers of a batch fill a screen."""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):  # type: ignore[arg-type]  # of the dataclasses below
            value = getattr(self, field.name)
            shown.append(f"{field.name}={tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class ViterbiPath(_Result):
    tokens: torch.Tensor  # (B, T) int64
    slots: torch.Tensor  # (B, T) int64
    score: torch.Tensor  # (B,)
    position_scores: torch.Tensor  # (B, T): what each position adds to the score
    beam_tokens: torch.Tensor  # (B, T, K) int64


@dataclass(frozen=True, repr=False)
class KBest(_Result):
    tokens: torch.Tensor  # (B, T, N) int64, best first
    slots: torch.Tensor  # (B, T, N) int64
    score: torch.Tensor  # (B, N), -inf where the beam holds fewer than N paths
    position_scores: torch.Tensor  # (B, T, N)
    beam_tokens: torch.Tensor  # (B, T, K) int64


@dataclass(frozen=True, repr=False)
class Sample(_Result):
    tokens: torch.Tensor  # (B, T, N) int64
    slots: torch.Tensor  # (B, T, N) int64
    log_prob: torch.Tensor  # (B, N)
    token_log_probs: torch.Tensor  # (B, T, N), log p(y_t | y_{t+1}); they sum to log_prob
    beam_tokens: torch.Tensor  # (B, T, K) int64


@dataclass(frozen=True, repr=False)
class LogProb(_Result):
    log_prob: torch.Tensor  # (B, N), or (B,) for one path per item
    token_log_probs: torch.Tensor  # (B, T, N), or (B, T)


@dataclass(frozen=True, repr=False)
class Marginals(_Result):
    probs: torch.Tensor  # (B, T, K): p(y_t = the token of slot k)
    beam_tokens: torch.Tensor  # (B, T, K) int64


@dataclass(frozen=True, repr=False)
class Beam(_Result):
    tokens: torch.Tensor  # (B, T, K) int64
    emissions: torch.Tensor  # (B, T, K), differentiable in the emissions they were taken from


@dataclass(frozen=True, repr=False)
class TagPath(_Result):
    tags: torch.Tensor  # (B, T) int64, -1 at padding
    score: torch.Tensor  # (B,)
    position_scores: torch.Tensor  # (B, T)


@dataclass(frozen=True, repr=False)
class TagPaths(_Result):
    tags: torch.Tensor  # (B, T, N) int64, best first, -1 at padding
    score: torch.Tensor  # (B, N), -inf where there are fewer than N paths
    position_scores: torch.Tensor  # (B, T, N)


@dataclass(frozen=True, repr=False)
class TagSample(_Result):
    tags: torch.Tensor  # (B, T, N) int64, -1 at padding
    log_prob: torch.Tensor  # (B, N)
    token_log_probs: torch.Tensor  # (B, T, N), log p(y_t | y_{t+1}); they sum to log_prob
