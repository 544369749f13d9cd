"""Beam selection: the K largest emissions of every position, by falling value, ties by the lower token.

One program a row. The row is read once for the maxima of as many interleaved groups as a tile is wide; the K-th largest
maximum is a threshold that at least K elements pass, and few more. They are collected, sorted, and the first K are the
beam. Where too many pass (a row full of equal values), the exact K-th value is searched for bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import last_dimension_contiguous
from .crf_common import as_lengths, length_of, registers


@triton.jit
def _order(x):
    """Integers in 0 .. 2^32 - 1 that rise with x; -0 and 0 are one value, NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key.to(tl.int64) + 2147483648, 4294967295)


@triton.jit
def _keys(row_ptr, v, V):
    """What orders the elements `v` of a row; -1 beyond its end."""
    x = tl.load(row_ptr + v, mask=v < V, other=0.0).to(tl.float32)
    return tl.where(v < V, _order(x), -1)


@triton.jit
def _entry(key, token):
    """One integer to sort by: the larger key first, then the lower token."""
    return (key - 2147483648) * 4294967296 + (4294967295 - token.to(tl.int64))


@triton.jit(do_not_specialize=["T"])
def _select_kernel(
    emissions_ptr, lengths_ptr, scratch_ptr, tokens_ptr, values_ptr,  # [B, T, V], [B], [rows, CAP], [B, T, K] twice
    stride_b, stride_t, T, V, K,
    HAS_LENGTHS: tl.constexpr, BLOCK_K: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    k = tl.arange(0, BLOCK_K)
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    if t >= length:
        tl.store(tokens_ptr + row * K + k, k.to(tl.int64), mask=k < K)
        tl.store(values_ptr + row * K + k, tl.zeros([BLOCK_K], tl.float32), mask=k < K)
    else:
        row_ptr = emissions_ptr + b * stride_b + t * stride_t
        lane = tl.arange(0, CAP)
        top = tl.full([CAP], -1, tl.int64)
        for v0 in range(0, V, CAP):
            top = tl.maximum(top, _keys(row_ptr, v0 + lane, V))
        limit = tl.sum(tl.zeros([CAP], tl.int64), axis=0)
        for bit in range(32):
            wanted = limit + (tl.full([], 1, tl.int64) << (31 - bit))
            limit = tl.where(tl.sum((top >= wanted).to(tl.int32), axis=0) >= K, wanted, limit)
        count = tl.sum(tl.zeros([CAP], tl.int32), axis=0)
        for v0 in range(0, V, CAP):
            v = v0 + lane
            key = _keys(row_ptr, v, V)
            taken = (key >= limit).to(tl.int32)
            place = count + tl.cumsum(taken, axis=0) - 1
            entry = _entry(key, v)
            tl.store(scratch_ptr + row * CAP + place, entry, mask=(taken > 0) & (place < CAP))
            count += tl.sum(taken, axis=0)
        if count > CAP:
            limit = limit * 0
            for bit in range(32):
                wanted = limit + (tl.full([], 1, tl.int64) << (31 - bit))
                above = tl.sum(tl.zeros([CAP], tl.int32), axis=0)
                for v0 in range(0, V, CAP):
                    above += tl.sum((_keys(row_ptr, v0 + lane, V) >= wanted).to(tl.int32), axis=0)
                limit = tl.where(above >= K, wanted, limit)
            above = tl.sum(tl.zeros([CAP], tl.int32), axis=0)
            for v0 in range(0, V, CAP):
                above += tl.sum((_keys(row_ptr, v0 + lane, V) > limit).to(tl.int32), axis=0)
            room = K - above  # for the lowest tokens among those of the limit's value
            count = count * 0
            equal = count
            for v0 in range(0, V, CAP):
                v = v0 + lane
                key = _keys(row_ptr, v, V)
                same = (key == limit).to(tl.int32)
                fits = (same > 0) & (equal + tl.cumsum(same, axis=0) <= room)
                taken = ((key > limit) | fits).to(tl.int32)
                place = count + tl.cumsum(taken, axis=0) - 1
                entry = _entry(key, v)
                tl.store(scratch_ptr + row * CAP + place, entry, mask=(taken > 0) & (place < CAP))
                count += tl.sum(taken, axis=0)
                equal += tl.sum(same, axis=0)
        tl.debug_barrier()
        entries = tl.load(scratch_ptr + row * CAP + lane, mask=lane < count, other=-9223372036854775808)
        entries = tl.sort(entries, descending=True)
        token = 4294967295 - (entries & 4294967295)
        valid = lane < K
        tl.store(tokens_ptr + row * K + lane, token, mask=valid)
        value = tl.load(row_ptr + token, mask=valid, other=0.0).to(tl.float32)
        tl.store(values_ptr + row * K + lane, value, mask=valid)


def config(beam_size: int) -> dict[str, int]:
    """How a row is launched."""
    side = triton.next_power_of_2(beam_size)
    cap = max(64, 4 * side)
    warps = 8 if cap >= 1024 else 4
    return {"BLOCK_K": side, "CAP": cap, "num_warps": warps, "maxnreg": registers(warps)}


def beam_select(emissions, beam_size: int, lengths):
    """tokens `(B, T, K)` int64 and values, fp32; see `simctg_fast/ops/crf_beam.py`."""
    batch, length, vocabulary = emissions.shape
    emissions = last_dimension_contiguous(emissions)
    shape = (batch, length, beam_size)
    tokens = torch.empty(shape, dtype=torch.int64, device=emissions.device)
    values = torch.empty(shape, dtype=torch.float32, device=emissions.device)
    launch = config(beam_size)
    scratch = torch.empty((batch * length, launch["CAP"]), dtype=torch.int64, device=emissions.device)
    pointer, has_lengths = as_lengths(lengths, tokens)
    if batch:
        with torch.cuda.device_of(emissions):
            _select_kernel[(batch * length,)](
                emissions, pointer, scratch, tokens, values, emissions.stride(0), emissions.stride(1),
                length, vocabulary, beam_size, HAS_LENGTHS=has_lengths, **launch,
            )  # fmt: skip
    return tokens, values
