"""The reverse sweep of the low-rank CRF.

share(k, j) = exp(alpha[t, k] + transition(k, j) - message[t + 1, j]) · flow[t + 1, j] is how the gradient of a message
is shared out over its sources. The first kernel (one program an item) carries the flow back in time and reads the
transitions that were formed for it (`crf_transitions`); once every flow is known, the gradients of the tables are
independent over positions: the second kernel takes one position a program and writes them slot by slot, owner computes,
no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import crf_transitions
from .crf_common import as_lengths, exp_or_zero, length_of, load_rows, power, precision, registers, transitions


@triton.jit
def _share(
    scores_ptr, tokens_ptr, left_ptr, right_ptr, messages_ptr, flow_ptr, base, norm, k, j, scale, K, D,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    alpha = tl.load(messages_ptr + base + k, mask=k < K, other=0.0)
    alpha += tl.load(scores_ptr + base + k, mask=k < K, other=-float("inf")) - norm
    message = tl.load(messages_ptr + base + K + j, mask=j < K, other=0.0)
    flow = tl.load(flow_ptr + base + K + j, mask=j < K, other=0.0)
    step = transitions(tokens_ptr, left_ptr, right_ptr, base, k, j, scale, K, D, BLOCK_D, PRECISION)
    return exp_or_zero(tl.minimum(alpha[:, None] + step - message[None, :], 0.0)) * flow[None, :]


@triton.jit(do_not_specialize=["T", "item", "first", "STEPS"])
def _flow_kernel(
    tiles_ptr, grad_ptr, messages_ptr, norms_ptr, scores_ptr, lengths_ptr,  # tiles [items, STEPS, K, WIDE]
    into_ptr, flow_ptr,  # [B, T, K]: gradient of the scores; grad + into, 0 beyond the lengths
    item, first, STEPS, T, K, WIDE,
    HAS_LENGTHS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Positions first + STEPS - 1 … first of an item, and before them the last one where they reach it."""
    own = tl.program_id(0).to(tl.int64)
    b = item + own
    j = tl.arange(0, BLOCK_J)
    inside = j < K
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    if first + STEPS + 1 == T:
        base = (b * T + T - 1) * K
        flow = tl.load(grad_ptr + base + j, mask=inside, other=0.0)
        tl.store(into_ptr + base + j, tl.zeros([BLOCK_J], tl.float32), mask=inside)
        tl.store(flow_ptr + base + j, tl.where(length >= T, flow, 0.0), mask=inside)
        tl.debug_barrier()
    for back in range(STEPS):
        step = STEPS - 1 - back
        t = first + step
        base = (b * T + t) * K
        if t + 1 < length:
            norm = tl.load(norms_ptr + b * T + t)
            message = tl.load(messages_ptr + base + K + j, mask=inside, other=0.0)
            after = tl.load(flow_ptr + base + K + j, mask=inside, other=0.0)
            columns_ptr = tiles_ptr + (own * STEPS + step) * K * WIDE + j[None, :]
            for k0 in tl.range(0, K, BLOCK_K, num_stages=AHEAD):
                k = k0 + tl.arange(0, BLOCK_K)
                tile = tl.load(columns_ptr + k[:, None] * WIDE, mask=(k < K)[:, None] & (j < WIDE)[None, :], other=0.0)
                alpha = tl.load(messages_ptr + base + k, mask=k < K, other=0.0)
                alpha += tl.load(scores_ptr + base + k, mask=k < K, other=-float("inf")) - norm
                share = exp_or_zero(tl.minimum(alpha[:, None] + tile - message[None, :], 0.0))
                into = tl.sum(share * after[None, :], axis=1)
                flow = into + tl.load(grad_ptr + base + k, mask=k < K, other=0.0)
                tl.store(into_ptr + base + k, into, mask=k < K)
                tl.store(flow_ptr + base + k, flow, mask=k < K)
        else:
            flow = tl.load(grad_ptr + base + j, mask=inside, other=0.0)
            tl.store(into_ptr + base + j, tl.zeros([BLOCK_J], tl.float32), mask=inside)
            tl.store(flow_ptr + base + j, tl.where(t < length, flow, 0.0), mask=inside)
        tl.debug_barrier()  # what some threads have written, others read


@triton.jit(do_not_specialize=["T"])
def _table_kernel(
    messages_ptr, norms_ptr, scores_ptr, tokens_ptr, left_ptr, right_ptr, lengths_ptr, flow_ptr,
    out_ptr,  # [B, T - 1, K, D]
    scale, T, K, D,
    HAS_LENGTHS: tl.constexpr, SOURCES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows of `left` (SOURCES) or of `right`, for BLOCK_K slots of one position."""
    position = tl.program_id(0).to(tl.int64)
    b, t = position // (T - 1), position % (T - 1)
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    base = (b * T + t) * K
    norm = tl.load(norms_ptr + b * T + t)
    own = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d0 = tl.program_id(2) * BLOCK_O
    acc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    if t + 1 < length:
        for o0 in range(0, K, BLOCK_J):
            other = o0 + tl.arange(0, BLOCK_J)
            share = _share(
                scores_ptr, tokens_ptr, left_ptr, right_ptr, messages_ptr, flow_ptr, base, norm,
                own if SOURCES else other, other if SOURCES else own, scale, K, D, BLOCK_D, PRECISION,
            )  # fmt: skip
            others_ptr = tokens_ptr + base + K if SOURCES else tokens_ptr + base
            token = tl.load(others_ptr + other, mask=other < K, other=0)
            rows = load_rows(right_ptr if SOURCES else left_ptr, token, other < K, d0, D, BLOCK_O)
            acc += tl.dot(share if SOURCES else tl.trans(share), rows, input_precision=PRECISION)
    d = d0 + tl.arange(0, BLOCK_O)
    mask = (own < K)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + (position * K + own[:, None]) * D + d[None, :], acc * scale, mask=mask)


def flow_config(beam: int) -> dict[str, int]:
    """How the reverse sweep is launched: a tile of whole rows, some of them on their way while one is worked on."""
    width = power(beam)
    return {
        "BLOCK_K": min(width, 4096 // width), "BLOCK_J": width, "AHEAD": 4,
        "num_warps": 16, "maxnreg": registers(16),
    }  # fmt: skip


def table_config(beam: int, rank: int) -> dict[str, int]:
    """How the tables' gradients are launched: a program has BLOCK_O of their columns, and takes the rank in slices."""
    side = power(beam)
    return {
        "BLOCK_K": min(64, side), "BLOCK_J": min(32, side), "BLOCK_D": 32, "BLOCK_O": min(64, power(rank)),
        "num_warps": 8, "num_stages": 1, "maxnreg": 255,
    }  # fmt: skip


def filter_backward(grad, messages, norms, p, scale: float, tables: bool, add_rows_):
    """Gradients of `scores`, `left` and `right`, fp32; the last two empty unless `tables`. Everything contiguous.
    `add_rows_(table, index, rows)` adds rows to those of a table in one order, whatever repeats."""
    batch, length, beam = p.scores.shape
    rank = p.left.shape[1]
    into, flow = torch.empty_like(p.scores), torch.empty_like(p.scores)
    grads = [torch.zeros_like(x) if tables else x.new_zeros((0,)) for x in (p.left, p.right)]
    if batch == 0:
        return into, *grads
    lengths, has_lengths = as_lengths(p.lengths, p.tokens)
    with torch.cuda.device_of(p.scores):
        for tiles, items, place in crf_transitions.formed(p, scale, last_first=True):
            _flow_kernel[(items,)](
                tiles, grad, messages, norms, p.scores, lengths, into, flow, *place, length, beam, tiles.shape[3],
                HAS_LENGTHS=has_lengths, **flow_config(beam),
            )  # fmt: skip
        del tiles
        if tables and length > 1:
            launch = table_config(beam, rank)
            columns = triton.cdiv(rank, launch["BLOCK_O"])
            grid = (batch * (length - 1), triton.cdiv(beam, launch["BLOCK_K"]), columns)
            for sources, table, own in ((True, grads[0], p.tokens[:, :-1]), (False, grads[1], p.tokens[:, 1:])):
                out = p.scores.new_empty((batch, length - 1, beam, rank))
                _table_kernel[grid](
                    messages, norms, p.scores, p.tokens, p.left, p.right, lengths, flow, out, scale, length, beam, rank,
                    HAS_LENGTHS=has_lengths, SOURCES=sources, PRECISION=precision(), **launch,
                )  # fmt: skip
                add_rows_(table, own.reshape(-1), out.view(-1, rank))
    return into, *grads
