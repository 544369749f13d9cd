"""Sampling kernels of the low-rank CRF: exact backward sampling, and the published stochastic Viterbi.

Random numbers are Philox words of (seed, b, n, t), the same as on the CPU; a beam is one tile high, so that inverse
CDFs are one cumulative sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import before_triton
from .crf_common import (
    as_lengths,
    exp_or_zero,
    length_of,
    pick,
    power,
    precision,
    products,
    registers,
    to_uniform,
    transitions,
)

# Narrower slices of the rank spare high tiles a few spilled registers; `tl.dot` takes none below 16 before triton 3.8.
_NARROW = 16 if before_triton(3, 8) else 8


@triton.jit(do_not_specialize=["T", "seed"])
def _ffbs_kernel(
    messages_ptr, norms_ptr, scores_ptr, tokens_ptr, left_ptr, right_ptr, lengths_ptr, uniforms_ptr,
    slots_ptr,  # [B, T, N]
    seed, scale, T, K, D, N,
    HAS_LENGTHS: tl.constexpr, HAS_UNIFORMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    k = tl.arange(0, BLOCK_K)
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    slot = tl.zeros([WIDTH], tl.int32)
    for step in range(T):
        t = T - 1 - step
        at = (b * T + t) * N + n
        if t < length:
            base = (b * T + t) * K
            alpha = tl.load(messages_ptr + base + k, mask=k < K, other=0.0)
            alpha += tl.load(scores_ptr + base + k, mask=k < K, other=-float("inf"))
            alpha -= tl.load(norms_ptr + b * T + t)
            x = alpha[:, None] + tl.zeros([BLOCK_K, WIDTH], tl.float32)
            if t + 1 < length:
                source = tl.load(tokens_ptr + base + k, mask=k < K, other=0)
                target = tl.load(tokens_ptr + base + K + slot)
                x += products(left_ptr, right_ptr, source, target, k < K, n < N, scale, D, BLOCK_D, PRECISION)
            if HAS_UNIFORMS:
                uniform = tl.load(uniforms_ptr + at, mask=n < N, other=0.0)
            else:
                zero = tl.zeros([WIDTH], tl.int32)
                word, _, _, _ = tl.philox(seed, zero, zero + t, n, zero + b.to(tl.int32))
                uniform = to_uniform(word)
            x = tl.where((k < K)[:, None], x, -float("inf"))
            slot = pick(exp_or_zero(x - tl.max(x, axis=0)[None, :]), uniform, BLOCK_K)
            tl.store(slots_ptr + at, slot.to(tl.int64), mask=n < N)
        else:
            tl.store(slots_ptr + at, tl.full([WIDTH], -1, tl.int64), mask=n < N)


@triton.jit(do_not_specialize=["T", "seed"])
def _stochastic_kernel(
    scores_ptr, tokens_ptr, left_ptr, right_ptr, lengths_ptr, uniforms_ptr,
    slots_ptr, prefixes_ptr, pointers_ptr,  # [B, T, N], [B, T, K, N], [B, T, K, N]
    seed, inverse, T, K, D, N,
    HAS_LENGTHS: tl.constexpr, HAS_UNIFORMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One table of one item. Prefix scores pass from step to step through global memory."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    length = length_of(lengths_ptr, b, T, HAS_LENGTHS)
    slot = tl.zeros([1], tl.int32)
    for t in range(T):
        base = (b * T + t) * K
        if t < length:
            if t == 0:
                x = tl.load(scores_ptr + base + k, mask=k < K, other=-float("inf"))
                tl.store(pointers_ptr + (base + k) * N + n, tl.zeros([BLOCK_K], tl.int32), mask=k < K)
            else:
                before = base - K
                state = tl.load(prefixes_ptr + (before + k) * N + n, mask=k < K, other=-float("inf"))
                for j0 in range(0, K, WIDTH):
                    j = j0 + tl.arange(0, WIDTH)
                    step = transitions(tokens_ptr, left_ptr, right_ptr, before, k, j, 1.0, K, D, BLOCK_D, PRECISION)
                    candidates = state[:, None] + step
                    logits = candidates * inverse
                    weights = exp_or_zero(logits - tl.max(logits, axis=0)[None, :])
                    if HAS_UNIFORMS:
                        at = ((b * (T - 1) + t - 1) * K + j) * N + n
                        uniform = tl.load(uniforms_ptr + at, mask=j < K, other=0.0)
                    else:
                        zero = tl.zeros([WIDTH], tl.int32)
                        w0, w1, w2, w3 = tl.philox(seed, 1 + j // 4, zero + (t - 1), zero + n, zero + b.to(tl.int32))
                        odd = j % 4
                        word = tl.where(odd == 0, w0, tl.where(odd == 1, w1, tl.where(odd == 2, w2, w3)))
                        uniform = to_uniform(word)
                    chosen = pick(weights, uniform, BLOCK_K)
                    carried = tl.sum(tl.where(k[:, None] == chosen[None, :], candidates, 0.0), axis=0)
                    carried += tl.load(scores_ptr + base + j, mask=j < K, other=0.0)
                    tl.store(pointers_ptr + (base + j) * N + n, chosen, mask=j < K)
                    tl.store(prefixes_ptr + (base + j) * N + n, carried, mask=j < K)
                tl.debug_barrier()
                x = tl.load(prefixes_ptr + (base + k) * N + n, mask=k < K, other=-float("inf"))
                tl.debug_barrier()  # all have read before any writes
            x -= tl.max(x, axis=0)
            slot = tl.argmax(x, axis=0, tie_break_left=True) + tl.zeros([1], tl.int32)
            tl.store(prefixes_ptr + (base + k) * N + n, x, mask=k < K)
        else:
            tl.store(prefixes_ptr + (base + k) * N + n, tl.zeros([BLOCK_K], tl.float32), mask=k < K)
            tl.store(pointers_ptr + (base + k) * N + n, tl.zeros([BLOCK_K], tl.int32), mask=k < K)
        tl.debug_barrier()
    one = tl.arange(0, 1)
    for step in range(T):
        t = T - 1 - step
        here = t < length
        tl.store(slots_ptr + (b * T + t) * N + n + one, tl.where(here, slot, -1).to(tl.int64))
        before_slot = tl.load(pointers_ptr + ((b * T + t) * K + slot) * N + n).to(tl.int32)
        slot = tl.where(here, before_slot, slot)


def _config(beam: int, width: int, free: int) -> dict[str, int]:
    """How a tile of a whole beam is launched: its height, the samples or targets beside it, slices of the rank; up to
    the height `free` a thread is told that it may have all registers.

    Whatever the rank is, 64 KiB of shared memory are enough, and from triton 3.8 on no register is spilled.
    """
    height = power(beam)
    warps = 4 if height <= 64 else 8 if height <= 128 else 16
    return {
        "BLOCK_K": height, "WIDTH": width, "BLOCK_D": 16 if height <= 256 else _NARROW,
        "num_warps": warps, "num_stages": 1,
        **({"maxnreg": registers(warps)} if height <= free else {}),
    }  # fmt: skip


def ffbs_config(beam: int) -> dict[str, int]:
    return _config(beam, 16 if beam <= 256 else 8, 512)


def stochastic_config(beam: int) -> dict[str, int]:
    return _config(beam, 16 if beam <= 256 else 8 if beam <= 512 else 2, 1024)


def ffbs(messages, norms, p, scale: float, samples: int, seed: int, uniforms):
    """Slots `(B, T, N)` int64 of exact samples. Everything contiguous, fp32."""
    batch, length, beam = p.scores.shape
    slots = torch.empty((batch, length, samples), dtype=torch.int64, device=p.scores.device)
    lengths, has_lengths = as_lengths(p.lengths, p.tokens)
    launch = ffbs_config(beam)
    if batch:
        with torch.cuda.device_of(p.scores):
            _ffbs_kernel[(batch, triton.cdiv(samples, launch["WIDTH"]))](
                messages, norms, p.scores, p.tokens, p.left, p.right, lengths,
                p.scores if uniforms is None else uniforms,
                slots, seed, scale, length, beam, p.left.shape[1], samples,
                HAS_LENGTHS=has_lengths, HAS_UNIFORMS=uniforms is not None, PRECISION=precision(),
                **launch,
            )  # fmt: skip
    return slots


def stochastic_viterbi(p, temperature: float, seed: int, uniforms, slots, prefixes, pointers) -> None:
    """Fills slots `(B, T, N)`, prefix scores and back-pointers `(B, T, K, N)` of the published sampler."""
    batch, length, beam = p.scores.shape
    lengths, has_lengths = as_lengths(p.lengths, p.tokens)
    if batch:
        with torch.cuda.device_of(p.scores):
            _stochastic_kernel[(batch, slots.shape[2])](
                p.scores, p.tokens, p.left, p.right, lengths, p.scores if uniforms is None else uniforms,
                slots, prefixes, pointers, seed, 1.0 / temperature, length, beam, p.left.shape[1], slots.shape[2],
                HAS_LENGTHS=has_lengths, HAS_UNIFORMS=uniforms is not None, PRECISION=precision(),
                **stochastic_config(beam),
            )  # fmt: skip
