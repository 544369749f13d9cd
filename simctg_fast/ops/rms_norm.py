"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467) in one pass. T5 and Llama write it as six
tensor operations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from .dispatch import element_type


def run_kernel(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight · x / √(mean(x²) + epsilon)`` over the last dimension of ``x (..., D)``, contiguous on the CPU and
    both of one type, float32, bfloat16 or float16: what calls has checked that, and that the extension is there. It is
    computed in float32 and rounded once."""
    y, width = torch.empty_like(x), x.shape[-1]
    _backends.require_extension().rms_norm(
        *(x.data_ptr(), weight.data_ptr(), epsilon, x.numel() // max(1, width), width, y.data_ptr()),
        torch.get_num_threads(),
        element_type(x.dtype),
    )
    return y
