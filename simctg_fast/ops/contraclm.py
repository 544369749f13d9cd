"""ContraCLM's token-level loss without its matrix: the operator `simctg_fast::contraclm_loss`.

Each sequence has two views of its tokens, and each of their states is to find its twin, the same token in the other
view, among all other states of both. The loss of a sequence is a `self_loss` (`simcse.py`) over its real states, and
all of them have one weight. So its gradient is known up to a factor: on the CPU it is made in the forward pass, where
one is wanted, from the blocks that the log-sum-exps were taken of (as many as a fixed number holds; the others are
computed again). The kernels, which take all sequences at once, and PyTorch off the CPU keep a log-sum-exp and a
reciprocal norm a state, and compute the probabilities again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_devices
from . import _simcse_torch as _tiled
from ._autograd import define, register, tracked
from ._contrastive_loss_torch import accumulator_dtype, full_precision
from .contrastive_loss import check_states, dtype_obstacle
from .dispatch import IMPLS, choose
from .simcse import _contiguous_like, _second_derivative, _tangent

Rows = Tensor | slice


def contraclm_loss(first: Tensor, second: Tensor, real: Tensor, scale: float, impl: str) -> Tensor:
    """``(B,)``: the sum over a sequence's real states, of both views, of the cross-entropy of ``scale * cosine`` to the
    twin among the others; 0 for a sequence of fewer than two real tokens.

    Args:
        first, second: ``(B, T, D)``, the views; a zero vector has similarity 0 to everything and gradient 0.
        real: ``(B, T)`` bool.

    Returns:
        float32, or float64 for float64.
    """
    keep = tracked(first) or tracked(second)
    result: Tensor = torch.ops.simctg_fast.contraclm_loss(first, second, real, scale, keep, impl)[0]
    return result


def _check(first: Tensor, second: Tensor, real: Tensor, scale: float, impl: str) -> None:
    check_choice("impl", impl, IMPLS)
    check_states(first)
    if second.shape != first.shape or second.dtype != first.dtype or second.layout != first.layout:
        raise ValueError(
            f"hidden_states_2 has shape {tuple(second.shape)}, dtype {second.dtype} and layout {second.layout}, must "
            f"have {tuple(first.shape)}, {first.dtype} and {first.layout} as hidden_states has"
        )
    if real.shape != first.shape[:2] or real.dtype != torch.bool:
        raise ValueError(
            f"attention_mask has shape {tuple(real.shape)}, must be {tuple(first.shape[:2])} as hidden_states has"
        )
    check_devices("hidden_states", first, hidden_states_2=second, attention_mask=real)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, must be positive and finite")


def _uses_kernels(impl: str, states: Tensor) -> bool:
    """``"cpu"`` and ``"torch"`` are one implementation here, as for `self_loss`."""
    triton = choose(impl, states.device, triton=lambda: dtype_obstacle("hidden_states", states)) == "triton"
    return triton and states.numel() > 0


def _sequences(real: Tensor) -> Iterator[tuple[int, Rows, int]]:
    """Sequences of two real tokens or more, where these are, and how many. Off the CPU the host waits."""
    for item, mask in enumerate(real):
        rows = mask.nonzero().squeeze(1)
        count = rows.shape[0]
        if count < 2:
            continue
        start, last = int(rows[0]), int(rows[-1])
        together = last - start + 1 == count  # a view, where padding is at the ends
        yield item, slice(start, last + 1) if together else rows, count


def _unit(views: tuple[Tensor, Tensor], item: int, rows: Rows, count: int, inverse: Tensor) -> Tensor:
    """``(2 n, D)`` unit vectors of a sequence, the first view's and then the second's."""
    unit = inverse.new_empty((2 * count, views[0].shape[2]))
    for view, part in enumerate((unit[:count], unit[count:])):
        torch.mul(views[view][item, rows], inverse[view].unsqueeze(1), out=part)
    return unit


# ---- the operators ---------------------------------------------------------------------------------------------------


def _outputs(first: Tensor, keep: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses ``(B,)``; log-sum-exps and reciprocal norms, ``(B, 2, T)``; the gradient of the losses, ``(B, 2, T, D)``,
    of no size where the backward pass makes it. Zeros."""
    batch, length, width = first.shape
    dtype = accumulator_dtype(first.dtype)
    made = keep and first.device.type == "cpu" and impl != "triton"
    losses, lse, inverse, gradient = (
        first.new_zeros(shape, dtype=dtype)
        for shape in ((batch,), *[(batch, 2, length)] * 2, (batch, 2, length, width) if made else (0, 2, length, width))
    )
    return losses, lse, inverse, gradient


def _forward(first: Tensor, second: Tensor, real: Tensor, scale: float, keep: bool, impl: str) -> tuple[Tensor, ...]:
    _check(first, second, real, scale, impl)
    with full_precision(first.device):
        if _uses_kernels(impl, first):
            losses, lse, inverse = _kernels_forward(first, second, real, scale)
            return losses, lse, inverse, lse.new_empty((0, 2, *first.shape[1:]))
        losses, lse, inverse, gradient = _outputs(first, keep, impl)
        for item, rows, count in _sequences(real):
            own = torch.stack([_tiled.inverse_norms(view[item, rows]) for view in (first, second)])
            unit = _unit((first, second), item, rows, count, own)
            kept: list[Tensor] | None = [] if gradient.shape[0] else None
            sums = _tiled.self_forward(unit, scale, kept)
            twins = (unit[:count] * unit[count:]).sum(dim=1)
            losses[item] = (sums.view(2, count) - scale * twins).sum()  # large numbers that are nearly equal
            inverse[item][:, rows], lse[item][:, rows] = own, sums.view(2, count)
            if kept is not None:
                _gradient(torch.ones_like(losses[item]), unit, own, rows, sums, scale, gradient[item], kept)
        return losses, lse, inverse, gradient


def _gradient(
    grad: Tensor, unit: Tensor, inverse: Tensor, rows: Rows, lse: Tensor, scale: float, out: Any, kept: Any = ()
) -> None:
    """``grad`` times the gradient of a sequence's loss, into the rows of ``out``: ``(2, T, D)``, or two ``(T, D)``."""
    gradient = _tiled.self_backward(grad.expand(unit.shape[0]), unit, lse, scale, kept)
    count = unit.shape[0] // 2
    parts = (slice(0, count), slice(count, 2 * count))
    for part, twins in (parts, parts[::-1]):
        gradient[part].addcmul_(unit[twins], -2 * scale * grad)
    for view, part in enumerate(parts):
        pulled = gradient[part], unit[part], inverse[view]
        if isinstance(rows, slice):
            _tangent(*pulled, out[view][rows])
        else:
            out[view][rows] = _tangent(*pulled, gradient[part]).to(out[view].dtype)


def _fake(first, second, real, scale, keep, impl):
    _check(first, second, real, scale, impl)
    return tuple(torch.empty_like(each) for each in _outputs(first, keep, impl))


def _backward(
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    real: Tensor,
    lse: Tensor,
    inverse: Tensor,
    gradient: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with full_precision(first.device):
        grad = grad.to(lse.dtype)
        if gradient.shape[0]:
            factor = grad.view(-1, 1, 1)
            left, right = ((gradient[:, view] * factor).to(first.dtype) for view in range(2))
            return left, right
        if _uses_kernels(impl, first):
            return _kernels_backward(grad, first, second, real, lse, inverse, scale)
        left, right = (torch.zeros_like(view, memory_format=torch.contiguous_format) for view in (first, second))
        for item, rows, count in _sequences(real):
            own = inverse[item][:, rows]
            unit = _unit((first, second), item, rows, count, own)
            _gradient(grad[item], unit, own, rows, lse[item][:, rows].flatten(), scale, (left[item], right[item]))
        return left, right


def _counted(real: Tensor) -> Tensor:
    """``(B, 2, T)``: the states that have a loss."""
    counted = real & (real.sum(dim=1, keepdim=True) >= 2)
    return counted.unsqueeze(1).expand(-1, 2, -1)


def _stacked(first: Tensor, second: Tensor, counted: Tensor, inverse: Tensor) -> Tensor:
    """``(B, 2 T, D)`` unit vectors in the states' dtype, zero where they do not count."""
    unit = (torch.stack([first, second], dim=1) * inverse.unsqueeze(-1)).to(first.dtype)
    return unit.masked_fill_(~counted.unsqueeze(-1), 0.0).flatten(1, 2)  # not 0 * NaN: padding may hold anything


def _kernels_forward(first: Tensor, second: Tensor, real: Tensor, scale: float) -> tuple[Tensor, ...]:
    from simctg_fast.kernels import contraclm as kernels

    length, counted = first.shape[1], _counted(real)
    inverse = torch.stack([kernels.inverse_norms(view.flatten(0, 1)).view_as(real) for view in (first, second)], dim=1)
    inverse = inverse.masked_fill(~counted, 0.0)
    unit = _stacked(first, second, counted, inverse)
    lse = kernels.forward(unit, counted.flatten(1).to(torch.uint8), scale).unflatten(1, (2, length))
    twins = (unit[:, :length].to(lse.dtype) * unit[:, length:]).sum(dim=2, dtype=lse.dtype)
    losses = (lse - scale * twins.unsqueeze(1)).masked_fill_(~counted, 0.0).sum(dim=(1, 2))
    return losses, lse.contiguous(), inverse


def _kernels_backward(
    grad: Tensor, first: Tensor, second: Tensor, real: Tensor, lse: Tensor, inverse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from simctg_fast.kernels import contraclm as kernels

    length, counted = first.shape[1], _counted(real)
    unit = _stacked(first, second, counted, inverse)
    weight = (grad.view(-1, 1, 1) * counted).flatten(1)
    gradient = kernels.backward(weight, unit, lse.flatten(1), scale)
    both = (grad * (-2 * scale)).view(-1, 1, 1).to(unit.dtype)
    gradient[:, :length].addcmul_(unit[:, length:], both)
    gradient[:, length:].addcmul_(unit[:, :length], both)
    gradient = _tangent(gradient.flatten(0, 1), unit.flatten(0, 1), inverse.flatten(), gradient.flatten(0, 1))
    gradient = gradient.view(-1, 2, length, first.shape[2]).masked_fill_(~counted.unsqueeze(-1), 0.0)
    return gradient[:, 0].contiguous(), gradient[:, 1].contiguous()


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _, ctx.impl = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _autograd(ctx, grad, *_unused):
    if grad is None:
        return None, None
    return torch.ops.simctg_fast.contraclm_loss_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.impl)


def _second_setup(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _second(ctx, *directions):
    """Sequence by sequence; nothing is written in place, as under vmap a result may have a dimension more."""
    grad, first, second, real, lse, inverse, _ = ctx.saved_tensors
    views, changes = (first, second), []
    results: tuple[list[Tensor], list[Tensor]] = ([], [])
    found = {item: (rows, count) for item, rows, count in _sequences(real)}
    for item in range(first.shape[0]):
        if item not in found:
            changes.append(torch.zeros_like(grad[item]))
            for view, result in enumerate(results):
                result.append(torch.zeros_like(views[view][item]))
            continue
        rows, count = found[item]
        where = torch.arange(first.shape[1], device=real.device)[rows]

        def both(values):
            return torch.cat([value[rows] for value in values])  # noqa: B023 - called in its own turn

        side = both([first[item], second[item]]), both(inverse[item])
        direction = both([each[item] for each in directions])
        twins = torch.arange(2 * count, device=real.device).roll(count)
        of_grad, left, right = _second_derivative(
            grad[item].expand(2 * count), side, side, direction, direction, twins, both(lse[item]), ctx.scale, 0
        )
        changes.append(of_grad.sum())
        for result, part in zip(results, (left + right).view(2, count, -1), strict=True):
            result.append(torch.zeros_like(first[item]).index_copy(0, where, part))
    if not changes:
        return torch.zeros_like(grad), torch.zeros_like(first), torch.zeros_like(second)
    return torch.stack(changes), torch.stack(results[0]), torch.stack(results[1])


define(
    "contraclm_loss(Tensor first, Tensor second, Tensor real, float scale, bool keep, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "contraclm_loss_backward(Tensor grad, Tensor first, Tensor second, Tensor real, Tensor lse, Tensor inverse, "
    "Tensor gradient, float scale, str impl) -> (Tensor, Tensor)",
    _backward,
    lambda grad, first, second, *_: (_contiguous_like(first), _contiguous_like(second)),
)
register("contraclm_loss", _autograd, _setup)
register("contraclm_loss_backward", _second, _second_setup, last=True)
