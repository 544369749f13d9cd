"""Running out of memory: how it is recognised, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    known = [_available(), *_left_in_groups()]
    return min((size for size in known if size is not None), default=None)


def _available() -> int | None:
    """What the system can still give, where it says so."""
    found = _numbers("/proc/meminfo").get("MemAvailable:")
    return None if found is None else found * 1024


def _left_in_groups() -> Iterator[int]:
    """What is left of the limits of the control groups that this process is in: containers and jobs of clusters."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup") / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if controllers == "":  # the second version of groups
            names = ("memory.max", "memory.current", "inactive_file")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(group: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    try:
        most, now = (int((group / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # no such group within a container, or "max"
        return
    yield max(0, most - now + _numbers(group / "memory.stat").get(cache, 0))


def _numbers(path: str | Path) -> dict[str, int]:
    """Of lines that begin with a name and a number."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
