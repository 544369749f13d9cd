"""CUDA graphs emulated on the CPU, to find out without a GPU what a captured step would do.

As on a device, nothing is computed while a graph is recorded, a replay runs the recorded operations over the same
tensors, memory that was allocated inside the recording holds garbage until an operation of the replay writes it, a host
that reads a tensor invalidates the recording, and a recording that is not ended leaves allocator, stream and random
numbers as they are. What is not PyTorch's own operation cannot be recorded: kernels of ours have to be off.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from simctg_fast.decoding import decode_step
from simctg_fast.ops import _backends

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten._unique2.default, aten.is_nonzero.default, aten.item.default,
}  # fmt: skip
ALLOCATES = {
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
    aten.new_empty_strided.default,
}  # fmt: skip


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Stream:
    def __init__(self, device: Any = 0):
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        pass


class Driver(threading.local):
    """What torch and the driver know; the allocator's part is of the process, and the tests use one thread."""

    def __init__(self):
        self.default = self.current = Stream()
        self.recording: Graph | None = None
        self.pools = itertools.count(1)
        self.filling: list[Any] = []  # pools that allocations of a recording go to
        self.held: list[Any] = []  # pools that graphs hold
        self.random_in_recording = False
        self.watch: _Watch | None = None
        self.recorded = self.rehearsed = self.replayed = 0

    def as_before(self) -> bool:
        return self.current is self.default and not self.filling and not self.random_in_recording

    def end_allocation(self, index: int, pool: Any) -> None:
        if pool not in self.filling:
            raise RuntimeError("not currently recording to this pool")
        self.filling.remove(pool)

    def release_pool(self, index: int, pool: Any) -> None:
        if pool not in self.held:
            raise RuntimeError("no such pool")
        self.held.remove(pool)


class _Watch(TorchDispatchMode):
    """The debug mode that warns where the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in WAITS:
            frame = sys._getframe(1)  # whoever called the operation
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            place = (frame.f_code.co_filename, frame.f_lineno)
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, *place)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, graph = kwargs or {}, self.graph
        if func in WAITS:
            graph.invalid = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = tensors_in((args, kwargs))
        for tensor in given:
            graph.remember(tensor)
        out = func(*args, **kwargs)
        old = {address(tensor) for tensor in given}
        graph.made |= {address(tensor) for tensor in tensors_in(out)} - old
        graph.operations.append((func, args, kwargs, out))
        return out


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    driver: Driver

    def __init__(self):
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.made: set[int] = set()  # addresses of what was allocated inside
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pool: Any = None
        self.invalid = False

    def remember(self, tensor: torch.Tensor) -> None:
        if address(tensor) not in self.made and address(tensor) not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self.before[address(tensor)] = (whole, whole.clone())

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        driver = self.driver
        assert driver.current is not driver.default, "recorded on the default stream"
        assert pool not in driver.filling
        self.pool = pool
        driver.filling.append(pool)
        driver.held.append(pool)
        driver.random_in_recording = True
        driver.recording = self
        self.mode = _Recorder(self)
        self.mode.__enter__()

    def capture_end(self) -> None:
        driver = self.driver
        self.mode.__exit__(None, None, None)
        driver.recording = self.mode = None
        for whole, content in self.before.values():  # nothing has run
            whole.copy_(content)
        if self.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        driver.filling.remove(self.pool)
        driver.random_in_recording = False
        driver.recorded += 1

    def replay(self) -> None:
        self.driver.replayed += 1
        for func, args, kwargs, out in self.operations:
            if func in ALLOCATES:
                _spoil(out)
                continue
            result = func(*args, **kwargs)
            given = {address(tensor) for tensor in tensors_in((args, kwargs))}
            for old, new in zip(tensors_in(out), tensors_in(result), strict=True):
                if address(old) not in given:
                    old.copy_(new)

    def reset(self) -> None:
        if self.pool in self.driver.held:
            self.driver.held.remove(self.pool)
        self.operations, self.before, self.pool = [], {}, None

    def __del__(self):
        if not self.invalid:
            self.reset()


def _spoil(tensor: torch.Tensor) -> None:
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    whole.fill_(0x5A if tensor.dtype == torch.bool else 0xAB)


def _launch_commit(table: torch.Tensor, unit: torch.dtype, winners: torch.Tensor, position: torch.Tensor) -> None:
    """The commit kernel: what it copies, and where to, is in the table alone."""
    size = torch.empty(0, dtype=unit).element_size()
    for to, to_row, to_head, to_place, of, of_row, of_head, head_units, shape in table.view(-1, 9).tolist():
        for row, (winner, place) in enumerate(zip(winners.tolist(), position.tolist(), strict=True)):
            for head in range(shape & 0xFFFFFFFF):
                source = of + (winner * of_row + head * of_head) * size
                target = to + (row * to_row + head * to_head + place * to_place) * size
                assert all(map(_known, (source, target))), "the table holds an address of nothing"
                ctypes.memmove(target, source, head_units * size)


_ranges: dict[int, int] = {}


def _known(place: int) -> bool:
    return any(start <= place < start + size for start, size in _ranges.items())


@contextmanager
def emulated_cuda(monkeypatch):
    """Static steps on the CPU are rehearsed, recorded and replayed as on CUDA within the block. Yields the `Driver`."""
    from simctg_fast.kernels import prefix_commit as kernels

    driver = Driver()
    graph_type = type("EmulatedGraph", (Graph,), {"driver": driver})

    @contextmanager
    def stream(wanted):
        outer, driver.current = driver.current, wanted
        try:
            yield
        finally:
            driver.current = outer

    def set_debug_mode(mode):
        if driver.watch is not None:
            driver.watch.__exit__(None, None, None)
            driver.watch = None
        if mode == "warn":
            driver.rehearsed += 1
            driver.watch = _Watch()
            driver.watch.__enter__()

    table_of = kernels.table_of

    def known_table_of(pairs):
        _ranges.update((address(x), x.untyped_storage().nbytes()) for pair in pairs for x in pair)
        return table_of(pairs)

    def launch(table, unit, winners, position):
        if driver.recording is None:
            _launch_commit(table, unit, winners, position)
            return
        winners = winners.contiguous()
        changed = [x for pair in driver.recording.last_pairs for x in pair[:1]]
        with _disable_current_modes():
            for tensor in changed:
                driver.recording.remember(tensor)
        driver.recording.operations.append((_launch_commit, (table, unit, winners, position), {}, None))

    def remembered_table_of(pairs):
        if driver.recording is not None:
            driver.recording.last_pairs = pairs
        return known_table_of(pairs)

    replaced = {
        "torch.cuda.is_initialized": lambda: True,
        "torch.cuda.is_current_stream_capturing": lambda: driver.recording is not None,
        "torch.cuda.CUDAGraph": graph_type,
        "torch.cuda.Stream": Stream,
        "torch.cuda.current_stream": lambda device=None: driver.current,
        "torch.cuda.stream": stream,
        "torch.cuda.device": lambda device: nullcontext(),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.graph_pool_handle": lambda: next(driver.pools),
        "torch.cuda.get_sync_debug_mode": lambda: 0,
        "torch.cuda.set_sync_debug_mode": set_debug_mode,
        "torch._C._cuda_endAllocateToPool": driver.end_allocation,
        "torch._C._cuda_releasePool": driver.release_pool,
    }
    with monkeypatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(name, value, raising=False)
        patch.setattr("simctg_fast.decoding.cuda_graph._streams", {})
        patch.setattr("simctg_fast.decoding.cuda_graph._lost", [])
        patch.setattr(decode_step, "_obstacle", lambda *_: None)
        patch.setattr(_backends, "extension", lambda: None)
        patch.setattr(kernels, "table_of", remembered_table_of)
        patch.setattr(kernels, "launch", launch)
        _ranges.clear()
        yield driver
