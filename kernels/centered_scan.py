"""Candidates of contrastive search against the history of hidden states, both less the history's mean.

The scan of `candidate_select.py` with one row more: the mean m is held against the history as the candidates are, and
what it gives is subtracted from their products before these are divided by lengths. Candidates come in raw: the shift
that the history is kept without is taken out in float32, and what is left rounded to the history's dtype, as that was.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._decode import DTYPE_NAMES, DTYPES, counters, last_to_arrive, ranked, ranked_index, ranked_value
from ._launch import architecture, last_dimension_contiguous, on, precise
from .candidate_select import _NOTHING, _SPLIT_LIMIT, WIDTH_LIMIT, Config, config_of, plan

CANDIDATE_LIMIT = 63  # with the mean a tile of 64 rows
_ROUNDING = tl.constexpr(2.0**-16)  # as in ops/centered_scan.py
_FEWEST = tl.constexpr(3)
_COUNTED = 1024  # positions of a mask that are counted at a time
# (architecture, bytes of an element of the product, rows of a tile). The row of the mean and the subtractions take
# registers that the scan without a mean has for wider tiles. Blackwell takes what Hopper does.
CONFIGS = {
    (80, 2, 16): Config(32, 64, 4, 4, 128),
    (80, 2, 32): Config(32, 64, 8, 4, 128),
    (80, 2, 64): Config(32, 64, 8, 4, 255),
    (80, 4, 16): Config(32, 32, 4, 3),
    (80, 4, 32): Config(32, 64, 8, 3, 168),
    (80, 4, 64): Config(16, 32, 8, 3, 255),
    (90, 2, 16): Config(32, 64, 4, 5, 128),
    (90, 2, 32): Config(32, 64, 8, 5, 128),
    (90, 2, 64): Config(32, 64, 8, 5, 255),
    (90, 4, 16): Config(32, 32, 4, 5),
    (90, 4, 32): Config(16, 64, 8, 5),
    (90, 4, 64): Config(16, 32, 8, 3, 255),
}


@triton.jit
def _inverse_length(square, with_mean, mean_square):
    """1 / |x − m| of |x|², m·x and |m|²; 0 where nothing but rounding is left, NaN where it is not finite."""
    left = square - 2.0 * with_mean + mean_square
    usable = left > _ROUNDING * (square + mean_square)
    return tl.where(usable, 1.0 / tl.sqrt_rn(tl.where(usable, left, 1.0)), left - left)


@triton.jit
def _store(best, b, k, count, penalty_ptr, position_ptr, BLOCK_K: tl.constexpr):
    candidate = tl.arange(0, BLOCK_K)
    penalty = tl.where(count == 0, 0.0, ranked_value(best))
    position = tl.where(count == 0, 0, ranked_index(best))
    tl.store(penalty_ptr + b * k + candidate, penalty, mask=candidate < k)
    tl.store(position_ptr + b * k + candidate, position, mask=candidate < k)


# What moves from step to step or call to call must not compile anew: k, lengths, and what grows with the buffers.
@triton.jit(
    do_not_specialize=[
        "mask_ptr",
        "stride_mb",
        "lengths_ptr",
        "squares_ptr",
        "stride_qb",
        "length",
        "splits",
        "k",
        "capacity",
    ]
)
def centered_scan_kernel(
    states_ptr, stride_sb, stride_sk,  # [B, k, D]
    shift_ptr, stride_cb,  # [B, D]
    history_ptr, stride_hb, stride_ht,  # [B, capacity, D]
    squares_ptr, stride_qb,  # [B, capacity]
    sums_ptr, stride_ub,  # [B, D]
    mask_ptr, stride_mb,  # [B, capacity], 0: no real position
    lengths_ptr,  # [B]
    partial_ptr, counter_ptr,  # [B, splits, BLOCK_K], [B]
    penalty_ptr, position_ptr,  # [B, k]
    length, splits, k, width, capacity,
    HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sequence and share of its history; row k of the tile is the mean. EVEN: BLOCK_D divides the width."""
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    states_ptr += b * stride_sb
    shift_ptr += b * stride_cb
    history_ptr += b * stride_hb
    squares_ptr += b * stride_qb
    sums_ptr += b * stride_ub
    end = length
    if HAS_LENGTHS:
        end = tl.load(lengths_ptr + b).to(tl.int32)
        end = tl.minimum(tl.maximum(end, 0), capacity)
    count = end
    if HAS_MASK:
        real = tl.zeros((BLOCK_C,), tl.int32)
        for t0 in range(0, end, BLOCK_C):
            t = t0 + tl.arange(0, BLOCK_C)
            real += (tl.load(mask_ptr + b * stride_mb + t, mask=t < end, other=0) != 0).to(tl.int32)
        count = tl.sum(real, axis=0)
    number = tl.maximum(count, 1).to(tl.float32)
    share = tl.cdiv(tl.cdiv(end, BLOCK_T), splits) * BLOCK_T
    first = split * share
    row = tl.arange(0, BLOCK_K)
    valid = row < k
    is_mean = row == k
    state_at = states_ptr + tl.where(valid, row, 0).to(tl.int64) * stride_sk
    best = tl.full((BLOCK_K,), _NOTHING, tl.int64)
    for t0 in range(first, tl.minimum(first + share, end), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = t < end
        row_at = history_ptr + tl.where(seen, t, 0).to(tl.int64) * stride_ht
        if HAS_MASK:
            seen = seen & (tl.load(mask_ptr + b * stride_mb + t, mask=seen, other=0) != 0)
        products = tl.zeros((BLOCK_K, BLOCK_T), tl.float32)
        squares = tl.zeros((BLOCK_K,), tl.float32)
        with_mean = tl.zeros((BLOCK_K,), tl.float32)
        for d0 in range(0, width, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            if EVEN:
                states = tl.load(state_at[:, None] + d[None, :], mask=valid[:, None], other=0.0)
                shift = tl.load(shift_ptr + d)
                sums = tl.load(sums_ptr + d)
                kept = tl.load(row_at[:, None] + d[None, :], mask=seen[:, None], other=0.0)
            else:
                inside = d < width
                states = tl.load(state_at[:, None] + d[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
                shift = tl.load(shift_ptr + d, mask=inside, other=0.0)
                sums = tl.load(sums_ptr + d, mask=inside, other=0.0)
                kept = tl.load(row_at[:, None] + d[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
            mean = (sums / number)[None, :]
            rows = states.to(tl.float32) - shift.to(tl.float32)[None, :]
            rows = tl.where(valid[:, None], rows, tl.where(is_mean[:, None], mean, 0.0)).to(kept.dtype)
            wide = rows.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            with_mean += tl.sum(wide * mean.to(kept.dtype).to(tl.float32), axis=1)
            products = tl.dot(rows, tl.trans(kept), products, input_precision=PRECISION)
        mean_square = tl.sum(tl.where(is_mean, squares, 0.0), axis=0)
        of_history = tl.sum(tl.where(is_mean[:, None], products, 0.0), axis=0)  # [BLOCK_T]
        kept_squares = tl.load(squares_ptr + t, mask=seen, other=0.0)
        inverse = _inverse_length(squares, with_mean, mean_square)
        inverses = _inverse_length(kept_squares, of_history, mean_square)
        cosine = products - with_mean[:, None] + (mean_square - of_history)[None, :]
        cosine = cosine * inverse[:, None] * inverses[None, :]
        cosine = tl.where(cosine > 1.0, 1.0, tl.where(cosine < -1.0, -1.0, cosine))  # NaN stays
        few = count < _FEWEST
        cosine = tl.where(few, cosine - cosine, cosine)
        place = tl.where(few, 0, t)
        entry = ranked(cosine, tl.broadcast_to(place[None, :], (BLOCK_K, BLOCK_T)))
        best = tl.maximum(best, tl.max(tl.where(seen[None, :], entry, _NOTHING), axis=1))
    if SPLIT:
        part_at = partial_ptr + b * splits * BLOCK_K
        tl.store(part_at + split * BLOCK_K + row, best)
        if last_to_arrive(counter_ptr + b, splits):
            s = tl.arange(0, BLOCK_S)[:, None]
            part = tl.load(part_at + s * BLOCK_K + row[None, :], mask=s < splits, other=_NOTHING)
            _store(tl.max(part, axis=0), b, k, count, penalty_ptr, position_ptr, BLOCK_K)
    else:
        _store(best, b, k, count, penalty_ptr, position_ptr, BLOCK_K)


def configuration(arch: int, size: int, width: int, k: int, exact: bool) -> tuple[int, Config]:
    """Rows of a tile, the mean's among them, and how a launch is cut; ``size``: bytes of an element of the history."""
    block_k = max(16, triton.next_power_of_2(k + 1))
    if exact and width % 16 == 0:
        return block_k, CONFIGS[min(arch, 90), size, block_k]
    return block_k, config_of(arch, size, width, block_k, exact, False)


def obstacle(hidden_states: Tensor, shift: Tensor, history: Tensor, squares: Tensor, sums: Tensor) -> str | None:
    """What keeps these operands (wherever they are) from the kernel."""
    _, k, width = hidden_states.shape
    dtypes = all(tensor.dtype in DTYPES for tensor in (hidden_states, shift, history))
    single = squares.dtype == sums.dtype == torch.float32
    if dtypes and single and 1 <= k <= CANDIDATE_LIMIT and 1 <= width <= WIDTH_LIMIT:
        return None
    return (
        f"takes up to {CANDIDATE_LIMIT} candidates of width up to {WIDTH_LIMIT} in {DTYPE_NAMES}, with squares and "
        f"sums in float32, got hidden_states {tuple(hidden_states.shape)} of {hidden_states.dtype}, a shift of "
        f"{shift.dtype}, a history of {history.dtype}, squares of {squares.dtype} and sums of {sums.dtype}"
    )


def centered_scan(
    hidden_states: Tensor, shift: Tensor, history: Tensor, squares: Tensor, sums: Tensor, length: int,
    mask: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``penalty (B, k)`` float32 and ``position (B, k)`` int64; see `simctg_fast/ops/centered_scan.py`."""
    states, shift, sums = (last_dimension_contiguous(x) for x in (hidden_states, shift, sums))
    squares = last_dimension_contiguous(squares)
    batch, k, width = states.shape
    capacity = history.shape[1]
    if history.stride(-1) != 1 and width > 1:
        raise ValueError(f"history has strides {history.stride()}, the last must be 1")
    size = history.element_size()
    exact = size == 2 or precise()
    block_k, config = configuration(architecture(states.device), size, width, k, exact)
    # Under a capture the length moves while the launch stays, so the split follows the capacity.
    splits = plan(states.device, batch, capacity if lengths is not None else max(1, length), config.block_t)
    penalty = states.new_empty((batch, k), dtype=torch.float32)
    position = states.new_empty((batch, k), dtype=torch.int64)
    partial = states.new_empty((batch * splits * block_k,) if splits > 1 else (0,), dtype=torch.int64)
    counter = counters(states.device, batch) if splits > 1 else partial
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    if batch == 0:
        return penalty, position
    with on(states):
        centered_scan_kernel[(batch, splits)](
            states, states.stride(0), states.stride(1), shift, shift.stride(0),
            history, history.stride(0), history.stride(1), squares, squares.stride(0), sums, sums.stride(0),
            states if mask is None else mask, 0 if mask is None else mask.stride(0),
            states if lengths is None else lengths.contiguous(),
            partial, counter, penalty, position, length, splits, k, width, capacity,
            HAS_MASK=mask is not None, HAS_LENGTHS=lengths is not None, EVEN=width % config.block_d == 0,
            PRECISION="ieee" if exact else "tf32x3", SPLIT=splits > 1, BLOCK_S=_SPLIT_LIMIT, BLOCK_K=block_k,
            BLOCK_T=config.block_t, BLOCK_D=config.block_d, BLOCK_C=_COUNTED,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers,
        )  # fmt: skip
    return penalty, position
