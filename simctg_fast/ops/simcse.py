"""Row-wise log-sum-exp of scaled dot products, tile by tile: the quadratic part of the SimCSE losses, in linear memory.

* `simctg_fast::pair_logsumexp`: ``lse_i = log sum_j exp(scale * q_i . k_j)`` of two sets of vectors.
* `simctg_fast::self_logsumexp`: the same of one set with itself, ``j = i`` left out. S is symmetric, so every pair of
  rows is multiplied once forward, and the gradient needs one product with ``p_ij g_i + p_ji g_j`` instead of two.

The probabilities are recomputed in the backward pass from the saved log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._contrastive_loss_torch import accumulator_dtype, full_precision
from .contrastive_loss import FUSED_DTYPES, IMPLS, require_triton

_BLOCK = 512  # rows and columns of a block of S: 1 MB of floats, which stays in the second-level cache
_DELEGATE = 2048  # on CUDA, up to here torch's own kernels finish before ours would have been launched

_library = torch.library.Library("simctg_fast", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("pair_logsumexp(Tensor queries, Tensor keys, float scale, str impl) -> Tensor", tags=_tags)
_library.define(
    "pair_logsumexp_backward(Tensor grad, Tensor queries, Tensor keys, Tensor lse, float scale, str impl) "
    "-> (Tensor, Tensor)",
    tags=_tags,
)
_library.define("self_logsumexp(Tensor vectors, float scale, str impl) -> Tensor", tags=_tags)
_library.define(
    "self_logsumexp_backward(Tensor grad, Tensor vectors, Tensor lse, float scale, str impl) -> Tensor", tags=_tags
)


def pair_logsumexp(queries: Tensor, keys: Tensor, scale: float, impl: str) -> Tensor:
    """``(N,)`` log-sum-exp over the M keys of ``scale * queries @ keys.T``; float32, or float64 for float64."""
    result: Tensor = torch.ops.simctg_fast.pair_logsumexp(queries, keys, scale, impl)
    return result


def self_logsumexp(vectors: Tensor, scale: float, impl: str) -> Tensor:
    """``(N,)`` log-sum-exp of ``scale * vectors @ vectors.T`` over the columns ``j != i``; -inf where there is none."""
    result: Tensor = torch.ops.simctg_fast.self_logsumexp(vectors, scale, impl)
    return result


def resolve(impl: str, vectors: Tensor, columns: int) -> str:
    """The implementation that serves a call: "triton", "dense" (torch, the whole matrix, small and on CUDA) or "torch".

    ``"cpu"`` and ``"torch"`` are one implementation here: blocks that stay in the cache, multiplied by the BLAS.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, must be one of {', '.join(map(repr, IMPLS))}")
    device, fused = vectors.device.type, vectors.dtype in FUSED_DTYPES
    if impl == "cpu" and device != "cpu":
        raise ValueError(f"impl='cpu' needs vectors on the CPU, got {vectors.device}")
    if impl == "triton":
        if not fused:
            raise ValueError(
                f"impl='triton' takes vectors of dtype {', '.join(map(str, FUSED_DTYPES))}, got {vectors.dtype}; "
                "impl='torch' takes every floating dtype"
            )
        require_triton(vectors)
        return impl
    if impl == "auto" and device == "cuda":
        if vectors.shape[0] <= _DELEGATE and columns <= 2 * _DELEGATE:
            return "dense"
        if fused and _backends.has_triton():
            return "triton"
    return "torch"


def _check(vectors: Tensor, keys: Tensor | None, scale: float, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, must be one of {', '.join(map(repr, IMPLS))}")
    for name, value in (("vectors" if keys is None else "queries", vectors), ("keys", keys)):
        if value is None:
            continue
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, must be (rows, width)")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {value.dtype}, must be a floating one")
    if keys is not None:
        if keys.shape[1] != vectors.shape[1]:
            raise ValueError(f"keys have width {keys.shape[1]}, must have {vectors.shape[1]} as queries have")
        if keys.dtype != vectors.dtype or keys.device != vectors.device:
            raise ValueError(
                f"keys are {keys.dtype} on {keys.device}, must be {vectors.dtype} on {vectors.device} as queries are"
            )
    if not scale > 0:
        raise ValueError(f"scale is {scale}, must be positive")


def _blocks(rows: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, rows)) for start in range(0, rows, _BLOCK)]


class _RunningLogSumExp:
    """Log-sum-exp of rows whose entries arrive block by block: the largest so far, and the sum relative to it."""

    def __init__(self, rows: int, like: Tensor):
        self.largest = like.new_full((rows,), -torch.inf)
        self.total = like.new_zeros((rows,))

    def add(self, rows: slice, largest: Tensor, total: Tensor) -> None:
        old = self.largest[rows]
        new = torch.maximum(old, largest)
        base = torch.where(new == -torch.inf, torch.zeros_like(new), new)  # no -inf minus -inf
        self.total[rows] = self.total[rows] * (old - base).exp() + total * (largest - base).exp()
        self.largest[rows] = new

    def finish(self) -> Tensor:
        return torch.where(self.largest == -torch.inf, self.largest, self.largest + self.total.log())


def _reduce_block(block: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    largest = block.amax(dim=dim)
    base = torch.where(largest == -torch.inf, torch.zeros_like(largest), largest)
    return largest, (block - base.unsqueeze(dim)).exp_().sum(dim=dim)


def _pair_forward(queries: Tensor, keys: Tensor, scale: float, impl: str) -> Tensor:
    _check(queries, keys, scale, impl)
    impl = resolve(impl, queries, keys.shape[0])
    if impl == "triton" and queries.numel() > 0 and keys.numel() > 0:
        from simctg_fast.kernels import simcse as kernels

        return kernels.pair_forward(queries, keys, scale)
    dtype = accumulator_dtype(queries.dtype)
    with full_precision(queries.device):
        if impl == "dense":
            return torch.logsumexp((queries @ keys.T).to(dtype) * scale, dim=1)
        running = _RunningLogSumExp(queries.shape[0], queries.new_empty(0, dtype=dtype))
        for rows in _blocks(queries.shape[0]):
            scaled = queries[rows].to(dtype) * scale
            for columns in _blocks(keys.shape[0]):
                running.add(rows, *_reduce_block(scaled @ keys[columns].to(dtype).T, 1))
        return running.finish()


def _self_forward(vectors: Tensor, scale: float, impl: str) -> Tensor:
    _check(vectors, None, scale, impl)
    impl = resolve(impl, vectors, vectors.shape[0])
    if impl == "triton" and vectors.numel() > 0:
        from simctg_fast.kernels import simcse as kernels

        return kernels.self_forward(vectors, scale)
    dtype = accumulator_dtype(vectors.dtype)
    with full_precision(vectors.device):
        if impl == "dense":
            logits = (vectors @ vectors.T).to(dtype) * scale
            return torch.logsumexp(logits.fill_diagonal_(-torch.inf), dim=1)
        running = _RunningLogSumExp(vectors.shape[0], vectors.new_empty(0, dtype=dtype))
        blocks = _blocks(vectors.shape[0])
        for index, rows in enumerate(blocks):
            scaled = vectors[rows].to(dtype) * scale
            for columns in blocks[index:]:
                block = scaled @ vectors[columns].to(dtype).T
                if columns == rows:
                    block.fill_diagonal_(-torch.inf)
                else:
                    running.add(columns, *_reduce_block(block, 0))
                running.add(rows, *_reduce_block(block, 1))
        return running.finish()


def _probabilities(block: Tensor, lse: Tensor) -> Tensor:
    """In place; a row without columns (``lse`` -inf) gets zeros."""
    return block.sub_(torch.where(lse == -torch.inf, torch.inf, lse).unsqueeze(1)).exp_()


def _pair_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, lse: Tensor, scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    impl = resolve(impl, queries, keys.shape[0])
    if impl == "triton" and queries.numel() > 0 and keys.numel() > 0:
        from simctg_fast.kernels import simcse as kernels

        return kernels.pair_backward(grad, queries, keys, lse, scale)
    dtype = lse.dtype
    with full_precision(queries.device):
        grad = grad.to(dtype) * scale
        if impl == "dense":
            weights = _probabilities((queries @ keys.T).to(dtype) * scale, lse).mul_(grad.unsqueeze(1))
            weights = weights.to(queries.dtype)
            return weights @ keys, weights.T @ queries
        grad_queries = queries.new_zeros(queries.shape, dtype=dtype)
        grad_keys = keys.new_zeros(keys.shape, dtype=dtype)
        for rows in _blocks(queries.shape[0]):
            left = queries[rows].to(dtype)
            for columns in _blocks(keys.shape[0]):
                right = keys[columns].to(dtype)
                block = _probabilities((left @ right.T).mul_(scale), lse[rows]).mul_(grad[rows].unsqueeze(1))
                grad_queries[rows].addmm_(block, right)
                grad_keys[columns].addmm_(block.T, left)
        return grad_queries.to(queries.dtype), grad_keys.to(keys.dtype)


def _self_backward(grad: Tensor, vectors: Tensor, lse: Tensor, scale: float, impl: str) -> Tensor:
    impl = resolve(impl, vectors, vectors.shape[0])
    if impl == "triton" and vectors.numel() > 0:
        from simctg_fast.kernels import simcse as kernels

        return kernels.self_backward(grad, vectors, lse, scale)
    dtype = lse.dtype
    with full_precision(vectors.device):
        grad = grad.to(dtype) * scale
        if impl == "dense":
            weights = _probabilities((vectors @ vectors.T).to(dtype) * scale, lse)
            weights = weights.fill_diagonal_(0.0).mul_(grad.unsqueeze(1))
            return (weights + weights.T).to(vectors.dtype) @ vectors
        result = vectors.new_zeros(vectors.shape, dtype=dtype)
        blocks = _blocks(vectors.shape[0])
        for index, rows in enumerate(blocks):
            left = vectors[rows].to(dtype)
            for columns in blocks[index:]:
                right = left if columns == rows else vectors[columns].to(dtype)
                block = (left @ right.T).mul_(scale)
                across = block - torch.where(lse[columns] == -torch.inf, torch.inf, lse[columns])
                across.exp_().mul_(grad[columns])
                _probabilities(block, lse[rows]).mul_(grad[rows].unsqueeze(1)).add_(across)
                if columns == rows:
                    block.fill_diagonal_(0.0)
                else:
                    result[columns].addmm_(block.T, left)
                result[rows].addmm_(block, right)
        return result.to(vectors.dtype)


def _pair_fake(queries, keys, scale, impl):
    _check(queries, keys, scale, impl)
    return queries.new_empty((queries.shape[0],), dtype=accumulator_dtype(queries.dtype))


def _self_fake(vectors, scale, impl):
    _check(vectors, None, scale, impl)
    return vectors.new_empty((vectors.shape[0],), dtype=accumulator_dtype(vectors.dtype))


def _contiguous_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _pair_setup(ctx, inputs, output) -> None:
    queries, keys, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(queries, keys, output)


def _pair_autograd(ctx, grad):
    queries, keys, lse = ctx.saved_tensors
    grads = torch.ops.simctg_fast.pair_logsumexp_backward(grad, queries, keys, lse, ctx.scale, ctx.impl)
    return (*grads, None, None)


def _self_setup(ctx, inputs, output) -> None:
    vectors, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(vectors, output)


def _self_autograd(ctx, grad):
    vectors, lse = ctx.saved_tensors
    return torch.ops.simctg_fast.self_logsumexp_backward(grad, vectors, lse, ctx.scale, ctx.impl), None, None


_library.impl("pair_logsumexp", _pair_forward, "CompositeExplicitAutograd")
_library.impl("pair_logsumexp_backward", _pair_backward, "CompositeExplicitAutograd")
_library.impl("self_logsumexp", _self_forward, "CompositeExplicitAutograd")
_library.impl("self_logsumexp_backward", _self_backward, "CompositeExplicitAutograd")
torch.library.register_fake("simctg_fast::pair_logsumexp", _pair_fake, lib=_library)
torch.library.register_fake(
    "simctg_fast::pair_logsumexp_backward",
    lambda grad, queries, keys, lse, scale, impl: (_contiguous_like(queries), _contiguous_like(keys)),
    lib=_library,
)
torch.library.register_fake("simctg_fast::self_logsumexp", _self_fake, lib=_library)
torch.library.register_fake(
    "simctg_fast::self_logsumexp_backward",
    lambda grad, vectors, lse, scale, impl: _contiguous_like(vectors),
    lib=_library,
)
torch.library.register_autograd("simctg_fast::pair_logsumexp", _pair_autograd, setup_context=_pair_setup, lib=_library)
torch.library.register_autograd("simctg_fast::self_logsumexp", _self_autograd, setup_context=_self_setup, lib=_library)
