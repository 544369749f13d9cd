"""Cross-entropy of cosines, tile by tile: the quadratic part of the SimCSE losses, in linear memory.

* `simctg_fast::pair_loss`: each query to its own key among all keys; a query that is itself one of the keys can be left
  out there.
* `simctg_fast::self_loss`: each row to its partner (row ``i ^ 1``) among all other rows. S is symmetric, so every pair
  of rows is multiplied once forward, and the gradient needs one product with ``p_ij g_i + p_ji g_j`` instead of two.

Both take vectors of any length and normalise them; a zero vector has similarity 0 to everything and gradient 0. What is
kept for the backward pass is one log-sum-exp and one reciprocal norm a row: the probabilities are recomputed.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..checks import check_choice
from . import _simcse_torch as _tiled
from ._accumulate import add_rows, add_rows_
from ._autograd import define, register
from ._contrastive_loss_torch import SMALLEST_NORM, accumulator_dtype, along, full_precision
from .contrastive_loss import dtype_obstacle
from .dispatch import IMPLS, choose

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
    return (unit_vectors(left) * unit_vectors(right)).sum(dim=1)


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
        left = unit_vectors(queries).to(queries.dtype)
        right = left if keys is queries else unit_vectors(keys).to(keys.dtype)
        logits = (left @ right.T).to(accumulator_dtype(queries.dtype)) * scale
    if itself >= 0:
        logits.diagonal(itself).fill_(-torch.inf)
    return logits


def unit_vectors(vectors: Tensor) -> Tensor:
    """Of ``(…, D)``, in the accumulator's dtype, differentiable; zeros, with gradient 0, for zero vectors."""
    wide = vectors.to(accumulator_dtype(vectors.dtype))
    if wide.shape[-1] == 0:
        return wide
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest <= SMALLEST_NORM
    wide = (wide / largest.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)  # no square overflows or vanishes
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).masked_fill(zero, 1.0)


def _backend(impl: str, *vectors: Tensor) -> tuple[ModuleType, torch.dtype]:
    """The module that serves a call, Triton's or PyTorch's, and the dtype of its unit vectors.

    ``"cpu"`` and ``"torch"`` are one implementation here: blocks that stay in the cache, multiplied by the BLAS.
    """
    dtype = vectors[0].dtype
    backend = choose(impl, vectors[0].device, triton=lambda: dtype_obstacle("vectors", vectors[0]))
    if backend == "triton" and all(each.numel() for each in vectors):
        from simctg_fast.kernels import simcse as kernels

        return kernels, dtype
    return _tiled, accumulator_dtype(dtype)


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


# ---- the operators ---------------------------------------------------------------------------------------------------


def _unit(vectors: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    return (vectors * inverse.unsqueeze(1)).to(dtype).contiguous()


def _tangent(gradient: Tensor, unit: Tensor, inverse: Tensor, result: Tensor) -> Tensor:
    """From the gradient of unit vectors to that of the vectors, block by block into `result`."""
    step = _tiled.BLOCK if unit.device.type == "cpu" else max(1, _tiled.STRIP_ELEMENTS // max(1, unit.shape[1]))
    for rows in _tiled.slices(0, unit.shape[0], step):
        own, out = unit[rows].to(inverse.dtype), gradient[rows].to(inverse.dtype)
        radial = (own * out).sum(dim=1, keepdim=True)
        result[rows] = (out - own * radial).mul_(inverse[rows].unsqueeze(1))
    return result


def _self_forward(vectors: Tensor, scale: float, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    _check(vectors, None, scale, impl)
    backend, dtype = _backend(impl, vectors)
    with full_precision(vectors.device):
        inverse = backend.inverse_norms(vectors)
        unit = _unit(vectors, inverse, dtype)
        lse = backend.self_forward(unit, scale)
        partners = (unit[0::2].to(lse.dtype) * unit[1::2]).sum(dim=1, dtype=lse.dtype).repeat_interleave(2)
        return lse - scale * partners, lse, inverse


def _self_backward(grad: Tensor, vectors: Tensor, lse: Tensor, inverse: Tensor, scale: float, impl: str) -> Tensor:
    backend, dtype = _backend(impl, vectors)
    result = _contiguous_like(vectors)
    with full_precision(vectors.device):
        grad, unit = grad.to(lse.dtype), _unit(vectors, inverse, dtype)
        gradient = backend.self_backward(grad, unit, lse, scale)
        both = (grad[0::2] + grad[1::2]).mul_(-scale).unsqueeze(1).to(gradient.dtype)
        gradient[0::2].addcmul_(unit[1::2], both)
        gradient[1::2].addcmul_(unit[0::2], both)
        return _tangent(gradient, unit, inverse, gradient if gradient.dtype == result.dtype else result)


def _pair_forward(
    queries: Tensor, keys: Tensor, targets: Tensor, itself: int, scale: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(queries, keys, scale, impl)
    _check_targets(targets, queries, keys)
    backend, dtype = _backend(impl, queries, keys)
    with full_precision(queries.device):
        query_inverse, key_inverse = backend.inverse_norms(queries), backend.inverse_norms(keys)
        left, right = _unit(queries, query_inverse, dtype), _unit(keys, key_inverse, dtype)
        lse = backend.pair_forward(left, right, scale, itself)
        partners = (left.to(lse.dtype) * right[targets]).sum(dim=1, dtype=lse.dtype)
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
    backend, dtype = _backend(impl, queries, keys)
    with full_precision(queries.device):
        grad = grad.to(lse.dtype)
        left, right = _unit(queries, query_inverse, dtype), _unit(keys, key_inverse, dtype)
        gradients = backend.pair_backward(grad, left, right, lse, scale, itself)
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
        row_blocks = _tiled.slices(
            0, left.shape[0], max(1, _tiled.STRIP_ELEMENTS // max(1, right.shape[0])) if wide else _tiled.BLOCK
        )
        column_blocks = _tiled.slices(0, right.shape[0], right.shape[0] if wide else _tiled.BLOCK)

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
