"""What the launchers of the losses share: the device to launch on, and one frozen configuration per architecture.

Autotuning is off. :func:`set_autotune` (or SIMCTG_FAST_AUTOTUNE=1 in the environment) lets the matrix kernels try a few
configurations around the frozen one, once for each kind of problem in a process: the first call of a kind then takes
seconds. `torch.use_deterministic_algorithms(True)` switches it off again, as two configurations may round differently.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How a matrix kernel is cut: depth of a slice of the product, warps, and stages of its pipeline."""

    block_k: int
    num_warps: int
    num_stages: int


_enabled = os.environ.get("SIMCTG_FAST_AUTOTUNE", "0") not in ("", "0")
_tuned: dict[Hashable, Config] = {}


def set_autotune(enabled: bool) -> None:
    """Switches autotuning on or off for the process; off also forgets what was found."""
    global _enabled
    _enabled = enabled
    if not enabled:
        _tuned.clear()


def size_class(size: int) -> int:
    """The power of two at or above: problems of one class share a configuration."""
    return 1 << max(0, size - 1).bit_length()


def launch(
    key: Hashable, frozen: Config, run: Callable[[Config], object], device: torch.device, *, tune_depth: bool = True
) -> None:
    """Runs the kernel, which must be safe to run again, in its frozen configuration or in the best one around it.

    Args:
        key: the kind of problem: the kernel's name, `size_class` of its lengths, dtype, architecture.
        frozen: the shipped configuration.
        run: launches with a configuration.
        device: where it runs, for timing.
        tune_depth: whether `block_k` may change; it decides the grid of some kernels.
    """
    if not _enabled or torch.are_deterministic_algorithms_enabled():
        run(frozen)
        return
    if key not in _tuned:
        _tuned[key] = min(_around(frozen, tune_depth), key=lambda config: _seconds(config, run, device))
    run(_tuned[key])


def _around(frozen: Config, tune_depth: bool) -> list[Config]:
    """The frozen configuration first, so that it wins a tie."""
    depths = [frozen.block_k // 2, frozen.block_k * 2] if tune_depth else []
    others = [Config(depth, frozen.num_warps, frozen.num_stages) for depth in depths if 16 <= depth <= 128]
    others += [Config(frozen.block_k, warps, frozen.num_stages) for warps in (4, 8) if warps != frozen.num_warps]
    others += [
        Config(frozen.block_k, frozen.num_warps, stages)
        for stages in (frozen.num_stages - 1, frozen.num_stages + 1)
        if stages >= 1
    ]
    return [frozen, *others]


def _seconds(config: Config, run: Callable[[Config], object], device: torch.device) -> float:
    """The best of a few runs; infinite where the configuration does not fit the device."""
    from triton.runtime.errors import OutOfResources, PTXASError

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    try:
        run(config)  # compiles
    except (OutOfResources, PTXASError):
        return float("inf")
    best = float("inf")
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        run(config)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def architecture(device: torch.device) -> int:
    """80, 90 or 100: the newest generation with configurations that this device can run; 80 in the interpreter."""
    if device.type != "cuda":
        return 80
    major = torch.cuda.get_device_capability(device)[0]
    return 100 if major >= 10 else 90 if major == 9 else 80


def on(tensor: Tensor):
    """Kernels start on the tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def precise() -> bool:
    """Whether float32 products have to be exact to float32: torch's own knob."""
    return torch.get_float32_matmul_precision() == "highest"


def last_dimension_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()
