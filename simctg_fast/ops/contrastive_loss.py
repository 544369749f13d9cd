"""The operator `simctg_fast::contrastive_loss`: SimCTG's loss without the matrix of similarities.

The matrix of hinges is symmetric and its derivative is 0 or 1, so the forward pass keeps one bit a pair and the
backward pass multiplies that 0/1 matrix by the unit vectors. What passes between them, for every implementation:

* ``weights (B,)``: the derivative of the loss with respect to the hinge sum of each sequence.
* ``inverse_norms (B, T)``: 0 at padding and at zero vectors, which then take part in no pair.
* ``radial (B, T)``: sum of ``s_ij`` over the active ``j != i``.
* ``bits (B, P, P / 32)`` int32, ``P`` = T rounded up to 128: bit ``j % 32`` of word ``[b, i, j // 32]`` says that the
  hinge of the pair is positive; not on the diagonal. Bits of a pair without two unit vectors mean nothing, and so do
  those of a tile whose flag is not 2.
* ``flags (B, P / 128, P / 128)`` uint8: 0 no pair of the tile is active, 1 every one is, 2 mixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_devices, check_margin
from . import _backends
from . import _contrastive_loss_torch as _tiled
from ._autograd import define, register, tracked
from ._contrastive_loss_torch import TILE, WORD, accumulator_dtype, full_precision
from .dispatch import IMPLS, address, addresses, choose, rows_contiguous

REDUCTIONS = ("pairs", "paper", "dense")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def contrastive_loss(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    normalizer: Tensor | None,
    margin: float,
    reduction: str,
    impl: str,
) -> Tensor:
    """See `simctg_fast.functional.contrastive_loss`."""
    keep = tracked(hidden_states)
    loss: Tensor = torch.ops.simctg_fast.contrastive_loss(
        hidden_states, attention_mask, normalizer, margin, reduction, keep, impl
    )[0]
    return loss


def resolve(impl: str, hidden_states: Tensor) -> str:
    """The implementation that serves a call, see `dispatch.choose`."""

    def cpu() -> str | None:
        return dtype_obstacle("hidden_states", hidden_states)

    return choose(impl, hidden_states.device, cpu=cpu, triton=lambda: triton_obstacle(impl, hidden_states))


def dtype_obstacle(name: str, tensor: Tensor) -> str | None:
    """What keeps a tensor from kernels that accumulate in float32."""
    if tensor.dtype in FUSED_DTYPES:
        return None
    return (
        f"takes {name} of dtype {', '.join(map(str, FUSED_DTYPES))}, got {tensor.dtype}; "
        "impl='torch' takes every floating dtype"
    )


def triton_obstacle(impl: str, hidden_states: Tensor) -> str | None:
    """What keeps `hidden_states` from the Triton kernels.

    Raises:
        RuntimeError: they were asked for by name, and this triton does not compile them for this GPU.
    """
    from simctg_fast.kernels import contrastive_loss as kernels

    problem = dtype_obstacle("hidden_states", hidden_states)
    if problem is None and not kernels.compiles(hidden_states.device):
        problem = (
            f"needs triton 3.8 or newer on this GPU, {_backends.backend_info()['triton']} does not compile its kernel; "
            "impl='torch' runs everywhere"
        )
        if impl == "triton":
            raise RuntimeError(f"impl='triton' {problem}")
    return problem


def _padded(length: int) -> int:
    return (length + TILE - 1) // TILE * TILE


def check_states(hidden_states: Tensor) -> None:
    if hidden_states.layout != torch.strided:
        raise ValueError(f"hidden_states has layout {hidden_states.layout}, must be {torch.strided}")
    if hidden_states.dim() != 3:
        raise ValueError(f"hidden_states has shape {tuple(hidden_states.shape)}, must be (batch, length, width)")
    if not hidden_states.dtype.is_floating_point:
        raise ValueError(f"hidden_states has dtype {hidden_states.dtype}, must be a floating one")


def check_mask(attention_mask: Tensor) -> None:
    if attention_mask.dtype.is_complex or attention_mask.layout != torch.strided:
        raise ValueError(
            f"attention_mask has dtype {attention_mask.dtype} and layout {attention_mask.layout}, must be of bool, "
            f"integers or floats, {torch.strided}"
        )


def _check(hidden_states: Tensor, attention_mask: Tensor | None, margin: float, reduction: str) -> None:
    check_states(hidden_states)
    check_margin(margin)
    check_choice("reduction", reduction, REDUCTIONS)
    if attention_mask is None:
        return
    if reduction == "dense":
        raise ValueError("reduction='dense' counts padding as text: attention_mask must be None")
    check_mask(attention_mask)
    if attention_mask.dim() != 2 or attention_mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, must be {tuple(hidden_states.shape[:2])} "
            "as hidden_states has"
        )
    check_devices("hidden_states", hidden_states, attention_mask=attention_mask)


class Results(NamedTuple):
    """What the operator returns; bits and flags are of no size where nothing is kept."""

    loss: Tensor
    weights: Tensor
    inverse_norms: Tensor
    radial: Tensor
    bits: Tensor
    flags: Tensor


def _outputs(hidden_states: Tensor, keep: bool) -> Results:
    """The results, uninitialised."""
    batch, length, _ = hidden_states.shape
    dtype = accumulator_dtype(hidden_states.dtype)
    padded = _padded(length) if keep else 0
    new = hidden_states.new_empty
    return Results(
        new((), dtype=dtype),
        new((batch,), dtype=dtype),
        new((batch, length), dtype=dtype),
        new((batch, length), dtype=dtype),
        new((batch, padded, padded // WORD), dtype=torch.int32),
        new((batch, padded // TILE, padded // TILE), dtype=torch.uint8),
    )


def _fake(hidden_states, attention_mask, normalizer, margin, reduction, keep, impl):
    _check(hidden_states, attention_mask, margin, reduction)
    check_choice("impl", impl, IMPLS)
    return _outputs(hidden_states, keep)


def _forward(
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    normalizer: Tensor | None,
    margin: float,
    reduction: str,
    keep: bool,
    impl: str,
) -> Results:
    _check(hidden_states, attention_mask, margin, reduction)
    impl = resolve(impl, hidden_states)
    if impl == "triton" and hidden_states.numel() > 0:
        from simctg_fast.kernels import contrastive_loss as kernels

        return Results(*kernels.forward(hidden_states, attention_mask, normalizer, margin, reduction, keep))
    real = None if attention_mask is None else attention_mask != 0
    with full_precision(hidden_states.device):
        results = _outputs(hidden_states, keep)
        if impl == "cpu":
            _cpu_forward(hidden_states, real, normalizer, margin, reduction, results)
            return results
        inverse = _tiled.inverse_norms(hidden_states, real)
        kept = (results.bits, results.flags) if keep else (None, None)
        hinge, radial = _tiled.hinge_sums(hidden_states, inverse, 1.0 - margin, *kept)
        loss, weights = _reduce(hinge, inverse, real, normalizer, margin, reduction)
    return Results(loss, weights, inverse, radial, results.bits, results.flags)


def _reduce(
    hinge: Tensor, inverse: Tensor, real: Tensor | None, normalizer: Tensor | None, margin: float, reduction: str
) -> tuple[Tensor, Tensor]:
    """The loss and its derivative with respect to each sequence's sum of hinges."""
    batch, length = hinge.shape
    zero = inverse == 0
    if real is None:
        tokens = torch.full((batch,), length, dtype=torch.int64, device=hinge.device)
    else:
        zero = zero & real
        tokens = real.sum(dim=1)
    # A zero vector has similarity 0 to all others and to itself: its own hinges are max(0, margin).
    pairs = tokens * (tokens - 1)
    zero_hinges = ((tokens - 1) * zero.sum(dim=1)).to(hinge.dtype) * max(0.0, margin)  # not in the default dtype
    sums = hinge.sum(dim=1) + zero_hinges + (inverse * 0.0).sum(dim=1)  # NaN where a real vector is not finite
    if reduction == "dense":
        sums = sums + length * max(0.0, margin)
        weights = torch.full_like(sums, 1.0 / max(1, length * length))
        items: Tensor | int = max(1, batch)
    elif reduction == "paper":
        weights = 1.0 / pairs.clamp_min(1).to(sums.dtype)
        items = max(1, batch)
    else:
        weights = torch.ones_like(sums)
        items = pairs.sum().clamp_min(1)
    if normalizer is not None:
        items = normalizer.to(device=sums.device, dtype=sums.dtype)
    total = (sums * weights).sum()
    loss = torch.where((total == 0) & (items == 0), total, total / items)  # 0 / 0: the count of a batch without pairs
    return loss, (weights / items).masked_fill(pairs == 0, 0.0)  # no pair, no gradient: not even a rounding error's


def _view(hidden_states: Tensor) -> tuple[str, int, tuple[int, ...], tuple[int, ...]]:
    name = str(hidden_states.dtype).removeprefix("torch.")
    return name, hidden_states.data_ptr(), tuple(hidden_states.shape), tuple(hidden_states.stride()[:2])


def _cpu_forward(
    hidden_states: Tensor, real: Tensor | None, normalizer: Tensor | None, margin: float, reduction: str, out: Results
) -> None:
    """Fills the results, bits and flags where they are not empty."""
    states = rows_contiguous(hidden_states)
    real = None if real is None else real.contiguous()
    hinge = torch.empty_like(out.radial)
    keep = out.bits.numel() > 0
    extension = _backends.require_extension()
    extension.contrastive_hinge(
        *_view(states),
        address(real),
        max(0.0, 1.0 - margin),
        *addresses(hinge, out.inverse_norms, out.radial, *((out.bits, out.flags) if keep else (None, None))),
        torch.get_num_threads(),
    )
    extension.contrastive_reduce(
        *addresses(hinge, out.inverse_norms, real),
        tuple(states.shape[:2]),
        margin,
        reduction,
        None if normalizer is None else float(normalizer),
        *addresses(out.loss, out.weights),
    )
    if not keep:
        out.radial.zero_()


def _cpu_gradient(
    scale: Tensor, hidden_states: Tensor, inverse_norms: Tensor, radial: Tensor, bits: Tensor, flags: Tensor
) -> Tensor:
    states = rows_contiguous(hidden_states)
    result = torch.empty_like(states, memory_format=torch.contiguous_format)
    _backends.require_extension().contrastive_gradient(
        *_view(states),
        *addresses(scale, inverse_norms, radial, bits, flags, result),
        torch.get_num_threads(),
    )
    return result


def _backward(
    grad: Tensor,
    hidden_states: Tensor,
    weights: Tensor,
    inverse_norms: Tensor,
    radial: Tensor,
    bits: Tensor,
    flags: Tensor,
    impl: str,
) -> Tensor:
    impl = resolve(impl, hidden_states)
    if impl == "triton" and hidden_states.numel() > 0:
        from simctg_fast.kernels import contrastive_loss as kernels

        return kernels.backward(grad, hidden_states, weights, inverse_norms, radial, bits, flags)
    with full_precision(hidden_states.device):
        scale = weights * grad.to(weights.dtype) * 2.0  # every pair is counted from both of its ends
        gradient = _cpu_gradient if impl == "cpu" else _tiled.gradient
        return gradient(scale, hidden_states, inverse_norms, radial, bits, flags)


def _setup(ctx, inputs, output) -> None:
    hidden_states, _, _, _, _, keep, impl = inputs
    ctx.impl, ctx.keep = impl, keep
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if keep:
        ctx.save_for_backward(hidden_states, *output[1:])


def _autograd(ctx, grad, *_unused):
    if grad is None:
        return (None,) * 7
    if not ctx.keep:
        raise RuntimeError("contrastive_loss was called with keep=False, so it has no gradient")
    result = torch.ops.simctg_fast.contrastive_loss_backward(grad, *ctx.saved_tensors, ctx.impl)
    return (result, *(None,) * 6)


def _second_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1])


def _second(ctx, direction):
    """The derivative of ``<direction, gradient>``, which is ``sum_ij A_ij du_i · u_j`` with the 0/1 matrix A, a
    constant: two products with it, as in the first derivative, and then each vector by itself. In tiled PyTorch,
    whatever the implementation.
    """
    grad, hidden_states, weights, inverse, radial, bits, flags = ctx.saved_tensors
    with full_precision(hidden_states.device):
        unit, tangent, pull = _tiled.along(hidden_states, direction, inverse)
        # The gradient of vectors that count as unit ones and keep their radial part is the product with A. The kernels
        # rely on unit vectors and on their radial parts.
        half, ones = grad.new_full((), 0.5, dtype=weights.dtype), torch.ones_like(weights)
        units, zeros = (inverse != 0).to(inverse.dtype), torch.zeros_like(radial)
        sums, moved = (
            torch.ops.simctg_fast.contrastive_loss_backward(half, x, ones, units, zeros, bits, flags, "torch")
            for x in (unit, tangent)
        )
        scale = (2.0 * weights)[:, None, None]
        of_grad = (scale * sums * tangent).sum().to(grad.dtype)
        scale = scale * grad.to(scale.dtype)
        return of_grad, pull(scale * moved, scale * sums)


define(
    "contrastive_loss(Tensor hidden_states, Tensor? attention_mask, Tensor? normalizer, float margin, str reduction, "
    "bool keep, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)
define(
    "contrastive_loss_backward(Tensor grad, Tensor hidden_states, Tensor weights, Tensor inverse_norms, Tensor radial, "
    "Tensor bits, Tensor flags, str impl) -> Tensor",
    _backward,
    lambda grad, hidden_states, *_: torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
)
register("contrastive_loss", _autograd, _setup)
register("contrastive_loss_backward", _second, _second_setup, last=True)
