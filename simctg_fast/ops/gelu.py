"""The operator `simctg_fast::gelu_tanh`: the tanh form of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) in one
pass. transformers' `NewGELUActivation` (GPT-2's) takes eight tensor operations for it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._autograd import register

_library = torch.library.Library("simctg_fast", "FRAGMENT")
_library.define("gelu_tanh(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def gelu_tanh(x: Tensor) -> Tensor:
    """``x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))``, elementwise; any shape, dtype and device, differentiable.
    C++ for contiguous float32 on the CPU, PyTorch elsewhere."""
    y: Tensor = torch.ops.simctg_fast.gelu_tanh(x)
    return y


def run_kernel(x: Tensor) -> Tensor:
    """The C++ kernel on contiguous float32 on the CPU, with the extension there."""
    y = torch.empty_like(x)
    _backends.require_extension().gelu_tanh(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y


def _torch(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _cpu(x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and x.is_contiguous() and _backends.wanted_extension() is not None:
        return run_kernel(x)
    return _torch(x)


def _backward(ctx, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


_library.impl("gelu_tanh", _torch, "CompositeExplicitAutograd")
_library.impl("gelu_tanh", _cpu, "CPU")
torch.library.register_fake("simctg_fast::gelu_tanh", lambda x: torch.empty_like(x), lib=_library)
register(_library, "gelu_tanh", _backward, lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))
