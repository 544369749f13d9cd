"""Score top-k candidates against the history of hidden states, and pick the winner.

Su et al. 2022 (arXiv 2202.06417), equation 5: of the ``top_k`` candidates v, take the one with the largest
``(1 − alpha) · p(v) − alpha · max_j cos(h_v, h_j)``, j over the real positions before it.
"""

from __future__ import annotations

import torch

from . import _cpu

_LIBRARY = torch.library.Library("simctg_fast", "FRAGMENT")
_LIBRARY.define(
    "candidate_scan(Tensor hidden_states, Tensor history, int length, Tensor? mask, "
    "Tensor? lengths=None) -> (Tensor, Tensor)",
)

IMPLS = ("auto", "cpu", "torch")


def candidate_scan(
    hidden_states: torch.Tensor,
    history: torch.Tensor,
    length: int,
    mask: torch.Tensor | None = None,
    impl: str = "auto",
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of every candidate with the history, and where it is.

    Args:
        hidden_states: ``(B, k, D)`` raw last-layer states of the candidates, any float dtype.
        history: ``(B, T_max, D)`` states of earlier positions, already of unit length (a zero state stays zero).
        length: number of positions of ``history`` in use, at most.
        mask: ``(B, T_max)`` bool, True for real (unpadded) positions; ``None`` when all are real.
        impl: ``"auto"``, ``"cpu"`` (C++) or ``"torch"``.
        lengths: ``(B,)`` int64, positions in use in each row, each at most ``length``; ``None``: ``length`` in all.

    Returns:
        ``penalty (B, k)``, float32 (float64 for float64 states), and ``position (B, k)`` int64 (the earliest on ties).
        NaN propagates. A row with no real position has penalty −inf.

    Raises:
        ValueError: an unknown ``impl``. RuntimeError: ``impl="cpu"`` that cannot run here.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl != "torch" and torch.compiler.is_compiling():
        return torch.ops.simctg_fast.candidate_scan(hidden_states, history, length, mask, lengths)
    if impl == "auto" and not _cpu.candidate_scan_supported(hidden_states, history, mask):
        impl = "torch"
    if impl == "torch":
        return _scan_torch(hidden_states, history, length, mask, lengths)
    return _cpu.candidate_scan_cpu(hidden_states, history, length, mask, lengths)


def _scan_torch(
    hidden_states: torch.Tensor,
    history: torch.Tensor,
    length: int,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    precise = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    candidates = torch.nn.functional.normalize(precise, dim=-1).to(history.dtype)
    cosine = torch.matmul(candidates, history[:, :length].mT).to(precise.dtype)  # (B, k, length)
    if mask is not None:
        cosine.masked_fill_(~mask[:, None, :length], float("-inf"))
    if lengths is not None:
        beyond = torch.arange(length, device=lengths.device) >= lengths[:, None]
        cosine.masked_fill_(beyond[:, None], float("-inf"))
    penalty, position = cosine.max(dim=-1)
    return penalty, position


def _scan_op(hidden_states, history, length, mask, lengths=None):
    return candidate_scan(hidden_states, history, length, mask, lengths=lengths)


torch.library.impl(_LIBRARY, "candidate_scan", "CompositeExplicitAutograd")(_scan_op)


@torch.library.register_fake("simctg_fast::candidate_scan")
def _(hidden_states, history, length, mask, lengths=None):
    shape, dtype = hidden_states.shape[:2], torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_empty(shape, dtype=dtype), hidden_states.new_empty(shape, dtype=torch.int64)


def contrastive_scores(probs: torch.Tensor, penalty: torch.Tensor, penalty_alpha: float | torch.Tensor) -> torch.Tensor:
    """``(1 − alpha) · p − alpha · penalty`` in float32, ``(B, k)``; alpha is a number or ``(B, 1)``. A candidate of
    probability 0 (banned by a logits processor) scores −inf, so that it can never be chosen."""
    scores = (1.0 - penalty_alpha) * probs - penalty_alpha * penalty
    return scores.masked_fill(probs == 0, float("-inf"))
