"""Score top-k candidates against the history of hidden states, and pick the winner.

Su et al. 2022 (arXiv 2202.06417), equation 5: of the ``top_k`` candidates v, take the one with the largest
``(1 − alpha) · p(v) − alpha · max_j cos(h_v, h_j)``, j over the real positions before it.
"""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register
from .dispatch import NOT_TAKEN, address, choose, float32_obstacle, is_deferred, lengths_obstacle, widened


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
        impl: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` (CUDA) or ``"torch"``.
        lengths: ``(B,)`` int64, positions in use in each row, each at most ``length``; ``None``: ``length`` in all.

    Returns:
        ``penalty (B, k)``, float32 (float64 for float64 states), and ``position (B, k)`` int64 (the earliest on ties).
        NaN propagates. A row with no real position has penalty −inf.

    Raises:
        ValueError: an unknown ``impl``, or one that does not take these operands. RuntimeError: an ``impl`` that this
            installation lacks.
    """
    if is_deferred(impl):
        return torch.ops.simctg_fast.candidate_scan(hidden_states, history, length, mask, lengths, impl=impl)
    return _scan(resolve(impl, hidden_states, history, mask), hidden_states, history, length, mask, lengths)


def resolve(impl: str, hidden_states: torch.Tensor, history: torch.Tensor, mask: torch.Tensor | None) -> str:
    """The implementation that serves a call, see `dispatch.choose`."""

    def triton() -> str | None:
        from simctg_fast.kernels import candidate_select as kernels

        return kernels.obstacle(hidden_states, history)

    def cpu() -> str | None:
        return float32_obstacle(mask, hidden_states=widened(hidden_states), history=history)

    return choose(impl, hidden_states.device, cpu=cpu, triton=triton)


def _scan(impl, hidden_states, history, length, mask, lengths):
    if impl == "triton":
        from simctg_fast.kernels import candidate_select as kernels

        return kernels.candidate_scan(hidden_states, history, length, mask, lengths)
    return (_scan_cpu if impl == "cpu" else _scan_torch)(hidden_states, history, length, mask, lengths)


def candidate_select(
    hidden_states: torch.Tensor,
    probs: torch.Tensor,
    history: torch.Tensor,
    lengths: torch.Tensor,
    penalty_alpha: float,
    mask: torch.Tensor | None = None,
    *,
    with_penalty: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose each row's winner by equation 5, and append its normalised state to the row's history. One launch on CUDA;
    nothing is read on the host, so it can be captured in a graph.

    Args:
        hidden_states: ``(B, k, D)`` raw last-layer states of the candidates.
        probs: ``(B, k)`` float32 probabilities; 0 for candidates that must not be chosen.
        history: ``(B, T_max, D)`` unit-length states; row b's winner goes to position ``lengths[b]``, or nowhere if
            that is ``T_max``. All else stays.
        lengths: ``(B,)`` int64 positions in use. They are not changed.
        penalty_alpha: weight of the penalty, in [0, 1].
        mask: ``(B, T_max)`` bool, True for real positions; ``None`` when all are real.
        with_penalty: also return the penalties and where they come from.
        impl: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` (CUDA) or ``"torch"``.

    Returns:
        ``selected (B,)`` int64; ``winner (B, D)``, its raw state; ``penalty (B, k)`` and ``position (B, k)`` as
        :func:`candidate_scan` gives them, empty unless ``with_penalty``. Of equal scores the more probable wins, then
        the first; a NaN score loses.

    Raises:
        ValueError: shapes that do not fit, an unknown ``impl``, or one that does not take these operands.
    """
    batch, k, _ = hidden_states.shape
    for name, got, wanted in (
        ("probs", tuple(probs.shape), (batch, k)),
        ("lengths", tuple(lengths.shape), (batch,)),
        ("history", (history.shape[0], history.shape[2]), (batch, hidden_states.shape[2])),
    ):
        if got != wanted:
            raise ValueError(f"{name} has shape {got} (history: batch and width), must be {wanted}")
    run = torch.ops.simctg_fast.candidate_select if impl == "auto" or is_deferred(impl) else _select
    return run(hidden_states, probs, history, lengths, mask, penalty_alpha, with_penalty, impl=impl)


def _select(hidden_states, probs, history, lengths, mask, penalty_alpha, with_penalty, *, impl="auto"):
    impl = resolve(impl, hidden_states, history, mask)
    if impl == "triton":
        from simctg_fast.kernels import candidate_select as kernels

        return kernels.candidate_select(hidden_states, probs, history, lengths, mask, penalty_alpha, with_penalty)
    batch = hidden_states.shape[0]
    penalty, position = _scan(impl, hidden_states, history, history.shape[1], mask, lengths)
    scores = contrastive_scores(probs.to(penalty.dtype), penalty, penalty_alpha)
    scores = scores.nan_to_num(nan=float("-inf"), neginf=float("-inf"), posinf=float("inf"))
    best = scores == scores.amax(dim=-1, keepdim=True)
    selected = probs.nan_to_num(nan=-1.0).masked_fill(~best, -2.0).argmax(dim=-1)
    rows = torch.arange(batch, device=selected.device)
    winner = hidden_states[rows, selected]
    precise = winner.to(torch.promote_types(winner.dtype, torch.float32))
    unit = torch.nn.functional.normalize(precise, dim=-1).to(history.dtype)
    place = lengths.clamp(0, history.shape[1] - 1)
    history[rows, place] = torch.where((lengths == place)[:, None], unit, history[rows, place])
    if not with_penalty:
        penalty, position = penalty.new_empty((0,)), position.new_empty((0,))
    return selected, winner, penalty, position


def _scan_cpu(hidden_states, history, length, mask, lengths):
    """One pass over the history in C++. Norms below 1e-12 count as 1e-12."""
    hidden_states = widened(hidden_states)
    batch, candidates, dim = hidden_states.shape
    problem = lengths_obstacle(batch, lengths=lengths)
    if history.shape[0] != batch or history.shape[2] != dim or history.shape[1] < length:
        problem = f"history has shape {tuple(history.shape)}, must be ({batch}, at least {length}, {dim})"
    elif mask is not None and (mask.shape[0] != batch or mask.shape[1] < length):
        problem = f"mask has shape {tuple(mask.shape)}, must be ({batch}, at least {length})"
    if problem is not None:
        raise ValueError(f"impl='cpu' {NOT_TAKEN}{problem}")
    lengths = None if lengths is None else lengths.contiguous()
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    penalty = hidden_states.new_empty((batch, candidates))
    position = hidden_states.new_empty((batch, candidates), dtype=torch.int64)
    _backends.require_extension().candidate_scan(
        (batch, candidates, dim, length),
        (hidden_states.data_ptr(), hidden_states.stride(0), hidden_states.stride(1)),
        (history.data_ptr(), history.stride(0), history.stride(1)),
        address(lengths),
        (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0)),
        penalty.data_ptr(),
        position.data_ptr(),
        torch.get_num_threads(),
    )
    return penalty, position


def _scan_torch(hidden_states, history, length, mask, lengths):
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


def _scan_op(hidden_states, history, length, mask, lengths=None, *, impl="auto"):
    return candidate_scan(hidden_states, history, length, mask, impl, lengths)


def _scan_fake(hidden_states, history, length, mask, lengths=None, *, impl="auto"):
    shape, dtype = hidden_states.shape[:2], torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_empty(shape, dtype=dtype), hidden_states.new_empty(shape, dtype=torch.int64)


def _select_fake(hidden_states, probs, history, lengths, mask, penalty_alpha, with_penalty, *, impl="auto"):
    batch, k, width = hidden_states.shape
    shape = (batch, k) if with_penalty else (0,)
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    return (
        hidden_states.new_empty((batch,), dtype=torch.int64),
        hidden_states.new_empty((batch, width)),
        hidden_states.new_empty(shape, dtype=dtype),
        hidden_states.new_empty(shape, dtype=torch.int64),
    )


def contrastive_scores(probs: torch.Tensor, penalty: torch.Tensor, penalty_alpha: float | torch.Tensor) -> torch.Tensor:
    """``(1 − alpha) · p − alpha · penalty`` in float32, ``(B, k)``; alpha is a number or ``(B, 1)`` in float64, which
    gives the same bits. A candidate of probability 0 (banned by a logits processor) scores −inf, so that it can never
    be chosen."""
    weight = 1.0 - penalty_alpha
    if isinstance(weight, torch.Tensor) and isinstance(penalty_alpha, torch.Tensor):
        weight, penalty_alpha = weight.to(penalty), penalty_alpha.to(penalty)
    scores = weight * probs - penalty_alpha * penalty
    return scores.masked_fill(probs == 0, float("-inf"))


define(
    "candidate_scan(Tensor hidden_states, Tensor history, int length, Tensor? mask, Tensor? lengths=None, *, "
    'str impl="auto") -> (Tensor, Tensor)',
    _scan_op,
    _scan_fake,
)
define(
    "candidate_select(Tensor hidden_states, Tensor probs, Tensor(a!) history, Tensor lengths, Tensor? mask, "
    'float penalty_alpha, bool with_penalty, *, str impl="auto") -> (Tensor, Tensor, Tensor, Tensor)',
    _select,
    _select_fake,
)
register("candidate_scan")
register("candidate_select")
