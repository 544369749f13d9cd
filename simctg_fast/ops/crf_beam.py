"""The operator `simctg_fast::crf_beam_select`: the K best tokens of every position.

A beam is sorted by falling emission, ties by the lower token id, on every backend. Forced tokens come first, in the
order of their ids, whatever their emission is.
"""

from __future__ import annotations

import torch

from . import _backends
from ._autograd import define, register
from .crf_common import BEAM_LIMIT, check_beside, choose
from .dispatch import addresses, contiguous, rows_contiguous

ROWS = 64  # rows that the PyTorch path looks at together: bounds its scratch memory


def crf_beam_select(
    emissions: torch.Tensor,
    beam_size: int,
    lengths: torch.Tensor | None = None,
    forced: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `beam_size` best tokens of every position.

    Args:
        emissions: `(B, T, V)`, floating point. NaN sorts first, so that it shows in the result.
        beam_size: K, at most V.
        lengths: `(B,)` int64; positions beyond are not looked at: slot k holds token k there, with a score of 0.
        forced: `(B, T, F)` int64, F <= K: tokens that must be in the beam; negative: none.

    Returns:
        tokens `(B, T, K)` int64 and their emissions `(B, T, K)`, float32 or float64, not differentiable.
    """
    return torch.ops.simctg_fast.crf_beam_select(emissions, beam_size, lengths, forced, impl=impl)


def _check(emissions: torch.Tensor, beam_size: int, lengths: torch.Tensor | None, forced: torch.Tensor | None) -> None:
    if emissions.dim() != 3 or emissions.shape[1] < 1 or emissions.shape[2] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, vocabulary >= 1)")
    if not emissions.dtype.is_floating_point:
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be floating point")
    if not 1 <= beam_size <= min(emissions.shape[2], BEAM_LIMIT):
        raise ValueError(f"beam_size is {beam_size}, must be in 1..{min(emissions.shape[2], BEAM_LIMIT)}")
    if forced is not None:
        if forced.dim() != 3 or forced.shape[:2] != emissions.shape[:2] or forced.dtype != torch.int64:
            raise ValueError(
                f"forced is {forced.dtype} {tuple(forced.shape)}, must be int64 "
                f"({emissions.shape[0]}, {emissions.shape[1]}, tokens)"
            )
        if forced.shape[2] > beam_size:
            raise ValueError(
                f"forced holds {forced.shape[2]} tokens a position, must be at most the beam's {beam_size}"
            )
    check_beside("emissions", emissions, lengths, forced=forced)


def _result_dtype(emissions: torch.Tensor) -> torch.dtype:
    return torch.float64 if emissions.dtype == torch.float64 else torch.float32


def _fake(emissions, beam_size, lengths=None, forced=None, *, impl="auto"):
    _check(emissions, beam_size, lengths, forced)
    shape = (*emissions.shape[:2], beam_size)
    return emissions.new_empty(shape, dtype=torch.int64), emissions.new_empty(shape, dtype=_result_dtype(emissions))


def _select(emissions, beam_size, lengths=None, forced=None, *, impl="auto"):
    _check(emissions, beam_size, lengths, forced)
    backend = choose(impl, emissions, beam=beam_size)
    if backend == "triton":
        from ..kernels import crf_beam

        tokens, values = crf_beam.beam_select(emissions, beam_size, lengths)
        return _force(tokens, values, emissions, forced)
    if backend == "cpu":
        return _cpu(emissions, beam_size, lengths, forced)
    tokens, values = _torch(emissions, beam_size)
    tokens, values = _force(tokens, values, emissions, forced)
    if lengths is not None:
        beyond = (torch.arange(emissions.shape[1], device=emissions.device) >= lengths[:, None])[:, :, None]
        tokens = torch.where(beyond, torch.arange(beam_size, device=emissions.device), tokens)
        values = values.masked_fill(beyond, 0)
    return tokens, values


def _cpu(emissions, beam_size, lengths, forced):
    emissions = rows_contiguous(emissions)
    shape = (*emissions.shape[:2], beam_size)
    tokens = emissions.new_empty(shape, dtype=torch.int64)
    values = emissions.new_empty(shape, dtype=torch.float32)
    lengths, forced = contiguous(lengths, None if forced is None or forced.shape[2] == 0 else forced)
    _backends.require_extension().crf_beam_select(
        str(emissions.dtype).removeprefix("torch."),
        emissions.data_ptr(),
        tuple(emissions.shape),
        tuple(emissions.stride()[:2]),
        beam_size,
        *addresses(lengths, forced),
        0 if forced is None else forced.shape[2],
        *addresses(tokens, values),
        torch.get_num_threads(),
    )
    return tokens, values


def _torch(emissions: torch.Tensor, beam_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, vocabulary = emissions.shape
    rows = emissions.detach().reshape(batch * length, vocabulary)
    tokens = rows.new_empty((rows.shape[0], beam_size), dtype=torch.int64)
    values = rows.new_empty((rows.shape[0], beam_size))
    for begin in range(0, rows.shape[0], ROWS):
        part = slice(begin, begin + ROWS)
        values[part], tokens[part] = topk_in_order(rows[part], beam_size)
    shape = (batch, length, beam_size)
    return tokens.view(shape), values.view(shape).to(_result_dtype(emissions))


def topk_in_order(rows: torch.Tensor, beam_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of `rows (R, V)`, falling, and their places; of equals the first. torch.topk returns any of several
    equals, in any order."""
    value, token = rows.topk(beam_size, dim=1)
    token, order = token.sort(dim=1)
    value, again = value.gather(1, order).sort(dim=1, descending=True, stable=True)
    token = token.gather(1, again)
    if beam_size < rows.shape[1]:
        last = value[:, -1:]
        # At the edge of the beam every token of the last value competes: those of the lowest ids belong in it.
        wanted = (value == last).sum(1, keepdim=True)
        tied = rows == last
        if bool((tied.sum(1, keepdim=True) > wanted).any()):
            chosen = tied & (tied.cumsum(1) <= wanted)
            keys = torch.where(chosen, torch.arange(rows.shape[1], 0, -1, device=rows.device), 0)
            lowest = rows.shape[1] - keys.topk(beam_size, dim=1).values  # rising token ids, `wanted` of them real
            place = torch.arange(beam_size, device=rows.device) - (beam_size - wanted)
            token = torch.where(place >= 0, lowest.gather(1, place.clamp(min=0)), token)
    return value, token


def _force(tokens, values, emissions, forced):
    """Puts the forced tokens in front; the worst of the others make room."""
    if forced is None or forced.shape[2] == 0:
        return tokens, values
    size = tokens.shape[2]
    vocabulary = emissions.shape[2]
    forced = forced.masked_fill(forced < 0, vocabulary).sort(dim=2).values
    real = forced < vocabulary
    real[..., 1:] &= forced[..., 1:] != forced[..., :-1]
    there = (tokens.unsqueeze(-1) == forced.unsqueeze(-2)).any(-1)
    both = torch.cat([forced.clamp(max=vocabulary - 1), tokens], dim=2)
    keep = torch.cat([real, ~there], dim=2)
    order = (~keep).to(torch.uint8).sort(dim=2, stable=True).indices[..., :size]
    forced_values = emissions.detach().gather(2, both[..., : forced.shape[2]]).to(values.dtype)
    return both.gather(2, order), torch.cat([forced_values, values], dim=2).gather(2, order)


define(
    "crf_beam_select(Tensor emissions, int beam_size, Tensor? lengths=None, Tensor? forced=None, *, "
    'str impl="auto") -> (Tensor, Tensor)',
    _select,
    _fake,
)
register("crf_beam_select")
