"""A step over static buffers as a CUDA graph, and the graphs that are kept for later calls.

A graph serves one model as it is, one number of rows and one capacity. What it reads and writes stays with it: slots,
the strategy's settings, the table of its commit. Where a model cannot be captured (several devices, tensor parallelism,
host decisions inside the model) the same step runs as it is.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cpu.forwards import has_own_forward
from ..memory import free_bytes
from ..ops import _backends
from ..ops.prefix_commit import CommitPlan
from .cuda_graph import CaptureError, record, rehearse
from .hidden_states import HiddenStatesTap
from .report import setting_of
from .slot_step import Outcome, SlotStep
from .slots import Slots

logger = logging.getLogger("simctg_fast")

_REHEARSALS = 2  # the host may wait in the first, for something that is made once
MIN_CAPTURED = 24  # tokens that have to follow for a graph to pay: opening one costs the host some eager steps
MOST_KEPT = 2  # graphs, with their buffers, between calls
SHARE_KEPT = 0.25  # of the free memory, at most


@dataclass
class Known:
    """What earlier calls have found out about a model: the kinds of calls whose step was reproduced, the sizes of steps
    that were rehearsed, why steps of a kind are not captured, and which masks are windows, by their local size."""

    reproduced: set[Any] = field(default_factory=set)
    rehearsed: set[Any] = field(default_factory=set)
    not_captured: dict[Any, str] = field(default_factory=dict)
    windows: dict[int, bool] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, Known]] = weakref.WeakKeyDictionary()


def known_of(model: torch.nn.Module) -> Known:
    """For the model's present attention and dtype."""
    return _known.setdefault(model, {}).setdefault(setting_of(model), Known())


def obstacle(model: torch.nn.Module, device: torch.device) -> str | None:
    """Why steps of this model are not captured, None if nothing is in the way."""
    if device.type != "cuda":
        return f"it is on {device}"
    devices = {str(parameter.device) for parameter in model.parameters()}
    placed = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1 or len(placed) > 1:
        return f"it is spread over {', '.join(sorted(devices | placed))}"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return f"it runs tensor-parallel over {model._tp_size} devices"
    return None if _backends.has_triton() else f"triton does not load: {_backends.triton_error()}"


@dataclass
class Recorded:
    """A graph, and what has to stay where it is for it."""

    graph: torch.cuda.CUDAGraph
    size: tuple[int, ...]
    slots: Slots
    tensors: dict[str, Tensor]  # of the step, by the names of its attributes
    settings: dict[str, Tensor]  # of the strategy
    outcome: Outcome | None
    held: tuple[Any, ...]
    weights: Any = None  # of the model when it was kept

    @property
    def bytes(self) -> int:
        layers = [x for layer in self.slots.layers if layer.is_initialized for x in (layer.keys, layer.values)]
        cross = [] if self.slots.cross is None else itertools.chain(*self.slots.cross.buffers)
        others = (self.slots.history.states, self.slots.logits)
        return sum(x.numel() * x.element_size() for x in (*layers, *cross, *others) if x is not None)


class Graph:
    """``step`` as one launch, as soon as it can be: a size that is new is rehearsed first, then recorded.

    Args:
        reason: why there is to be no graph, or None.
        max_length: positions that the rows can reach, if that is known.

    Attributes:
        reason: why there is none, or None.
    """

    _TENSORS = ("bad", "steps_needed", "ends", "pad")

    def __init__(self, step: SlotStep, reason: str | None, max_length: int | None = None):
        self.step, self.slots, self.reason = step, step.slots, reason
        self.model, self.max_length = step.forward.model, max_length
        self.known = known_of(self.model)
        self.recorded: Recorded | None = None
        self.rehearsals = 0
        if reason is None and self._tokens_left() < MIN_CAPTURED:
            self.reason = f"{self._tokens_left()} tokens are left, a graph pays from {MIN_CAPTURED} on"

    def _tokens_left(self) -> float:
        return math.inf if self.max_length is None else self.max_length - self.slots.length

    @property
    def size(self) -> tuple[int, ...]:
        cross = 0 if self.slots.cross is None else self.slots.cross.capacity
        return (self.slots.extent.rows, self.slots.extent.capacity, cross)

    def kind(self) -> tuple[Any, ...]:
        """Of the steps of a model, those that launch the same operations."""
        step, slots = self.step, self.slots
        parts = (slots.starts, step.ends, slots.tokens, slots.cross, slots.history.states, slots.history.mask)
        strategy = (type(step.strategy), step.strategy.key())
        return (slots.device, strategy, step.all_grow, step.compiled, *(part is None for part in parts))

    def __call__(self, grows: Sequence[bool]) -> None:
        """A step over whole buffers, of the first rows; ``grows``: which of them, as far as the host knows."""
        slots = self.slots
        if slots.length == slots.extent.capacity:
            slots.reserve(slots.length + 1)
            if self.step.compiled:
                self.step.let_capacity_vary()
            if self.reason is None and self._tokens_left() < MIN_CAPTURED:
                self.reason = "too few tokens are left to capture it again"
        self.step.strategy.reserve(slots.extent.capacity)
        self.step.strategy.draw(len(grows))
        with slots.extent.seen_whole(True):
            self._run()
        slots.advance_host(grows)

    def _run(self) -> None:
        if self.recorded is not None and self.recorded.size != self.size:  # buffers have moved
            self.recorded, self.rehearsals = None, 0
        if self.recorded is None and self.reason is None:
            self._rehearse_or_record()
        elif self.recorded is None:
            self.step()
        if self.recorded is not None:
            self.recorded.graph.replay()

    def _rehearse_or_record(self) -> None:
        """Make a step of a size that is new as a rehearsal, or record the next one. Nothing runs while it is recorded,
        so what fails leaves the buffers as they are, and the step is made without a graph."""
        kind = self.kind()
        if kind in self.known.not_captured:
            self.reason = self.known.not_captured[kind]
            self.step()
        elif (kind, self.size) in self.known.rehearsed:
            self._record(kind)
        else:
            waits = rehearse(self.step, self.slots.device)
            self.rehearsals += 1
            if waits is None:
                self.known.rehearsed.add((kind, self.size))
            elif self.rehearsals >= _REHEARSALS:
                self._do_not_capture(kind, f"its step makes the host wait for the device ({waits})")

    def _record(self, kind: tuple[Any, ...]) -> None:
        from simctg_fast.kernels._decode import own_counters

        # What outlives the recording is made before it: memory of the graph's own is written over at every replay.
        step, slots = self.step, self.slots
        plan = step.plan = CommitPlan(2 * len(slots.layers), slots.device)
        counters = torch.zeros(1 << 16, dtype=torch.int32, device=slots.device)
        graph = None
        try:
            with own_counters(counters):
                graph = record(step, slots.device)
            plan.finish()
        except CaptureError as error:
            self._do_not_capture(kind, f"its step cannot be captured ({error})")
        finally:
            step.plan = None
        if graph is None:
            step()
            return
        tensors = {name: getattr(step, name) for name in self._TENSORS}
        # The outcome's tensors are the graph's own, and nobody else's as long as they are held.
        held = (plan, counters)  # the table, and the tensors it points at
        self.recorded = Recorded(graph, self.size, slots, tensors, step.strategy.settings, step.outcome, held)

    def _do_not_capture(self, kind: tuple[Any, ...], reason: str) -> None:
        if "out of memory" not in reason:  # which is of this call alone
            self.known.not_captured[kind] = reason
        self.reason = reason
        logger.info("%s: %s", type(self.model).__name__, reason)

    # ---- from call to call ----------------------------------------------------------------------------------------

    def adopt(self, recorded: Recorded) -> None:
        """Go on with a graph of an earlier call, in whose slots this one's prompt has been run."""
        step = self.step
        for name, tensor in recorded.tensors.items():
            now = getattr(step, name)
            if tensor is not None and now is not None:
                tensor.copy_(now)
            setattr(step, name, tensor)
        step.outcome = recorded.outcome
        self.recorded = recorded

    def keep(self, key: Any) -> None:
        """The call is over: the graph, if there is one, is kept for the next of its ``key``, None: for no other."""
        if key is None or self.recorded is None or self.recorded.size != self.size or self.step.strategy.key() is None:
            return
        self.recorded.weights = state_of(self.model)
        with _lock:
            _kept.append((weakref.ref(self.model, _forget), key, self.recorded))
            most = SHARE_KEPT * (free_bytes(self.slots.device) or 0)
            while len(_kept) > MOST_KEPT or (_kept and sum(each.bytes for _, _, each in _kept) > most):
                _kept.pop(0)


_lock = threading.RLock()  # a collection may come in between
_kept: list[tuple[weakref.ref, Any, Recorded]] = []  # the last used comes last


def take(model: torch.nn.Module, key: Any) -> Recorded | None:
    """The graph that was kept for this model and ``key``, if the model is what it was; it is the caller's."""
    with _lock:
        for entry in _kept:
            if entry[0]() is model and entry[1] == key:
                _kept.remove(entry)
                return entry[2] if entry[2].weights == state_of(model) else None
    return None


def release() -> None:
    """Drop all graphs that are kept between calls, and their buffers."""
    with _lock:
        _kept.clear()


def _forget(gone: weakref.ref) -> None:
    with _lock:
        _kept[:] = [entry for entry in _kept if entry[0] is not gone]


def state_of(model: Any) -> tuple[Any, ...]:
    """What a recorded step depends on: where the weights lie, and what modules look at to decide what they do. Equal to
    nothing where somebody has put hooks or forwards of their own into the model, or into all modules."""
    if torch.nn.modules.module._has_any_global_hook():
        return (object(),)
    state: list[Any] = [setting_of(model)]
    for module in model.modules():
        hooks = itertools.chain(module._forward_pre_hooks.values(), module._forward_hooks.values())
        foreign = any(not isinstance(getattr(hook, "__self__", None), HiddenStatesTap) for hook in hooks)
        if foreign or not has_own_forward(module):
            return (object(),)
        tensors: Any = itertools.chain(module._parameters.values(), module._buffers.values())
        state.append([(x.data_ptr(), x.dtype, x.shape) for x in tensors if x is not None])
        state.append([(name, repr(x)) for name, x in vars(module).items() if _is_plain(x)])
    configs = (model.config, model.config.get_text_config(decoder=True))
    state += [[(name, repr(x)) for name, x in vars(config).items() if _is_plain(x)] for config in configs]
    return tuple(state)


def _is_plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(isinstance(name, str) and _is_plain(value) for name, value in x.items())
    return (
        x is None or isinstance(x, (bool, int, float, str)) or (isinstance(x, (list, tuple)) and all(map(_is_plain, x)))
    )
