"""The stretches of a transformer block between its attentions, each in one call of the C++ extension.

Plain functions that need the extension, for :mod:`simctg_fast.decoding`, which has checked what it hands in: float32 on
the CPU, contiguous. Results have the bits of the single kernels (:mod:`.rms_norm`, :mod:`.linear`, :mod:`.gelu`) in
turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends

Norm = tuple[Tensor, float]  # weight and epsilon of a root mean square norm


def native_layer(weight: Tensor, bias: Tensor | None, transposed: bool, packed: Tensor | None) -> Any:
    """A linear layer as the functions below take it. It holds addresses: the tensors have to outlive it."""
    extension = _backends.require_extension()
    layouts = extension.WeightLayout
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    layout = layouts.rows_are_inputs if transposed else layouts.rows_are_outputs
    return extension.LinearLayer(
        layout if packed is None else layouts.panels,
        (weight if packed is None else packed).data_ptr(),
        0 if bias is None else bias.data_ptr(),
        in_features,
        out_features,
    )


def norm_linears(x: Tensor, norm: Norm, layers: list[Any], results: list[Tensor]) -> None:
    """``results[i] = norm(x) · layers[i]``, for ``x (rows, D)``."""
    weight, epsilon = norm
    _backends.require_extension().norm_linears(
        x.data_ptr(),
        x.shape[0],
        (weight.data_ptr(), epsilon),
        layers,
        [result.data_ptr() for result in results],
        torch.get_num_threads(),
    )


def linear_residual(x: Tensor, layer: Any, residual: Tensor) -> Tensor:
    """``x · layer + residual``, shaped as ``residual (rows, …)``."""
    y = torch.empty_like(residual)
    _backends.require_extension().linear_residual(
        x.data_ptr(), x.shape[0], layer, residual.data_ptr(), y.data_ptr(), torch.get_num_threads()
    )
    return y


def feed_forward(x: Tensor, norm: Norm, inner: Any, gate: Any | None, act: str, outer: Any) -> Tensor:
    """``(act(norm(x) · inner) [* (norm(x) · gate)]) · outer + x``; ``act`` is ``"relu"`` or ``"gelu_tanh"``.

    Where a ReLU leaves few elements and ``outer`` is packed, the others are not multiplied.
    """
    extension, (weight, epsilon) = _backends.require_extension(), norm
    y = torch.empty_like(x)
    extension.feed_forward(
        x.data_ptr(),
        x.shape[0],
        (weight.data_ptr(), epsilon),
        inner,
        gate,
        getattr(extension.Activation, act),
        outer,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y
