"""Checks of what a user hands over. Errors name the argument, the value it had and what is allowed."""

from __future__ import annotations

import math

import torch

from ..ops.crf_checks import checked_lengths

LOWEST_TEMPERATURE = 1e-20  # scores of up to 1e9 over it stay below the 1e30 that stands for infinity in the kernels


def check_emissions(emissions: torch.Tensor, vocabulary: int) -> None:
    if not isinstance(emissions, torch.Tensor):
        raise TypeError(f"emissions is {type(emissions).__name__}, must be a tensor")
    if emissions.dim() != 3 or emissions.shape[2] != vocabulary or emissions.shape[1] < 1:
        raise ValueError(f"emissions has shape {tuple(emissions.shape)}, must be (batch, length >= 1, {vocabulary})")
    if not emissions.dtype.is_floating_point:
        raise ValueError(f"emissions has dtype {emissions.dtype}, must be floating point")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the CRF's parameters are on {device}; one device is needed")


def as_lengths(lengths: torch.Tensor | None, emissions: torch.Tensor) -> torch.Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, torch.Tensor):
        raise TypeError(f"lengths is {type(lengths).__name__}, must be a tensor or None")
    batch, limit = emissions.shape[:2]
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}, must be integers of shape ({batch},)")
    check_device("lengths", lengths, emissions.device)
    return checked_lengths(lengths.to(torch.int64), limit)


def as_paths(name: str, paths: torch.Tensor, emissions: torch.Tensor) -> torch.Tensor:
    """`(B, T)` or `(B, T, N)` integers as `(B, T, N)` int64."""
    if not isinstance(paths, torch.Tensor):
        raise TypeError(f"{name} is {type(paths).__name__}, must be a tensor")
    if paths.dim() not in (2, 3) or paths.shape[:2] != emissions.shape[:2] or paths.dtype.is_floating_point:
        batch, length = emissions.shape[:2]
        raise ValueError(
            f"{name} is {paths.dtype} {tuple(paths.shape)}, must be integers of shape ({batch}, {length}) or "
            f"({batch}, {length}, paths)"
        )
    check_device(name, paths, emissions.device)
    return (paths if paths.dim() == 3 else paths.unsqueeze(2)).to(torch.int64)


def beyond(lengths: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """`(B, T)`: positions past the end; None: there are none."""
    return None if lengths is None else torch.arange(length, device=lengths.device) >= lengths[:, None]


def first_wrong(wrong: torch.Tensor) -> list[int] | None:
    """Indices of the first true element, or None; waits for the device."""
    if wrong.numel() == 0 or not bool(wrong.any()):
        return None
    return wrong.nonzero()[0].tolist()


def check_tokens(name: str, tokens: torch.Tensor, vocabulary: int, past: torch.Tensor | None) -> None:
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if past is not None:
        wrong &= ~past[:, :, None]
    where = first_wrong(wrong)
    if where is not None:
        place = ", ".join(map(str, where))
        raise ValueError(f"{name}[{place}] is {int(tokens[tuple(where)])}, must be in 0..{vocabulary - 1}")


def check_scores(scores: torch.Tensor, past: torch.Tensor | None, what: str = "token of the beam") -> None:
    """NaN, +inf and positions where everything is banned. `scores (B, T, K)` are those of the beams, or of all tags."""
    top = scores.amax(2)  # a NaN carries through
    wrong = ~torch.isfinite(top)
    if past is not None:
        wrong &= ~past
    where = first_wrong(wrong)
    if where is None:
        return
    value = float(top[tuple(where)])
    problem = "holds NaN" if math.isnan(value) else "holds +inf" if value > 0 else f"bans every {what} (-inf)"
    raise ValueError(
        f"emissions[{where[0]}, {where[1]}] {problem}; a position needs one finite emission and no NaN or +inf"
    )


def check_temperature(temperature: float) -> float:
    """Scores are divided by it: that must not make them infinite."""
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
    if not isinstance(uniforms, torch.Tensor):
        raise TypeError(f"uniforms is {type(uniforms).__name__}, must be a tensor or None")
    if uniforms.shape != shape or not uniforms.dtype.is_floating_point:
        raise ValueError(f"uniforms is {uniforms.dtype} {tuple(uniforms.shape)}, must be floating point {shape}")
    check_device("uniforms", uniforms, scores.device)
    if uniforms.device.type == "cpu" and bool(((uniforms < 0) | ~(uniforms < 1)).any()):
        raise ValueError("uniforms holds a value outside [0, 1)")
    return uniforms.to(scores.dtype)


def draw_seed(generator: torch.Generator | None) -> int:
    """63 random bits of `generator`, or of torch's default one."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**63 - 1, (), generator=generator, device=device))
