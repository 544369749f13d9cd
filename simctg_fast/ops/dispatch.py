"""Which implementation serves a call. Every operator asks :func:`choose`, and hands C++ :func:`addresses`.

``"triton"`` are kernels for CUDA devices (or the CPU in Triton's interpreter), ``"cpu"`` is C++, ``"torch"`` PyTorch on
any device. ``"auto"`` takes the one that is there and takes the call; one that is asked for by name runs or raises.
Where a loss has no elements there is nothing to launch, and PyTorch answers for the kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_choice
from . import _backends

IMPLS = ("auto", "triton", "cpu", "torch")
NOT_TAKEN = "does not take this call: "

Obstacle = Callable[[], str | None]  # what is in a call's way, as it follows "impl='cpu' "; None: nothing


def choose(
    impl: str,
    device: torch.device,
    *,
    cpu: Obstacle | None = None,
    triton: Obstacle | None = None,
    impls: tuple[str, ...] = IMPLS,
) -> str:
    """The implementation that serves a call: ``"cpu"``, ``"triton"`` or ``"torch"``.

    Args:
        impl: what was asked for, one of `impls`.
        device: where the tensors are.
        cpu: what keeps the C++ code from the call, asked where the tensors are on the CPU. None: there is no such code,
            and PyTorch's is the CPU's.
        triton: what keeps the kernel from the call, asked where triton is there. None: there is no kernel.

    Raises:
        ValueError: an unknown `impl`, or one that was asked for by name and does not take the call.
        RuntimeError: one that was asked for by name and that this installation lacks.
    """
    if impl == "auto":
        kind = device.type
        # The extension comes last: a call that it would not take does not warn that it is missing.
        if kind == "cpu" and cpu is not None and cpu() is None and _backends.wanted_extension() is not None:
            return "cpu"
        if kind == "cuda" and triton is not None and _backends.has_triton() and triton() is None:
            return "triton"
        return "torch"
    check_choice("impl", impl, impls)
    problem = None
    if impl == "cpu":
        if device.type != "cpu":
            raise ValueError(f"impl='cpu' needs tensors on the CPU, got {device}")
        if cpu is None:
            return "torch"
        _backends.require_extension()
        problem = cpu()
    elif impl == "triton":
        if triton is None:
            raise ValueError("impl='triton' has no kernel for this operation; impl='torch' runs on any device")
        _backends.require_triton()
        problem = triton()
        if problem is None and not _backends.triton_runs_on(device):
            problem = f"needs tensors on a CUDA device, got {device}"
    if problem is not None:
        raise ValueError(f"impl={impl!r} {problem}")
    return impl


def is_deferred(impl: str) -> bool:
    """Whether a call becomes an operator of the graph that `torch.compile` is tracing, which chooses when it runs.
    PyTorch's code asked for by name is traced itself."""
    return impl != "torch" and torch.compiler.is_dynamo_compiling()


ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)  # csrc/api/element_type.h


@functools.cache
def element_type(dtype: torch.dtype) -> Any:
    """The name that C++ has for one of `ELEMENT_TYPES`."""
    return getattr(_backends.require_extension().ElementType, _name(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def float32_obstacle(mask: Tensor | None = None, **tensors: Tensor | None) -> str | None:
    """`cpu_obstacle` where C++ has float32 only."""
    return cpu_obstacle((torch.float32,), mask, **tensors)


def cpu_obstacle(dtypes: tuple[torch.dtype, ...], mask: Tensor | None = None, **tensors: Tensor | None) -> str | None:
    """What keeps tensors from the C++ code of the decoding step: they have to be of one of `dtypes`, all of the same,
    on the CPU, `mask` bool, the last dimension contiguous; no gradient is wanted, and nothing follows the
    computation."""
    like = ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"{NOT_TAKEN}{name} is a {type(tensor).__name__}"
        if tensor.dtype not in dtypes or not tensor.is_cpu:
            allowed = " or ".join(map(_name, dtypes))
            return f"{NOT_TAKEN}{name} is {tensor.dtype} on {tensor.device}, must be {allowed} on the CPU{like}"
        if len(dtypes) > 1:
            dtypes, like = (tensor.dtype,), f" as {name}"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{NOT_TAKEN}{name} has strides {tensor.stride()}, the last must be 1"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{NOT_TAKEN}{name} requires a gradient"
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return f"{NOT_TAKEN}the call is being traced"
    if forward_ad._current_level >= 0:
        return f"{NOT_TAKEN}the call is being differentiated in forward mode"
    if mask is not None and not (mask.dtype is torch.bool and mask.is_cpu):
        return f"{NOT_TAKEN}mask is {mask.dtype} on {mask.device}, must be bool on the CPU"
    return None


def lengths_obstacle(batch: int, **tensors: Tensor | None) -> str | None:
    """What is wrong with numbers of positions, ``(B,)`` int64 on the CPU."""
    for name, lengths in tensors.items():
        if lengths is not None and not (lengths.dtype is torch.int64 and lengths.shape == (batch,) and lengths.is_cpu):
            return f"{name} is {lengths.dtype} of shape {tuple(lengths.shape)}, must be int64 of shape ({batch},)"
    return None


def widened(tensor: Tensor) -> Tensor:
    """16-bit floats on the CPU as float32, for C++ that has no other; whatever else as it is."""
    return tensor.float() if tensor.is_cpu and tensor.dtype in ELEMENT_TYPES else tensor


def contiguous(*tensors: Tensor | None) -> tuple:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, a copy if its last dimension is not contiguous."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's data begins, 0 for None. The caller keeps the tensor meanwhile."""
    return 0 if tensor is None else tensor.data_ptr()


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(map(address, tensors))
