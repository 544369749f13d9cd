"""Running out of memory: how it is recognised, and how much there is."""

from __future__ import annotations

import torch

SPARE_MEMORY = 0.9  # of what is free, at most, something new may take

# What PyTorch's CPU allocator says, and CUDA itself; of PyTorch's for a GPU there is a class of its own.
_SAID = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUDA error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def release() -> None:
    """Hand cached blocks back before the next attempt."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on ``device``; None where nobody says."""
    if device.type == "cuda":
        # Torch holds blocks for later; the rests of blocks that are in use may be too small for anything.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        unused -= torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
        return int(torch.cuda.mem_get_info(device)[0]) + max(0, unused)
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
