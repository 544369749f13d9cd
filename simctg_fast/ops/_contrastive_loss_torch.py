"""The two phases of the contrastive loss in tiled PyTorch: any device, any floating dtype, no T x T matrix of floats.

Phase 1 walks the tiles of S on and above the diagonal, sums the hinge and keeps one bit a pair and one flag a tile.
Phase 2 multiplies the 0/1 matrix of the bits by the unit vectors. The formats of the bits and flags are those of every
implementation; `contrastive_loss.py` describes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE = 128  # side of a tile that has one flag
WORD = 32  # pairs in a word of the bits
NONE, ALL, MIXED = 0, 1, 2

_BLOCK_ELEMENTS = 1 << 19  # floats in one operand of a product (2 MB); one product touches two of them and a block of S
SMALLEST_NORM = 2.0**-120  # below it a vector counts as zero: the reciprocal of its norm would not fit a float


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast inside: the operator's arithmetic does not depend on the caller's context."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_norms(hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """``(B, T)``: 1 / norm of every vector; 0 at padding and at zero vectors, NaN where a component is not finite."""
    result = hidden_states.new_zeros(hidden_states.shape[:2], dtype=accumulator_dtype(hidden_states.dtype))
    for group, rows in _blocks(hidden_states):
        result[group, rows] = reciprocal_norms(hidden_states[group, rows])
    return result if real is None else result.masked_fill_(~real, 0.0)


def reciprocal_norms(vectors: Tensor) -> Tensor:
    """``(…)``: 1 / norm of ``(…, D)`` vectors, 0 for zero vectors, NaN where a component is not finite."""
    dtype = accumulator_dtype(vectors.dtype)
    if vectors.numel() == 0:  # zero vectors, which have no largest component
        return vectors.new_zeros(vectors.shape[:-1], dtype=dtype)
    # The largest component is divided out first: no square overflows or vanishes.
    largest = torch.linalg.vector_norm(vectors, torch.inf, dim=-1, keepdim=True, dtype=dtype)
    zero = largest <= SMALLEST_NORM
    divisor = largest.masked_fill(zero, 1.0)
    inverse = torch.linalg.vector_norm(vectors / divisor, dim=-1, keepdim=True, dtype=dtype).reciprocal_().div_(divisor)
    return inverse.masked_fill_(zero, 0.0).squeeze(-1)


def _sizes(hidden_states: Tensor) -> tuple[int, int]:
    """Sequences and rows that one block spans."""
    batch, length, width = hidden_states.shape
    rows = max(TILE, min(256, _BLOCK_ELEMENTS // max(1, width) // TILE * TILE))
    sequences = max(1, _BLOCK_ELEMENTS // max(1, min(rows, length) * max(width, min(rows, length))))
    return min(max(1, batch), sequences), rows


def _blocks(hidden_states: Tensor) -> Iterator[tuple[slice, slice]]:
    batch, length, _ = hidden_states.shape
    group, rows = _sizes(hidden_states)
    for b in range(0, batch, group):
        for t in range(0, length, rows):
            yield slice(b, min(b + group, batch)), slice(t, min(t + rows, length))


def _parts(hidden_states: Tensor) -> list[slice]:
    """The width in parts, of which a block holds no more elements than it should."""
    width = hidden_states.shape[2]
    step = max(1, _BLOCK_ELEMENTS // _sizes(hidden_states)[1])
    return [slice(d, min(d + step, width)) for d in range(0, max(1, width), step)]


def _unit(hidden_states: Tensor, inverse: Tensor, group: slice, rows: slice, part: slice) -> Tensor:
    """A part of the unit vectors of one block, zeros where the inverse norm is 0."""
    scale = inverse[group, rows].unsqueeze(-1)
    unit = hidden_states[group, rows, part].to(inverse.dtype) * scale
    return unit.masked_fill_(scale == 0, 0.0)  # not 0 * NaN: padding may hold anything


def unit_and_tangent(vectors: Tensor, direction: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """``(..., D)`` unit vectors and their derivatives along `direction`, both differentiable; zeros where `inverse
    (...)`, the reciprocal norms, is 0.
    """
    zero = (inverse == 0).unsqueeze(-1)
    # As constants, the reciprocal norms cancel; they keep squares from overflowing.
    scale = inverse.detach().unsqueeze(-1)
    scaled, moved = ((x.to(inverse.dtype) * scale).masked_fill(zero, 0.0) for x in (vectors, direction))
    norm = torch.linalg.vector_norm(scaled.masked_fill(zero, 1.0), dim=-1, keepdim=True)
    unit = scaled / norm
    return unit, (moved - unit * (unit * moved).sum(dim=-1, keepdim=True)) / norm


def along(
    vectors: Tensor, direction: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """:func:`unit_and_tangent`, and what takes the gradients of the two back to `vectors`."""
    (unit, tangent), pull = torch.func.vjp(  # type: ignore[misc]
        lambda vectors: unit_and_tangent(vectors, direction, inverse), vectors
    )
    return unit, tangent, lambda *gradients: pull(gradients)[0]


def hinge_sums(
    hidden_states: Tensor, inverse: Tensor, threshold: float, bits: Tensor | None, flags: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Phase 1. Fills `bits` and `flags` where given.

    Returns:
        ``(B, T)`` sums over ``j != i`` of ``max(0, s_ij - threshold)``, and the radial part of the gradient: the sum of
        ``s_ij`` over the active pairs.
    """
    length, step, parts = hidden_states.shape[1], _sizes(hidden_states)[1], _parts(hidden_states)
    hinge, count = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for group, rows in _blocks(hidden_states):
        left = None
        for start in range(rows.start, length, step):
            columns = slice(start, min(start + step, length))
            diagonal = columns == rows
            excess = inverse.new_full((), -threshold)
            for part in parts:
                if left is None or len(parts) > 1:
                    left = _unit(hidden_states, inverse, group, rows, part)
                right = left if diagonal else _unit(hidden_states, inverse, group, columns, part)
                excess = torch.baddbmm(excess, left, right.transpose(1, 2))
            if diagonal:
                excess.diagonal(dim1=1, dim2=2).fill_(-1.0)
            if bits is not None and flags is not None:
                active = excess > 0
                count[group, rows] += active.sum(dim=2)
                if not diagonal:
                    count[group, columns] += active.sum(dim=1)
                _keep(active, inverse, bits, flags, group, rows, columns)
            excess.clamp_min_(0.0)
            hinge[group, rows] += excess.sum(dim=2)
            if not diagonal:
                hinge[group, columns] += excess.sum(dim=1)
    return hinge, hinge + threshold * count


def _keep(
    active: Tensor, inverse: Tensor, bits: Tensor, flags: Tensor, group: slice, rows: slice, columns: slice
) -> None:
    """Writes a block of the 0/1 matrix, and its mirror image, as bits and flags."""
    height, width = (-(-(s.stop - s.start) // TILE) * TILE for s in (rows, columns))
    block = active.new_zeros((active.shape[0], height, width))
    block[:, : active.shape[1], : active.shape[2]] = active
    # Pairs with a zero vector or padding are free: they add zeros, or their sum is not used. So is the diagonal.
    free = inverse.new_zeros((2, active.shape[0], max(height, width)), dtype=torch.bool).fill_(True)
    free[0, :, : active.shape[1]] = inverse[group, rows] == 0
    free[1, :, : active.shape[2]] = inverse[group, columns] == 0
    first, second = (slice(s.start // TILE, s.start // TILE + n // TILE) for s, n in ((rows, height), (columns, width)))

    tiles = (active.shape[0], height // TILE, TILE, width // TILE, TILE)
    some = block.view(tiles).any(dim=4).any(dim=2)
    every = block | free[0, :, :height, None] | free[1, :, None, :width]
    if rows == columns:
        every.diagonal(dim1=1, dim2=2).fill_(True)
    every = every.view(tiles).all(dim=4).all(dim=2)
    state = torch.where(some, torch.where(every, ALL, MIXED), NONE).to(torch.uint8)
    flags[group, first, second] = state
    flags[group, second, first] = state.transpose(1, 2)

    def words(mask: Tensor) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=mask.device)
        octets = (mask.unflatten(2, (-1, 8)).to(torch.uint8) << places).sum(dim=3, dtype=torch.uint8)
        return octets.view(torch.int32)

    def put(mask: Tensor, row: int, column: int) -> None:
        packed = words(mask)
        bits[group, row : row + packed.shape[1], column // WORD : column // WORD + packed.shape[2]] = packed

    put(block, rows.start, columns.start)
    if rows != columns:
        put(block.transpose(1, 2).contiguous(), columns.start, rows.start)


def gradient(
    scale: Tensor, hidden_states: Tensor, inverse: Tensor, radial: Tensor, bits: Tensor, flags: Tensor
) -> Tensor:
    """Phase 2: ``(B, T, D)``, ``scale_b / norm_i`` times the tangential part of the sum of the active unit vectors."""
    length, step = hidden_states.shape[1], _sizes(hidden_states)[1]
    result = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    # Reading the flags of a CUDA tensor would make the host wait.
    skip = hidden_states.device.type == "cpu"
    for group, rows in _blocks(hidden_states):
        for part in _parts(hidden_states):
            own = _unit(hidden_states, inverse, group, rows, part)
            total = own * -radial[group, rows].unsqueeze(-1)
            for start in range(0, length, step):
                columns = slice(start, min(start + step, length))
                if skip and not bool(flags[group, _tiles(rows), _tiles(columns)].any()):
                    continue
                packed = bits[group, rows, start // WORD : -(-columns.stop // WORD)]
                mask = (packed.unsqueeze(-1) >> shifts) & 1
                mask = mask.flatten(2)[:, :, : columns.stop - start].to(own.dtype)
                other = own if columns == rows else _unit(hidden_states, inverse, group, columns, part)
                total.baddbmm_(mask, other)
            total *= (inverse[group, rows] * scale[group].unsqueeze(1)).unsqueeze(-1)
            total.masked_fill_((inverse[group, rows] == 0).unsqueeze(-1), 0.0)
            result[group, rows, part] = total.to(result.dtype)
    return result


def _tiles(rows: slice) -> slice:
    return slice(rows.start // TILE, -(-rows.stop // TILE))
