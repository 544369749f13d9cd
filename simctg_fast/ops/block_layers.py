"""The stretches of a transformer block between its attentions, each in one call of the C++ extension, and whole blocks.

Plain functions that need the extension, for :mod:`simctg_fast.decoding`, which has checked what it hands in: of one
element type, on the CPU, contiguous. Results have the bits of the single kernels (:mod:`.rms_norm`, :mod:`.linear`,
:mod:`.gelu`) in turn; layer norm, SiLU and rotation, which PyTorch computes elsewhere, are as exact as its own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _backends
from .dispatch import element_type
from .linear import read_as

_NOT_ROTATED = (0, 0, 0, 0, 0)


def native_layer(weight: Tensor, bias: Tensor | None, transposed: bool, copy: Tensor | None) -> Any:
    """A linear layer as the functions below take it, ``copy`` as `linear.run_kernel` does. It holds addresses: the
    tensors have to outlive it."""
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    layout, address, element = read_as(weight, transposed, copy)
    return _backends.require_extension().LinearLayer(
        layout,
        address,
        0 if bias is None else bias.data_ptr(),
        in_features,
        out_features,
        element_type(weight.dtype),
        element,
    )


def native_norm(weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool) -> Any:
    """A layer norm if ``centred``, else a root mean square norm, as the functions below take it. It holds addresses."""
    extension = _backends.require_extension()
    kind = extension.NormKind.layer if centred else extension.NormKind.root_mean_square
    return extension.Norm(kind, weight.data_ptr(), 0 if bias is None else bias.data_ptr(), epsilon)


def native_activation(name: str) -> Any:
    """``"relu"``, ``"gelu_tanh"`` or ``"silu"``."""
    return getattr(_backends.require_extension().Activation, name)


@functools.cache
def _kernels() -> tuple[Any, Any, Any, Any]:
    extension = _backends.require_extension()
    return extension.norm_linears, extension.linear_residual, extension.linear_feed_forward, extension.decoder_blocks


def norm_linears(
    x: Tensor, norm: Any, layers: list[Any], results: list[Tensor], rotation: tuple[Tensor, Tensor] | None = None
) -> None:
    """``results[i] = norm(x) · layers[i]``, for ``x (rows, D)``.

    Args:
        rotation: cosines and sines of the rows' positions, each contiguous ``(rows or 1, …, width)``: every ``width``
            elements of the first two results are rotated by them, as Llama's queries and keys.
    """
    _kernels()[0](
        x.data_ptr(),
        x.shape[0],
        norm,
        layers,
        [result.data_ptr() for result in results],
        torch.get_num_threads(),
        _rotated(rotation),
    )


def _rotated(rotation: tuple[Tensor, Tensor] | None) -> tuple[int, ...]:
    if rotation is None:
        return _NOT_ROTATED
    cos, sin = rotation
    width = cos.shape[-1]
    return cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else width, width, 2


def linear_residual(x: Tensor, layer: Any, residual: Tensor) -> Tensor:
    """``x · layer + residual``, shaped as ``residual (rows, …)``."""
    y = torch.empty_like(residual)
    _kernels()[1](x.data_ptr(), x.shape[0], layer, residual.data_ptr(), y.data_ptr(), torch.get_num_threads())
    return y


def linear_feed_forward(
    x: Tensor, layer: Any, residual: Tensor, norm: Any, inner: Any, gate: Any | None, act: Any, outer: Any
) -> Tensor:
    """``(act(norm(z) · inner) [* (norm(z) · gate)]) · outer + z`` for ``z = x · layer + residual``, shaped as
    ``residual (rows, …)``.

    Where a ReLU leaves few elements and ``outer`` is packed, the others are not multiplied.
    """
    y = torch.empty_like(residual)
    _kernels()[2](
        x.data_ptr(),
        x.shape[0],
        layer,
        residual.data_ptr(),
        norm,
        inner,
        gate,
        act,
        outer,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def native_block(
    attention_norm: Any,
    projections: list[Any],
    scaling: float,
    output: Any,
    norm: Any,
    inner: Any,
    gate: Any | None,
    act: Any,
    outer: Any,
) -> Any:
    """A decoder's block as `decoder_blocks` takes it, of what `native_norm`, `native_layer` and `native_activation`
    make: ``z = x + attention(attention_norm(x)) · output``, then as `linear_feed_forward`.

    Args:
        projections: to queries, keys and values, or one to all three, side by side.
        scaling: of the attention.
    """
    make = _backends.require_extension().DecoderBlock
    return make(attention_norm, projections, scaling, output, norm, inner, gate, act, outer)


def decoder_blocks(
    x: Tensor,
    blocks: list[Any],
    arrays: list[tuple[int, ...]],
    attention: Any,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run blocks in turn, the first on ``x (rows, …, D)``.

    Args:
        arrays: of each block the addresses of its queries, new keys and new values, of the keys and values that are
            there, and of its result.
        attention: from `shared_prefix_attention.native_call`.
        rotation: see `norm_linears`.
    """
    run = _kernels()[3]
    run(x.data_ptr(), x.shape[0], blocks, arrays, attention, _rotated(rotation), torch.get_num_threads())
