"""Recording a CUDA graph by hand.

`torch.cuda.graph` records on a stream of the first device that was ever used, whichever the model is on, and where a
recording fails the thread stays on that stream, the allocator goes on asking the lost graph for its stream, and the
device's random numbers stay in recording. Here a step is rehearsed first, and one that makes the host wait is refused
instead of failing; what fails nevertheless leaves stream, allocator and random numbers as they were.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_WAITS = "called a synchronizing CUDA operation"  # what torch says of an operation that makes the host wait

# One at a time: warnings, their debug mode and the collector are the process's.
_lock = threading.Lock()
_streams: dict[int, torch.cuda.Stream] = {}  # by index of the device
# The memory of a graph that is gone serves no other, and stays with torch until its cache is emptied.
_DEAD_POOLS = 16  # at most, then it is
_recorded = 0
_lost: list[torch.cuda.CUDAGraph] = []  # of failed recordings: allocators may keep a pointer to them


class CaptureError(Exception):
    """The launches could not be recorded; the message says why."""


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """The device and its stream for recordings are current within the block, in order with what surrounds it."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        if index not in _streams:
            _streams[index] = torch.cuda.Stream(index)
        side, current = _streams[index], torch.cuda.current_stream(index)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            current.wait_stream(side)


def rehearse(run: Callable[[], Any], device: torch.device) -> str | None:
    """Run once, on the stream for recordings: what is made on first use (compiled kernels, workspaces of libraries) is
    there afterwards. Returns where the host had to wait for the device, ``file:line``; None if nowhere."""
    waits: list[str] = []
    thread, show, running = threading.get_ident(), warnings.showwarning, True

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if not running or _WAITS not in str(message):  # another thread may have put this back after its own block
            show(message, category, filename, lineno, file, line)
        elif threading.get_ident() == thread:  # the mode is the process's, and others may wait
            waits.append(f"{filename}:{lineno}")

    with _lock, _side_stream(device), warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_WAITS}")
        warnings.filterwarnings("ignore", message=".*Synchronization debug mode is a prototype")
        warnings.showwarning = note
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            running = False
            torch.cuda.set_sync_debug_mode(before)
    return waits[0] if waits else None


def record(run: Callable[[], Any], device: torch.device) -> torch.cuda.CUDAGraph:
    """The launches of ``run`` as a graph, on ``device``. Nothing is computed meanwhile, and another thread must not
    draw random numbers on the device. What is short of memory is tried once more without what torch keeps for later.

    Raises:
        CaptureError: it failed; stream, allocator and random numbers are as before.
    """
    global _recorded
    with _lock, _side_stream(device), _no_collection():
        _recorded += 1
        if _recorded % _DEAD_POOLS == 0:
            torch.cuda.empty_cache()
        graph, error = _try_to_record(run, device)
        if isinstance(error, torch.OutOfMemoryError):
            graph = error = None  # and the frames that hold on to tensors
            torch.cuda.empty_cache()
            graph, error = _try_to_record(run, device)
    if graph is not None:
        return graph
    assert error is not None
    if not isinstance(error, Exception):
        raise error
    raise CaptureError(f"{type(error).__name__}: {error}") from error.with_traceback(None)


def _try_to_record(
    run: Callable[[], Any], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, None] | tuple[None, BaseException]:
    index = torch.cuda.current_device()
    scratch = torch.zeros(16, 16, device=device)
    torch.mm(scratch, scratch)  # the workspace of this thread's BLAS, which must not come from the graph's memory
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    error: BaseException | None = None
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        run()
    except BaseException as raised:
        error = raised
    try:
        graph.capture_end()
    except RuntimeError as raised:
        error = error or raised
    if error is None:
        return graph, None
    try:
        graph.pool()
    except RuntimeError:  # it did not come to its end
        _abandon(graph, pool, index, scratch)
    else:
        graph.reset()
    return None, error


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, index: int, scratch: torch.Tensor) -> None:
    """Undo what a recording began that did not come to its end. (The allocator of pinned memory goes on asking the
    graph, which costs little; nothing in Python ends that.)"""
    _lost.append(graph)
    for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with suppress(RuntimeError):  # it had come so far
            undo(index, pool)
    with suppress(RuntimeError):  # one that ends takes the random numbers out of recording
        other = torch.cuda.CUDAGraph()
        other.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        scratch.zero_()
        other.capture_end()
        other.reset()


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection may free another graph, which no recording survives."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
