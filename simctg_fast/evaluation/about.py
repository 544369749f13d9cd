"""Where and with what figures were made."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ..ops._backends import backend_info


def about(model: Any) -> dict[str, Any]:
    """``machine``, ``versions`` and the model's ``dtype``."""
    info = backend_info()
    versions = {name: str(info[name]) for name in ("simctg_fast", "python", "torch", "transformers")}
    return {"machine": _machine(model.device), "versions": versions, "dtype": str(model.dtype).split(".")[-1]}


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
