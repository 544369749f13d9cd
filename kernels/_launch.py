"""What the launchers of the losses share: the device, one frozen configuration an architecture, and a quick launch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Config:
    """How a matrix kernel is cut: depth of a slice of the product, warps, and stages of its pipeline."""

    block_k: int
    num_warps: int
    num_stages: int


_KEPT_LIMIT = 4096  # kinds of launches; each new combination of lengths and strides is one
_kept: dict[Hashable, tuple[Any, CompiledKernel, tuple]] = {}


def start_kernel(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float, **options: Any) -> None:
    """``kernel[grid](*args, **options)``; what has been launched once starts without Triton's binding of arguments.

    Triton finds the compiled kernel of a launch by writing down a signature of all arguments and options as text, which
    takes longer than to start it. Here the first launch of a kind is Triton's own, and the others start the compiled
    kernel that it returned. Two launches are of one kind only where Triton cannot tell them apart: its specialisation
    reads dtype and 16-byte alignment of a tensor, the value of an integer, the type of a float, and constants; to these
    come the device and the settings that change what is compiled. Whatever is not as simple as that (an argument of
    another type, a hook before the kernel, a kernel that reads globals, the interpreter, another backend than CUDA) is
    Triton's own launch every time. Hooks around launches and the current stream are seen by both.

    Args:
        kernel: a function under `triton.jit`, whose constants come last.
        grid: one to three sizes.
        args: tensors and numbers in the order of the kernel's parameters.
        options: its constants, num_warps and num_stages.
    """
    kind = _kind(kernel, args, options)
    kept = None if kind is None else _kept.get(kind)
    if kept is None:
        compiled = kernel[grid](*args, **options)
        if kind is not None:
            _keep(kind, kernel, compiled, len(args), options)
    else:
        _, compiled, constants = kept
        compiled[(*grid, 1, 1)[:3]](*args, *constants)


def _kind(kernel: Any, args: tuple, options: dict[str, Any]) -> tuple | None:
    """What Triton's choice of a compiled kernel depends on; None where that is not known."""
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    if (
        kernel.__class__ is not triton.JITFunction
        or kernel.pre_run_hooks
        or getattr(runtime, "add_stages_inspection_hook", None) is not None
    ):
        return None
    kind = [
        id(kernel),
        triton.runtime.driver.active.get_current_device(),
        runtime.debug,
        compilation.instrumentation_mode,
        getattr(compilation, "fpsan_homomorphic_casts", None),
        *options.items(),
    ]
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.data_ptr() % 16:
                kind.append(None)  # before the dtype: not aligned
            kind.append(arg.dtype)
        elif arg.__class__ is int:
            kind.append(arg)
        elif arg.__class__ is float:
            kind.append(float)
        else:
            return None
    return tuple(kind)


def _keep(kind: tuple, kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> None:
    """Remembers a kernel that Triton compiled and started, if nothing but its kind decides about it."""
    names = kernel.arg_names[given:]  # of what follows the arguments: the constants
    if (
        compiled.__class__ is not CompiledKernel
        or compiled.metadata.target.backend != "cuda"
        or kernel.used_global_vals
        or kernel.constexprs != list(range(given, given + len(names)))
        or any(name not in options for name in names)
    ):
        return
    if len(_kept) >= _KEPT_LIMIT:
        _kept.clear()
    # The kernel too, so that nothing else gets its id.
    _kept[kind] = kernel, compiled, tuple(options[name] for name in names)


@functools.cache
def _architecture_of(index: int) -> int:
    major = torch.cuda.get_device_capability(index)[0]
    return 100 if major >= 10 else 90 if major == 9 else 80


def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest generation with configurations that this device can run; 80 in the interpreter."""
    return _architecture_of(device.index) if device.type == "cuda" else 80


def before_triton(major: int, minor: int) -> bool:
    return tuple(map(int, triton.__version__.split(".")[:2])) < (major, minor)


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. `triton.cdiv` is for kernels too and takes ten times as long."""
    return -(-numerator // denominator)


def next_power_of_2(size: int) -> int:
    """At or above `size`; 1 for 0."""
    return 1 << max(0, size - 1).bit_length()


def on(tensor: Tensor):
    """Kernels start on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def precise() -> bool:
    """Whether float32 products have to be exact to float32: torch's own knob."""
    return torch.get_float32_matmul_precision() == "highest"


def last_dimension_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
