"""Linear layers with weights of 8 bits, and an output layer whose most probable tokens are exact all the same.

Every output has a factor of its own, and so have 64 elements of an input row: symmetric rounding, by the largest of
them. (With one factor a row, a few large elements, as language models have them, would leave the others with few
steps.) Sums of 64 are exact integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends
from .dispatch import element_type
from .linear import layout_of, rows_of

_LINE = 64  # bytes of the cache


def quantized(weight: Tensor, transposed: bool) -> Tensor | None:
    """A copy in 8 bits of a CPU weight, ``(out_features, in_features)`` or ``transposed``, which `linear.run_kernel`
    reads in its place, and `certified`: in the kernel's own order, with a factor and a bound an output. None where
    there can be none: the weight is empty or not finite.
    """
    extension = _backends.require_extension()
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    if not (in_features and out_features):
        return None
    weight = weight.detach().contiguous()
    size = extension.int8_linear_size(in_features, out_features)
    copy = torch.empty(size + _LINE, dtype=torch.int8)
    copy = copy[-copy.data_ptr() % _LINE :][:size]
    is_finite = extension.quantize_linear(
        weight.data_ptr(),
        element_type(weight.dtype),
        weight.shape[1],
        layout_of(transposed),
        in_features,
        out_features,
        copy.data_ptr(),
        torch.get_num_threads(),
    )
    return copy if is_finite else None


def certified(x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor, top: int) -> Tensor:
    """``x · W + b`` as `linear.run_kernel` computes it, where that is among the ``top`` largest of its row or may be;
    elsewhere from ``copy`` in 8 bits (``x`` in 16), and below all of these.

    Bounds of what rounding takes away decide whom to compute: the ``top`` largest are exact for any input, equal ones
    included. Arguments are those of `linear.run_kernel`, ``weight (out_features, in_features)``, and ``copy`` what
    `quantized` made of it.
    """
    out_features, in_features = weight.shape
    shape = x.shape
    x, x_stride = rows_of(x, in_features)
    y = x.new_empty((*shape[:-1], out_features))
    run: Any = _backends.require_extension().certified_linear
    run(
        x.data_ptr(),
        x_stride,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // in_features,
        in_features,
        out_features,
        torch.get_num_threads(),
        element_type(x.dtype),
        copy.data_ptr(),
        min(top, out_features),
    )
    return y
