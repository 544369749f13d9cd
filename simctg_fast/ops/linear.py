"""A linear layer for a few rows, as a decoding step has them.

With few rows the time goes into reading the weight. C++ (`csrc/api/linear.h`) reads it once, in place; a general matrix
product repacks it first, which pays above `most_rows`. What it computes for a row does not depend on the other rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _backends
from .dispatch import element_type

MAX_ROWS = 64  # above, a general matrix product is as good
_MAX_ROWS_AMD = 256  # with AVX-512 there: PyTorch's is slower on AMD's processors (`benchmarks/linear.py`)
_ANY = 1 << 62  # where the processor has no instructions for 16 bits, PyTorch's is 2 to 200 times slower


def most_rows(dtype: torch.dtype = torch.float32) -> int:
    """Rows up to which the kernel is faster than a general matrix product on this machine."""
    extension = _backends.extension()
    if extension is None or (isa := extension.active_isa()) == "neon":
        return MAX_ROWS
    if dtype is torch.bfloat16 and isa != "avx512_bf16":
        return _ANY
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return _ANY
    return _MAX_ROWS_AMD if isa.startswith("avx512") and extension.is_amd() else MAX_ROWS


@functools.cache
def _kernel() -> tuple[Any, Any, Any, Any]:
    """The C++ function and the layouts it knows: rows are outputs, rows are inputs, panels."""
    extension = _backends.require_extension()
    layouts = extension.WeightLayout
    return extension.linear, layouts.rows_are_outputs, layouts.rows_are_inputs, layouts.panels


def run_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, packed: Tensor | None = None
) -> Tensor:
    """``x · W + b``, ``(..., out_features)`` contiguous, in x's type. What calls has checked the arguments: on the CPU,
    no gradient wanted, and the extension there; float32, bfloat16 or float16, ``weight`` in x's type, or of 16 bits
    where x is float32. Sums are taken in float32 and rounded once.

    Args:
        x: ``(..., in_features)``, any strides.
        weight: contiguous, ``(out_features, in_features)`` as `torch.nn.Linear` has it; with ``transposed``
            ``(in_features, out_features)`` as the `Conv1D` of transformers.
        bias: ``(out_features,)``, contiguous, in x's type, or None.
        packed: a copy of ``weight`` made by `pack`, which is read in its place.
    """
    linear, rows_are_outputs, rows_are_inputs, panels = _kernel()
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    layout = panels if packed is not None else rows_are_inputs if transposed else rows_are_outputs
    shape = x.shape
    if x.is_contiguous():
        x_stride = in_features
    else:
        x = x.reshape(-1, in_features)
        if x.stride(1) != 1:
            x = x.contiguous()
        x_stride = x.stride(0)
    y = x.new_empty((*shape[:-1], out_features))
    linear(
        layout,
        x.data_ptr(),
        x_stride,
        (weight if packed is None else packed).data_ptr(),
        weight.shape[1],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        out_features,
        x.numel() // in_features if in_features else y.numel() // max(1, out_features),
        in_features,
        out_features,
        torch.get_num_threads(),
        element_type(x.dtype),
        element_type(weight.dtype),
    )
    return y


def packed_size(weight: Tensor, transposed: bool) -> int:
    """Floats in the packed copy of a weight."""
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    return int(_backends.require_extension().packed_linear_size(in_features, out_features))


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """A copy of a float32 CPU weight in the order in which the kernel walks it: a panel of outputs beside each other,
    input after input. It serves any number of rows; a transposed weight gives the same bits packed and in place. It is
    for the instruction set that is in use now."""
    extension = _backends.require_extension()
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    layout = extension.WeightLayout.rows_are_inputs if transposed else extension.WeightLayout.rows_are_outputs
    weight = weight.detach().contiguous()
    packed = weight.new_empty(packed_size(weight, transposed))
    extension.pack_linear(
        weight.data_ptr(),
        weight.shape[1],
        layout,
        in_features,
        out_features,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed
