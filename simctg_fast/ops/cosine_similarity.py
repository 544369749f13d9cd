"""The operator `simctg_fast::cosine_similarity_matrix`: ``(B, T, D) -> (B, T, T)``, zero vectors safe, differentiable.

The Triton kernel takes the norms inside the tile. The backward pass is ``(G + G^T) U`` by the BLAS, then the
derivative of the normalisation; the derivative at a zero vector is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _contrastive_loss_torch as _tiled
from ._autograd import define, register
from ._contrastive_loss_torch import full_precision
from .contrastive_loss import check_states, triton_obstacle
from .dispatch import choose


def cosine_similarity_matrix(hidden_states: Tensor, impl: str) -> Tensor:
    """See `simctg_fast.functional.cosine_similarity_matrix`; one ``(B, T, D)`` tensor."""
    similarity: Tensor = torch.ops.simctg_fast.cosine_similarity_matrix(hidden_states, impl)[0]
    return similarity


def _fake(hidden_states: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    check_states(hidden_states)
    batch, length, _ = hidden_states.shape
    dtype = _tiled.accumulator_dtype(hidden_states.dtype)
    return hidden_states.new_empty((batch, length, length)), hidden_states.new_empty((batch, length), dtype=dtype)


def _forward(hidden_states: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    check_states(hidden_states)
    impl = choose(impl, hidden_states.device, triton=lambda: triton_obstacle(impl, hidden_states))
    if impl == "triton" and hidden_states.numel() > 0:
        from simctg_fast.kernels import cosine_similarity as kernels

        return kernels.forward(hidden_states)
    with full_precision(hidden_states.device):
        inverse = _tiled.inverse_norms(hidden_states, None)
        unit = _unit(hidden_states, inverse)
        return torch.bmm(unit, unit.transpose(1, 2)).to(hidden_states.dtype), inverse


def _unit(hidden_states: Tensor, inverse: Tensor) -> Tensor:
    return hidden_states.to(inverse.dtype) * inverse.unsqueeze(-1)


def _backward(grad: Tensor, hidden_states: Tensor, inverse_norms: Tensor) -> Tensor:
    with full_precision(hidden_states.device):
        unit = _unit(hidden_states, inverse_norms)
        symmetric = grad.to(unit.dtype)
        symmetric = symmetric + symmetric.transpose(1, 2)
        tangent = torch.bmm(symmetric, unit)
        tangent -= unit * (tangent * unit).sum(dim=-1, keepdim=True)
        return (tangent * inverse_norms.unsqueeze(-1)).to(hidden_states.dtype)


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])


def _autograd(ctx, grad, _unused):
    if grad is None:
        return None, None
    return torch.ops.simctg_fast.cosine_similarity_matrix_backward(grad, *ctx.saved_tensors), None


def _second_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _second(ctx, direction):
    """The derivative of ``<direction, gradient>``, which is ``<G, dU U^T + U dU^T>``."""
    grad, hidden_states, inverse = ctx.saved_tensors
    with full_precision(hidden_states.device):

        def along(grad: Tensor, states: Tensor) -> Tensor:
            unit, tangent = _tiled.unit_and_tangent(states, direction, inverse)
            half = torch.bmm(tangent, unit.transpose(1, 2))
            return (grad.to(half.dtype) * (half + half.transpose(1, 2))).sum()

        return *torch.func.grad(along, argnums=(0, 1))(grad, hidden_states), None


define("cosine_similarity_matrix(Tensor hidden_states, str impl) -> (Tensor, Tensor)", _forward, _fake)
define(
    "cosine_similarity_matrix_backward(Tensor grad, Tensor hidden_states, Tensor inverse_norms) -> Tensor",
    _backward,
    lambda grad, hidden_states, inverse_norms: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
)
register("cosine_similarity_matrix", _autograd, _setup)
register("cosine_similarity_matrix_backward", _second, _second_setup)
