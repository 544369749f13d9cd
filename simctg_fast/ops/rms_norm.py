"""The operator `simctg_fast::rms_norm`: root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467) in
one pass. T5 and Llama write it as six tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._autograd import register

_library = torch.library.Library("simctg_fast", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight · x / √(mean(x²) + epsilon)`` over the last dimension; any dtype and device, differentiable. C++ for
    contiguous float32 on the CPU, PyTorch elsewhere.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``.
    """
    y: Tensor = torch.ops.simctg_fast.rms_norm(x, weight, epsilon)
    return y


def run_kernel(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The C++ kernel on contiguous float32 on the CPU, with the extension there."""
    y, width = torch.empty_like(x), x.shape[-1]
    _backends.require_extension().rms_norm(
        *(x.data_ptr(), weight.data_ptr(), epsilon, x.numel() // max(1, width), width, y.data_ptr()),
        torch.get_num_threads(),
    )
    return y


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must be (D,) for x of shape {tuple(x.shape)}")


def _torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    _check(x, weight)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def _cpu(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    _check(x, weight)
    plain = x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous()
    if plain and _backends.wanted_extension() is not None:
        return run_kernel(x, weight, epsilon)
    return _torch(x, weight, epsilon)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.epsilon = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + ctx.epsilon)
    unit, scaled = x * scale, grad * weight
    grad_x = scale * (scaled - unit * (scaled * unit).mean(dim=-1, keepdim=True))
    return grad_x, (grad * unit).flatten(0, -2).sum(dim=0) if x.dim() > 1 else grad * unit, None


_library.impl("rms_norm", _torch, "CompositeExplicitAutograd")
_library.impl("rms_norm", _cpu, "CPU")
torch.library.register_fake("simctg_fast::rms_norm", lambda x, weight, epsilon: torch.empty_like(x), lib=_library)
register(_library, "rms_norm", _backward, _setup_context)
