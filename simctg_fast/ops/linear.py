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
_MAX_ROWS_AMD = 256  # of float32 with AVX-512: PyTorch's is slower on AMD's processors (`benchmarks/linear.py`)
ANY_ROWS = 1 << 62  # where the processor has no instructions for 16 bits, PyTorch's is 2 to 200 times slower


def most_rows(dtype: torch.dtype = torch.float32) -> int:
    """Rows up to which the kernel is faster than a general matrix product on this machine."""
    extension = _backends.extension()
    if extension is None or (isa := extension.active_isa()) == "neon":
        return MAX_ROWS
    if dtype is torch.bfloat16 and isa != "avx512_bf16":
        return ANY_ROWS
    if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return ANY_ROWS
    slow = dtype is torch.float32 and isa.startswith("avx512") and extension.is_amd()
    return _MAX_ROWS_AMD if slow else MAX_ROWS


# How copies lie, by their type; those of 16 bits lie as the weight does.
_LAYOUTS = {torch.float32: "panels", torch.int8: "int8"}


@functools.cache
def _kernel() -> Any:
    return _backends.require_extension().linear


@functools.cache
def layout_of(transposed: bool, copied: torch.dtype | None = None) -> Any:
    """How the C++ code is told a weight lies, or a copy of it of this type."""
    layouts = _backends.require_extension().WeightLayout
    if copied in _LAYOUTS:
        return getattr(layouts, _LAYOUTS[copied])
    return layouts.rows_are_inputs if transposed else layouts.rows_are_outputs


def read_as(weight: Tensor, transposed: bool, copy: Tensor | None) -> tuple[Any, int, Any]:
    """What the C++ code reads for ``weight``, or for a ``copy`` of it: layout, address and type."""
    if copy is None:
        return layout_of(transposed), weight.data_ptr(), element_type(weight.dtype)
    dtype = weight.dtype if copy.dtype is torch.int8 else copy.dtype
    return layout_of(transposed, copy.dtype), copy.data_ptr(), element_type(dtype)


def run_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, copy: Tensor | None = None) -> Tensor:
    """``x · W + b``, ``(..., out_features)`` contiguous, in x's type. What calls has checked the arguments: on the CPU,
    no gradient wanted, and the extension there; float32, bfloat16 or float16, ``weight`` in x's type, or of 16 bits
    where x is float32. Sums are taken in float32 and rounded once.

    Args:
        x: ``(..., in_features)``, any strides.
        weight: contiguous, ``(out_features, in_features)`` as `torch.nn.Linear` has it; with ``transposed``
            ``(in_features, out_features)`` as the `Conv1D` of transformers.
        bias: ``(out_features,)``, contiguous, in x's type, or None.
        copy: of ``weight``, which is read in its place: from `pack`, `narrowed` or `quantized`.
    """
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    shape = x.shape
    x, x_stride = rows_of(x, in_features)
    y = x.new_empty((*shape[:-1], out_features))
    layout, address, element = read_as(weight, transposed, copy)
    _kernel()(
        layout,
        x.data_ptr(),
        x_stride,
        address,
        weight.shape[1],
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        out_features,
        x.numel() // in_features if in_features else y.numel() // max(1, out_features),
        in_features,
        out_features,
        torch.get_num_threads(),
        element_type(x.dtype),
        element,
    )
    return y


def rows_of(x: Tensor, in_features: int) -> tuple[Tensor, int]:
    """``x`` with rows in one piece each, and the elements from one to the next."""
    if x.is_contiguous():
        return x, in_features
    x = x.reshape(-1, in_features)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def packed_size(weight: Tensor, transposed: bool) -> int:
    """Floats in the packed copy of a weight."""
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    return int(_backends.require_extension().packed_linear_size(in_features, out_features))


def narrowed(weight: Tensor) -> Tensor | None:
    """A float32 weight in 16 bits, bfloat16 if it can be and else float16, where nothing is lost by it: products have
    the same bits. None where something is."""
    weight = weight.detach()
    for dtype in (torch.bfloat16, torch.float16):
        for part in (weight[:1], weight):  # most weights that lose something lose it at once
            copy = part.to(dtype)
            if not torch.equal(copy.to(weight.dtype), part):
                break
        else:
            return copy
    return None


def pack(weight: Tensor, transposed: bool) -> Tensor:
    """A copy of a float32 CPU weight in the order in which the kernel walks it: a panel of outputs beside each other,
    input after input. It serves any number of rows; a transposed weight gives the same bits packed and in place. It is
    for the instruction set that is in use now."""
    extension = _backends.require_extension()
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    weight = weight.detach().contiguous()
    packed = weight.new_empty(packed_size(weight, transposed))
    extension.pack_linear(
        weight.data_ptr(),
        weight.shape[1],
        layout_of(transposed),
        in_features,
        out_features,
        packed.data_ptr(),
        torch.get_num_threads(),
    )
    return packed
