"""The operator `simctg_fast::linear_small_m`: a linear layer for a few rows, as a decoding step has them.

With few rows the time goes into reading the weight. C++ (`csrc/api/linear.h`) reads it once, in place, for up
to `MAX_ROWS` rows; a general matrix product repacks it first. What it computes for a row does not depend on the other
rows. What it does not take (other dtypes and devices, more rows, non-contiguous weights) goes to PyTorch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._autograd import register

IMPLS = ("auto", "cpu", "torch")
MAX_ROWS = 64  # above, a general matrix product is as good

_library = torch.library.Library("simctg_fast", "FRAGMENT")
_library.define(
    'linear_small_m(Tensor x, Tensor weight, Tensor? bias=None, bool transposed=False, *, str impl="auto") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_small_m(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, *, impl: str = "auto"
) -> Tensor:
    """``x · W + b``, fast for at most `MAX_ROWS` rows of float32 on the CPU, differentiable.

    Args:
        x: ``(..., in_features)``.
        weight: ``(out_features, in_features)`` as `torch.nn.Linear` has it; with ``transposed``
            ``(in_features, out_features)`` as the `Conv1D` of transformers.
        bias: ``(out_features,)`` or None.
        transposed: how ``weight`` lies.
        impl: ``"auto"``, ``"cpu"`` (the C++ kernel, or an error that says what is in its way) or ``"torch"``.

    Returns:
        ``(..., out_features)``, contiguous.

    Raises:
        ValueError: shapes that do not fit, an unknown ``impl``, a call that ``impl="cpu"`` does not take.
        RuntimeError: ``impl="cpu"`` without the extension.
    """
    y: Tensor = torch.ops.simctg_fast.linear_small_m(x, weight, bias, transposed, impl=impl)
    return y


@functools.cache
def _kernel() -> tuple[Any, Any, Any, Any] | None:
    """The C++ function and the layouts it knows: rows are outputs, rows are inputs, panels."""
    extension = _backends.wanted_extension()
    if extension is None:
        return None
    layouts = extension.WeightLayout
    return extension.linear, layouts.rows_are_outputs, layouts.rows_are_inputs, layouts.panels


def obstacle(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> str | None:
    """Why the kernel does not take a call, None if it does. Looks at the tensors only, not at gradients or modes."""
    rows = x.numel() // max(1, x.shape[-1])
    if rows > MAX_ROWS:
        return f"x has {rows} rows, the kernel is for at most {MAX_ROWS}"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or not tensor.is_cpu or tensor.layout != torch.strided:
            return f"{name} is {tensor.dtype} on {tensor.device}, the kernel is for float32 on the CPU"
        if name != "x" and not tensor.is_contiguous():
            return f"{name} has strides {tuple(tensor.stride())}, the kernel needs it contiguous"
    return None


def run_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, packed: Tensor | None = None
) -> Tensor:
    """The kernel on arguments that have been checked: ``packed`` is a copy of ``weight`` made by `pack`."""
    linear, rows_are_outputs, rows_are_inputs, panels = _kernel()  # type: ignore[misc]
    if transposed:
        in_features, out_features = weight.shape
        layout = rows_are_inputs
    else:
        out_features, in_features = weight.shape
        layout = rows_are_outputs
    if packed is None:
        address = weight.data_ptr()
    else:
        address, layout = packed.data_ptr(), panels
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
        address,
        out_features if transposed else in_features,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        out_features,
        x.numel() // in_features if in_features else y.numel() // max(1, out_features),
        in_features,
        out_features,
        torch.get_num_threads(),
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


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, impl: str) -> int:
    """Number of output features."""
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}, must be one of {', '.join(map(repr, IMPLS))}")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, must have 2 dimensions")
    in_features, out_features = weight.shape if transposed else weight.shape[::-1]
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, must be (..., {in_features}) for this weight")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, must be ({out_features},) for this weight")
    return int(out_features)


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    y = torch.nn.functional.linear(x, weight.t() if transposed else weight, bias)
    return y.contiguous()


def _any_device(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, *, impl: str = "auto"
) -> Tensor:
    _check(x, weight, bias, transposed, impl)
    if impl == "cpu":
        raise ValueError(f"impl='cpu' needs tensors on the CPU, x is on {x.device}")
    return _torch(x, weight, bias, transposed)


def _cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, *, impl: str = "auto"
) -> Tensor:
    _check(x, weight, bias, transposed, impl)
    if impl == "torch":
        return _torch(x, weight, bias, transposed)
    problem = obstacle(x, weight, bias, transposed)
    if impl == "cpu":
        _backends.require_extension()
        if problem is not None:
            raise ValueError(f"impl='cpu' does not take this call: {problem}")
    if problem is not None or _kernel() is None:
        return _torch(x, weight, bias, transposed)
    return run_kernel(x, weight, bias, transposed)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False, *, impl: str = "auto"
) -> Tensor:
    return x.new_empty((*x.shape[:-1], _check(x, weight, bias, transposed, impl)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, weight, bias, ctx.transposed = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.matmul(grad, weight.t() if ctx.transposed else weight)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.t() @ out if ctx.transposed else out.t() @ rows
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grad_bias = out.sum(0)
    return grad_x, grad_weight, grad_bias, None


_library.impl("linear_small_m", _any_device, "CompositeExplicitAutograd")
_library.impl("linear_small_m", _cpu, "CPU")
torch.library.register_fake("simctg_fast::linear_small_m", _fake, lib=_library)
register(_library, "linear_small_m", _backward, _setup_context)
