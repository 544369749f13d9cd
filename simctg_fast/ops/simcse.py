"""Cross-entropy of cosines, tile by tile: the quadratic part of the SimCSE losses, in linear memory.

* `simctg_fast::pair_loss`: each query to its own key among all keys; a query that is itself one of the keys can be left
  out there.
* `simctg_fast::self_loss`: each row to its partner (row ``i ^ 1``) among all other rows. S is symmetric, so every pair
  of rows is multiplied once forward, and the gradient needs one product with ``p_ij g_i + p_ji g_j`` instead of two.

Both take vectors of any length and normalise them; a zero vector has similarity 0 to everything and gradient 0. What is
kept for the backward pass is one log-sum-exp and one reciprocal norm a row: the probabilities are recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_choice
from ._accumulate import add_rows, add_rows_
from ._autograd import define, register
from ._contrastive_loss_torch import SMALLEST_NORM, accumulator_dtype, along, full_precision
from ._contrastive_loss_torch import inverse_norms as _scaled_inverse_norms
from .contrastive_loss import dtype_obstacle
from .dispatch import IMPLS, choose

_BLOCK = 512  # on the CPU, rows and columns of a block of S: 1 MB of floats, which stays in the second-level cache
# Elsewhere launches cost more than caches save: a block is a strip of so many elements, 128 MB of floats. The forward
# pass holds one or two of them, the backward pass two.
_STRIP_ELEMENTS = 1 << 25
# Up to this scale exp(scale * cosine) and a sum over all keys fit a float without a maximum taken out, and so does the
# reciprocal of it times a gradient.
_LARGEST_PLAIN_SCALE = 32.0
_DELEGATE = 2048  # on CUDA, up to here torch's own kernels finish before ours would have been launched


def pair_loss(queries: Tensor, keys: Tensor, targets: Tensor, scale: float, impl: str, itself: int = -1) -> Tensor:
    """``(N,)`` cross-entropies of ``scale * cosine`` to the keys that ``targets (N,)`` names.

    With ``itself >= 0`` query i is key ``itself + i``, and is left out there. float32, or float64 for float64.
    """
    if _delegates(impl, queries, keys.shape[0]):
        return _dense_pair_loss(queries, keys, targets, scale, itself)
    result: Tensor = torch.ops.simctg_fast.pair_loss(queries, keys, targets, itself, scale, impl)[0]
    return result


def pair_lse(queries: Tensor, keys: Tensor, scale: float, impl: str, itself: int = -1) -> Tensor:
    """``(N,)`` log-sum-exp of ``scale * cosine`` over the keys, without key ``itself + i`` where ``itself >= 0``.

    -inf, with gradient 0, where no key is left. float32, or float64 for float64.
    """
    count, columns = queries.shape[0], keys.shape[0]
    if count == 0:
        return cosines(queries, keys[:0])  # nothing, but of both: a gather behind the keys waits for its gradient
    if columns == 0:
        return queries.new_full((count,), -torch.inf, dtype=accumulator_dtype(queries.dtype))
    if _delegates(impl, queries, columns):
        logits = _dense_logits(queries, keys, scale, itself)
        alone = itself >= 0 and columns == 1
        return logits.squeeze(1) if alone else torch.logsumexp(logits, dim=1)
    # The operator's gradient is that of lse - partner: any key that is not left out may be the partner.
    targets = (torch.arange(count, device=queries.device) + (max(0, itself) + 1)) % columns
    losses, lse, *_ = torch.ops.simctg_fast.pair_loss(queries, keys, targets, itself, scale, impl)
    along = losses + scale * cosines(queries, keys[targets])
    return torch.where(lse == -torch.inf, lse, lse + (along - along.detach()))


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """``(N,)`` cosines of the rows; a zero vector has cosine 0 and gradient 0. float32, or float64 for float64."""
    return (_normalized(left) * _normalized(right)).sum(dim=1)


def self_loss(vectors: Tensor, scale: float, impl: str) -> Tensor:
    """``(N,)`` cross-entropies of ``scale * cosine`` of row i to row ``i ^ 1`` among the rows ``j != i``; N is even."""
    if _delegates(impl, vectors, vectors.shape[0]):
        targets = torch.arange(vectors.shape[0], device=vectors.device) ^ 1
        return _dense_pair_loss(vectors, vectors, targets, scale, 0)
    result: Tensor = torch.ops.simctg_fast.self_loss(vectors, scale, impl)[0]
    return result


def _delegates(impl: str, queries: Tensor, columns: int) -> bool:
    """Whether plain torch, the whole matrix, is the fastest: small problems on CUDA."""
    small = queries.device.type == "cuda" and 0 < queries.shape[0] <= _DELEGATE and columns <= 2 * _DELEGATE
    return impl == "auto" and small


def _dense_pair_loss(queries: Tensor, keys: Tensor, targets: Tensor, scale: float, itself: int) -> Tensor:
    logits = _dense_logits(queries, keys, scale, itself)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _dense_logits(queries: Tensor, keys: Tensor, scale: float, itself: int) -> Tensor:
    with full_precision(queries.device):
        left = _normalized(queries).to(queries.dtype)
        right = left if keys is queries else _normalized(keys).to(keys.dtype)
        logits = (left @ right.T).to(accumulator_dtype(queries.dtype)) * scale
    if itself >= 0:
        logits.diagonal(itself).fill_(-torch.inf)
    return logits


def _normalized(vectors: Tensor) -> Tensor:
    """Unit vectors in the accumulator's dtype, differentiable; zeros, with gradient 0, for zero vectors."""
    wide = vectors.to(accumulator_dtype(vectors.dtype))
    if wide.shape[1] == 0:
        return wide
    largest = wide.detach().abs().amax(dim=1, keepdim=True)
    zero = largest <= SMALLEST_NORM
    wide = (wide / largest.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)  # no square overflows or vanishes
    return wide / torch.linalg.vector_norm(wide, dim=1, keepdim=True).masked_fill(zero, 1.0)


def resolve(impl: str, vectors: Tensor) -> str:
    """The implementation that serves a call: "triton" or "torch".

    ``"cpu"`` and ``"torch"`` are one implementation here: blocks that stay in the cache, multiplied by the BLAS.
    """
    return choose(impl, vectors.device, triton=lambda: dtype_obstacle("vectors", vectors))


def _check(vectors: Tensor, keys: Tensor | None, scale: float, impl: str) -> None:
    check_choice("impl", impl, IMPLS)
    for name, value in (("vectors" if keys is None else "queries", vectors), ("keys", keys)):
        if value is None:
            continue
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be (rows, width)")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}, must be a floating one")
    if keys is None:
        if vectors.shape[0] % 2:
            raise ValueError(f"vectors has {vectors.shape[0]} rows, must have an even number")
    else:
        if keys.shape[1] != vectors.shape[1]:
            raise ValueError(f"keys have width {keys.shape[1]}, must have {vectors.shape[1]} as queries have")
        if keys.dtype != vectors.dtype or keys.device != vectors.device:
            raise ValueError(
                f"keys are {keys.dtype} on {keys.device}, must be {vectors.dtype} on {vectors.device} as queries are"
            )
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, must be positive and finite")


def _check_targets(targets: Tensor, queries: Tensor, keys: Tensor) -> None:
    if targets.shape != queries.shape[:1] or targets.dtype != torch.int64 or targets.device != queries.device:
        raise ValueError(
            f"targets is {tuple(targets.shape)} {targets.dtype} on {targets.device}, must be ({queries.shape[0]},) "
            f"torch.int64 on {queries.device}"
        )
    if targets.device.type == "cpu" and targets.numel() > 0:  # elsewhere the host would wait
        lowest, highest = (int(value) for value in targets.aminmax())
        if lowest < 0 or highest >= keys.shape[0]:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"targets holds {wrong}, must be in 0..{keys.shape[0] - 1}: keys has {keys.shape[0]} rows")


# ---- unit vectors ----------------------------------------------------------------------------------------------------


def _inverse_norms(vectors: Tensor) -> Tensor:
    """``(N,)``: 1 / norm, 0 for zero vectors, NaN where not finite."""
    dtype = accumulator_dtype(vectors.dtype)
    if vectors.device.type == "cpu" and vectors.numel() > 0:
        norms = torch.linalg.vector_norm(vectors, dim=1, dtype=dtype)
        if not bool(((norms > 1e-15) & (norms < 1e15)).all()):
            return _scaled_inverse_norms(vectors.unsqueeze(0), None).squeeze(0)  # a square may have overflowed
        return torch.where(norms > 0, norms.reciprocal(), norms)  # NaN stays NaN
    return _inverse_norms_unseen(vectors, dtype)


def _inverse_norms_unseen(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """The same without a look at the norms, for which the host would wait: the largest component is divided out."""
    if vectors.numel() == 0:
        return vectors.new_zeros((vectors.shape[0],), dtype=dtype)
    largest = torch.linalg.vector_norm(vectors, torch.inf, dim=1, keepdim=True, dtype=dtype)
    zero = largest <= SMALLEST_NORM
    divisor = largest.masked_fill(zero, 1.0)
    inverse = torch.linalg.vector_norm(vectors / divisor, dim=1, keepdim=True, dtype=dtype).reciprocal_().div_(divisor)
    return inverse.masked_fill_(zero, 0.0).squeeze(1)


def _unit(vectors: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    return (vectors * inverse.unsqueeze(1)).to(dtype).contiguous()


def _tangent(gradient: Tensor, unit: Tensor, inverse: Tensor, result: Tensor) -> Tensor:
    """From the gradient of unit vectors to that of the vectors, block by block into `result`."""
    step = _BLOCK if unit.device.type == "cpu" else max(1, _STRIP_ELEMENTS // max(1, unit.shape[1]))
    for rows in _slices(0, unit.shape[0], step):
        own, out = unit[rows].to(inverse.dtype), gradient[rows].to(inverse.dtype)
        radial = (own * out).sum(dim=1, keepdim=True)
        result[rows] = (out - own * radial).mul_(inverse[rows].unsqueeze(1))
    return result


# ---- log-sum-exp and its gradient, in blocks -------------------------------------------------------------------------


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _blocks(rows: int, columns: int, device: torch.device, symmetric: bool = False) -> list[tuple[slice, slice]]:
    """Rows and columns of the blocks that cover S; of a symmetric S the square ones on its diagonal, and what is right
    of them.
    """
    blocks = []
    start = 0
    while start < rows:
        height = width = _BLOCK
        if device.type != "cpu":
            width = max(1, columns - start if symmetric else columns)
            height = max(1, _STRIP_ELEMENTS // width)
            height -= height % _BLOCK if height > _BLOCK else 0
        own = slice(start, min(start + height, rows))
        if symmetric:
            blocks.append((own, own))
        blocks += [(own, others) for others in _slices(own.stop if symmetric else 0, columns, width)]
        start = own.stop
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

    def block(self, rows: slice, columns: slice) -> Tensor:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = self.buffer[: height * width].view(height, width)
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


def _self_lse(unit: Tensor, scale: float) -> Tensor:
    sums = _Sums(unit.shape[0], unit, scale)
    logits = _Logits(unit, unit, scale, 0, symmetric=True)
    for rows, columns in logits.blocks:
        block = logits.block(rows, columns)
        logits.fill(block, rows, columns, -torch.inf)
        sums.add(block, rows, None if columns == rows else columns)
    return sums.finish()


def _self_gradient(grad: Tensor, unit: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Of the unit vectors, from the log-sum-exp alone."""
    weight, shift = _weights_of(lse, grad * scale, scale)
    plain = scale <= _LARGEST_PLAIN_SCALE
    result = torch.zeros_like(unit)
    logits = _Logits(unit, unit, scale, 0, symmetric=True)
    other = torch.empty_like(logits.buffer)
    for rows, columns in logits.blocks:
        block = logits.block(rows, columns)
        factor = other[: block.numel()].view_as(block)
        if plain:
            torch.add(weight[rows].unsqueeze(1), weight[columns], out=factor)
            block.exp_().mul_(factor)
        else:
            torch.sub(block, shift[columns], out=factor).exp_().mul_(weight[columns])
            block.sub_(shift[rows].unsqueeze(1)).exp_().mul_(weight[rows].unsqueeze(1)).add_(factor)
        logits.fill(block, rows, columns, 0.0)
        result[rows].addmm_(block, unit[columns])
        if columns != rows:
            result[columns].addmm_(block.T, unit[rows])
    return result


def _pair_lse(left: Tensor, right: Tensor, scale: float, itself: int) -> Tensor:
    sums = _Sums(left.shape[0], left, scale)
    logits = _Logits(left, right, scale, itself)
    for rows, columns in logits.blocks:
        block = logits.block(rows, columns)
        logits.fill(block, rows, columns, -torch.inf)
        sums.add(block, rows)
    return sums.finish()


def _pair_gradients(
    grad: Tensor, left: Tensor, right: Tensor, lse: Tensor, scale: float, itself: int
) -> tuple[Tensor, Tensor]:
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


# ---- the operators ---------------------------------------------------------------------------------------------------


def _self_forward(vectors: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    _check(vectors, None, scale, impl)
    impl = resolve(impl, vectors)
    dtype = accumulator_dtype(vectors.dtype)
    with full_precision(vectors.device):
        if impl == "triton" and vectors.numel() > 0:
            from simctg_fast.kernels import simcse as kernels

            inverse = kernels.inverse_norms(vectors)
            unit = _unit(vectors, inverse, vectors.dtype)
            lse = kernels.self_forward(unit, scale)
        else:
            inverse = _inverse_norms(vectors)
            unit = _unit(vectors, inverse, dtype)
            lse = _self_lse(unit, scale)
        partners = (unit[0::2].to(dtype) * unit[1::2]).sum(dim=1, dtype=dtype).repeat_interleave(2)
        return lse - scale * partners, lse, inverse


def _self_backward(grad: Tensor, vectors: Tensor, lse: Tensor, inverse: Tensor, scale: float, impl: str) -> Tensor:
    impl = resolve(impl, vectors)
    result = torch.empty_like(vectors, memory_format=torch.contiguous_format)
    with full_precision(vectors.device):
        grad = grad.to(lse.dtype)
        if impl == "triton" and vectors.numel() > 0:
            from simctg_fast.kernels import simcse as kernels

            unit = _unit(vectors, inverse, vectors.dtype)
            gradient = kernels.self_backward(grad, unit, lse, scale)
        else:
            unit = _unit(vectors, inverse, lse.dtype)
            gradient = _self_gradient(grad, unit, lse, scale)
        both = (grad[0::2] + grad[1::2]).mul_(-scale).unsqueeze(1).to(gradient.dtype)
        gradient[0::2].addcmul_(unit[1::2], both)
        gradient[1::2].addcmul_(unit[0::2], both)
        return _tangent(gradient, unit, inverse, gradient if gradient.dtype == result.dtype else result)


def _pair_forward(
    queries: Tensor, keys: Tensor, targets: Tensor, itself: int, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(queries, keys, scale, impl)
    _check_targets(targets, queries, keys)
    impl = resolve(impl, queries)
    dtype = accumulator_dtype(queries.dtype)
    with full_precision(queries.device):
        if impl == "triton" and queries.numel() > 0 and keys.numel() > 0:
            from simctg_fast.kernels import simcse as kernels

            query_inverse, key_inverse = kernels.inverse_norms(queries), kernels.inverse_norms(keys)
            left, right = _unit(queries, query_inverse, queries.dtype), _unit(keys, key_inverse, keys.dtype)
            lse = kernels.pair_forward(left, right, scale, itself)
        else:
            query_inverse, key_inverse = _inverse_norms(queries), _inverse_norms(keys)
            left, right = _unit(queries, query_inverse, dtype), _unit(keys, key_inverse, dtype)
            lse = _pair_lse(left, right, scale, itself)
        partners = (left.to(dtype) * right[targets]).sum(dim=1, dtype=dtype)
        return lse - scale * partners, lse, query_inverse, key_inverse


def _pair_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    lse: Tensor,
    query_inverse: Tensor,
    key_inverse: Tensor,
    itself: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    impl = resolve(impl, queries)
    with full_precision(queries.device):
        grad = grad.to(lse.dtype)
        if impl == "triton" and queries.numel() > 0 and keys.numel() > 0:
            from simctg_fast.kernels import simcse as kernels

            left, right = _unit(queries, query_inverse, queries.dtype), _unit(keys, key_inverse, keys.dtype)
            gradients = kernels.pair_backward(grad, left, right, lse, scale, itself)
        else:
            left, right = _unit(queries, query_inverse, lse.dtype), _unit(keys, key_inverse, lse.dtype)
            gradients = _pair_gradients(grad, left, right, lse, scale, itself)
        own = (grad * -scale).unsqueeze(1).to(left.dtype)
        gradients[0].addcmul_(right[targets], own)
        add_rows_(gradients[1], targets, left * own)
        results = []
        for gradient, unit, inverse, like in zip(
            gradients, (left, right), (query_inverse, key_inverse), (queries, keys), strict=True
        ):
            out = gradient if gradient.dtype == like.dtype else _contiguous_like(like)
            results.append(_tangent(gradient, unit, inverse, out))
        return results[0], results[1]


def _pair_fake(queries, keys, targets, itself, scale, impl):
    _check(queries, keys, scale, impl)
    dtype = accumulator_dtype(queries.dtype)
    losses, lse, query_inverse = (queries.new_empty((queries.shape[0],), dtype=dtype) for _ in range(3))
    return losses, lse, query_inverse, keys.new_empty((keys.shape[0],), dtype=dtype)


def _self_fake(vectors, scale, impl):
    _check(vectors, None, scale, impl)
    losses, lse, inverse = (
        vectors.new_empty((vectors.shape[0],), dtype=accumulator_dtype(vectors.dtype)) for _ in range(3)
    )
    return losses, lse, inverse


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _pair_setup(ctx, inputs, output) -> None:
    queries, keys, targets, ctx.itself, ctx.scale, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(queries, keys, targets, *output[1:])


def _pair_autograd(ctx, grad, *_unused):
    if grad is None:
        return (None,) * 6
    backward = torch.ops.simctg_fast.pair_loss_backward
    return (*backward(grad, *ctx.saved_tensors, ctx.itself, ctx.scale, ctx.impl), None, None, None, None)


def _self_setup(ctx, inputs, output) -> None:
    vectors, ctx.scale, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(vectors, *output[1:])


def _self_autograd(ctx, grad, *_unused):
    if grad is None:
        return None, None, None
    return torch.ops.simctg_fast.self_loss_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.impl), None, None


def _pair_second_setup(ctx, inputs, output) -> None:
    *tensors, ctx.itself, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _pair_second(ctx, query_direction, key_direction):
    grad, queries, keys, targets, lse, query_inverse, key_inverse = ctx.saved_tensors
    sides = ((queries, query_inverse), (keys, key_inverse), query_direction, key_direction)
    return _second_derivative(grad, *sides, targets, lse, ctx.scale, ctx.itself)


def _self_second_setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _self_second(ctx, direction):
    grad, vectors, lse, inverse = ctx.saved_tensors
    partners = torch.arange(vectors.shape[0], device=vectors.device) ^ 1
    side = (vectors, inverse)
    of_grad, left, right = _second_derivative(grad, side, side, direction, direction, partners, lse, ctx.scale, 0)
    return of_grad, left + right


def _second_derivative(
    grad: Tensor,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    query_direction: Tensor,
    key_direction: Tensor,
    targets: Tensor,
    lse: Tensor,
    scale: float,
    itself: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of ``sum_i g_i dl_i`` with respect to g, the queries and the keys, where ``dl`` is that of the
    losses along the directions: ``dl_i = sum_j p_ij dz_ij - dz_it``, ``dz_ij = scale (du_i · k_j + u_i · dk_j)``.

    In blocks, whatever the implementation of the first derivative is: once for ``sum_j p_ij dz_ij``, once for the rest.
    """
    device = lse.device
    with full_precision(device):
        left, left_moved, pull_left = along(queries[0], query_direction, queries[1])
        right, right_moved, pull_right = along(keys[0], key_direction, keys[1])
        dtype, grad = grad.dtype, grad.to(lse.dtype)
        wide = left.device.type != "cpu"
        row_blocks = _slices(0, left.shape[0], max(1, _STRIP_ELEMENTS // max(1, right.shape[0])) if wide else _BLOCK)
        column_blocks = _slices(0, right.shape[0], right.shape[0] if wide else _BLOCK)

        def block(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
            """Probabilities and ``dz``."""
            share = (scale * left[rows] @ right[columns].T - lse[rows].unsqueeze(1)).exp()
            offset = itself + rows.start - columns.start
            if itself >= 0 and -share.shape[0] < offset < share.shape[1]:
                share = share.diagonal_scatter(torch.zeros_like(share.diagonal(offset)), offset)
            moved = left_moved[rows] @ right[columns].T + left[rows] @ right_moved[columns].T
            return share, scale * moved

        # Nothing is added in place: under vmap an addend may have a dimension that its sum has not yet.
        means, by_rows = [], []
        by_columns = [[torch.zeros_like(right[columns])] * 2 for columns in column_blocks]
        for rows in row_blocks:
            mean, total = torch.zeros_like(lse[rows]), torch.zeros_like(lse[rows])
            for columns in column_blocks:
                share, moved = block(rows, columns)
                mean, total = mean + (share * moved).sum(dim=1), total + share.sum(dim=1)
            total = total.clamp_min(torch.finfo(total.dtype).tiny)  # not quite 1: the rounding of the logits
            mean = mean / total
            means.append(mean)
            sums = [torch.zeros_like(left[rows])] * 2
            for place, columns in enumerate(column_blocks):
                share, moved = block(rows, columns)
                weight = share * (scale * grad[rows] / total).unsqueeze(1)
                change = weight * (moved - mean.unsqueeze(1))
                sums[0] = sums[0] + change @ right[columns] + weight @ right_moved[columns]
                sums[1] = sums[1] + weight @ right[columns]
                before = by_columns[place]
                by_columns[place] = [
                    before[0] + change.T @ left[rows] + weight.T @ left_moved[rows],
                    before[1] + weight.T @ left[rows],
                ]
            by_rows.append(sums)

        own = -(scale * grad).unsqueeze(1)
        target, target_moved = right[targets], right_moved[targets]
        left_sums, right_sums = (
            [torch.cat([torch.zeros_like(like[:0]), *(sums[i] for sums in parts)]) for i in range(2)]
            for like, parts in ((left, by_rows), (right, by_columns))
        )
        left_result = pull_left(left_sums[0] + own * target_moved, left_sums[1] + own * target)
        right_result = pull_right(
            add_rows(right_sums[0], targets, own * left_moved), add_rows(right_sums[1], targets, own * left)
        )
        changes = torch.cat([torch.zeros_like(lse[:0]), *means])
        changes = changes - scale * (left_moved * target + left * target_moved).sum(dim=1)
        return changes.to(dtype), left_result, right_result


define(
    "pair_loss(Tensor queries, Tensor keys, Tensor targets, int itself, float scale, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _pair_forward,
    _pair_fake,
)
define(
    "pair_loss_backward(Tensor grad, Tensor queries, Tensor keys, Tensor targets, Tensor lse, Tensor query_inverse, "
    "Tensor key_inverse, int itself, float scale, str impl) -> (Tensor, Tensor)",
    _pair_backward,
    lambda grad, queries, keys, *_: (_contiguous_like(queries), _contiguous_like(keys)),
)
define("self_loss(Tensor vectors, float scale, str impl) -> (Tensor, Tensor, Tensor)", _self_forward, _self_fake)
define(
    "self_loss_backward(Tensor grad, Tensor vectors, Tensor lse, Tensor inverse, float scale, str impl) -> Tensor",
    _self_backward,
    lambda grad, vectors, *_: _contiguous_like(vectors),
)
register("pair_loss", _pair_autograd, _pair_setup)
register("pair_loss_backward", _pair_second, _pair_second_setup, last=True)
register("self_loss", _self_autograd, _self_setup)
register("self_loss_backward", _self_second, _self_second_setup, last=True)
