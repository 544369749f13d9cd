"""Decode attention of k candidates a sequence over one copy of the sequence's keys and values.

The query rows that read one key/value head, candidates times grouped heads, are the rows of one `tl.dot` tile. A
program reads a share of the prefix; the first share also takes in what a row has for itself: the candidate's own key
and value, and the sink. The program that arrives last merges the shares in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._decode import DTYPE_NAMES, DTYPES, counters, last_to_arrive, multiprocessors
from ._launch import architecture, on, precise

DIM_LIMIT = 256
_SPLIT_LIMIT = 64
_SHARE = 256  # positions below which a share does not pay
_WAVES = 4  # of programs, where there is that much to split
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """Positions of a tile, warps, stages of the pipeline, and the most registers of a thread where products are exact;
    None: ptxas weighs them against blocks on a multiprocessor, and may spill a few bytes for one more."""

    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# (architecture, bytes of an element, padded head dimension)
CONFIGS = {
    (80, 2, 64): Config(64, 4, 4, 128),
    (80, 2, 128): Config(64, 4, 3, 255),
    (80, 2, 256): Config(32, 4, 3, 255),
    (80, 4, 64): Config(16, 4, 4, 128),
    (80, 4, 128): Config(16, 4, 3, 128),
    (80, 4, 256): Config(16, 4, 3),
    (90, 2, 64): Config(64, 4, 4, 128),
    (90, 2, 128): Config(64, 4, 4, 255),
    (90, 2, 256): Config(32, 4, 3, 255),
    (90, 4, 64): Config(32, 4, 4),
    (90, 4, 128): Config(16, 4, 3, 128),
    (90, 4, 256): Config(16, 8, 3, 128),
}
CONFIGS |= {(100, *key[1:]): config for key, config in CONFIGS.items() if key[0] == 90}
_SHORT_HEADS = Config(64, 4, 4, 168)  # of up to 32, in half precision
# Taller tiles. Of 32 rows, masks and biases leave registers for fewer positions; of more, they need those of twice the
# warps.
MIDDLE = {(arch, 2, 64): Config(64, 4, 4, 255) for arch in (80, 90, 100)}
MIDDLE |= {(arch, 2, 128): Config(32, 4, 4) for arch in (80, 90, 100)}
TALL = {
    (80, 2, 64): Config(32, 8, 4),
    (80, 2, 128): Config(32, 8, 4, 255),
    (90, 2, 64): Config(64, 8, 4),
    (90, 2, 128): Config(32, 8, 4),
}
TALL |= {(100, *key[1:]): config for key, config in TALL.items() if key[0] == 90}


@triton.jit
def _load(at, rows, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of the rows that count, zeros beyond their SIZE; columns are masked only where some are beyond."""
    if BLOCK == SIZE:
        return tl.load(at, mask=rows[:, None], other=0.0)
    else:
        return tl.load(at, mask=rows[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit
def _logits(
    product, n, seen, row_c, row_h, b, mask_ptr, stride_mb, stride_mc, stride_mh, bias_ptr, stride_bb, stride_bc,
    stride_bh, scaling, softcap, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scaled, capped, biased and masked scores in powers of two; product, n, seen, row_c and row_h broadcast."""
    score = product * scaling
    if HAS_SOFTCAP:
        small = tl.exp2(tl.abs(score) * (-2.0 * _LOG2E / softcap))
        score = tl.where(score < 0, -softcap, softcap) * ((1.0 - small) / (1.0 + small))
    if HAS_BIAS:
        at = bias_ptr + b * stride_bb + row_c * stride_bc + row_h * stride_bh + n
        score += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    score *= _LOG2E
    if HAS_MASK:
        at = mask_ptr + b * stride_mb + row_c * stride_mc + row_h * stride_mh + n
        seen = seen & (tl.load(at, mask=seen, other=0) != 0)
    return tl.where(seen, score, float("-inf"))


# What moves from step to step or call to call must not compile anew: sizes that grow, and masks and biases, whose rows
# are as long as the prefix.
@triton.jit(
    do_not_specialize=[
        "mask_ptr", "stride_mb", "stride_mc", "stride_mh", "bias_ptr", "stride_bb", "stride_bc", "stride_bh",
        "lengths_ptr", "starts_ptr", "length", "start", "window", "splits", "positions",
    ]
)  # fmt: skip
def shared_prefix_attention_kernel(
    query_ptr, stride_qr, stride_qh,  # [B·k, H, D]
    key_ptr, stride_kb, stride_kh, stride_kt,  # [B, H_kv, T, D]
    value_ptr, stride_vb, stride_vh, stride_vt,  # [B, H_kv, T, D_v]
    new_key_ptr, stride_nr, stride_nh,  # [B·k, H_kv, D]
    new_value_ptr, stride_wr, stride_wh,  # [B·k, H_kv, D_v]
    mask_ptr, stride_mb, stride_mc, stride_mh,  # [B, k, H, length + 1]
    bias_ptr, stride_bb, stride_bc, stride_bh,
    sinks_ptr, lengths_ptr, starts_ptr,  # [H], [B], [B]
    partial_ptr, maxima_ptr, counter_ptr, out_ptr,
    scaling, softcap, length, start, window, splits, positions,
    CANDIDATES: tl.constexpr, GROUPS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, HAS_OWN: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Program: (sequence and key/value head, share of the prefix, tile of query rows). Partials are laid out
    [programs but for the share, share, BLOCK_M (, BLOCK_V)]; `maxima_ptr` holds maxima, then sums."""
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    b = pair // KV_HEADS
    g = pair % KV_HEADS
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < CANDIDATES * GROUPS
    r = tl.where(valid, r, 0)
    c = r // GROUPS
    h = g * GROUPS + r % GROUPS
    row = b * CANDIDATES + c
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    query_at = query_ptr + row[:, None] * stride_qr + h[:, None] * stride_qh + d[None, :]
    query = _load(query_at, valid, d, DIM, BLOCK_D)

    end = length
    if HAS_LENGTHS:
        end = tl.minimum(tl.maximum(tl.load(lengths_ptr + b).to(tl.int32), 0), positions)
    first = start
    if HAS_STARTS:
        first = tl.maximum(first, tl.load(starts_ptr + b).to(tl.int32))
    if HAS_WINDOW:  # it counts the candidate itself
        first = tl.maximum(first, end + 1 - window)
    first = tl.minimum(first, end)
    aligned = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(end - aligned, BLOCK_N), splits) * BLOCK_N
    begin = aligned + split * share

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    if split == 0:
        if HAS_OWN:
            own_at = new_key_ptr + row[:, None] * stride_nr + g * stride_nh + d[None, :]
            own = tl.load(own_at, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
            top = _logits(
                tl.sum(query.to(tl.float32) * own.to(tl.float32), axis=1), length, valid, c, h, b, mask_ptr, stride_mb,
                stride_mc, stride_mh, bias_ptr, stride_bb, stride_bc, stride_bh, scaling, softcap, HAS_MASK, HAS_BIAS,
                HAS_SOFTCAP,
            )  # fmt: skip
            own_at = new_value_ptr + row[:, None] * stride_wr + g * stride_wh + dv[None, :]
            own = tl.load(own_at, mask=valid[:, None] & (dv < VALUE_DIM)[None, :], other=0.0)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
            acc = tl.where(top[:, None] == float("-inf"), 0.0, own.to(tl.float32))
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + h, mask=valid, other=0.0).to(tl.float32) * _LOG2E
            larger = tl.maximum(top, sink)
            shrink = tl.exp2(top - larger)
            total = total * shrink + tl.exp2(sink - larger)
            acc = acc * shrink[:, None]
            top = larger

    key_at = key_ptr + b * stride_kb + g * stride_kh
    value_at = value_ptr + b * stride_vb + g * stride_vh
    for n0 in range(begin, tl.minimum(begin + share, end), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (n >= first) & (n < end)
        n_wide = n.to(tl.int64)
        keys = _load(key_at + n_wide[:, None] * stride_kt + d[None, :], inside, d, DIM, BLOCK_D)
        values = _load(value_at + n_wide[:, None] * stride_vt + dv[None, :], inside, dv, VALUE_DIM, BLOCK_V)
        score = _logits(
            tl.dot(query, tl.trans(keys), input_precision=PRECISION), n[None, :], inside[None, :] & valid[:, None],
            c[:, None], h[:, None], b, mask_ptr, stride_mb, stride_mc, stride_mh, bias_ptr, stride_bb, stride_bc,
            stride_bh, scaling, softcap, HAS_MASK, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        larger = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # nothing seen so far
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = larger

    out_at = out_ptr + (row * (KV_HEADS * GROUPS) + h)[:, None] * VALUE_DIM + dv[None, :]
    wanted = valid[:, None] & (dv < VALUE_DIM)[None, :]
    if SPLIT:
        m = tl.arange(0, BLOCK_M)
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(2)
        place = pair * tl.num_programs(2) + tile
        part = (place * splits + split) * BLOCK_M
        sums_ptr = maxima_ptr + programs * splits * BLOCK_M
        tl.store(maxima_ptr + part + m, top)
        tl.store(sums_ptr + part + m, total)
        tl.store(partial_ptr + (part + m)[:, None] * BLOCK_V + dv[None, :], acc)
        if last_to_arrive(counter_ptr + place, splits):
            part = place * splits * BLOCK_M
            top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            for s in tl.range(0, splits, loop_unroll_factor=4):
                top = tl.maximum(top, tl.load(maxima_ptr + part + s * BLOCK_M + m))
            base = tl.where(top == float("-inf"), 0.0, top)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
            for s in tl.range(0, splits, loop_unroll_factor=4):
                at = part + s * BLOCK_M + m
                factor = tl.exp2(tl.load(maxima_ptr + at) - base)
                total += tl.load(sums_ptr + at) * factor
                acc += tl.load(partial_ptr + at[:, None] * BLOCK_V + dv[None, :]) * factor[:, None]
            tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        tl.store(out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=wanted)


def tile_rows(rows: int, size: int, dim: int, value_dim: int) -> int:
    """Rows of a tile for `rows` query rows of a key head, elements of `size` bytes: what the registers hold."""
    limit = 16 if size == 4 or max(padded(dim), padded(value_dim)) > 128 else 64
    return min(limit, max(16, triton.next_power_of_2(rows)))


def padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def config_of(arch: int, size: int, dim: int, value_dim: int, block_m: int) -> Config:
    head = max(64, padded(dim), padded(value_dim))
    key = (arch, size, head)
    if block_m > 32:
        return TALL[key]
    if block_m == 32:
        return MIDDLE.get(key, CONFIGS[key])
    return _SHORT_HEADS if size == 2 and max(padded(dim), padded(value_dim)) <= 32 else CONFIGS[key]


def exact_products(arch: int, size: int, dim: int, value_dim: int) -> bool:
    """Whether products are exact whatever torch's knob says: half precision, and heads too wide for the registers that
    tf32x3 needs on sm_80."""
    return size == 2 or (arch == 80 and max(padded(dim), padded(value_dim)) > 128)


def plan(device: torch.device, tiles: int, positions: int) -> int:
    """Shares of each prefix. It follows sizes alone, so a row's result does not depend on what is beside it."""
    wanted = _WAVES * 2 * multiprocessors(device) // max(1, tiles)
    return max(1, min(wanted, triton.cdiv(positions, _SHARE), _SPLIT_LIMIT))


def obstacle(query: Tensor, key: Tensor, value: Tensor, *new: Tensor | None) -> str | None:
    """What keeps these operands (wherever they are) from the kernel: one dtype, heads of up to 256."""
    alike = all(
        x.dtype == query.dtype and (x.stride(-1) == 1 or x.shape[-1] == 1)
        for x in (query, key, value, *new)
        if x is not None
    )
    if alike and query.dtype in DTYPES and max(query.shape[-1], value.shape[-1]) <= DIM_LIMIT:
        return None
    return (
        f"takes heads of up to {DIM_LIMIT} in one dtype of {DTYPE_NAMES}, last dimension contiguous; got query "
        f"{tuple(query.shape)} of {query.dtype}, key {tuple(key.shape)} of {key.dtype}, value {tuple(value.shape)} of "
        f"{value.dtype}"
    )


def _rows(tensor: Tensor | None, instead: Tensor) -> tuple[Tensor, int, int]:
    """A tensor with its strides over rows and heads; another with none where there is no tensor."""
    return (instead, 0, 0) if tensor is None else (tensor, tensor.stride(0), tensor.stride(1))


def _strides(tensor: Tensor | None, batch: int, candidates: int) -> tuple[int, int, int]:
    """Strides of ``(1 | B | B·k, 1 | H, 1, S)`` over sequences, candidates and heads."""
    if tensor is None:
        return 0, 0, 0
    head = 0 if tensor.shape[1] == 1 else tensor.stride(1)
    if tensor.shape[0] == 1:
        return 0, 0, head
    if tensor.shape[0] == batch:
        return tensor.stride(0), 0, head
    return tensor.stride(0) * candidates, tensor.stride(0), head


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, length: int, new_key: Tensor | None, new_value: Tensor | None,
    scaling: float, mask: Tensor | None, bias: Tensor | None, softcap: float | None, sinks: Tensor | None,
    window_start: int, lengths: Tensor | None, starts: Tensor | None, window: int | None,
) -> Tensor:  # fmt: skip
    """``(B·k, 1, H, D_v)``; see `simctg_fast/ops/shared_prefix_attention.py`."""
    rows, heads, _, dim = query.shape
    batch, kv_heads, positions, _ = key.shape
    value_dim = value.shape[-1]
    out = query.new_empty((rows, 1, heads, value_dim))
    if out.numel() == 0:
        return out
    candidates, groups = rows // batch, heads // kv_heads
    arch, size = architecture(query.device), query.element_size()
    block_m = tile_rows(candidates * groups, size, dim, value_dim)
    block_v = padded(value_dim)
    tiles = triton.cdiv(candidates * groups, block_m)
    config = config_of(arch, size, dim, value_dim, block_m)
    programs = batch * kv_heads * tiles
    # Under a capture the lengths move while the launch stays, so the split follows the capacity.
    splits = plan(query.device, programs, positions if lengths is not None else length - window_start)
    split = splits > 1
    partial = query.new_empty((programs * splits * block_m * block_v,) if split else (0,), dtype=torch.float32)
    maxima = query.new_empty((2 * programs * splits * block_m,) if split else (0,), dtype=torch.float32)
    counter = counters(query.device, programs) if split else partial
    if mask is not None:
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    own = new_key is not None
    exact = exact_products(arch, size, dim, value_dim) or precise()
    with on(query):
        shared_prefix_attention_kernel[(batch * kv_heads, splits, tiles)](
            query, query.stride(0), query.stride(1),
            key, key.stride(0), key.stride(1), key.stride(2),
            value, value.stride(0), value.stride(1), value.stride(2),
            *_rows(new_key, query), *_rows(new_value, query),
            query if mask is None else mask, *_strides(mask, batch, candidates),
            query if bias is None else bias, *_strides(bias, batch, candidates),
            query if sinks is None else sinks.contiguous(),
            query if lengths is None else lengths.contiguous(),
            query if starts is None else starts.contiguous(),
            partial, maxima, counter, out,
            float(scaling), float(softcap or 0.0), length, window_start, window or 0, splits, positions,
            CANDIDATES=candidates, GROUPS=groups, KV_HEADS=kv_heads, DIM=dim, VALUE_DIM=value_dim, HAS_OWN=own,
            HAS_MASK=mask is not None, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None, HAS_LENGTHS=lengths is not None, HAS_STARTS=starts is not None,
            HAS_WINDOW=window is not None and own, SPLIT=split,
            PRECISION="ieee" if exact else "tf32x3",
            BLOCK_M=block_m, BLOCK_N=config.block_n, BLOCK_D=padded(dim), BLOCK_V=block_v,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers if exact else None,
        )  # fmt: skip
    return out
