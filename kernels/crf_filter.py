"""The forward filters of the low-rank CRF, log-sum-exp and max, and the way back along the pointers.

One program an item walks through its positions and reads the transitions of a step, formed before (`crf_transitions`),
column by column. Messages go through global memory, where the next step finds them. The sums are those of exponentials
below each column's own largest term, so neither the range of a transition nor that of a score loses a path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import crf_transitions
from .crf_common import as_lengths, exp_or_zero, length_of, power, registers


@triton.jit(do_not_specialize=["T", "item", "first", "STEPS"])
def _filter_kernel(
    tiles_ptr, scores_ptr, lengths_ptr,  # [items, STEPS, K, WIDE], [B, T, K], [B]
    messages_ptr, norms_ptr, pointers_ptr, last_ptr,  # [B, T, K], [B, T], [B, T, K], [B]
    item, first, STEPS, T, K, WIDE,
    HAS_LENGTHS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Positions first + 1 … first + STEPS of an item, and position 0 where first is 0."""
    own = tl.program_id(0).to(tl.int64)
    b = item + own
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    if first == 0:
        base = b * T * K
        tl.store(messages_ptr + base + k, tl.zeros([BLOCK_K], tl.float32), mask=inside)
        x = tl.load(scores_ptr + base + k, mask=inside, other=-float("inf"))
        tl.store(norms_ptr + b * T, tl.where(length > 0, tl.max(x, axis=0), 0.0))
        if MAX:
            tl.store(pointers_ptr + base + k, tl.zeros([BLOCK_K], tl.int32), mask=inside)
            tl.store(last_ptr + b, tl.argmax(x, axis=0, tie_break_left=True).to(tl.int64))
        tl.debug_barrier()
    for step in range(STEPS):
        t = first + 1 + step
        base = (b * T + t) * K
        if t < length:
            before = base - K
            alpha = tl.load(messages_ptr + before + k, mask=inside, other=0.0)
            alpha += tl.load(scores_ptr + before + k, mask=inside, other=-float("inf"))
            alpha -= tl.load(norms_ptr + b * T + t - 1)
            rows_ptr = tiles_ptr + ((own * STEPS + step) * K + k)[:, None] * WIDE
            for j0 in tl.range(0, K, BLOCK_J, num_stages=AHEAD):
                j = j0 + tl.arange(0, BLOCK_J)
                tile = tl.load(rows_ptr + j[None, :], mask=inside[:, None] & (j < WIDE)[None, :], other=0.0)
                x = alpha[:, None] + tile
                top = tl.maximum(tl.max(x, axis=0), -1e30)  # finite where every path is banned
                if MAX:
                    best = tl.argmax(x, axis=0, tie_break_left=True)
                    tl.store(pointers_ptr + base + j, best, mask=j < K)
                    message = top
                else:
                    message = top + tl.log(tl.sum(exp_or_zero(x - top[None, :]), axis=0))
                tl.store(messages_ptr + base + j, message, mask=j < K)
            tl.debug_barrier()  # messages written by some threads are read by others
            x = tl.load(messages_ptr + base + k, mask=inside, other=0.0)
            x += tl.load(scores_ptr + base + k, mask=inside, other=-float("inf"))
            tl.store(norms_ptr + b * T + t, tl.max(x, axis=0))
            if MAX:
                tl.store(last_ptr + b, tl.argmax(x, axis=0, tie_break_left=True).to(tl.int64))
        else:
            tl.store(messages_ptr + base + k, tl.zeros([BLOCK_K], tl.float32), mask=inside)
            tl.store(norms_ptr + b * T + t, 0.0)
            if MAX:
                tl.store(pointers_ptr + base + k, tl.zeros([BLOCK_K], tl.int32), mask=inside)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T"])
def _backtrace_kernel(pointers_ptr, last_ptr, lengths_ptr, path_ptr, T, K, HAS_LENGTHS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    slot = tl.load(last_ptr + b)
    for step in range(T):
        t = T - 1 - step
        here = t < length
        tl.store(path_ptr + b * T + t, tl.where(here, slot, -1))
        before = tl.load(pointers_ptr + (b * T + t) * K + slot).to(tl.int64)
        slot = tl.where(here, before, slot)


def config(beam: int) -> dict[str, int]:
    """How the filter is launched: a tile of whole columns, some of them on their way while one is worked on."""
    height = power(beam)
    return {
        "BLOCK_K": height, "BLOCK_J": min(height, 8192 // height), "AHEAD": 4,
        "num_warps": 16, "maxnreg": registers(16),
    }  # fmt: skip


def _launch(p, scale: float, messages, norms, pointers, last, maximum: bool) -> None:
    _, length, beam = p.scores.shape
    lengths, has_lengths = as_lengths(p.lengths, p.tokens)
    with torch.cuda.device_of(p.scores):
        for tiles, items, place in crf_transitions.formed(p, scale):
            _filter_kernel[(items,)](
                tiles, p.scores, lengths, messages, norms, pointers, last, *place, length, beam, tiles.shape[3],
                HAS_LENGTHS=has_lengths, MAX=maximum, **config(beam),
            )  # fmt: skip


def filter_forward(p, scale: float):
    """`messages (B, T, K)` and `norms (B, T)`, fp32, of contiguous potentials (`simctg_fast/ops/crf_common.py`)."""
    messages, norms = torch.empty_like(p.scores), p.scores.new_empty(p.scores.shape[:2])
    _launch(p, scale, messages, norms, p.tokens, p.tokens, False)
    return messages, norms


def max_forward(p):
    """Back-pointers `(B, T, K)`, uint8 or uint16, and the best last slot `(B,)`, int64."""
    messages, norms = torch.empty_like(p.scores), p.scores.new_empty(p.scores.shape[:2])
    dtype = torch.uint8 if p.scores.shape[2] <= 256 else torch.uint16
    pointers = torch.empty(p.scores.shape, dtype=dtype, device=p.scores.device)
    last = torch.zeros(p.scores.shape[:1], dtype=torch.int64, device=p.scores.device)
    _launch(p, 1.0, messages, norms, pointers, last, True)
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
