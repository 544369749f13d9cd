"""The forward filters of the low-rank CRF, log-sum-exp and max, and the way back along the pointers.

One program an item walks through its positions; the transitions of a step are formed tile by tile with `tl.dot` and
consumed at once, so the (T, K, K) tensor never exists. Messages go through global memory, where the next step finds
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .crf_common import as_lengths, exp_or_zero, power, precision, transitions


@triton.jit(do_not_specialize=["T"])
def _filter_kernel(
    scores_ptr, tokens_ptr, left_ptr, right_ptr, lengths_ptr,  # [B, T, K], [B, T, K], [V, D], [V, D], [B]
    messages_ptr, norms_ptr, pointers_ptr, last_ptr,  # [B, T, K], [B, T], [B, T, K], [B]
    scale, T, K, D,
    HAS_LENGTHS: tl.constexpr, MAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    norm = 0.0
    for t in range(T):
        base = (b * T + t) * K
        here = t < length
        if t == 0:
            for j0 in range(0, K, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                tl.store(messages_ptr + base + j, tl.zeros([BLOCK_J], tl.float32), mask=j < K)
                if MAX:
                    tl.store(pointers_ptr + base + j, tl.zeros([BLOCK_J], tl.int32), mask=j < K)
        else:
            before = base - K
            for j0 in range(0, K, BLOCK_J):
                j = j0 + tl.arange(0, BLOCK_J)
                top = tl.full([BLOCK_J], -1e30, tl.float32)
                total = tl.zeros([BLOCK_J], tl.float32)
                best = tl.zeros([BLOCK_J], tl.int32)
                for k0 in range(0, K, BLOCK_K):
                    k = k0 + tl.arange(0, BLOCK_K)
                    alpha = tl.load(messages_ptr + before + k, mask=k < K, other=0.0)
                    alpha += tl.load(scores_ptr + before + k, mask=k < K, other=-float("inf")) - norm
                    x = alpha[:, None] + transitions(
                        tokens_ptr, left_ptr, right_ptr, before, k, j, scale, K, D, BLOCK_D, PRECISION
                    )  # [BLOCK_K, BLOCK_J]
                    high = tl.max(x, axis=0)
                    if MAX:
                        first = tl.argmax(x, axis=0, tie_break_left=True)
                        best = tl.where(high > top, k0 + first, best)
                        top = tl.maximum(top, high)
                    else:
                        higher = tl.maximum(top, high)
                        total = total * exp_or_zero(top - higher) + tl.sum(exp_or_zero(x - higher[None, :]), axis=0)
                        top = higher
                if MAX:
                    tl.store(pointers_ptr + base + j, tl.where(here, best, 0), mask=j < K)
                    message = top
                else:
                    message = top + tl.log(total)
                tl.store(messages_ptr + base + j, tl.where(here, message, 0.0), mask=j < K)
        tl.debug_barrier()  # messages written by some threads are read by others
        if here:
            norm = -float("inf")
            slot = 0
            for k0 in range(0, K, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                x = tl.load(messages_ptr + base + k, mask=k < K, other=0.0)
                x += tl.load(scores_ptr + base + k, mask=k < K, other=-float("inf"))
                high = tl.max(x, axis=0)
                if MAX:
                    first = tl.argmax(x, axis=0, tie_break_left=True)
                    slot = tl.where(high > norm, k0 + first, slot)
                norm = tl.maximum(norm, high)
            tl.store(norms_ptr + b * T + t, norm)
            if MAX:
                tl.store(last_ptr + b, slot.to(tl.int64))
        else:
            tl.store(norms_ptr + b * T + t, 0.0)


@triton.jit(do_not_specialize=["T"])
def _backtrace_kernel(pointers_ptr, last_ptr, lengths_ptr, path_ptr, T, K, HAS_LENGTHS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    slot = tl.load(last_ptr + b)
    for step in range(T):
        t = T - 1 - step
        here = t < length
        tl.store(path_ptr + b * T + t, tl.where(here, slot, -1))
        before = tl.load(pointers_ptr + (b * T + t) * K + slot).to(tl.int64)
        slot = tl.where(here, before, slot)


def config(beam: int) -> dict[str, int]:
    """How the filter is launched, whatever the rank."""
    side = power(beam)
    return {
        "BLOCK_K": min(128, side),
        "BLOCK_J": min(32, side),
        "BLOCK_D": 32,
        "num_warps": 8,
        "num_stages": 1,
        "maxnreg": 255,
    }


def _launch(scores, tokens, left, right, lengths, scale, messages, norms, pointers, last, maximum: bool) -> None:
    batch, length, beam = scores.shape
    rank = left.shape[1]
    lengths, has_lengths = as_lengths(lengths, tokens)
    if batch == 0:
        return
    with torch.cuda.device_of(scores):
        _filter_kernel[(batch,)](
            scores, tokens, left, right, lengths, messages, norms, pointers, last, scale, length, beam, rank,
            HAS_LENGTHS=has_lengths, MAX=maximum, PRECISION=precision(), **config(beam),
        )  # fmt: skip


def filter_forward(scores, tokens, left, right, lengths, scale):
    """`messages (B, T, K)` and `norms (B, T)`, fp32; everything contiguous."""
    messages, norms = torch.empty_like(scores), scores.new_empty(scores.shape[:2])
    _launch(scores, tokens, left, right, lengths, scale, messages, norms, tokens, tokens, False)
    return messages, norms


def max_forward(scores, tokens, left, right, lengths):
    """Back-pointers `(B, T, K)`, uint8 or uint16, and the best last slot `(B,)`, int64."""
    messages, norms = torch.empty_like(scores), scores.new_empty(scores.shape[:2])
    dtype = torch.uint8 if scores.shape[2] <= 256 else torch.uint16
    pointers = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    last = torch.zeros(scores.shape[:1], dtype=torch.int64, device=scores.device)
    _launch(scores, tokens, left, right, lengths, 1.0, messages, norms, pointers, last, True)
    return pointers, last


def backtrace(pointers, last, lengths):
    """`(B, T)` int64: the slots of each path, -1 beyond the lengths."""
    batch, length, beam = pointers.shape
    path = torch.empty((batch, length), dtype=torch.int64, device=pointers.device)
    lengths, has_lengths = as_lengths(lengths, last)
    if batch:
        with torch.cuda.device_of(pointers):
            _backtrace_kernel[(batch,)](
                pointers, last, lengths, path, length, beam, HAS_LENGTHS=has_lengths, num_warps=1
            )
    return path
