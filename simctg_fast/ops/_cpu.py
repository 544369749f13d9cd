"""The C++ kernels of the decoding step, as plain functions over tensors.

They serve the eager inference path, where the price of an operator boundary would show: arguments are read as addresses
and strides, and only what the kernels need is checked. ``*_supported`` says whether a call may come here.
"""

from __future__ import annotations

import torch

from . import _backends


def _has(name: str) -> bool:
    return hasattr(_backends.extension(), name)


def candidate_scan_supported(hidden_states: torch.Tensor, history: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether :func:`candidate_scan_cpu` takes these arguments."""
    return False


def decode_attention_supported(
    query, key, value, length, new_key, new_value, scaling, mask, bias, softcap, sinks, window_start
) -> bool:
    """Whether :func:`decode_attention_cpu` takes these arguments."""
    return False
