"""What the kernels of the low-rank CRF share: tiles of transitions, the inverse CDF, launch sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def length_of(lengths_ptr, b, T, HAS_LENGTHS: tl.constexpr):
    """How many of its T positions item b has."""
    if HAS_LENGTHS:
        return tl.load(lengths_ptr + b).to(tl.int32)
    else:
        return T


@triton.jit
def load_rows(table_ptr, tokens, row_mask, d0, D, BLOCK_D: tl.constexpr):
    """Columns from d0 on of a table's rows, for a vector of tokens: [tokens, BLOCK_D], zeros where masked off."""
    d = d0 + tl.arange(0, BLOCK_D)
    mask = row_mask[:, None] & (d < D)[None, :]
    return tl.load(table_ptr + tokens[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def products(
    left_ptr, right_ptr, source, target, source_mask, target_mask, scale, D,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * left[source] · right[target]: [sources, targets], summed over slices of the rank from the first on.

    Shared memory holds one slice of the operands, whatever the rank is.
    """
    total = tl.zeros([source.shape[0], target.shape[0]], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        u = load_rows(left_ptr, source, source_mask, d0, D, BLOCK_D) * scale
        v = load_rows(right_ptr, target, target_mask, d0, D, BLOCK_D)
        total = tl.dot(u, tl.trans(v), total, input_precision=PRECISION)
    return total


@triton.jit
def transitions(
    tokens_ptr, left_ptr, right_ptr, base, k, j, scale, K, D, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Scores from slots k of one position to slots j of the next: [k, j]. `base`: where the position's tokens begin."""
    source = tl.load(tokens_ptr + base + k, mask=k < K, other=0)
    target = tl.load(tokens_ptr + base + K + j, mask=j < K, other=0)
    return products(left_ptr, right_ptr, source, target, k < K, j < K, scale, D, BLOCK_D, PRECISION)


@triton.jit
def pick(weights, uniform, BLOCK_K: tl.constexpr):
    """Inverse CDF along the first dimension of [BLOCK_K, n]: the first slot whose running sum exceeds uniform ·
    total. It has weight: sums taken in another order than the slots' may rise at one that adds nothing."""
    running = tl.cumsum(weights, axis=0)
    total = tl.max(running, axis=0)
    k = tl.arange(0, BLOCK_K)[:, None]
    live = weights > 0
    first = tl.min(tl.where(live & (running > (uniform * total)[None, :]), k, BLOCK_K), axis=0)
    return tl.minimum(first, tl.max(tl.where(live, k, 0), axis=0))


@triton.jit
def to_uniform(word):
    """24 bits of a random word in [0, 1)."""
    return (word.to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def exp_or_zero(x):
    return tl.where(x > -87.0, tl.exp(x), 0.0)


def power(size: int) -> int:
    """The next power of two from 16 on: the smallest side of a `tl.dot`."""
    return max(16, triton.next_power_of_2(size))


def registers(warps: int) -> int:
    """All that a thread can have. Left to itself, the assembler spills a few bytes to fit one more block."""
    return min(255, 65536 // (32 * warps))


def precision() -> str:
    """Full fp32 products; TF32 where the user has allowed it for matrix products."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def as_lengths(lengths: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A pointer that is valid whether or not there are lengths."""
    return (like, False) if lengths is None else (lengths, True)
