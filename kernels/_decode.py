"""What the kernels of the decoding step share: values that sort as integers, and the reduction of a split launch.

A launch that is split writes its parts to memory; the program that arrives last reads all of them, always in the same
order, and finishes. Nobody waits, so nothing can hang, and the order of arrival does not show in the result.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_NAMES = ", ".join(map(str, DTYPES))

_local = threading.local()
_counters: dict[tuple[int | None, int], torch.Tensor] = {}


@triton.jit
def ranked(x, index):
    """One int64 that puts the larger float32 first, and of equals the lower index; −0 is 0, NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return key.to(tl.int64) * 4294967296 + (4294967295 - index.to(tl.int64))


@triton.jit
def ranked_value(entry):
    """The float32 that went into `ranked`."""
    key = (entry >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked_index(entry):
    """The index that went into `ranked`, int64."""
    return 4294967295 - (entry & 4294967295)


@triton.jit
def last_to_arrive(counter_ptr, count):
    """Whether this program is the last of `count` to come here. It sees what the others stored before they came, and
    leaves the counter at zero for the next launch."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == count - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 4 in the interpreter, so that small tests are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least `count` int32 zeros that launches of this thread's current stream share: they follow each other, and
    each leaves zeros behind. A graph under capture gets its own, from :func:`own_counters` or zeroed at every replay.
    """
    given = getattr(_local, "counters", None)
    if given is not None and given.device == device and given.numel() >= count:
        return given
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _counters or _counters[key].numel() < count:
        _counters[key] = torch.zeros(max(4096, count), dtype=torch.int32, device=device)
    return _counters[key]


@contextmanager
def own_counters(buffer: torch.Tensor) -> Iterator[None]:
    """Launches of this thread use `buffer` (int32 zeros) meanwhile: for a graph whose owner keeps the buffer alive."""
    outer = getattr(_local, "counters", None)
    _local.counters = buffer
    try:
        yield
    finally:
        _local.counters = outer
