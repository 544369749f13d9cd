"""Cosines of candidates with the history of hidden states, both less the mean of that history.

States of a model may share most of their direction (mean cosines of .98 are common), and what tells them apart is lost
where that is rounded. So the history is kept less a shift c near its mean, taken out before anything is rounded: with
g_j = h_j − c, g = h − c, n positions and m = Σ g_j / n the cosine of h − μ and h_j − μ is ::

    (g·g_j − m·g − m·g_j + m·m) / √((|g|² − 2 m·g + m·m) (|g_j|² − 2 m·g_j + m·m))

in which one rounded m stands everywhere: one more row that is held against the history.
"""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register
from .dispatch import NOT_TAKEN, address, choose, float32_obstacle, is_deferred, lengths_obstacle, widened

FEWEST = 3  # real positions with a mean that says anything
ROUNDING = 2.0**-16  # of what is subtracted from each other, what may be left of it by rounding


def centered_scan(
    hidden_states: torch.Tensor,
    shift: torch.Tensor,
    history: torch.Tensor,
    squares: torch.Tensor,
    sums: torch.Tensor,
    length: int,
    mask: torch.Tensor | None = None,
    impl: str = "auto",
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest cosine of every candidate with the history, both less the history's mean, and where it is.

    Args:
        hidden_states: ``(B, k, D)`` raw last-layer states of the candidates, any float dtype.
        shift: ``(B, D)``, near the mean of the row's states.
        history: ``(B, T_max, D)`` states of earlier positions less ``shift``. Candidates are rounded to its dtype, when
            the shift is out of them, and so is the mean.
        squares: ``(B, T_max)`` float32, of the lengths of ``history``.
        sums: ``(B, D)`` float32, of ``history`` over the real positions in use.
        length: number of positions of ``history`` in use, at most.
        mask: ``(B, T_max)`` bool, True for real (unpadded) positions; ``None`` when all are real.
        impl: ``"auto"``, ``"cpu"`` (C++), ``"triton"`` (CUDA) or ``"torch"``.
        lengths: ``(B,)`` int64, positions in use in each row, each at most ``length``; ``None``: ``length`` in all.

    Returns:
        ``penalty (B, k)``, float32 (float64 for float64 states), within −1 … 1, and ``position (B, k)`` int64 (the
        earliest on ties). A state that is the mean up to rounding has cosine 0. In a row with fewer than 3 real
        positions both are 0. NaN propagates, but where there is no real position.

    Raises:
        ValueError: an unknown ``impl``, or one that does not take these operands. RuntimeError: an ``impl`` that this
            installation lacks.
    """
    centered = (hidden_states, shift, history, squares, sums)
    if is_deferred(impl):
        return torch.ops.simctg_fast.centered_scan(*centered, length, mask, lengths, impl=impl)
    chosen = _resolve(impl, *centered, mask)
    if chosen == "triton":
        from simctg_fast.kernels import centered_scan as kernels

        return kernels.centered_scan(*centered, length, mask, lengths)
    return (_scan_cpu if chosen == "cpu" else _scan_torch)(*centered, length, mask, lengths)


def _resolve(impl, hidden_states, shift, history, squares, sums, mask):
    def triton() -> str | None:
        from simctg_fast.kernels import centered_scan as kernels

        return kernels.obstacle(hidden_states, shift, history, squares, sums)

    def cpu() -> str | None:
        others = {"shift": shift, "history": history, "squares": squares, "sums": sums}
        return float32_obstacle(mask, hidden_states=widened(hidden_states), **others)

    return choose(impl, hidden_states.device, cpu=cpu, triton=triton)


def _scan_cpu(hidden_states, shift, history, squares, sums, length, mask, lengths):
    """One pass over the history in C++."""
    hidden_states = widened(hidden_states)
    batch, candidates, dim = hidden_states.shape
    problem = lengths_obstacle(batch, lengths=lengths)
    for name, tensor, of_positions in (
        ("history", history, (dim,)), ("squares", squares, ()), ("mask", mask, ()),
    ):  # fmt: skip
        if tensor is not None and (
            tensor.shape[0] != batch or tensor.shape[1] < length or tuple(tensor.shape[2:]) != of_positions
        ):
            wanted = ", ".join(map(str, (batch, f"at least {length}", *of_positions)))
            problem = f"{name} has shape {tuple(tensor.shape)}, must be ({wanted})"
    for name, tensor in (("shift", shift), ("sums", sums)):
        if tuple(tensor.shape) != (batch, dim):
            problem = f"{name} has shape {tuple(tensor.shape)}, must be ({batch}, {dim})"
    if problem is not None:
        raise ValueError(f"impl='cpu' {NOT_TAKEN}{problem}")
    lengths = None if lengths is None else lengths.contiguous()
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    penalty = hidden_states.new_empty((batch, candidates))
    position = hidden_states.new_empty((batch, candidates), dtype=torch.int64)
    _backends.require_extension().centered_scan(
        (batch, candidates, dim, length),
        (hidden_states.data_ptr(), hidden_states.stride(0), hidden_states.stride(1)),
        (shift.data_ptr(), shift.stride(0)),
        (history.data_ptr(), history.stride(0), history.stride(1)),
        (squares.data_ptr(), squares.stride(0)),
        (sums.data_ptr(), sums.stride(0)),
        address(lengths),
        (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0)),
        penalty.data_ptr(),
        position.data_ptr(),
        torch.get_num_threads(),
    )
    return penalty, position


def _scan_torch(hidden_states, shift, history, squares, sums, length, mask, lengths):
    precise = torch.promote_types(hidden_states.dtype, torch.float32)
    seen = torch.ones(history.shape[0], length, dtype=torch.bool, device=history.device)
    if mask is not None:
        seen = mask[:, :length].bool()
    if lengths is not None:
        seen = seen & (torch.arange(length, device=seen.device) < lengths[:, None])
    count = seen.sum(dim=-1)[:, None, None]  # (B, 1, 1)
    mean = (sums / count[:, 0].clamp_min(1)).to(history.dtype).to(precise)[:, None]  # (B, 1, D)
    g = (hidden_states.to(precise) - shift[:, None].to(precise)).to(history.dtype).to(precise)
    # Sums in at least float32: their differences are what counts.
    products = torch.matmul(torch.cat([g, mean], dim=1), history[:, :length].to(precise).mT)  # (B, k + 1, length)
    products, of_history = products[:, :-1], products[:, -1:]
    mean_square, with_mean = mean.square().sum(dim=-1, keepdim=True), (g * mean).sum(dim=-1, keepdim=True)
    inverse = _inverse_length(g.square().sum(dim=-1, keepdim=True), with_mean, mean_square)  # (B, k, 1)
    inverses = _inverse_length(squares[:, None, :length].to(precise), of_history, mean_square)  # (B, 1, length)
    cosine = (products - with_mean + (mean_square - of_history)) * inverse * inverses
    cosine = cosine.clamp(-1, 1).masked_fill(~seen[:, None], float("-inf"))
    penalty, position = cosine.max(dim=-1)
    few = (count < FEWEST)[..., 0]
    penalty = torch.where(few, torch.where(count[..., 0] == 0, 0.0, penalty - penalty), penalty)  # NaN stays
    return penalty, position.masked_fill(few, 0)


def _inverse_length(square, with_mean, mean_square):
    """``1 / |x − m|`` of ``|x|²``, ``m·x`` and ``|m|²``: 0 where rounding is all that is left, NaN where it is not
    finite."""
    left = square - 2 * with_mean + mean_square
    return torch.where(left > ROUNDING * (square + mean_square), left.rsqrt(), left - left)


def _scan_op(hidden_states, shift, history, squares, sums, length, mask, lengths=None, *, impl="auto"):
    return centered_scan(hidden_states, shift, history, squares, sums, length, mask, impl, lengths)


def _scan_fake(hidden_states, shift, history, squares, sums, length, mask, lengths=None, *, impl="auto"):
    shape, dtype = hidden_states.shape[:2], torch.promote_types(hidden_states.dtype, torch.float32)
    return hidden_states.new_empty(shape, dtype=dtype), hidden_states.new_empty(shape, dtype=torch.int64)


define(
    "centered_scan(Tensor hidden_states, Tensor shift, Tensor history, Tensor squares, Tensor sums, int length, "
    'Tensor? mask, Tensor? lengths=None, *, str impl="auto") -> (Tensor, Tensor)',
    _scan_op,
    _scan_fake,
)
register("centered_scan")
