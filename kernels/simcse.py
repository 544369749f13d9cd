"""Log-sum-exp of scaled dot products, and the weights of its gradient, on a GPU.

Forward: a program owns a tile of rows and a share of the columns, keeps a running maximum and sum, and never writes a
tile of S. Backward: one kernel recomputes a strip of S (some rows by all columns) and turns it into the weights of the
gradient, in the vectors' own dtype; the product of the strip with the vectors is a plain matrix product, for which the
BLAS is best. Strips have a fixed number of elements, so memory is linear, and rows own their results: the gradient of
the keys comes from strips of keys by queries, that of one set with itself from p_ij g_i + p_ji g_j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Config,
    architecture,
    cdiv,
    last_dimension_contiguous,
    next_power_of_2,
    on,
    precise,
    start_kernel,
)
from .contrastive_loss import norms_kernel

Term = tuple[Tensor, Tensor]  # log-sum-exps and incoming gradients of the rows, or of the columns

TILE = 128
# Where the two exponentials of the weights do not fit the registers of a tile of 128: tiles of 64, four warps.
_SMALL_WEIGHTS = {(80, 4), (100, 2), (100, 4)}
_STRIP_ELEMENTS = 1 << 25  # of weights: 64 MB in 16 bits
_PROGRAMS = 512  # in a launch, at least, where there is that much work

# (architecture, bytes of an element)
CONFIGS = {
    (80, 2): Config(32, 8, 3),
    (80, 4): Config(16, 8, 2),
    (90, 2): Config(64, 8, 3),
    (90, 4): Config(16, 8, 3),
}
CONFIGS |= {(100, *key[1:]): config for key, config in CONFIGS.items() if key[0] == 90}


@triton.jit
def _similarity(
    q_ptr, k_ptr, stride_q, stride_k, rows, columns, count_q, count_k, width,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of Q K^T; rows and columns beyond the ends repeat the first."""
    row_at = q_ptr + tl.where(rows < count_q, rows, 0).to(tl.int64) * stride_q
    column_at = k_ptr + tl.where(columns < count_k, columns, 0).to(tl.int64) * stride_k
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < width
        left = tl.load(row_at[:, None] + depth[None, :], mask=inside[None, :], other=0.0)
        right = tl.load(column_at[None, :] + depth[:, None], mask=inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def lse_kernel(
    q_ptr, k_ptr, stride_q, stride_k, out_ptr,  # [N, D], [M, D], [shares, N]
    count_q, count_k, width, scale, tiles_each, itself,
    SELF: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of a tile of rows over this program's share of the columns, (shares, rows).

    With SELF the column ``itself`` places behind a row is the row itself, and does not count.
    """
    share = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, TILE)
    rows = tl.program_id(0) * TILE + lanes
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    for tile in range(tl.program_id(1) * tiles_each, (tl.program_id(1) + 1) * tiles_each):
        columns = tile * TILE + lanes
        logits = scale * _similarity(
            q_ptr, k_ptr, stride_q, stride_k, rows, columns, count_q, count_k, width, PRECISION, TILE, BLOCK_K
        )
        counted = (columns < count_k)[None, :]
        if SELF:
            counted = counted & (rows[:, None] + itself != columns[None, :])
        logits = tl.where(counted, logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[:, None]), axis=1)
        largest = new
    lse = tl.where(total > 0.0, largest + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    # A NaN fails every comparison above, and has to come out.
    lse = tl.where(total == total, lse, total)
    tl.store(out_ptr + share * count_q + rows, lse, mask=rows < count_q)


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, stride_q, stride_k,  # [N, D], [M, D]
    row_lse_ptr, row_grad_ptr, column_lse_ptr, column_grad_ptr, out_ptr,  # [N] twice, [M] twice, [strip, M]
    first_row, end_row, count_q, count_k, width, scale, itself,
    ROW_TERM: tl.constexpr, COLUMN_TERM: tl.constexpr, SELF: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale * (p_ij g_i [ROW_TERM] + p_ji g_j [COLUMN_TERM]) for the rows of a strip."""
    lanes = tl.arange(0, TILE)
    columns = tl.program_id(0) * TILE + lanes
    rows = first_row + tl.program_id(1) * TILE + lanes
    logits = scale * _similarity(
        q_ptr, k_ptr, stride_q, stride_k, rows, columns, count_q, count_k, width, PRECISION, TILE, BLOCK_K
    )
    weights = tl.zeros((TILE, TILE), tl.float32)
    if ROW_TERM:
        lse = tl.load(row_lse_ptr + rows, mask=rows < end_row, other=float("inf"))
        grad = tl.load(row_grad_ptr + rows, mask=rows < end_row, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        weights += tl.exp(logits - lse[:, None]) * grad[:, None]
    if COLUMN_TERM:
        lse = tl.load(column_lse_ptr + columns, mask=columns < count_k, other=float("inf"))
        grad = tl.load(column_grad_ptr + columns, mask=columns < count_k, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        weights += tl.exp(logits - lse[None, :]) * grad[None, :]
    if SELF:
        weights = tl.where(rows[:, None] + itself != columns[None, :], weights, 0.0)
    # A strip is small: 32-bit offsets reach everywhere, and leave the registers to the weights.
    at = out_ptr + (rows - first_row)[:, None] * count_k + columns[None, :]
    inside = (rows < end_row)[:, None] & (columns < count_k)[None, :]
    tl.store(at, (weights * scale).to(out_ptr.dtype.element_ty), mask=inside)


def weights_tile(key: tuple[int, int]) -> tuple[int, int]:
    """Side of a tile of `weights_kernel`, and its warps, for an architecture and an element size."""
    return (64, 4) if key in _SMALL_WEIGHTS else (TILE, CONFIGS[key].num_warps)


def _precision(vectors: Tensor) -> str:
    return "ieee" if vectors.element_size() == 2 or precise() else "tf32x3"


def inverse_norms(vectors: Tensor) -> Tensor:
    """``(N,)`` float32: 1 / norm of ``(N, width)`` vectors, 0 for zero vectors, NaN where not finite; no size 0."""
    vectors = last_dimension_contiguous(vectors)
    rows, width = vectors.shape
    inverse = vectors.new_empty((rows,), dtype=torch.float32)
    with on(vectors):
        start_kernel(
            norms_kernel, (rows,),
            vectors, 0, vectors.stride(0), vectors, vectors, vectors, inverse, rows, width,
            HAS_MASK=False, SPLIT=False, BLOCK=min(1024, next_power_of_2(width)), num_warps=4,
        )  # fmt: skip
    return inverse


def _lse(queries: Tensor, keys: Tensor, scale: float, itself: int | None) -> Tensor:
    queries, keys = last_dimension_contiguous(queries), last_dimension_contiguous(keys)
    rows, columns = cdiv(queries.shape[0], TILE), cdiv(keys.shape[0], TILE)
    shares = max(1, min(columns, _PROGRAMS // rows))
    each = cdiv(columns, shares)
    shares = cdiv(columns, each)
    partial = queries.new_empty((shares, queries.shape[0]), dtype=torch.float32)
    config = CONFIGS[architecture(queries.device), queries.element_size()]
    with on(queries):
        start_kernel(
            lse_kernel, (rows, shares),
            queries, keys, queries.stride(0), keys.stride(0), partial, queries.shape[0], keys.shape[0],
            queries.shape[1], scale, each, itself or 0,
            SELF=itself is not None, PRECISION=_precision(queries), TILE=TILE, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return partial[0] if shares == 1 else torch.logsumexp(partial, dim=0)


def _gradient(
    rows: Tensor, columns: Tensor, scale: float, row_term: Term | None, column_term: Term | None, itself: int | None
) -> Tensor:
    """The gradient of `rows`, strip by strip."""
    rows, columns = last_dimension_contiguous(rows), last_dimension_contiguous(columns)
    count, others = rows.shape[0], columns.shape[0]
    strip = max(TILE, _STRIP_ELEMENTS // others // TILE * TILE)
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    weights = rows.new_empty((min(strip, count), others))
    key = architecture(rows.device), rows.element_size()
    tile, warps = weights_tile(key)
    with on(rows):
        for first in range(0, count, strip):
            end = min(first + strip, count)
            start_kernel(
                weights_kernel, (cdiv(others, tile), cdiv(end - first, tile)),
                rows, columns, rows.stride(0), columns.stride(0), *(row_term or (weights, weights)),
                *(column_term or (weights, weights)), weights, first, end, count, others, rows.shape[1], scale,
                itself or 0,
                ROW_TERM=row_term is not None, COLUMN_TERM=column_term is not None, SELF=itself is not None,
                PRECISION=_precision(rows), TILE=tile, BLOCK_K=CONFIGS[key].block_k, num_warps=warps,
                num_stages=CONFIGS[key].num_stages,
            )  # fmt: skip
            torch.mm(weights[: end - first], columns, out=result[first:end])
    return result


def pair_forward(queries: Tensor, keys: Tensor, scale: float, itself: int = -1) -> Tensor:
    """``(N,)`` float32 log-sum-exp over the keys, without key ``itself + i`` where ``itself >= 0``; no size 0."""
    return _lse(queries, keys, scale, itself if itself >= 0 else None)


def self_forward(vectors: Tensor, scale: float) -> Tensor:
    """``(N,)`` float32 log-sum-exp over the other rows; no size 0."""
    return _lse(vectors, vectors, scale, 0)


def pair_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float, itself: int = -1
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and of the keys."""
    term = lse, grad.float().contiguous()
    forth, back = (itself, -itself) if itself >= 0 else (None, None)
    return _gradient(queries, keys, scale, term, None, forth), _gradient(keys, queries, scale, None, term, back)


def self_backward(grad: Tensor, vectors: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Gradient of the vectors, from both of their roles."""
    term = lse, grad.float().contiguous()
    return _gradient(vectors, vectors, scale, term, term, 0)
