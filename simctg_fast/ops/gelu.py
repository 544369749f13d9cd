"""The tanh form of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415) in one pass. transformers' `NewGELUActivation`
(GPT-2's) takes eight tensor operations for it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from .dispatch import element_type


def run_kernel(x: Tensor) -> Tensor:
    """``x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))``, elementwise, for ``x`` contiguous on the CPU, in float32,
    bfloat16 or float16: what calls has checked that, and that the extension is there. It is computed in float32 and
    rounded once."""
    y = torch.empty_like(x)
    _backends.require_extension().gelu_tanh(
        x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads(), element_type(x.dtype)
    )
    return y
