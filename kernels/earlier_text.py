"""The newest states of a text against those that tokens followed which may come next.

A program takes a share of a text's positions. Where none of the tokens that are weighed stands among a tile of them,
which is nearly everywhere, no state is read. Maxima travel as integers with their places, so the result depends on no
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._decode import DTYPE_NAMES, DTYPES, multiprocessors, ranked, ranked_index, ranked_value
from ._launch import last_dimension_contiguous, on

PICK_LIMIT = 64
WIDTH_LIMIT = 16384
BLOCK_T, BLOCK_D, NUM_WARPS, REGISTERS = 32, 128, 4, 168
_SPLIT_LIMIT = 64
_NOTHING = tl.constexpr(-9223372036854775808)


@triton.jit(do_not_specialize=["stride_tb", "starts_ptr", "k", "capacity"])
def follower_scan_kernel(
    history_ptr, stride_hb, stride_ht,  # [B, capacity, D]
    tokens_ptr, stride_tb,  # [B, at least capacity]
    picks_ptr,  # [B, k]
    lengths_ptr, starts_ptr, orders_ptr,  # [B]
    norms_ptr, stride_nb,  # [B, capacity]
    partial_ptr,  # [B, splits, BLOCK_K]
    k, width, capacity,
    HAS_STARTS: tl.constexpr, LONGEST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sequence and share of its positions. LONGEST: the largest order; above 2 the states' lengths count."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    history_ptr += b * stride_hb
    tokens_ptr += b * stride_tb
    norms_ptr += b * stride_nb
    end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), capacity)
    begin = end * 0
    if HAS_STARTS:
        begin = tl.maximum(tl.load(starts_ptr + b).to(tl.int32), 0)
    context = tl.load(orders_ptr + b).to(tl.int32) - 1
    candidate = tl.arange(0, BLOCK_K)
    picks = tl.load(picks_ptr + b * k + candidate, mask=candidate < k, other=-1)
    best = tl.full((BLOCK_K,), _NOTHING, tl.int64)
    # How many of the newest positions are no text, and their length as one vector.
    missing = tl.where(end - begin > context, 0, 1)
    own = 0.0
    for back in tl.static_range(LONGEST - 1):
        at = tl.maximum(end - 1 - back, 0)
        last = tl.where(context > back, tl.load(tokens_ptr + at), 0)
        missing += tl.where(last < 0, 1, 0)
        if LONGEST > 2:
            mine = tl.load(norms_ptr + at)
            own += tl.where(context > back, mine * mine, 0.0)
    begin = tl.where(missing > 0, end, begin)
    share = tl.cdiv(tl.cdiv(end, BLOCK_T), splits) * BLOCK_T
    first = split * share
    for t0 in range(first, tl.minimum(first + share, end), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        here = (t < end) & (t >= begin + context)
        token = tl.load(tokens_ptr + t, mask=here, other=-1)
        here = here & (token >= 0)
        match = (picks[:, None] == token[None, :]) & here[None, :]
        if tl.max(tl.max(match.to(tl.int32), axis=1), axis=0) > 0:
            product = tl.zeros((BLOCK_T,), tl.float32)
            size = tl.zeros((BLOCK_T,), tl.float32)
            for back in tl.static_range(LONGEST - 1):
                wanted = here & (tl.full((BLOCK_T,), back, tl.int32) < context)
                then = t - 1 - back
                here = here & (tl.load(tokens_ptr + then, mask=wanted, other=0) >= 0)
                now_at = history_ptr + tl.maximum(end - 1 - back, 0).to(tl.int64) * stride_ht
                then_at = history_ptr + tl.where(wanted, then, 0).to(tl.int64) * stride_ht
                cosine = tl.zeros((BLOCK_T,), tl.float32)
                for d0 in range(0, width, BLOCK_D):
                    d = d0 + tl.arange(0, BLOCK_D)
                    inside = d < width
                    newest = tl.load(now_at + d, mask=inside, other=0.0).to(tl.float32)
                    earlier = tl.load(
                        then_at[:, None] + d[None, :], mask=wanted[:, None] & inside[None, :], other=0.0
                    ).to(tl.float32)
                    cosine += tl.sum(newest[None, :] * earlier, axis=1)
                if LONGEST > 2:
                    r = tl.load(norms_ptr + then, mask=wanted, other=0.0)
                    cosine *= r * tl.load(norms_ptr + tl.maximum(end - 1 - back, 0))
                    size += r * r
                product += tl.where(wanted, cosine, 0.0)
            if LONGEST > 2:
                product = product / tl.maximum(tl.sqrt_rn(size) * tl.sqrt_rn(own), 1e-24)
            entry = ranked(product, t)
            entry = tl.where(match & here[None, :], entry[None, :], _NOTHING)
            best = tl.maximum(best, tl.max(entry, axis=1))
    tl.store(partial_ptr + (b * splits + split) * BLOCK_K + candidate, best)


@triton.jit
def follower_finish_kernel(
    partial_ptr, penalty_ptr, position_ptr, splits, k, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Of a sequence's shares the largest: penalties in [0, 1], and their places."""
    b = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S)[:, None]
    part = tl.load(partial_ptr + (b * splits + s) * BLOCK_K + candidate[None, :], mask=s < splits, other=_NOTHING)
    best = tl.max(part, axis=0)
    none = best == _NOTHING
    value = ranked_value(best)
    clipped = tl.minimum(tl.maximum(value, 0.0), 1.0)
    penalty = tl.where(none, 0.0, tl.where(value == value, clipped, value))
    tl.store(penalty_ptr + b * k + candidate, penalty, mask=candidate < k)
    tl.store(position_ptr + b * k + candidate, tl.where(none, -1, ranked_index(best)), mask=candidate < k)


def obstacle(history: Tensor, picks: Tensor) -> str | None:
    """What keeps these operands (wherever they are) from the kernel."""
    width, k = history.shape[2], picks.shape[1]
    if history.dtype in DTYPES and 1 <= k <= PICK_LIMIT and 1 <= width <= WIDTH_LIMIT:
        return None
    return (
        f"takes up to {PICK_LIMIT} picks and states of width up to {WIDTH_LIMIT} in {DTYPE_NAMES}, got picks "
        f"{tuple(picks.shape)} and a history {tuple(history.shape)} of {history.dtype}"
    )


def plan(device: torch.device, batch: int, capacity: int) -> int:
    """Shares of each text."""
    wanted = 4 * multiprocessors(device) // max(1, batch)
    return max(1, min(wanted, triton.cdiv(capacity, BLOCK_T), _SPLIT_LIMIT))


def follower_scan(
    history: Tensor, tokens: Tensor, picks: Tensor, lengths: Tensor, starts: Tensor | None, orders: Tensor,
    norms: Tensor | None, longest: int,
):  # fmt: skip
    """``penalty (B, k)`` float32 and ``position (B, k)`` int64; see `simctg_fast/ops/earlier_text.py`."""
    history, tokens = last_dimension_contiguous(history), last_dimension_contiguous(tokens)
    batch, capacity, width = history.shape
    k = picks.shape[1]
    penalty = picks.new_empty((batch, k), dtype=torch.float32)
    position = picks.new_empty((batch, k))
    if batch == 0:
        return penalty, position
    splits, block_k = plan(history.device, batch, capacity), triton.next_power_of_2(k)
    partial = picks.new_empty((batch * splits * block_k,))
    norms = None if norms is None else last_dimension_contiguous(norms)
    with on(history):
        follower_scan_kernel[(batch, splits)](
            history, history.stride(0), history.stride(1), tokens, tokens.stride(0), picks.contiguous(),
            lengths.contiguous(), lengths if starts is None else starts.contiguous(), orders.contiguous(),
            history if norms is None else norms, 0 if norms is None else norms.stride(0), partial, k, width, capacity,
            HAS_STARTS=starts is not None, LONGEST=max(2, longest), BLOCK_K=block_k, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS, maxnreg=REGISTERS,
        )  # fmt: skip
        follower_finish_kernel[(batch,)](
            partial, penalty, position, splits, k, BLOCK_S=triton.next_power_of_2(splits), BLOCK_K=block_k, num_warps=1
        )
    return penalty, position
