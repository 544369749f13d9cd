"""ContraCLM's token loss on a GPU: log-sum-exps and gradient of a batch of sequences, each against itself alone.

The kernels of `simcse.py` with the sequence as a third dimension of the grid, and a flag a row instead of a length: the
host never learns how long a sequence is. Rows are unit vectors, zero where the flag is 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import architecture, cdiv, on, start_kernel
from .simcse import _PROGRAMS, _STRIP_ELEMENTS, CONFIGS, TILE, _precision, _similarity, inverse_norms, weights_tile

__all__ = ["backward", "forward", "inverse_norms"]


@triton.jit
def token_lse_kernel(
    u_ptr, real_ptr, out_ptr,  # [B, N, D], [B, N], [B, shares, N]
    count, width, scale, tiles_each, shares,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of rows over this program's share of the other real rows; -inf for rows that are not."""
    item = tl.program_id(2).to(tl.int64)
    u_ptr += item * count * width
    real_ptr += item * count
    lanes = tl.arange(0, TILE)
    rows = tl.program_id(0) * TILE + lanes
    own = tl.load(real_ptr + rows, mask=rows < count, other=0) != 0
    first = tl.program_id(1) * tiles_each
    end = tl.where(tl.max(own.to(tl.int32), axis=0) > 0, first + tiles_each, first)  # nothing to do for padding
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(first, end):
        columns = tile * TILE + lanes
        logits = scale * _similarity(
            u_ptr, u_ptr, width, width, rows, columns, count, count, width, PRECISION, TILE, BLOCK_K
        )
        real = tl.load(real_ptr + columns, mask=columns < count, other=0) != 0
        counted = real[None, :] & (rows[:, None] != columns[None, :])
        logits = tl.where(counted, logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        largest = new
    lse = tl.where(total > 0.0, largest + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    lse = tl.where(total == total, lse, total)  # a NaN fails every comparison, and has to come out
    lse = tl.where(own, lse, float("-inf"))
    tl.store(out_ptr + (item * shares + tl.program_id(1)) * count + rows, lse, mask=rows < count)


@triton.jit
def token_weights_kernel(
    u_ptr, lse_ptr, grad_ptr, out_ptr,  # [B, N, D], [B, N] twice, [B, strip, N]
    first_row, end_row, count, width, scale,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale * (p_ij g_i + p_ji g_j), 0 for j = i, for the rows of a strip of each sequence.

    What it gives to or for a row that is not real means nothing: the one multiplies a zero vector, the other is not
    looked at.
    """
    item = tl.program_id(2).to(tl.int64)
    u_ptr += item * count * width
    lse_ptr += item * count
    grad_ptr += item * count
    lanes = tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + lanes
    rows = first_row + tl.program_id(1) * TILE + lanes
    logits = scale * _similarity(
        u_ptr, u_ptr, width, width, rows, columns, count, count, width, PRECISION, TILE, BLOCK_K
    )
    lse = tl.load(lse_ptr + rows, mask=rows < end_row, other=float("inf"))
    grad = tl.load(grad_ptr + rows, mask=rows < end_row, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    weights = tl.exp(logits - lse[:, None]) * grad[:, None]
    lse = tl.load(lse_ptr + columns, mask=columns < count, other=float("inf"))
    grad = tl.load(grad_ptr + columns, mask=columns < count, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    weights += tl.exp(logits - lse[None, :]) * grad[None, :]
    weights = tl.where(rows[:, None] != columns[None, :], weights, 0.0)
    at = (rows - first_row)[:, None] * count + columns[None, :]
    inside = (rows < end_row)[:, None] & (columns < count)[None, :]
    out_ptr += item * (end_row - first_row) * count
    tl.store(out_ptr + at, (weights * scale).to(out_ptr.dtype.element_ty), mask=inside)


def forward(unit: Tensor, real: Tensor, scale: float) -> Tensor:
    """``(B, N)`` float32 log-sum-exp over the other real rows, of contiguous ``(B, N, D)`` and ``real (B, N)`` uint8;
    -inf where a row is not real. No size 0."""
    batch, count, width = unit.shape
    tiles = cdiv(count, TILE)
    shares = max(1, min(tiles, _PROGRAMS // (tiles * batch)))
    each = cdiv(tiles, shares)
    shares = cdiv(tiles, each)
    partial = unit.new_empty((batch, shares, count), dtype=torch.float32)
    config = CONFIGS[architecture(unit.device), unit.element_size()]
    with on(unit):
        start_kernel(
            token_lse_kernel, (tiles, shares, batch),
            unit, real, partial, count, width, scale, each, shares,
            PRECISION=_precision(unit), TILE=TILE, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return partial[:, 0] if shares == 1 else torch.logsumexp(partial, dim=1)


def backward(grad: Tensor, unit: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient of the unit vectors through the log-sum-exps, ``(B, N, D)``; anything where a row is not real.

    Args:
        grad: ``(B, N)``, 0 where a row is not real. unit, lse: of `forward`.
    """
    batch, count, width = unit.shape
    grad, lse = grad.float().contiguous(), lse.contiguous()
    result = torch.empty_like(unit)
    # Whole sequences, as many as go into the fixed number of elements; or one, in strips of rows.
    group = max(1, min(batch, _STRIP_ELEMENTS // (count * count)))
    strip = count if group > 1 else min(count, max(TILE, _STRIP_ELEMENTS // count // TILE * TILE))
    buffer = unit.new_empty(group * strip * count)
    key = architecture(unit.device), unit.element_size()
    tile, warps = weights_tile(key)
    with on(unit):
        for item in range(0, batch, group):
            items = slice(item, min(item + group, batch))
            some = unit[items]
            for first in range(0, count, strip):
                end = min(first + strip, count)
                weights = buffer[: len(some) * (end - first) * count].view(len(some), end - first, count)
                start_kernel(
                    token_weights_kernel, (cdiv(count, tile), cdiv(end - first, tile), len(some)),
                    some, lse[items], grad[items], weights, first, end, count, width, scale,
                    PRECISION=_precision(unit), TILE=tile, BLOCK_K=CONFIGS[key].block_k, num_warps=warps,
                    num_stages=CONFIGS[key].num_stages,
                )  # fmt: skip
                torch.bmm(weights, some, out=result[items, first:end])
    return result
