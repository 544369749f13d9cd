"""One step of contrastive search over buffers that stay where they are: a CUDA graph, where that is possible.

A step reads and writes static buffers alone: logits, lengths, keys and values, hidden states, tokens, and who is
unfinished. The host decides nothing on the way, so the same launches serve every step, and on CUDA they are replayed as
one graph for each (slots, candidates, capacity). Elsewhere, and for models that cannot be captured (several devices,
tensor parallelism, host decisions inside the model), the same step runs eagerly. It is adopted from a
:class:`~.paths.SharedPrefixPath` that already serves the model, and has to reproduce one of its steps first. On request
the decoder runs compiled (:mod:`.compiled_decoder`), inside the CUDA graph or, elsewhere, without one.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.masking_utils import causal_mask_function

from ..ops import _backends
from ..ops.candidate_select import candidate_select
from ..ops.prefix_commit import CommitPlan, prefix_commit
from ..ops.top_k import top_k_probs
from .compiled_decoder import compiled_decoder, obstacle
from .cuda_graph import CaptureError, record, rehearse
from .hidden_states import HiddenStatesHistory, HiddenStatesTap
from .paths import SharedPrefixPath, StepResult
from .prefix_cache import CACHE_NAME, PrefixCacheLayer, next_capacity
from .shared_prefix import AttentionSwitch, SharedPrefixStep, SharedPrefixUnsupportedError
from .support import autocast_dtype, setting_of
from .truth import RELATIVE_ERROR

logger = logging.getLogger("simctg_fast")

# Logits processors that neither look at the ids so far nor ask the host: they go into the graph.
GRAPH_SAFE = (
    InfNanRemoveLogitsProcessor, LogitNormalization, SuppressTokensLogitsProcessor, TemperatureLogitsWarper,
)  # fmt: skip
_KNOWN_KWARGS = frozenset({CACHE_NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep"})
_KNOWN_CRITERIA = frozenset({MaxLengthCriteria.__name__, EosTokenCriteria.__name__})
_REHEARSALS = 2  # the host may wait in the first, for something that is made once
_ROUNDING = 4  # times what the winners' logits are off, candidates' states may be
MIN_CAPTURED = 24  # tokens that have to follow for a graph to pay: opening one costs the host some eager steps


class StaticStepUnsupportedError(Exception):
    """This call cannot be served by static buffers; the message says why."""


@dataclass
class _Known:
    """What earlier calls have found out about a model: the kinds of calls whose step was reproduced, the sizes of steps
    that were rehearsed, why steps of a kind are not captured, and which masks are windows, by their local size."""

    reproduced: set[Any] = field(default_factory=set)
    rehearsed: set[Any] = field(default_factory=set)
    not_captured: dict[Any, str] = field(default_factory=dict)
    windows: dict[int, bool] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


class _StaticLayer(PrefixCacheLayer):
    """The whole buffer of one layer; how much of a row counts is on the device."""

    def __init__(self, layer: PrefixCacheLayer):
        super().__init__()
        self.was_read = False
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        self.pending = (key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0


class _StaticStep(SharedPrefixStep):
    """Attention over rows whose lengths are on the device; masks are windows, or made from the model's own function."""

    def __init__(self, cache: Cache, k: int, lengths: torch.Tensor, starts: torch.Tensor | None, windows: dict):
        super().__init__(cache, None, k)
        self.lengths, self.starts = lengths, starts
        self.known_windows: dict[int, bool] = windows
        self.masks: list[tuple[torch.Tensor, int | None]] = []  # each with its window

    @property
    def capacity(self) -> int:
        return self.cache.layers[0].keys.shape[2]

    def make_mask(self, *args, **kwargs) -> torch.Tensor | None:
        function = kwargs.get("mask_function", causal_mask_function)
        if kwargs.get("attention_mask") is not None:
            raise SharedPrefixUnsupportedError("it makes an attention mask of its own")
        if function is causal_mask_function:
            return None
        device, size = self.lengths.device, kwargs.get("local_size")
        if size is not None:
            if size not in self.known_windows:
                self.known_windows[size] = _is_window(function, size, device)
            if self.known_windows[size]:
                mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
                self.masks.append((mask, size))
                return mask
        own = self.lengths[:, None, None, None]
        place = torch.arange(self.capacity + 1, device=device)[None, None, None]
        place = torch.where(place == self.capacity, own, place)  # the last column is the candidate itself
        rows = torch.arange(len(self.lengths), device=device)[:, None, None, None]
        offset = 0 if self.starts is None else self.starts[:, None, None, None]
        mask = function(rows, torch.zeros_like(rows), own - offset, place - offset)
        mask = mask.expand(len(self.lengths), 1, 1, self.capacity + 1).contiguous()
        self.masks.append((mask, None))
        return mask

    def _read(
        self,
        module: torch.nn.Module,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        has_own: bool,
    ) -> dict[str, Any]:
        if position_bias is not None:
            raise SharedPrefixUnsupportedError(f"{type(module).__name__} adds a position bias made for one length")
        mask = window = None
        if attention_mask is not None:
            known = False
            for made, size in self.masks:
                if made is attention_mask:
                    known, mask, window = True, made if size is None else None, size
            if not known:
                raise SharedPrefixUnsupportedError(f"{type(module).__name__} changes its attention mask")
        starts = None if self.starts is None else _on(key.device, self.starts)
        prefix = {"key": layer.keys, "value": layer.values, "length": self.capacity}
        return prefix | {"mask": mask, "window": window, "lengths": _on(key.device, self.lengths), "starts": starts}

    def _find(self, module, query, key, value):
        if not torch.compiler.is_dynamo_compiling():
            return super()._find(module, query, key, value)
        for layer in self.cache.layers:  # addresses are not known yet; an eager step has been checked by them
            if layer.pending is not None and layer.keys is key and layer.values is value:
                return layer, *layer.pending
        raise SharedPrefixUnsupportedError(f"{type(module).__name__} attends to keys other than its cache's")

    def _mark_read(self, layer: Any) -> None:
        layer.was_read = True

    def _was_read(self, layer: Any) -> bool:
        return layer.was_read


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.device == device else tensor.to(device)


def _is_window(function: Callable, size: int, device: torch.device) -> bool:
    """Whether a mask function lets a query see itself and the ``size − 1`` positions before it, wherever it stands."""
    zero = torch.zeros((), dtype=torch.long, device=device)
    for query in (size - 1, size, size + 1, 2 * size - 1, 2 * size + 3, 3 * size):
        place = torch.arange(query + 1, device=device)
        seen = function(zero, zero, zero + query, place).expand(query + 1)
        if not torch.equal(seen, place > query - size):
            return False
    return True


class DecodeStep:
    """Contrastive search (k = 1: greedy search) over static buffers, a token for every row with each call.

    Args:
        path: the open path whose cache is taken over; it must not be stepped any more.
        history: its hidden states, taken over as well; None for greedy search.
        input_ids: ``(B, L)`` so far. All rows grow together; what a row is padded with on the left is not read.
        starts: ``(B,)`` positions of left padding in the cache, or None.
        logits: ``(B, V)`` for the next token.
        k: candidates; penalty_alpha: weight of the penalty.
        processors: logits processors. Those in :data:`GRAPH_SAFE` become part of the step; if there are others, all
            run before it, outside the graph, on the ids so far.
        eos_token_id: ids ``(n,)`` that end a row, or None; pad_token_id: what follows them.
        max_length: positions the sequences can reach, if that is known.
        capture: use a CUDA graph where that is possible.
        compile_decoder: run the decoder through `torch.compile` where that is possible (:meth:`compile`).

    Attributes:
        unfinished: ``(B,)`` bool; bad: ``(B,)`` rows whose logits left no probabilities while they were unfinished.
        steps_needed: how many of the steps began with an unfinished row. logits: ``(B, V)`` float32.
        not_captured: why there is no CUDA graph, or None. not_compiled: why the decoder is not compiled, or None.
    """

    def __init__(
        self,
        path: SharedPrefixPath,
        history: HiddenStatesHistory | None,
        *,
        input_ids: torch.Tensor,
        logits: torch.Tensor,
        k: int,
        penalty_alpha: float,
        starts: torch.Tensor | None = None,
        processors: Sequence[Any] = (),
        eos_token_id: torch.Tensor | None = None,
        pad_token_id: torch.Tensor | int = 0,
        max_length: int | None = None,
        capture: bool = True,
        compile_decoder: bool = False,
    ):
        self.model, self.k, self.penalty_alpha, self.max_length = path.model, k, penalty_alpha, max_length
        self.tap: HiddenStatesTap = path.tap
        self.switch = AttentionSwitch(self.model)
        self.cache = Cache(layers=[_StaticLayer(layer) for layer in path.cache.layers])
        self.history = history
        self.batch, self.width = input_ids.shape
        device = self.device = input_ids.device
        self.length = path.cache.length  # of every row, on the host
        self.lengths = torch.full((self.batch,), self.length, dtype=torch.long, device=device)
        self.starts = starts
        self.logits = logits.to(torch.float32, copy=True)
        self.scores = torch.empty_like(self.logits)
        self.processors = LogitsProcessorList(processors)
        self.outside = any(type(processor) not in GRAPH_SAFE for processor in self.processors)
        self.first_rows = torch.arange(self.batch, device=device) * k
        self.column = torch.full((1, 1), self.width, dtype=torch.long, device=device)
        self.sequences = torch.nn.functional.pad(input_ids, (0, self.capacity - self.length + 2))
        self.eos = eos_token_id
        self.pad = torch.as_tensor(pad_token_id, dtype=torch.long, device=device).flatten()[:1]
        self.unfinished = torch.ones(self.batch, dtype=torch.bool, device=device)
        self.bad = torch.zeros(self.batch, dtype=torch.bool, device=device)
        self.steps_needed = torch.zeros((), dtype=torch.long, device=device)
        self.steps = 0
        self.known = _known.setdefault(self.model, {}).setdefault(setting_of(self.model), _Known())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.kept: tuple[Any, ...] = ()  # what the graph reads beside the buffers
        self.rehearsals = 0
        self.not_captured = _obstacle(self.model, device) if capture else "capture=False"
        if self.not_captured is None and self._tokens_left() < MIN_CAPTURED:
            self.not_captured = f"{self._tokens_left()} tokens are left, a graph pays from {MIN_CAPTURED} on"
        self.wants_graph = self.not_captured is None
        self.not_compiled = obstacle(self.tap.decoder) if compile_decoder else "compile_decoder=False"
        self.compiled = False
        self.plan: CommitPlan | None = None

    @property
    def capacity(self) -> int:
        return int(self.cache.layers[0].keys.shape[2])

    @property
    def input_ids(self) -> torch.Tensor:
        """``(B, L + steps)``, the prompt included."""
        return self.sequences[:, : self.width + self.steps]

    def begin(self, input_ids: torch.Tensor, unfinished: torch.Tensor) -> None:
        """The ids ``(B, L)`` to go on from, and which rows are unfinished ``(B,)``."""
        self.width, self.steps = input_ids.shape[1], 0
        self.sequences[:, : self.width] = input_ids
        self.column.fill_(self.width)
        self.unfinished.copy_(unfinished)

    # ---- a step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self) -> None:
        """One token for every row."""
        self._reserve()
        if self.outside:
            self.scores.copy_(self.processors(self.input_ids, self.logits))
        if self.graph is None and self.wants_graph:
            self._rehearse_or_capture()
        elif self.graph is None:
            self._run()
        if self.graph is not None:
            self.graph.replay()
        self.steps += 1
        self.length += 1

    @torch.no_grad()
    def reproduces(
        self, probs: torch.Tensor, candidates: torch.Tensor, result: StepResult, scores: torch.Tensor | None
    ) -> bool:
        """Run the path's last step, whose ``result`` is already in the cache, once more, keeping its winners. Returns
        whether their logits agree, and what would have been chosen has the best of the path's ``scores (B, k)``, up to
        what rounding makes of these (None: there is no choice)."""
        kept = None if self.history is None else self.history.states[:, self.length - 1].clone()
        self.lengths -= 1
        selected, logits = self._forward(probs, candidates, keep=_on(self.device, result.selected))
        self.lengths += 1
        if self.history is not None and kept is not None:
            self.history.states[:, self.length - 1] = kept
        expected = result.logits.to(logits)
        finite = torch.isfinite(expected) & torch.isfinite(logits)
        difference = torch.where(finite, logits - expected, 0.0).norm(dim=-1)
        error = difference / torch.where(finite, expected, 0.0).norm(dim=-1).clamp_min(1e-12)
        dtype = autocast_dtype(self.device) or result.hidden_states.dtype
        near = error <= RELATIVE_ERROR.get(dtype, 1e-1)
        near &= (torch.isfinite(logits) == torch.isfinite(expected)).all(-1)
        if scores is not None:
            regret = scores.amax(-1) - scores.gather(1, selected[:, None].to(scores.device))[:, 0]
            # Two cosines are compared, which move by about as much as states do, and these by as much as logits.
            allowed = 2 * self.penalty_alpha * _ROUNDING * (error + torch.finfo(dtype).eps)
            near &= (selected == _on(self.device, result.selected)) | (_on(self.device, regret) <= allowed)
        return bool(near.all())

    def compile(self) -> None:
        """Compile the decoder from now on. The same code serves other buffers, lengths and sizes: what a process has
        compiled for a model is compiled once."""
        if self.not_compiled is None:
            self.compiled = True
            self._let_capacity_vary()

    def _do_not_compile(self, reason: str) -> None:
        self.compiled, self.not_compiled = False, reason
        logger.info("%s: %s", type(self.model).__name__, reason)

    def _let_capacity_vary(self) -> None:
        """Tell the compiler that buffers come in all lengths, so that it does not learn it by compiling twice."""
        for layer in self.cache.layers:
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)

    def _run(self) -> None:
        scores = self.scores
        if not self.outside:
            scores = self.processors(self.sequences[:, : self.width], self.logits) if self.processors else self.logits
        probs, candidates = top_k_probs(scores, self.k)
        self.bad |= probs.isnan().any(dim=-1) & self.unfinished
        selected, logits = self._forward(probs, candidates)
        self.logits.copy_(logits)
        tokens = candidates.gather(1, selected[:, None])
        if self.eos is not None:
            tokens = torch.where(self.unfinished[:, None], tokens, self.pad)
        self.sequences.scatter_(1, self.column.expand(self.batch, 1), tokens)
        self.steps_needed += self.unfinished.any()
        if self.eos is not None:
            self.unfinished &= ~(tokens == self.eos).any(dim=-1)
        self.lengths += 1
        self.column += 1

    def _forward(
        self, probs: torch.Tensor, candidates: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Try the candidates, commit the winners, or those at the places ``keep (B,)``. Returns the winners' places
        ``(B,)`` and the logits ``(B, V)`` of those committed."""
        step = _StaticStep(self.cache, self.k, self.lengths, self.starts, self.known.windows)
        chosen: dict[str, torch.Tensor] = {}

        def select(hidden_states: torch.Tensor) -> torch.Tensor:
            last = hidden_states[:, -1].view(self.batch, self.k, -1)
            if self.history is None:
                chosen["selected"] = torch.zeros(self.batch, dtype=torch.long, device=last.device)
                return last[:, :1]
            chosen["selected"], winner, _, _ = candidate_select(
                last,
                _on(last.device, probs),
                self.history.states,
                _on(last.device, self.lengths),
                self.penalty_alpha,
                self.history.mask,
            )
            if keep is not None:
                rows = torch.arange(self.batch, device=last.device)
                winner = last[rows, _on(last.device, keep)]
            return winner[:, None]

        places = self.lengths if self.starts is None else self.lengths - self.starts
        self.tap.listen(select)
        try:
            outputs = self._call_model(
                step,
                input_ids=candidates.reshape(-1, 1),
                position_ids=places[:, None].expand(-1, self.k).reshape(-1, 1),
                use_cache=True,
                return_dict=True,
                **{CACHE_NAME: self.cache},
            )
            heard = self.tap.mute()
            if len(heard.head) != 1:
                raise SharedPrefixUnsupportedError(f"the output embedding ran {len(heard.head)} times in one forward")
            step.check_all_called()
            selected = _on(self.device, chosen["selected"])
            pairs = [
                pair
                for layer in self.cache.layers
                for pair in zip((layer.keys, layer.values), layer.pending, strict=True)
            ]
            commit = prefix_commit if self.plan is None else self.plan.run
            commit(pairs, self.lengths, self.first_rows + (selected if keep is None else keep))
        finally:
            self.tap.mute()
            for layer in self.cache.layers:
                layer.pending, layer.was_read = None, False
        return selected, _on(self.device, outputs.logits[:, -1].float())

    def _call_model(self, step: _StaticStep, **inputs: Any) -> Any:
        if self.compiled:
            assert self.tap.decoder is not None
            try:
                with self.switch(step), compiled_decoder(self.tap.decoder, step):
                    return self.model(**inputs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise all kinds; what is wrong with the model itself comes again
                reason = str(error).strip().partition("\n")[0]
                self._do_not_compile(f"its decoder cannot be compiled ({type(error).__name__}: {reason})")
        with self.switch(step):
            return self.model(**inputs)

    # ---- buffers --------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Room for one more position; where the buffers have to move, the graph is captured again."""
        if self.length < self.capacity:
            return
        capacity = next_capacity(self.length + 1, self.max_length)
        self.graph, self.kept, self.rehearsals = None, (), 0
        self.wants_graph &= self._tokens_left() >= MIN_CAPTURED
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, _longer(getattr(layer, name), capacity, 2))
        if self.history is not None:
            _lengthen(self.history, capacity)
        self.sequences = torch.nn.functional.pad(self.sequences, (0, capacity - self.length + 2))
        if self.compiled:
            self._let_capacity_vary()

    # ---- capture --------------------------------------------------------------------------------------------------

    def _tokens_left(self) -> float:
        return math.inf if self.max_length is None else self.max_length - self.length

    def _rehearse_or_capture(self) -> None:
        """Make a step of a size that is new as a rehearsal, or record the next one. Nothing runs while it is recorded,
        so what fails leaves the buffers as they are, and the step is made without a graph."""
        kind = self._kind()
        if kind in self.known.not_captured:
            self.wants_graph, self.not_captured = False, self.known.not_captured[kind]
            self._run()
            return
        size = (kind, self.batch, self.capacity)
        if size not in self.known.rehearsed:
            waits = rehearse(self._run, self.device)
            self.rehearsals += 1
            if waits is None:
                self.known.rehearsed.add(size)
            elif self.rehearsals >= _REHEARSALS:
                self._do_not_capture(f"its step makes the host wait for the device ({waits})")
            return
        from simctg_fast.kernels._decode import own_counters

        # What outlives the recording is made before it: memory of the graph's own is written over at every replay.
        self.plan = CommitPlan(2 * len(self.cache.layers), self.device)
        counters = torch.zeros(1 << 16, dtype=torch.int32, device=self.device)
        try:
            with own_counters(counters):
                self.graph = record(self._run, self.device)
            self.plan.finish()
            self.kept = (self.plan, counters)  # the table, and the tensors it points at
        except CaptureError as error:
            self._do_not_capture(f"its step cannot be captured ({error})")
        finally:
            self.plan = None
        if self.graph is None:
            self._run()

    def _kind(self) -> tuple[Any, ...]:
        """Of the steps of a model, those that launch the same operations."""
        absent = (part is None for part in (self.history, self.starts, self.eos))
        return (self.device, self.k, *absent, self.compiled, *map(type, self.processors))

    def _do_not_capture(self, reason: str) -> None:
        self.wants_graph, self.not_captured = False, reason
        if "out of memory" not in reason:  # which is of this call alone
            self.known.not_captured[self._kind()] = reason
        logger.info("%s: %s", type(self.model).__name__, reason)


def _longer(buffer: torch.Tensor, capacity: int, dim: int) -> torch.Tensor:
    if buffer.shape[dim] >= capacity:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown


def _lengthen(history: HiddenStatesHistory, capacity: int) -> None:
    history.states = _longer(history.states, capacity, 1)
    if history.mask is not None:  # everything after the prompt is real
        history.mask = torch.nn.functional.pad(history.mask, (0, capacity - history.mask.shape[1]), value=True)


def _obstacle(model: torch.nn.Module, device: torch.device) -> str | None:
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


# ---- for ContrastiveSearch ------------------------------------------------------------------------------------------


def open_decode_step(
    run, k: int, probs: torch.Tensor, candidates: torch.Tensor, result: StepResult, scores: torch.Tensor | None
) -> DecodeStep:
    """Take over a ``ContrastiveSearch`` run after one of its steps, whose ``scores (B, k)`` decided (None for k = 1).

    Raises:
        StaticStepUnsupportedError: the call or the model does not allow it.
    """
    path = run.opened
    odd = sorted({type(criterion).__name__ for criterion in run.criteria} - _KNOWN_CRITERIA)
    kwargs = getattr(path, "expanded", None) or {}
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _KNOWN_KWARGS)
    left = (
        math.inf if run.max_length is None or path.name != SharedPrefixPath.name else run.max_length - path.cache.length
    )
    for problem in (
        run.strategy.decode_step == "auto" and left < MIN_CAPTURED and f"{left} tokens are left",
        not isinstance(path, SharedPrefixPath) and f"it is decoded on path {path.name!r}",
        run.is_encoder_decoder and "encoder-decoders run step by step",
        not path.head and "its output embedding does not get the last hidden state",
        "position_ids" not in inspect.signature(run.model.forward).parameters and "it takes no position_ids",
        run.strategy.temperature is not None and "the choice is random",
        (run.config.return_dict_in_generate or run.callers_cache is not None) and "more than the tokens is wanted",
        run.synced_gpus and "synced_gpus is set",
        bool(odd) and f"stopping criteria look at the tokens: {', '.join(odd)}",
        bool(unknown) and f"the model is given {', '.join(unknown)}",
    ):
        if problem:
            raise StaticStepUnsupportedError(problem)
    mask = run.history.mask if run.history is not None else _left_padding(run)
    starts = None
    if mask is not None:
        used = mask[:, : path.cache.length].to(run.input_ids.device)
        starts = used.int().argmax(dim=-1)
        if not bool((used.sum(dim=-1) == path.cache.length - starts).all()):
            raise StaticStepUnsupportedError("attention_mask has gaps")
    eos = next((criterion.eos_token_id for criterion in run.criteria if isinstance(criterion, EosTokenCriteria)), None)
    # All buffers end at the same position, and what lies beyond the rows' ends is finite: it is multiplied by zero.
    capacity = max(path.cache.layers[0].keys.shape[2], 0 if run.history is None else run.history.states.shape[1])
    for layer in path.cache.layers:
        layer.keys, layer.values = (_longer(buffer, capacity, 2) for buffer in (layer.keys, layer.values))
        layer.keys[:, :, layer.length :] = 0
        layer.values[:, :, layer.length :] = 0
    if run.history is not None:
        _lengthen(run.history, capacity)
        run.history.states[:, run.history.length :] = 0
    step = DecodeStep(
        path,
        run.history,
        input_ids=run.input_ids,
        logits=result.logits.to(run.input_ids.device),
        k=k,
        penalty_alpha=run.penalty_alpha,
        starts=starts,
        processors=run.processors,
        eos_token_id=None if eos is None else eos.to(run.input_ids.device),
        pad_token_id=0 if run.config._pad_token_tensor is None else run.config._pad_token_tensor,
        max_length=run.max_length,
        compile_decoder=run.strategy.decode_step == "compiled",
    )
    reproduced = step.known.reproduced
    try:
        if run.kind not in reproduced and not step.reproduces(probs, candidates, result, scores):
            raise StaticStepUnsupportedError("its step over static buffers differs")
        step.compile()
        untried = step.compiled and (run.kind, "compiled") not in reproduced
        if untried and not step.reproduces(probs, candidates, result, scores) and step.compiled:
            step._do_not_compile("its step differs when it is compiled")
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, SharedPrefixUnsupportedError, TypeError, ValueError) as error:
        raise StaticStepUnsupportedError(
            f"a step over static buffers fails ({type(error).__name__}: {error})"
        ) from error
    if run.kind is not None:  # else the caller named a path, and nothing is remembered of such calls
        reproduced.update([run.kind, (run.kind, "compiled")] if step.compiled else [run.kind])
    for layer in path.cache.layers:  # the step owns the buffers now, and may move them
        layer.keys = layer.values = None
    return step


def _left_padding(run) -> torch.Tensor | None:
    mask = run._prompt_mask(run.model_kwargs)
    if mask is None or bool(mask.all()):
        return None
    return torch.nn.functional.pad(mask.bool(), (0, run.opened.cache.length - mask.shape[1]), value=True)
