"""What the launchers of the losses share: the device to launch on, and one frozen configuration per architecture."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How a matrix kernel is cut: depth of a slice of the product, warps, and stages of its pipeline."""

    block_k: int
    num_warps: int
    num_stages: int


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
