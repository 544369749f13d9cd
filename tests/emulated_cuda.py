"""CUDA emulated on the CPU, to find out without a GPU what our code would do on one.

`emulated_cuda` has captured graphs: as on a device, nothing is computed while a graph is recorded, a replay runs the
recorded operations over the same tensors, memory that was allocated inside the recording holds garbage until an
operation of the replay writes it, a host that reads a tensor invalidates the recording, and a recording that is not
ended leaves allocator, stream and random numbers as they are. Its tensors are the CPU's; kernels of ours, which are not
PyTorch's operations and cannot be recorded there, have to be off.

`emulated_device` has tensors of a CUDA device as well: what mixes devices raises, branches for CUDA are taken, and our
Triton kernels run in the interpreter (which has to be on in the process), recorded and replayed with the rest.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from simctg_fast.decoding import graph, slots_decoder
from simctg_fast.engine import slot_decoder
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


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return unwrapped(tensor).untyped_storage()


def address(tensor: torch.Tensor) -> int:
    return storage(tensor).data_ptr()


class Stream:
    def __init__(self, device: Any = 0):
        self.device, self.cuda_stream = device, id(self)

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
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
        self.recorded = self.rehearsed = self.replayed = self.emptied = 0

    def as_before(self) -> bool:
        return self.current is self.default and not self.filling and not self.random_in_recording

    def end_allocation(self, index: int, pool: Any) -> None:
        if pool not in self.filling:
            raise RuntimeError("not currently recording to this pool")
        self.filling.remove(pool)

    def empty_cache(self) -> None:
        self.emptied += 1

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
        if is_ours_on_cuda(func, args, kwargs):
            with self:
                return func.redispatch(CUDA_KEYS, *args, **kwargs)
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
        self.pool_id: Any = None
        self.invalid = self.ended = False

    def remember(self, tensor: torch.Tensor) -> None:
        if address(tensor) not in self.made and address(tensor) not in self.before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage(tensor))
            self.before[address(tensor)] = (whole, whole.clone())

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        driver = self.driver
        assert driver.current is not driver.default, "recorded on the default stream"
        assert pool not in driver.filling
        self.pool_id = pool
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
        driver.filling.remove(self.pool_id)
        driver.random_in_recording = False
        driver.recorded += 1
        self.ended = True

    def pool(self) -> Any:
        if not self.ended:
            raise RuntimeError("no capture has come to its end")
        return self.pool_id

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
        if self.pool_id in self.driver.held:
            self.driver.held.remove(self.pool_id)
        self.operations, self.before, self.pool_id = [], {}, None

    def __del__(self):
        if not self.invalid:
            self.reset()


def _spoil(tensor: torch.Tensor) -> None:
    whole = torch.empty(0, dtype=torch.uint8).set_(storage(tensor))
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
def emulated_cuda(monkeypatch, tensors_of_cpu: bool = True):
    """Static steps are rehearsed, recorded and replayed as on CUDA within the block. Yields the `Driver`."""
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
        _ranges.update((address(x), storage(x).nbytes()) for pair in pairs for x in pair)
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
        "torch.cuda.Event": Event,
        "torch.cuda.current_stream": lambda device=None: driver.current,
        "torch.cuda.stream": stream,
        "torch.cuda.device": lambda device: nullcontext(),
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.graph_pool_handle": lambda: next(driver.pools),
        "torch.cuda.empty_cache": driver.empty_cache,
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
        patch.setattr("simctg_fast.decoding.cuda_graph._recorded", 0)  # whatever other tests have recorded
        if tensors_of_cpu:
            for module in (graph, slots_decoder, slot_decoder):
                patch.setattr(module, "obstacle", lambda *_: None)
            patch.setattr(_backends, "extension", lambda: None)
            patch.setattr(kernels, "table_of", remembered_table_of)
            patch.setattr(kernels, "launch", launch)
        _ranges.clear()
        yield driver


# ---- what adds in whatever order threads arrive ----------------------------------------------------------------------

# From the documentation of `torch.use_deterministic_algorithms`, as ATen names them; of the likelihood it is the
# two-dimensional one.
_VARYING = {
    "index_add", "index_copy", "index_reduce", "scatter_add", "scatter_reduce", "put", "histc", "bincount", "median",
    "nanmedian", "kthvalue", "nll_loss2d_forward", "nll_loss2d_backward", "_ctc_loss_backward", "_embedding_bag",
    "index_select_backward", "gather_backward", "resize",
}  # fmt: skip
_VARYING_ENDS = ("_pool3d_backward", "_pad2d_backward", "sampler_2d_backward")


def varies_on_cuda(func, args, kwargs) -> bool:
    """Whether two runs of the operator on CUDA may differ, outside of torch's deterministic mode."""
    name = func._schema.name.split("::")[1].removesuffix("_")
    if name in ("index_put", "_index_put_impl"):  # accumulating, it sorts first
        return not (kwargs.get("accumulate", False) or (len(args) > 3 and args[3]))
    if name == "scatter":
        return func._overloadname.startswith("src")
    if name in ("cumsum", "cumprod"):
        return args[0].dtype.is_floating_point
    return name in _VARYING or name.endswith(_VARYING_ENDS)


# ---- tensors of a device --------------------------------------------------------------------------------------------

CUDA_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_MOVES = {aten._to_copy.default, aten.copy_.default}
_INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # by indices of the host as well


class CudaTensor(torch.Tensor):
    """Says that it is on ``cuda:0``; its numbers are in ``on_host``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, on_host: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls, on_host.size(), strides=on_host.stride(), storage_offset=on_host.storage_offset(), dtype=on_host.dtype,
            device=torch.device("cuda", 0),
        )  # fmt: skip
        self.on_host = on_host
        return self

    def data_ptr(self) -> int:
        return self.on_host.data_ptr()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo):
        return CudaTensor(self.on_host.clone())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _on_device(func, args, kwargs or {})


def unwrapped(x: Any) -> Any:
    return x.on_host if isinstance(x, CudaTensor) else x


def is_ours_on_cuda(func, args, kwargs) -> bool:
    return func.namespace == "simctg_fast" and any(isinstance(x, CudaTensor) for x in tensors_in((args, kwargs)))


def _on_device(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    if is_ours_on_cuda(func, args, kwargs):
        with _Device():
            return func.redispatch(CUDA_KEYS, *args, **kwargs)
    given = tensors_in((args, kwargs))
    on_cuda = any(isinstance(x, CudaTensor) for x in given)
    on_host = any(not isinstance(x, CudaTensor) and x.dim() for x in given)
    if on_cuda and on_host and func not in _MOVES | _INDEXES:
        devices = [(tuple(x.shape), str(x.device)) for x in given]
        raise RuntimeError(f"Expected all tensors to be on the same device, {func} got {devices}")
    if kwargs.get("device") is not None:
        to_cuda = torch.device(kwargs["device"]).type in ("cuda", "meta")  # "cuda" without a number asks the guard
        kwargs = kwargs | {"device": torch.device("cpu"), "pin_memory": None}
    else:
        to_cuda = isinstance(args[0], CudaTensor) if func is aten.copy_.default else on_cuda
    if "pin_memory" not in {argument.name for argument in func._schema.arguments}:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    same = {id(unwrapped(x)): x for x in given}  # an operation in place returns what it was given

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else CudaTensor(x) if to_cuda else x

    return tree_map(wrapped, out)


class _Device(TorchDispatchMode):
    """Makes new tensors of the device where they are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _on_device(func, args, kwargs or {})


def to_cuda(model: torch.nn.Module) -> torch.nn.Module:
    moved: dict[int, torch.Tensor] = {}  # tied weights stay one
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for name, x in owned.items():
                if x is not None and id(x) not in moved:
                    on_device = CudaTensor(x.detach())
                    moved[id(x)] = torch.nn.Parameter(on_device) if owned is module._parameters else on_device
                owned[name] = None if x is None else moved[id(x)]
    return model


@contextmanager
def device_guard():
    """Indexing and copying switch to the tensor's device, for which torch built without CUDA has nothing registered:
    the guard of meta tensors, which does nothing, takes its place. A build with CUDA has its own."""
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        yield
        return
    cuda_type, meta_type = 1, 14  # of c10::DeviceType
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    registry = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    registry[cuda_type] = registry[meta_type]
    try:
        yield
    finally:
        registry[cuda_type] = None


class _Properties:
    multi_processor_count = 4


@contextmanager
def emulated_device(monkeypatch):
    """A CUDA device within the block, graphs included. Yields the `Driver`. (`torch.inference_mode` does not know such
    tensors: have it be `torch.no_grad` before the package is imported.)"""
    import triton.runtime.interpreter as interpreter

    launch = interpreter.GridExecutor.__call__

    def run(self, *args, **options):
        given, graph = tensors_in((args, options)), driver.recording
        args, options = tree_map(unwrapped, (args, options))

        def kernel():
            with _disable_current_modes():
                launch(self, *args, **options)

        if graph is not None:
            with _disable_current_modes():
                for tensor in given:
                    graph.remember(tensor)
            graph.operations.append((kernel, (), {}, None))
        # What is recorded after it has to find indices that are some; the commit's table is filled later.
        if graph is None or self.fn.__name__ != "prefix_commit_kernel":
            kernel()

    replaced = {
        "torch.cuda._initialized": True,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_device_properties": lambda device=None: _Properties,
        "torch.cuda.mem_get_info": lambda device=None: (10**10, 2 * 10**10),
        "torch.cuda.memory_reserved": lambda device=None: 0,
        "torch.cuda.memory_stats": lambda device=None: {},
        "torch.cuda.memory_allocated": lambda device=None: 0,
        "torch.cuda.device_of": lambda tensor: nullcontext(),
        "torch.Tensor.pin_memory": lambda self: self,
    }
    with monkeypatch.context() as patch, emulated_cuda(monkeypatch, tensors_of_cpu=False) as driver, device_guard():
        for name, value in replaced.items():
            patch.setattr(name, value)
        patch.setattr(interpreter.GridExecutor, "__call__", run)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its numbers on the CPU first
        try:
            with _Device():
                yield driver
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
