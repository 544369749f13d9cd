"""Candidates of contrastive search against the history of hidden states: one launch scores, chooses and appends.

A program holds all candidates of a sequence against a share of its history. The candidates go through the product as
they are, and the cosines are divided by their norms afterwards, so half-precision states are not rounded a second time.
The largest cosine and its position travel as one integer, whose maximum depends on no order. The program that arrives
last forms ``(1 − alpha) · p − alpha · max``, takes the best, and appends its normalised state behind the row's history,
where no program of this launch reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._decode import DTYPE_NAMES, DTYPES, counters, last_to_arrive, multiprocessors, ranked, ranked_index, ranked_value
from ._launch import architecture, last_dimension_contiguous, on, precise

CANDIDATE_LIMIT = 64
WIDTH_LIMIT = 16384
_SPLIT_LIMIT = 128  # a power of two
_PROGRAMS_EACH = 4  # on a multiprocessor at a time
_NOTHING = tl.constexpr(-2139095041 * 4294967296 + 4294967295)  # ranked(−inf, 0)


@dataclass(frozen=True)
class Config:
    """Positions and channels of a tile of the history, warps, stages of the pipeline, and the most registers of a
    thread; None: ptxas weighs them against blocks on a multiprocessor, and may spill a few bytes for one more."""

    block_t: int
    block_d: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# (architecture, bytes of an element of the product): up to 16 candidates
CONFIGS = {
    (80, 2): Config(32, 64, 4, 4, 128),
    (80, 4): Config(32, 32, 4, 3, 128),
    (90, 2): Config(32, 128, 4, 5, 128),
    (90, 4): Config(32, 64, 4, 5),
}
CONFIGS |= {(100, *key[1:]): config for key, config in CONFIGS.items() if key[0] == 90}
# More candidates need the registers of twice the warps, and float32 shallower pipelines.
WIDE = {
    (80, 2): Config(32, 64, 8, 4, 128),
    (80, 4): Config(32, 64, 8, 3),
    (90, 2): Config(32, 128, 8, 5, 128),
    (90, 4): Config(32, 64, 8, 5),
    (100, 2): Config(32, 128, 8, 5, 128),
    (100, 4): Config(32, 64, 8, 3),
}
_WIDEST = {(100, 2): Config(32, 128, 8, 5, 255)}  # 64 candidates, where one block fills the shared memory
# tf32x3 holds three products' operands.
_THREEFOLD = {80: Config(32, 32, 4, 3, 128), 90: Config(32, 64, 4, 5, 255), 100: Config(32, 64, 4, 5, 255)}
_WIDE_THREEFOLD = Config(16, 32, 8, 4, 255)
_WIDE_MIXED = Config(16, 64, 8, 3, 255)  # half-precision states need 64 channels for loads of 128 bits
# Widths that are no multiple of 16 are read an element at a time.
_UNALIGNED, _UNALIGNED_WIDE = Config(32, 16, 4, 1, 128), Config(16, 16, 4, 2, 255)


def config_of(arch: int, size: int, width: int, block_k: int, exact: bool, mixed: bool) -> Config:
    """``size``: bytes of an element of the product; ``exact``: no tf32x3; ``mixed``: states and history differ in
    dtype."""
    if width % 16:
        return _UNALIGNED if block_k == 16 else _UNALIGNED_WIDE
    if block_k == 16:
        return CONFIGS[arch, size] if exact else _THREEFOLD[arch]
    if not exact:
        return _WIDE_MIXED if mixed else _WIDE_THREEFOLD
    return _WIDEST.get((arch, size), WIDE[arch, size]) if block_k == 64 else WIDE[arch, size]


@triton.jit
def _finish(
    best, b, end, states_ptr, stride_sk, history_ptr, stride_ht, probs_ptr, selected_ptr, winner_ptr, penalty_ptr,
    position_ptr, penalty_alpha, k, width, capacity,
    SELECT: tl.constexpr, KEEP: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of the ranked maxima [BLOCK_K] of sequence b: penalties out, winner chosen, its state copied and appended.
    `states_ptr` and `history_ptr` point at the sequence."""
    candidate = tl.arange(0, BLOCK_K)
    valid = candidate < k
    penalty = ranked_value(best)
    if KEEP:
        tl.store(penalty_ptr + b * k + candidate, penalty, mask=valid)
        tl.store(position_ptr + b * k + candidate, ranked_index(best), mask=valid)
    if SELECT:
        p = tl.load(probs_ptr + b * k + candidate, mask=valid, other=0.0)
        score = (1.0 - penalty_alpha) * p - penalty_alpha * penalty
        score = tl.where((p == 0.0) | (score != score), float("-inf"), score)
        top = tl.max(tl.where(valid, score, float("-inf")), axis=0)
        p = tl.where(p == p, p, -1.0)
        tie = valid & (score == top)
        likely = tl.max(tl.where(tie, p, -2.0), axis=0)
        winner = tl.min(tl.where(tie & (p == likely), candidate, BLOCK_K), axis=0).to(tl.int64)
        tl.store(selected_ptr + b, winner)
        state_at = states_ptr + winner * stride_sk
        squares = tl.zeros((BLOCK_D,), tl.float32)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = d < width
            state = tl.load(state_at + d) if EVEN else tl.load(state_at + d, mask=inside, other=0.0)
            squares += state.to(tl.float32) * state.to(tl.float32)
        inverse = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), 1e-12)
        new_at = history_ptr + end.to(tl.int64) * stride_ht
        room = tl.where(end < capacity, width, 0)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            inside = d < width
            state = tl.load(state_at + d) if EVEN else tl.load(state_at + d, mask=inside, other=0.0)
            tl.store(winner_ptr + b * width + d, state, mask=inside)
            unit = (state.to(tl.float32) * inverse).to(history_ptr.dtype.element_ty)
            tl.store(new_at + d, unit, mask=d < room)


# What moves from step to step or call to call must not compile anew: k, lengths, and what grows with the buffers.
@triton.jit(do_not_specialize=["mask_ptr", "stride_mb", "lengths_ptr", "length", "splits", "k", "capacity"])
def candidate_select_kernel(
    states_ptr, stride_sb, stride_sk,  # [B, k, D]
    history_ptr, stride_hb, stride_ht,  # [B, capacity, D]
    mask_ptr, stride_mb,  # [B, capacity], 0: no real position
    lengths_ptr,  # [B]
    probs_ptr,  # [B, k]
    partial_ptr, counter_ptr,  # [B, splits, BLOCK_K], [B]
    selected_ptr, winner_ptr, penalty_ptr, position_ptr,  # [B], [B, D], [B, k], [B, k]
    penalty_alpha, length, splits, k, width, capacity,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, SELECT: tl.constexpr, KEEP: tl.constexpr, WIDEN: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sequence and share of its history. WIDEN: states and history differ in dtype and meet in float32. EVEN: BLOCK_D
    divides the width."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    states_ptr += b * stride_sb
    history_ptr += b * stride_hb
    end = length
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + b).to(tl.int32)
        end = tl.minimum(tl.maximum(end, 0), capacity)
    share = tl.cdiv(tl.cdiv(end, BLOCK_T), splits) * BLOCK_T
    first = split * share
    candidate = tl.arange(0, BLOCK_K)
    valid = candidate < k
    state_at = states_ptr + tl.where(valid, candidate, 0).to(tl.int64) * stride_sk
    best = tl.full((BLOCK_K,), _NOTHING, tl.int64)
    for t0 in range(first, tl.minimum(first + share, end), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = t < end
        row_at = history_ptr + tl.where(seen, t, 0).to(tl.int64) * stride_ht
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + b * stride_mb + t, mask=seen, other=0) != 0)
        acc = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            if EVEN:
                states = tl.load(state_at[:, None] + d[None, :], mask=valid[:, None], other=0.0)
                rows = tl.load(row_at[:, None] + d[None, :], mask=seen[:, None], other=0.0)
            else:
                inside = (d < width)[None, :]
                states = tl.load(state_at[:, None] + d[None, :], mask=valid[:, None] & inside, other=0.0)
                rows = tl.load(row_at[:, None] + d[None, :], mask=seen[:, None] & inside, other=0.0)
            wide = states.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            if WIDEN:
                acc = tl.dot(wide, tl.trans(rows.to(tl.float32)), acc, input_precision=PRECISION)
            else:
                acc = tl.dot(states, tl.trans(rows), acc, input_precision=PRECISION)
        inverse = 1.0 / tl.maximum(tl.sqrt_rn(squares), 1e-12)
        entry = ranked(acc * inverse[:, None], tl.broadcast_to(t[None, :], (BLOCK_K, BLOCK_T)))
        best = tl.maximum(best, tl.max(tl.where(seen[None, :], entry, _NOTHING), axis=1))
    if SPLIT:
        part_at = partial_ptr + b * splits * BLOCK_K
        tl.store(part_at + split * BLOCK_K + candidate, best)
        if last_to_arrive(counter_ptr + b, splits):
            s = tl.arange(0, BLOCK_S)[:, None]
            part = tl.load(part_at + s * BLOCK_K + candidate[None, :], mask=s < splits, other=_NOTHING)
            best = tl.max(part, axis=0)
            _finish(
                best, b, end, states_ptr, stride_sk, history_ptr, stride_ht, probs_ptr, selected_ptr, winner_ptr,
                penalty_ptr, position_ptr, penalty_alpha, k, width, capacity, SELECT, KEEP, EVEN, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    else:
        _finish(
            best, b, end, states_ptr, stride_sk, history_ptr, stride_ht, probs_ptr, selected_ptr, winner_ptr,
            penalty_ptr, position_ptr, penalty_alpha, k, width, capacity, SELECT, KEEP, EVEN, BLOCK_K, BLOCK_D,
        )  # fmt: skip


def plan(device: torch.device, batch: int, capacity: int, block_t: int) -> int:
    """Shares of each history: as many programs as fit the multiprocessors, none without a tile."""
    wanted = _PROGRAMS_EACH * multiprocessors(device) // max(1, batch)
    return max(1, min(wanted, triton.cdiv(capacity, block_t), _SPLIT_LIMIT))


def obstacle(hidden_states: Tensor, history: Tensor) -> str | None:
    """What keeps these operands (wherever they are) from the kernel."""
    _, k, width = hidden_states.shape
    dtypes = hidden_states.dtype in DTYPES and history.dtype in DTYPES
    if dtypes and 1 <= k <= CANDIDATE_LIMIT and 1 <= width <= WIDTH_LIMIT:
        return None
    return (
        f"takes up to {CANDIDATE_LIMIT} candidates of width up to {WIDTH_LIMIT} in {DTYPE_NAMES}, got hidden_states "
        f"{tuple(hidden_states.shape)} of {hidden_states.dtype} and a history of {history.dtype}"
    )


def _launch(hidden_states, history, length, lengths, mask, probs, penalty_alpha, keep):
    states = last_dimension_contiguous(hidden_states)
    batch, k, width = states.shape
    capacity = history.shape[1]
    if history.stride(-1) != 1 and width > 1:
        raise ValueError(f"history has strides {history.stride()}, the last must be 1")
    widen = states.dtype != history.dtype
    size = 4 if widen else history.element_size()
    block_k = max(16, triton.next_power_of_2(k))
    exact = size == 2 or precise()
    config = config_of(architecture(states.device), size, width, block_k, exact, widen)
    # Under a capture the length moves while the launch stays, so the split follows the capacity.
    splits = plan(states.device, batch, capacity if lengths is not None else max(1, length), config.block_t)
    select = probs is not None
    penalty = states.new_empty((batch, k) if keep else (0,), dtype=torch.float32)
    position = states.new_empty((batch, k) if keep else (0,), dtype=torch.int64)
    selected = states.new_empty((batch,) if select else (0,), dtype=torch.int64)
    winner = states.new_empty((batch, width) if select else (0,))
    partial = states.new_empty((batch * splits * block_k,) if splits > 1 else (0,), dtype=torch.int64)
    counter = counters(states.device, batch) if splits > 1 else partial
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    if batch == 0:
        return selected, winner, penalty, position
    with on(states):
        candidate_select_kernel[(batch, splits)](
            states, states.stride(0), states.stride(1), history, history.stride(0), history.stride(1),
            states if mask is None else mask, 0 if mask is None else mask.stride(0),
            states if lengths is None else lengths.contiguous(),
            states if probs is None else probs.float().contiguous(),
            partial, counter, selected, winner, penalty, position,
            float(penalty_alpha), length, splits, k, width, capacity,
            HAS_MASK=mask is not None, HAS_LENGTHS=lengths is not None, SELECT=select, KEEP=keep, WIDEN=widen,
            EVEN=width % config.block_d == 0,
            PRECISION="ieee" if exact else "tf32x3",
            SPLIT=splits > 1, BLOCK_S=_SPLIT_LIMIT, BLOCK_K=block_k,
            BLOCK_T=config.block_t, BLOCK_D=config.block_d, num_warps=config.num_warps, num_stages=config.num_stages,
            maxnreg=config.registers,
        )  # fmt: skip
    return selected, winner, penalty, position


def candidate_scan(hidden_states: Tensor, history: Tensor, length: int, mask: Tensor | None, lengths: Tensor | None):
    """``penalty (B, k)`` float32 and ``position (B, k)`` int64; see `simctg_fast/ops/candidate_select.py`."""
    return _launch(hidden_states, history, length, lengths, mask, None, 0.0, True)[2:]


def candidate_select(
    hidden_states: Tensor, probs: Tensor, history: Tensor, lengths: Tensor, mask: Tensor | None, penalty_alpha: float,
    keep: bool,
):  # fmt: skip
    """``selected (B,)``, ``winner (B, D)``, and penalty and position if `keep` (else empty); appends to `history`."""
    return _launch(hidden_states, history, 0, lengths, mask, probs, penalty_alpha, keep)
