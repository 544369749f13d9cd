"""Log-sum-exp of scaled dot products and its gradient in blocks, in PyTorch: any device, any floating dtype.

The functions are those of `kernels/simcse.py`, for unit vectors in the accumulator's dtype, sets without rows included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._contrastive_loss_torch import accumulator_dtype, reciprocal_norms

BLOCK = 512  # on the CPU, rows and columns of a block of S: 1 MB of floats, which stays in the second-level cache
KEPT_BLOCKS = 16  # that a forward pass may leave to a backward pass right behind it: 16 MB of floats, whatever the rows
# Elsewhere launches cost more than caches save: a block is a strip of so many elements, 128 MB of floats. The forward
# pass holds one or two of them, the backward pass two.
STRIP_ELEMENTS = 1 << 25
# Up to this scale exp(scale * cosine) and a sum over all keys fit a float without a maximum taken out, and so does the
# reciprocal of it times a gradient.
_LARGEST_PLAIN_SCALE = 32.0


def inverse_norms(vectors: Tensor) -> Tensor:
    """``(N,)``: 1 / norm, 0 for zero vectors, NaN where not finite."""
    if vectors.device.type == "cpu":  # elsewhere the host would wait for a look at the norms
        norms = torch.linalg.vector_norm(vectors, dim=1, dtype=accumulator_dtype(vectors.dtype))
        if bool(((norms > 1e-15) & (norms < 1e15)).all()):
            return norms.reciprocal_()
    return reciprocal_norms(vectors)  # a square may have overflowed


def slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _blocks(rows: int, columns: int, device: torch.device, symmetric: bool = False) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks that cover S; of a symmetric S the square ones on its diagonal, and what is right
    of them.
    """
    blocks = []
    start = 0
    while start < rows:
        height = width = BLOCK
        if device.type != "cpu":
            width = max(1, columns - start if symmetric else columns)
            height = max(1, STRIP_ELEMENTS // width)
            height -= height % BLOCK if height > BLOCK else 0
        strip = slice(start, min(start + height, rows))
        if symmetric:
            blocks.append((strip, strip))
        blocks += [(strip, others) for others in slices(strip.stop if symmetric else 0, columns, width)]
        start = strip.stop
    return blocks


class _Sums:
    """Log-sum-exp of rows whose entries arrive block by block.

    Plain sums of exponentials for small scales; otherwise the largest so far, and the sum relative to it.
    """

    def __init__(self, rows: int, like: Tensor, scale: float):
        self.plain = scale <= _LARGEST_PLAIN_SCALE
        self.largest = like.new_full((0 if self.plain else rows,), -torch.inf)
        self.total = like.new_zeros((rows,))

    def add(self, block: Tensor, rows: slice, columns: slice | None = None) -> None:
        """Adds a block of logits to its rows and, where given, transposed to its columns; may overwrite the block."""
        if self.plain:
            block.exp_()
            self.total[rows].add_(block.sum(dim=1))
            if columns is not None:
                self.total[columns].add_(block.sum(dim=0))
            return
        self._add_relative(block, rows, 1)
        if columns is not None:
            self._add_relative(block, columns, 0)

    def _add_relative(self, block: Tensor, rows: slice, dim: int) -> None:
        old = self.largest[rows]
        new = torch.maximum(old, block.amax(dim=dim))
        base = torch.where(new == -torch.inf, torch.zeros_like(new), new)  # no -inf minus -inf
        added = (block - base.unsqueeze(dim)).exp_().sum(dim=dim)
        self.total[rows] = self.total[rows] * (old - base).exp() + added
        self.largest[rows] = new

    def finish(self) -> Tensor:
        if self.plain:
            return self.total.log()
        return torch.where(self.largest == -torch.inf, self.largest, self.largest + self.total.log())


class _Logits:
    """Blocks of ``scale * left @ right.T``, one after the other in one buffer."""

    def __init__(self, left: Tensor, right: Tensor, scale: float, itself: int, symmetric: bool = False):
        self.left, self.right, self.scale, self.itself = left, right, scale, itself
        self.blocks = _blocks(left.shape[0], right.shape[0], left.device, symmetric)
        sizes = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in self.blocks]
        self.buffer = left.new_empty(max(sizes, default=0))

    def block(self, rows: slice, columns: slice, own: bool = False) -> Tensor:
        """`own`: in memory of its own."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = self.left.new_empty((height, width)) if own else self.buffer[: height * width].view(height, width)
        left, right = self.left[rows], self.right[columns]
        return torch.addmm(out, left, right.T, beta=0.0, alpha=self.scale, out=out)

    def fill(self, block: Tensor, rows: slice, columns: slice, value: float) -> None:
        """Writes `value` where a query is itself the key."""
        offset = self.itself + rows.start - columns.start
        if self.itself >= 0 and -block.shape[0] < offset < block.shape[1]:
            block.diagonal(offset).fill_(value)


def _weights_of(lse: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What ``exp(logits - shift)`` is multiplied by in a gradient, and the shift: none where plain sums fit."""
    if scale <= _LARGEST_PLAIN_SCALE:
        return torch.where(lse == -torch.inf, 0.0, (-lse).exp()) * grad, torch.zeros_like(lse)
    return grad, torch.where(lse == -torch.inf, torch.inf, lse)


def self_forward(unit: Tensor, scale: float, kept: list[Tensor] | None = None) -> Tensor:
    """``(N,)`` log-sum-exp over the other rows. Leaves its first blocks, as `self_backward` wants them, in `kept`."""
    sums = _Sums(unit.shape[0], unit, scale)
    logits = _Logits(unit, unit, scale, 0, symmetric=True)
    for rows, columns in logits.blocks:
        keeps = kept is not None and len(kept) < KEPT_BLOCKS
        block = logits.block(rows, columns, own=keeps)
        if kept is not None and keeps:
            kept.append(block)
        logits.fill(block, rows, columns, -torch.inf)
        sums.add(block, rows, None if columns == rows else columns)
    return sums.finish()


def self_backward(grad: Tensor, unit: Tensor, lse: Tensor, scale: float, kept: Sequence[Tensor] = ()) -> Tensor:
    """Gradient of the unit vectors, from the log-sum-exp alone; overwrites what `self_forward` has kept."""
    weight, shift = _weights_of(lse, grad * scale, scale)
    plain = scale <= _LARGEST_PLAIN_SCALE
    result = torch.zeros_like(unit)
    logits = _Logits(unit, unit, scale, 0, symmetric=True)
    other = torch.empty_like(logits.buffer)
    for place, (rows, columns) in enumerate(logits.blocks):
        fresh = place >= len(kept)
        block = logits.block(rows, columns) if fresh else kept[place]
        factor = other[: block.numel()].view_as(block)
        if plain:
            torch.add(weight[rows].unsqueeze(1), weight[columns], out=factor)
            if fresh:
                block.exp_()
            block.mul_(factor)
        else:
            torch.sub(block, shift[columns], out=factor).exp_().mul_(weight[columns])
            block.sub_(shift[rows].unsqueeze(1)).exp_().mul_(weight[rows].unsqueeze(1)).add_(factor)
        logits.fill(block, rows, columns, 0.0)
        result[rows].addmm_(block, unit[columns])
        if columns != rows:
            result[columns].addmm_(block.T, unit[rows])
    return result


def pair_forward(left: Tensor, right: Tensor, scale: float, itself: int) -> Tensor:
    """``(N,)`` log-sum-exp over the keys, without key ``itself + i`` where ``itself >= 0``."""
    sums = _Sums(left.shape[0], left, scale)
    logits = _Logits(left, right, scale, itself)
    for rows, columns in logits.blocks:
        block = logits.block(rows, columns)
        logits.fill(block, rows, columns, -torch.inf)
        sums.add(block, rows)
    return sums.finish()


def pair_backward(
    grad: Tensor, left: Tensor, right: Tensor, lse: Tensor, scale: float, itself: int
) -> tuple[Tensor, Tensor]:
    """Gradients of both sets of unit vectors."""
    weight, shift = _weights_of(lse, grad * scale, scale)
    plain = scale <= _LARGEST_PLAIN_SCALE
    left_result, right_result = torch.zeros_like(left), torch.zeros_like(right)
    logits = _Logits(left, right, scale, itself)
    for rows, columns in logits.blocks:
        block = logits.block(rows, columns)
        if not plain:
            block.sub_(shift[rows].unsqueeze(1))
        block.exp_().mul_(weight[rows].unsqueeze(1))
        logits.fill(block, rows, columns, 0.0)
        left_result[rows].addmm_(block, right[columns])
        right_result[columns].addmm_(block.T, left[rows])
    return left_result, right_result
