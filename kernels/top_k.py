"""The k largest probabilities of a softmax over the vocabulary, without the softmax: one pass over the logits.

A program reads a share of a row, keeps its largest k as integers that sort by value, then by lower token, and the
maximum and sum of the exponentials; the program that arrives last merges the shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._decode import DTYPE_NAMES, DTYPES, counters, last_to_arrive, ranked, ranked_index, ranked_value
from ._launch import last_dimension_contiguous, on

K_LIMIT = 64
BLOCK = 4096
NUM_WARPS = 8
_LOWEST = tl.constexpr(-9223372036854775808)


@triton.jit
def _write(entries, top, total, probs_ptr, tokens_ptr, row, k, BLOCK_K: tl.constexpr):
    i = tl.arange(0, BLOCK_K)
    probs = tl.exp(ranked_value(entries) - top) / total
    tl.store(probs_ptr + row * k + i, probs, mask=i < k)
    tl.store(tokens_ptr + row * k + i, ranked_index(entries), mask=i < k)


@triton.jit(do_not_specialize=["k"])
def top_k_kernel(
    logits_ptr, stride_row, entries_ptr, sums_ptr, counter_ptr, probs_ptr, tokens_ptr, vocabulary, k,
    SPLIT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    splits = tl.num_programs(1)
    v = share * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocabulary
    x = tl.load(logits_ptr + row * stride_row + v, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    # A share of −inf alone adds nothing; NaN spreads.
    total = tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - top)), axis=0)
    entries = tl.topk(tl.where(inside, ranked(x, v), _LOWEST), BLOCK_K)
    if SPLIT:
        i = tl.arange(0, BLOCK_K)
        part = row * splits
        tl.store(entries_ptr + (part + share) * BLOCK_K + i, entries)
        tl.store(sums_ptr + (part + share) * 2, top)
        tl.store(sums_ptr + (part + share) * 2 + 1, total)
        if last_to_arrive(counter_ptr + row, splits):
            s = tl.arange(0, BLOCK_S)
            tops = tl.load(sums_ptr + (part + s) * 2, mask=s < splits, other=float("-inf"))
            totals = tl.load(sums_ptr + (part + s) * 2 + 1, mask=s < splits, other=0.0)
            top = tl.max(tops, axis=0)
            total = tl.sum(tl.where(tops == float("-inf"), totals, totals * tl.exp(tops - top)), axis=0)
            j = tl.arange(0, BLOCK_S * BLOCK_K)
            entries = tl.load(entries_ptr + part * BLOCK_K + j, mask=j < splits * BLOCK_K, other=_LOWEST)
            entries = tl.topk(entries, BLOCK_K)
            _write(entries, top, total, probs_ptr, tokens_ptr, row, k, BLOCK_K)
    else:
        _write(entries, top, total, probs_ptr, tokens_ptr, row, k, BLOCK_K)


def obstacle(logits: Tensor, k: int) -> str | None:
    """What keeps these logits (wherever they are) from the kernel: the shares' k largest have to fit one program."""
    entries = triton.next_power_of_2(triton.cdiv(logits.shape[-1], BLOCK)) * triton.next_power_of_2(k)
    if logits.dtype in DTYPES and 1 <= k <= min(K_LIMIT, logits.shape[-1]) and entries <= 4096:
        return None
    return (
        f"takes k up to {K_LIMIT} and rows of up to 2**24 / k logits in {DTYPE_NAMES}, got k={k} and logits "
        f"{tuple(logits.shape)} of {logits.dtype}"
    )


def top_k_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``probs (B, k)`` float32, falling, and ``tokens (B, k)`` int64 of ``logits (B, V)``."""
    logits = last_dimension_contiguous(logits)
    batch, vocabulary = logits.shape
    splits = triton.cdiv(vocabulary, BLOCK)
    block_k = max(2, triton.next_power_of_2(k))
    probs = logits.new_empty((batch, k), dtype=torch.float32)
    tokens = logits.new_empty((batch, k), dtype=torch.int64)
    entries = logits.new_empty((batch * splits * block_k,), dtype=torch.int64)
    sums = logits.new_empty((batch * splits * 2,), dtype=torch.float32)
    if batch:
        with on(logits):
            top_k_kernel[(batch, splits)](
                logits, logits.stride(0), entries, sums, counters(logits.device, batch), probs, tokens, vocabulary, k,
                SPLIT=splits > 1, BLOCK_S=triton.next_power_of_2(splits), BLOCK_K=block_k,
                BLOCK=min(BLOCK, max(block_k, triton.next_power_of_2(vocabulary))), num_warps=NUM_WARPS,
            )  # fmt: skip
    return probs, tokens
