"""The reverse sweep of the low-rank CRF.

share(k, j) = exp(alpha[t, k] + transition(k, j) - message[t + 1, j]) · flow[t + 1, j] is how the gradient of a message
is shared out over its sources. The first kernel (one program an item) carries the flow back in time; once every flow is
known, the gradients of the tables are independent over positions: the second kernel takes one position a program and
writes them slot by slot, owner computes, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops._accumulate import add_rows_
from .crf_common import as_lengths, exp_or_zero, load_rows, power, precision, transitions


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


@triton.jit(do_not_specialize=["T"])
def _flow_kernel(
    grad_ptr, messages_ptr, norms_ptr, scores_ptr, tokens_ptr, left_ptr, right_ptr, lengths_ptr,
    into_ptr, flow_ptr,  # [B, T, K]: gradient of the scores; grad + into, 0 beyond the lengths
    scale, T, K, D,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    for step in range(T):
        t = T - 1 - step
        base = (b * T + t) * K
        norm = tl.load(norms_ptr + b * T + t)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            into = tl.zeros([BLOCK_K], tl.float32)
            if t + 1 < length:
                for j0 in range(0, K, BLOCK_J):
                    j = j0 + tl.arange(0, BLOCK_J)
                    into += tl.sum(
                        _share(
                            scores_ptr, tokens_ptr, left_ptr, right_ptr, messages_ptr, flow_ptr, base, norm, k, j,
                            scale, K, D, BLOCK_D, PRECISION,
                        ),
                        axis=1,
                    )  # fmt: skip
            tl.store(into_ptr + base + k, into, mask=k < K)
            flow = into + tl.load(grad_ptr + base + k, mask=k < K, other=0.0)
            tl.store(flow_ptr + base + k, tl.where(t < length, flow, 0.0), mask=k < K)
        tl.debug_barrier()


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
    length = T
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b).to(tl.int32)
    base = (b * T + t) * K
    norm = tl.load(norms_ptr + b * T + t)
    own = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    d0 = tl.program_id(2) * BLOCK_O
    acc = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    if t + 1 < length:
        for o0 in range(0, K, BLOCK_J):
            other = o0 + tl.arange(0, BLOCK_J)
            if SOURCES:
                share = _share(
                    scores_ptr, tokens_ptr, left_ptr, right_ptr, messages_ptr, flow_ptr, base, norm, own, other,
                    scale, K, D, BLOCK_D, PRECISION,
                )  # fmt: skip
                token = tl.load(tokens_ptr + base + K + other, mask=other < K, other=0)
                rows = load_rows(right_ptr, token, other < K, d0, D, BLOCK_O)
                acc += tl.dot(share, rows, input_precision=PRECISION)
            else:
                share = _share(
                    scores_ptr, tokens_ptr, left_ptr, right_ptr, messages_ptr, flow_ptr, base, norm, other, own,
                    scale, K, D, BLOCK_D, PRECISION,
                )  # fmt: skip
                token = tl.load(tokens_ptr + base + other, mask=other < K, other=0)
                rows = load_rows(left_ptr, token, other < K, d0, D, BLOCK_O)
                acc += tl.dot(tl.trans(share), rows, input_precision=PRECISION)
    d = d0 + tl.arange(0, BLOCK_O)
    mask = (own < K)[:, None] & (d < D)[None, :]
    tl.store(out_ptr + (position * K + own[:, None]) * D + d[None, :], acc * scale, mask=mask)


def flow_config(beam: int) -> dict[str, int]:
    """How the reverse sweep is launched, whatever the rank."""
    side = power(beam)
    return {
        "BLOCK_K": min(64, side),
        "BLOCK_J": min(32, side),
        "BLOCK_D": 32,
        "num_warps": 8,
        "num_stages": 1,
        "maxnreg": 255,
    }


def table_config(beam: int, rank: int) -> dict[str, int]:
    """How the tables' gradients are launched: a program has BLOCK_O of their columns."""
    return {**flow_config(beam), "BLOCK_O": min(64, power(rank))}


def filter_backward(grad, messages, norms, scores, tokens, left, right, lengths, scale, tables: bool):
    """Gradients of `scores`, `left` and `right`, fp32; the last two empty unless `tables`. Everything contiguous."""
    batch, length, beam = scores.shape
    rank = left.shape[1]
    into, flow = torch.empty_like(scores), torch.empty_like(scores)
    grads = [torch.zeros_like(x) if tables else x.new_zeros((0,)) for x in (left, right)]
    if batch == 0:
        return into, *grads
    pointer, has_lengths = as_lengths(lengths, tokens)
    common = {"HAS_LENGTHS": has_lengths, "PRECISION": precision()}
    launch = table_config(beam, rank)
    with torch.cuda.device_of(scores):
        _flow_kernel[(batch,)](
            grad, messages, norms, scores, tokens, left, right, pointer, into, flow, scale, length, beam, rank,
            **common, **flow_config(beam),
        )  # fmt: skip
        if tables and length > 1:
            shape = (batch, length - 1, beam, rank)
            tiles = triton.cdiv(beam, launch["BLOCK_K"]), triton.cdiv(rank, launch["BLOCK_O"])
            grid = (batch * (length - 1), *tiles)
            for sources, table, own in ((True, grads[0], tokens[:, :-1]), (False, grads[1], tokens[:, 1:])):
                out = scores.new_empty(shape)
                _table_kernel[grid](
                    messages, norms, scores, tokens, left, right, pointer, flow, out, scale, length, beam, rank,
                    SOURCES=sources, **common, **launch,
                )  # fmt: skip
                add_rows_(table, own.reshape(-1), out.view(-1, rank))
    return into, *grads
