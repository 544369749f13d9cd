"""Where and with what figures were made."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..ops._backends import backend_info

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes


def about(model: Any) -> dict[str, Any]:
    """``machine``, ``versions`` and the model's ``dtype``."""
    info = backend_info()
    versions = {name: str(info[name]) for name in ("simctg_fast", "python", "torch", "transformers")}
    return {"machine": _machine(model.device), "versions": versions, "dtype": str(model.dtype).split(".")[-1]}


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """Of configuration and weights, their dtypes included, and the kind of device: for models that a name does not tell
    apart."""
    found = hashlib.sha256(model.device.type.encode())
    for config in (model.config, model.generation_config):
        found.update(config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        # A sum of bits as integers: exact in any order, and done where the tensor is. Quantized weights have none.
        integers = _INTEGERS.get(tensor.element_size()) if type(tensor) is torch.Tensor else None
        bits = 0 if integers is None else tensor.reshape(-1).view(integers).sum(dtype=torch.int64).item()
        found.update(repr((name, tensor.dtype, tensor.shape, bits)).encode())
    return found.hexdigest()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({os.cpu_count()} cores), {torch.get_num_threads()} threads"


def _processor() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
