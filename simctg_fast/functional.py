"""Stateless public functions. Each checks what it was handed and calls one operator."""

from __future__ import annotations

import torch

from .ops.viterbi_backtrace import viterbi_backtrace as _viterbi_backtrace

__all__ = ["viterbi_backtrace"]


def viterbi_backtrace(
    backpointers: torch.Tensor, last: torch.Tensor, lengths: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """Follows back-pointers from the last slot of every sequence to its first.

    Args:
        backpointers: `(batch, length, slots)`, uint8, uint16, int32 or int64, any strides. ``backpointers[b, t, j]`` is
            the slot at ``t - 1`` that leads to slot ``j`` at ``t``. Row ``t = 0`` is not read, nor is a row beyond the
            item's length.
        last: `(batch,)`, the slot each sequence ends in, one of the same dtypes. Not read where the length is 0.
        lengths: `(batch,)`, one of the same dtypes, each in ``0..length``. None: all sequences are `length` long.
        impl: ``"cpu"`` is the C++ extension, ``"torch"`` PyTorch on any device, ``"auto"`` the first that can run.

    Returns:
        `(batch, length)` int64: the slots of each path, and -1 from the item's length on.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a wrong shape, dtype or device; an unknown `impl`; a length outside ``0..length``; a path that runs
            into a slot outside ``0..slots - 1`` (the text names the item, the step and the value).
        RuntimeError: ``impl="cpu"`` where the extension is absent.
    """
    for name, value in (("backpointers", backpointers), ("last", last)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is {value!r}, must be a tensor")
    if lengths is not None and not isinstance(lengths, torch.Tensor):
        raise TypeError(f"lengths is {lengths!r}, must be a tensor or None")
    return _viterbi_backtrace(backpointers, last, lengths, impl=impl)
