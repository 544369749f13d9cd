"""Cosines of every two rows of a sequence: one tile a program, the norms taken from the operands as they pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Config, architecture, cdiv, last_dimension_contiguous, on, precise, start_kernel

TILE = 64
# (architecture, bytes of an element)
CONFIGS = {
    (80, 2): Config(64, 4, 3),
    (80, 4): Config(32, 4, 3),
    (90, 2): Config(64, 4, 4),
    (90, 4): Config(32, 4, 3),
}
CONFIGS |= {(100, *key[1:]): config for key, config in CONFIGS.items() if key[0] == 90}
HIGHEST = Config(32, 8, 3)  # float32 products by FFMA: four warps would not hold their sums


@triton.jit
def cosine_kernel(
    x_ptr, stride_xb, stride_xt, out_ptr, inverse_ptr, length, width,  # [B, T, D], [B, T, T], [B, T]
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the matrix; the programs of the first column also write 1 / norm."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    lanes = tl.arange(0, TILE)
    rows = i * TILE + lanes
    columns = j * TILE + lanes
    row_at = x_ptr + b * stride_xb + tl.where(rows < length, rows, 0).to(tl.int64) * stride_xt
    column_at = x_ptr + b * stride_xb + tl.where(columns < length, columns, 0).to(tl.int64) * stride_xt
    acc = tl.zeros((TILE, TILE), tl.float32)
    row_squares = tl.zeros((TILE,), tl.float32)
    column_squares = tl.zeros((TILE,), tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < width
        left = tl.load(row_at[:, None] + depth[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(column_at[None, :] + depth[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        left_wide = left.to(tl.float32)
        right_wide = right.to(tl.float32)
        row_squares += tl.sum(left_wide * left_wide, axis=1)
        column_squares += tl.sum(right_wide * right_wide, axis=0)
    row_inverse = tl.where(row_squares == 0.0, 0.0, 1.0 / tl.sqrt_rn(row_squares))
    column_inverse = tl.where(column_squares == 0.0, 0.0, 1.0 / tl.sqrt_rn(column_squares))
    cosine = acc * row_inverse[:, None] * column_inverse[None, :]
    at = out_ptr + (b * length + rows[:, None].to(tl.int64)) * length + columns[None, :]
    tl.store(at, cosine.to(out_ptr.dtype.element_ty), mask=(rows < length)[:, None] & (columns < length)[None, :])
    if j == 0:
        tl.store(inverse_ptr + b * length + rows, row_inverse, mask=rows < length)


def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, T, T)`` of the input's dtype and ``(B, T)`` float32 inverse norms, of ``(B, T, D)`` with no size 0."""
    states = last_dimension_contiguous(hidden_states)
    batch, length, width = states.shape
    out = states.new_empty((batch, length, length))
    inverse = states.new_empty((batch, length), dtype=torch.float32)
    tiles = cdiv(length, TILE)
    highest = states.element_size() == 4 and precise()
    config = HIGHEST if highest else CONFIGS[architecture(states.device), states.element_size()]
    with on(states):
        start_kernel(
            cosine_kernel, (tiles, tiles, batch),
            states, states.stride(0), states.stride(1), out, inverse, length, width,
            PRECISION="tf32x3" if states.element_size() == 4 and not highest else "ieee", TILE=TILE,
            BLOCK_K=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, inverse
