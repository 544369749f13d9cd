"""Checks of what a user hands over. Errors name the argument, the value it had and what is allowed."""

from __future__ import annotations

import math
from numbers import Integral

import torch

from ..checks import check_real

LOWEST_TEMPERATURE = 1e-20  # scores of up to 1e9 over it stay below the 1e30 that stands for infinity in the kernels


def check_tensor(name: str, value: object, what: str = "a tensor") -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, must be {what}")


def check_emissions(emissions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    check_tensor("emissions", emissions)
    if emissions.dim() != 3 or emissions.shape[2] != vocabulary or emissions.shape[1] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, {vocabulary})")
    if not emissions.dtype.is_floating_point:
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be floating point")
    return emissions


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the CRF's parameters are on {device}; one device is needed")


def check_count(name: str, value: int) -> int:
    """Raises a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | Integral | torch.SymInt) or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {value!r:.80}, must be an integer of at least 1")
    return value


def check_no_count(lengths: object, example: str) -> None:
    """For methods where a number is easily taken for the second argument."""
    if isinstance(lengths, int):
        raise TypeError(
            f"lengths is int, must be a tensor of shape (batch,) or None; numbers are named: {example}={lengths})"
        )


def as_paths(name: str, paths: torch.Tensor, emissions: torch.Tensor, *, several: bool = True) -> torch.Tensor:
    """`(B, T)` or, with `several`, `(B, T, N)` integers as `(B, T, N)` int64."""
    check_tensor(name, paths)
    number = paths.dtype.is_floating_point or paths.dtype.is_complex or paths.dtype == torch.bool
    if number or paths.dim() not in ((2, 3) if several else (2,)) or paths.shape[:2] != emissions.shape[:2]:
        batch, length = emissions.shape[:2]
        wanted = f"({batch}, {length})" + (f" or ({batch}, {length}, paths)" if several else "")
        raise ValueError(f"{name} is {paths.dtype} {tuple(paths.shape)}, must be integers of shape {wanted}")
    check_device(name, paths, emissions.device)
    return (paths if paths.dim() == 3 else paths.unsqueeze(2)).to(torch.int64)


def check_temperature(temperature: float) -> float:
    """Scores are divided by it: that must not make them infinite."""
    if type(temperature) is float and temperature == 1.0:  # what nearly every call has
        return temperature
    check_real("temperature", temperature, "a positive number")
    value = float(temperature)
    if not LOWEST_TEMPERATURE <= value < math.inf:
        raise ValueError(f"temperature is {temperature}, must be positive and finite, at least {LOWEST_TEMPERATURE}")
    return value


def checked_uniforms(
    uniforms: torch.Tensor | None, shape: tuple[int, ...], scores: torch.Tensor
) -> torch.Tensor | None:
    """As numbers of the scores' dtype; values are looked at on the CPU."""
    if uniforms is None:
        return None
    check_tensor("uniforms", uniforms, "a tensor or None")
    if uniforms.shape != shape or not uniforms.dtype.is_floating_point:
        raise ValueError(f"uniforms is {uniforms.dtype} {tuple(uniforms.shape)}, must be floating point {shape}")
    check_device("uniforms", uniforms, scores.device)
    if uniforms.device.type == "cpu" and bool(((uniforms < 0) | ~(uniforms < 1)).any()):
        raise ValueError("uniforms holds a value outside [0, 1)")
    return uniforms.to(scores.dtype)


def draw_seed(generator: torch.Generator | None) -> int:
    """63 random bits of `generator`, or of torch's default one."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {type(generator).__name__}, must be a torch.Generator or None")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=device))
