"""The contrastive loss on a GPU: tiles of S above the diagonal to bits and flags, then the 0/1 matrix times the rows.

Formats are those of `simctg_fast/ops/contrastive_loss.py`. Four launches in all for 16-bit types up to a length of 512:
norms, tiles, sums, gradient. Every program owns what it writes: no atomics, no dependence on the order of programs.

Operands. 16-bit hidden states are multiplied as they are and the products scaled by 1 / norm of both rows, so that no
normalised copy is rounded or stored; their norms must lie within 2^-60 and 2^60, or the products leave a float. float32
becomes unit vectors times 2^8 split into two fp16 planes, the bytes of the float: three fp16 products give a cosine to
1e-6, and the 0/1 matrix, exact in fp16, needs two. At matmul precision "highest" float32 is multiplied as such (FFMA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import (
    Config,
    architecture,
    before_triton,
    cdiv,
    last_dimension_contiguous,
    next_power_of_2,
    on,
    precise,
    start_kernel,
)

TILE = 128
_PLANES_BYTES = 24 << 20  # of unit vectors in two planes that exist at one time
_IN_KERNEL_SUMS = 512  # up to this length full tiles are summed where they are met: one launch less
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_READ = (torch.bool, *_INTEGERS, torch.float16, torch.float32)  # as masks and counts, by every triton's interpreter too
_REDUCTIONS = {"pairs": 0, "paper": 1, "dense": 2}

# (architecture, bytes of an element of an operand, two planes): measured or, where no such device was at hand, the
# deepest pipeline that compiles without spills into the shared memory.
HINGE_CONFIGS = {
    (80, 2, False): Config(32, 8, 3),
    (80, 2, True): Config(16, 8, 2),
    (80, 4, False): Config(16, 16, 2),
    (90, 2, False): Config(64, 8, 3),
    (90, 2, True): Config(32, 8, 3),
    (90, 4, False): Config(16, 16, 2),
}
HINGE_CONFIGS |= {(100, *key[1:]): config for key, config in HINGE_CONFIGS.items() if key[0] == 90}
GRADIENT_CONFIGS = {
    (80, 2, False): Config(128, 8, 2),
    (80, 2, True): Config(128, 8, 1),
    (80, 4, False): Config(16, 8, 1),
    (90, 2, False): Config(128, 8, 2),
    (90, 2, True): Config(128, 8, 2),
    (90, 4, False): Config(32, 16, 1),
    (100, 2, False): Config(128, 8, 2),
    (100, 2, True): Config(128, 8, 2),
    (100, 4, False): Config(16, 8, 1),
}


def compiles(device: torch.device) -> bool:
    """Whether triton compiles the hinge kernel for this device: 3.6 fails on Blackwell, 3.8 does not."""
    return architecture(device) < 100 or not before_triton(3, 8)


@triton.jit
def norms_kernel(
    x_ptr, stride_xb, stride_xt, mask_ptr, high_ptr, low_ptr, inverse_ptr,  # [B, T, D], [B, T], planes as x, [B, T]
    length, width,
    HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program: 1 / norm, and with SPLIT the unit vector times 2^8 as two fp16 planes."""
    row = tl.program_id(0).to(tl.int64)  # b * length + t
    b = row // length
    t = row % length
    readable = width
    if HAS_MASK:
        readable = tl.where(tl.load(mask_ptr + row) != 0, width, 0)  # padding may hold anything: it is not read
    base = x_ptr + b * stride_xb + t * stride_xt
    # The largest component is divided out first: no square overflows or vanishes.
    largest = tl.zeros((), tl.float32)
    poison = tl.zeros((), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(base + k, mask=k < readable, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=0))
        poison += tl.sum(x * 0.0, axis=0)  # NaN where a component is not finite
    usable = largest > 7.52316384526264e-37  # 2^-120
    factor = 1.0 / tl.where(usable, largest, 1.0)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(base + k, mask=k < readable, other=0.0).to(tl.float32) * factor
        squares += x * x
    inverse = tl.where(usable, factor / tl.sqrt_rn(tl.maximum(tl.sum(squares, axis=0), 1e-30)), 0.0) + poison
    tl.store(inverse_ptr + row, inverse)
    if SPLIT:
        for start in range(0, width, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(base + k, mask=k < readable, other=0.0).to(tl.float32)
            unit = tl.where(inverse != 0.0, x * inverse * 256.0, 0.0)
            high = unit.to(tl.float16)
            low = (unit - high.to(tl.float32)).to(tl.float16)
            tl.store(high_ptr + row * width + k, high, mask=k < width)
            tl.store(low_ptr + row * width + k, low, mask=k < width)


@triton.jit
def hinge_kernel(
    x_ptr, low_ptr, stride_xb, stride_xt, inverse_ptr,  # [B, T, D], its second plane, [B, T]
    totals_ptr, radial_ptr, bits_ptr, flags_ptr,  # [B, pairs of tiles], [B, tiles, tiles, TILE], half-words, flags
    length, width, tiles, threshold,
    KEEP: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of S on or above the diagonal: its hinge sum; its rows' and columns' radial sums, bits, flag."""
    pair = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    # pair = j (j + 1) / 2 + i with i <= j
    j = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > pair, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= pair, j + 1, j)
    i = pair - j * (j + 1) // 2

    lanes = tl.arange(0, TILE)
    rows = i * TILE + lanes
    columns = j * TILE + lanes
    base = b * stride_xb
    row_offsets = base + tl.where(rows < length, rows, 0).to(tl.int64) * stride_xt
    column_offsets = base + tl.where(columns < length, columns, 0).to(tl.int64) * stride_xt
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, width, BLOCK_K):
        depth = k + tl.arange(0, BLOCK_K)
        inside = depth < width
        left_at = row_offsets[:, None] + depth[None, :]
        right_at = column_offsets[None, :] + depth[:, None]
        left = tl.load(x_ptr + left_at, mask=inside[None, :], other=0.0)  # [TILE, BLOCK_K]
        right = tl.load(x_ptr + right_at, mask=inside[:, None], other=0.0)  # [BLOCK_K, TILE]
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if SPLIT:
            left_low = tl.load(low_ptr + left_at, mask=inside[None, :], other=0.0)
            right_low = tl.load(low_ptr + right_at, mask=inside[:, None], other=0.0)
            acc = tl.dot(left, right_low, acc)
            acc = tl.dot(left_low, right, acc)

    row_inverse = tl.load(inverse_ptr + b * length + rows, mask=rows < length, other=0.0)
    column_inverse = tl.load(inverse_ptr + b * length + columns, mask=columns < length, other=0.0)
    if SPLIT:
        acc = acc * (1.0 / (256.0 * 256.0))
    else:
        acc = acc * row_inverse[:, None] * column_inverse[None, :]
    row_used = row_inverse != 0.0
    column_used = column_inverse != 0.0
    used = row_used[:, None] & column_used[None, :] & (rows[:, None] != columns[None, :])
    # Few registers are left: everything below reads this one tile.
    hinge = tl.maximum(tl.where(used, acc - threshold, 0.0), 0.0)
    row_hinge = tl.sum(hinge, axis=1)
    total = tl.sum(row_hinge, axis=0)
    # A tile off the diagonal stands for its mirror image too.
    tl.store(totals_ptr + b * tl.num_programs(0) + pair, tl.where(i == j, total, 2.0 * total))
    if KEEP:
        # Packing by one small product: column w < 8 of the weights picks the 16 pairs of half-word w, column 8 counts.
        place = tl.arange(0, 16)
        halves: tl.constexpr = TILE // 16
        weights = tl.where(lanes[:, None] // 16 == place[None, :], (1 << (lanes % 16))[:, None], 0)
        weights = tl.where(place[None, :] == halves, 1, weights).to(tl.float16)
        ones = tl.where(hinge > 0.0, 1.0, 0.0).to(tl.float16)
        slot = b * tiles
        stride = tiles * halves
        packed = tl.dot(ones, weights)  # [TILE, 16], exact
        counts = tl.sum(tl.where((place == halves)[None, :], packed, 0.0), axis=1)
        tl.store(radial_ptr + ((slot + i) * tiles + j) * TILE + lanes, row_hinge + threshold * counts)
        at = (slot + i) * TILE * stride + lanes[:, None] * stride + j * halves + place[None, :]
        tl.store(bits_ptr + at, packed.to(tl.int32).to(tl.int16), mask=(place < halves)[None, :])
        if i != j:
            column_hinge = tl.sum(hinge, axis=0)
            packed = tl.dot(tl.trans(ones), weights)
            column_counts = tl.sum(tl.where((place == halves)[None, :], packed, 0.0), axis=1)
            tl.store(radial_ptr + ((slot + j) * tiles + i) * TILE + lanes, column_hinge + threshold * column_counts)
            at = (slot + j) * TILE * stride + lanes[:, None] * stride + i * halves + place[None, :]
            tl.store(bits_ptr + at, packed.to(tl.int32).to(tl.int16), mask=(place < halves)[None, :])
        count = tl.sum(counts, axis=0)
        real_rows = tl.sum(tl.where(row_used, 1.0, 0.0), axis=0)
        real_columns = tl.sum(tl.where(column_used, 1.0, 0.0), axis=0)
        needed = real_rows * tl.where(i == j, real_columns - 1.0, real_columns)
        flag = tl.where(count == 0.0, 0, tl.where(count == needed, 1, 2)).to(tl.uint8)
        tl.store(flags_ptr + (slot + i) * tiles + j, flag)
        tl.store(flags_ptr + (slot + j) * tiles + i, flag)


@triton.jit
def sums_kernel(
    inverse_ptr, mask_ptr, totals_ptr, partial_ptr, normalizer_ptr,  # partial: the radial sums of the hinge kernel
    loss_ptr, weights_ptr, radial_ptr,  # [], [B], [B, T]
    batch, length, tiles, pairs_of_tiles, margin,
    REDUCTION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_NORMALIZER: tl.constexpr, KEEP: tl.constexpr,
    TILE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0: the loss and the sequences' weights. The others: the radial sums of one tile of rows each."""
    pid = tl.program_id(0)
    if pid == 0:
        own = tl.maximum(margin, 0.0)
        sum_of_pairs = tl.zeros((), tl.float32)
        loss = tl.zeros((), tl.float32)
        # What does not depend on the sum over all sequences first, then the weights.
        for b0 in range(0, batch, BLOCK_B):
            b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
            tokens = tl.zeros((BLOCK_B,), tl.float32)
            zeros = tl.zeros((BLOCK_B,), tl.float32)
            sums = tl.zeros((BLOCK_B,), tl.float32)
            for t0 in range(0, length, BLOCK):
                t = t0 + tl.arange(0, BLOCK)
                at = b[:, None] * length + t[None, :]
                inside = (b < batch)[:, None] & (t < length)[None, :]
                inverse = tl.load(inverse_ptr + at, mask=inside, other=0.0)
                real = inside
                if HAS_MASK:
                    real = real & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
                tokens += tl.sum(real.to(tl.float32), axis=1)
                zeros += tl.sum((real & (inverse == 0.0)).to(tl.float32), axis=1)
                sums += tl.sum(inverse * 0.0, axis=1)  # NaN where a real vector is not finite
            for p0 in range(0, pairs_of_tiles, BLOCK):
                p = p0 + tl.arange(0, BLOCK)
                at = b[:, None] * pairs_of_tiles + p[None, :]
                inside = (b < batch)[:, None] & (p < pairs_of_tiles)[None, :]
                sums += tl.sum(tl.load(totals_ptr + at, mask=inside, other=0.0), axis=1)
            pairs = tokens * (tokens - 1.0)
            # A zero vector has similarity 0 to everything: its own hinges are max(0, margin).
            sums += tl.where(zeros > 0.0, (tokens - 1.0) * zeros * own, 0.0)
            weights = tl.where(pairs > 0.0, 1.0, 0.0)
            value = weights
            if REDUCTION == 1:
                weights = weights / tl.maximum(pairs, 1.0)
                value = weights
            if REDUCTION == 2:
                sums += length * own
                value = tl.full((BLOCK_B,), 1.0, tl.float32) / (length * 1.0) / length
                weights = weights * value
            loss += tl.sum(tl.where(b < batch, sums * value, 0.0), axis=0)
            sum_of_pairs += tl.sum(tl.where(b < batch, pairs, 0.0), axis=0)
            tl.store(weights_ptr + b, weights, mask=b < batch)
        items = batch * 1.0
        if REDUCTION == 0:
            items = tl.maximum(sum_of_pairs, 1.0)
        if HAS_NORMALIZER:
            items = tl.load(normalizer_ptr).to(tl.float32)
        # 0 / 0 is the count of a batch without pairs.
        tl.store(loss_ptr, tl.where((loss == 0.0) & (items == 0.0), 0.0, loss / items))
        tl.debug_barrier()
        for b0 in range(0, batch, BLOCK_B):
            b = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)
            weights = tl.load(weights_ptr + b, mask=b < batch, other=0.0)
            tl.store(weights_ptr + b, tl.where(weights == 0.0, 0.0, weights / items), mask=b < batch)
    elif KEEP:
        tile = (pid - 1).to(tl.int64)  # b * tiles + i
        lanes = tl.arange(0, TILE)
        total = tl.zeros((TILE,), tl.float32)
        for j in range(tiles):
            total += tl.load(partial_ptr + (tile * tiles + j) * TILE + lanes)
        b = tile // tiles
        t = (tile % tiles) * TILE + lanes
        tl.store(radial_ptr + b * length + t, total, mask=t < length)


@triton.jit
def tile_sums_kernel(
    x_ptr, low_ptr, stride_xb, stride_xt, inverse_ptr, sums_ptr,  # sums [B, tiles, D]
    length, width, tiles,
    SPLIT: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of the unit vectors of one tile, for one slice of the width: what a full tile contributes."""
    tile = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tile * TILE + tl.arange(0, TILE)
    inverse = tl.load(inverse_ptr + b * length + rows, mask=rows < length, other=0.0)
    at = b * stride_xb + rows[:, None].to(tl.int64) * stride_xt + columns[None, :]
    inside = (inverse != 0.0)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        x = (x + tl.load(low_ptr + at, mask=inside, other=0.0).to(tl.float32)) * (1.0 / 256.0)
    else:
        x = x * inverse[:, None]
    tl.store(sums_ptr + (b * tiles + tile) * width + columns, tl.sum(x, axis=0), mask=columns < width)


@triton.jit
def gradient_kernel(
    x_ptr, low_ptr, stride_xb, stride_xt, inverse_ptr, radial_ptr,  # [B, T, D], its second plane, [B, T] twice
    bits_ptr, flags_ptr, sums_ptr, weights_ptr, grad_ptr, out_ptr,  # words, flags, [B, tiles, D], [B], [], [B, T, D]
    length, width, tiles,
    HAS_SUMS: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of rows in one slice of the width."""
    i = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    lanes = tl.arange(0, TILE)
    rows = i * TILE + lanes
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide = columns < width
    base = b * stride_xb
    acc = tl.zeros((TILE, BLOCK_D), tl.float32)
    full = tl.zeros((BLOCK_D,), tl.float32)
    shift = tl.arange(0, 32)
    word = tl.arange(0, TILE // 32)
    bits_row = (b * tiles + i) * TILE + lanes
    for j in range(tiles):
        flag = tl.load(flags_ptr + (b * tiles + i) * tiles + j)
        if flag == 1 and HAS_SUMS:
            full += tl.load(sums_ptr + (b * tiles + j) * width + columns, mask=wide, other=0.0)
        elif flag != 0:
            others = j * TILE + lanes
            inverse = tl.load(inverse_ptr + b * length + others, mask=others < length, other=0.0)
            at = base + others[:, None].to(tl.int64) * stride_xt + columns[None, :]
            inside = (inverse != 0.0)[:, None] & wide[None, :]
            words = tl.load(bits_ptr + bits_row[:, None] * (tiles * (TILE // 32)) + j * (TILE // 32) + word[None, :])
            words = tl.where(flag == 1, -1, words)
            ones = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 1, (TILE, TILE))  # [row, other]
            x = tl.load(x_ptr + at, mask=inside, other=0.0)  # [other, BLOCK_D]
            if SPLIT:
                mask = ones.to(tl.float16)
                acc = tl.dot(mask, x, acc)
                acc = tl.dot(mask, tl.load(low_ptr + at, mask=inside, other=0.0), acc)
            elif x_ptr.dtype.element_ty == tl.float16:
                # The reciprocal of a norm may not fit float16; relative to the largest of the tile it does.
                peak = tl.max(inverse, axis=0)
                mask = tl.where(ones != 0, (inverse / tl.where(peak > 0.0, peak, 1.0))[None, :], 0.0).to(tl.float16)
                acc += tl.dot(mask, x) * (peak * 256.0)
            else:
                mask = tl.where(ones != 0, inverse[None, :] * 256.0, 0.0).to(x.dtype)
                acc = tl.dot(mask, x, acc, input_precision=PRECISION)

    inverse = tl.load(inverse_ptr + b * length + rows, mask=rows < length, other=0.0)
    radial = tl.load(radial_ptr + b * length + rows, mask=rows < length, other=0.0)
    # The sum of a full tile on the diagonal has the vector itself in it, which is radial too.
    radial += tl.where(tl.load(flags_ptr + (b * tiles + i) * tiles + i) == 1, 1.0, 0.0)
    at = base + rows[:, None].to(tl.int64) * stride_xt + columns[None, :]
    inside = (inverse != 0.0)[:, None] & wide[None, :]
    own = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        own = (own + tl.load(low_ptr + at, mask=inside, other=0.0).to(tl.float32)) * (1.0 / 256.0)
    else:
        own = own * inverse[:, None]
    scale = 2.0 * tl.load(weights_ptr + b) * tl.load(grad_ptr).to(tl.float32)
    total = acc * (1.0 / 256.0) + full[None, :] - radial[:, None] * own
    total = tl.where(inside, total * (inverse * scale)[:, None], 0.0)
    out_at = (b * length + rows[:, None].to(tl.int64)) * width + columns[None, :]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=(rows < length)[:, None] & wide[None, :])


class _Operands:
    """The tensors that stand for some sequences' vectors in the products.

    Writes the norms to `inverse`, or reads them there where they are `known`.
    """

    def __init__(self, states: Tensor, mask: Tensor | None, inverse: Tensor, known: bool):
        batch, length, width = states.shape
        self.split = states.dtype == torch.float32 and not precise()
        self.inverse = inverse
        self.x = self.low = states
        if self.split:
            self.x = states.new_empty((batch, length, width), dtype=torch.float16)
            self.low = torch.empty_like(self.x)
        if self.split or not known:
            start_kernel(
                norms_kernel, (batch * length,),
                states, states.stride(0), states.stride(1), states if mask is None else mask, self.x, self.low,
                # Recomputed for the planes alone: the saved norms already know the padding.
                torch.empty_like(inverse) if known else inverse, length, width,
                HAS_MASK=mask is not None, SPLIT=self.split, BLOCK=min(1024, next_power_of_2(width)), num_warps=4,
            )  # fmt: skip
        self.strides = (self.x.stride(0), self.x.stride(1))
        self.key = (architecture(states.device), self.x.element_size(), self.split)


def _loadable(mask: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype not in _READ:
        mask = mask != 0
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).contiguous()


def _groups(states: Tensor) -> list[slice]:
    """Slices of the batch whose planes fit the budget; the whole batch where there are none."""
    batch, length, width = states.shape
    size = batch
    if states.dtype == torch.float32 and not precise():
        size = max(1, min(batch, _PLANES_BYTES // (4 * length * width)))
    return [slice(b, min(b + size, batch)) for b in range(0, batch, size)]


def _part(tensor: Tensor, group: slice) -> Tensor:
    """The group's part of a tensor: the tensor itself, without the time that a view takes, where that is all."""
    return tensor if group.stop - group.start == tensor.shape[0] else tensor[group]


def forward(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    normalizer: Tensor | None,
    margin: float,
    reduction: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, weights, inverse norms, radial sums, bits and flags of ``(B, T, D)`` states with no size 0."""
    states = last_dimension_contiguous(hidden_states)
    batch, length, width = states.shape
    tiles = cdiv(length, TILE)
    pairs_of_tiles = tiles * (tiles + 1) // 2
    mask = _loadable(attention_mask)
    if normalizer is not None and normalizer.dtype not in _READ:
        normalizer = normalizer.to(torch.float32)
    new, floats = states.new_empty, torch.float32
    inverse, weights = new((batch, length), dtype=floats), new((batch,), dtype=floats)
    loss = new((), dtype=floats)
    radial = new((batch, length), dtype=floats)
    kept = tiles if keep else 0
    bits = new((batch, kept * TILE, kept * TILE // 32), dtype=torch.int32)
    flags = new((batch, kept, kept), dtype=torch.uint8)
    totals = new((batch, pairs_of_tiles), dtype=floats)
    partials = new((batch, kept, kept, TILE), dtype=floats)
    half_words = bits.view(torch.int16)
    with on(states):
        for group in _groups(states):
            own_mask = None if mask is None else _part(mask, group)
            operands = _Operands(_part(states, group), own_mask, _part(inverse, group), known=False)
            config = HINGE_CONFIGS[operands.key]
            start_kernel(
                hinge_kernel, (pairs_of_tiles, group.stop - group.start),
                operands.x, operands.low, *operands.strides, operands.inverse, _part(totals, group),
                _part(partials, group), _part(half_words, group), _part(flags, group), length, width, tiles,
                1.0 - margin,
                KEEP=keep, SPLIT=operands.split, PRECISION="ieee", TILE=TILE, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        start_kernel(
            sums_kernel, (1 + (batch * tiles if keep else 0),),
            inverse, inverse if mask is None else mask, totals, partials, inverse if normalizer is None else normalizer,
            loss, weights, radial, batch, length, tiles, pairs_of_tiles, float(margin),
            REDUCTION=_REDUCTIONS[reduction], HAS_MASK=mask is not None, HAS_NORMALIZER=normalizer is not None,
            KEEP=keep, TILE=TILE, BLOCK_B=8, BLOCK=512, num_warps=8,
        )  # fmt: skip
    return loss, weights, inverse, radial, bits, flags


def backward(
    grad: Tensor,
    hidden_states: Tensor,
    weights: Tensor,
    inverse_norms: Tensor,
    radial: Tensor,
    bits: Tensor,
    flags: Tensor,
) -> Tensor:
    """``(B, T, D)``, contiguous, of the hidden states' dtype."""
    states = last_dimension_contiguous(hidden_states)
    _, length, width = states.shape
    tiles = cdiv(length, TILE)
    result = torch.empty_like(states, memory_format=torch.contiguous_format)
    with on(states):
        for group in _groups(states):
            size = group.stop - group.start
            operands = _Operands(_part(states, group), None, _part(inverse_norms, group), known=True)
            sums = None
            if length > _IN_KERNEL_SUMS:
                sums = states.new_empty((size, tiles, width), dtype=torch.float32)
                start_kernel(
                    tile_sums_kernel, (tiles, cdiv(width, 64), size),
                    operands.x, operands.low, *operands.strides, operands.inverse, sums, length, width, tiles,
                    SPLIT=operands.split, TILE=TILE, BLOCK_D=64, num_warps=4,
                )  # fmt: skip
            config = GRADIENT_CONFIGS[operands.key]
            start_kernel(
                gradient_kernel, (cdiv(width, config.block_k), tiles, size),
                operands.x, operands.low, *operands.strides, operands.inverse, _part(radial, group), _part(bits, group),
                _part(flags, group), operands.inverse if sums is None else sums, _part(weights, group), grad,
                _part(result, group), length, width, tiles,
                HAS_SUMS=sums is not None, SPLIT=operands.split, PRECISION="ieee", TILE=TILE,
                BLOCK_D=config.block_k, num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
    return result
