"""One step of contrastive search over buffers that stay where they are: a CUDA graph, where that is possible.

A step reads and writes static buffers alone: logits, lengths, keys and values, hidden states, tokens, and who is
unfinished. The host decides nothing on the way, so the same launches serve every step, and on CUDA they are replayed as
one graph for each (slots, candidates, capacity). Elsewhere, and for models that cannot be captured (several devices,
tensor parallelism, host decisions inside the model), the same step runs eagerly. It goes on with the slots of a
:class:`~.slots_decoder.SlotsDecoder` that already serves the call, and has to reproduce one of its steps first. By wish
the decoder runs compiled (:mod:`.compiled_decoder`), inside the CUDA graph or, elsewhere, without one.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..ops import _backends
from ..ops.candidate_select import candidate_select
from ..ops.prefix_commit import CommitPlan, prefix_commit
from ..ops.top_k import top_k_probs
from .caches import CACHE_NAME
from .compiled_decoder import compiled_decoder, obstacle
from .cuda_graph import CaptureError, record, rehearse
from .inputs import DirectInputs
from .report import autocast_dtype, setting_of
from .slots import Slots, on
from .slots_decoder import SlotsDecoder
from .step import Choose, StepResult, the_first
from .truth import RELATIVE_ERROR
from .unsupported import UnsupportedError

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


@dataclass
class _Known:
    """What earlier calls have found out about a model: the kinds of calls whose step was reproduced, the sizes of steps
    that were rehearsed, why steps of a kind are not captured, and which masks are windows, by their local size."""

    reproduced: set[Any] = field(default_factory=set)
    rehearsed: set[Any] = field(default_factory=set)
    not_captured: dict[Any, str] = field(default_factory=dict)
    windows: dict[int, bool] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


class DecodeStep:
    """Contrastive search (k = 1: greedy search) over static buffers, a token for every row with each call.

    Args:
        decoder: whose slots are taken over; it must not be stepped any more.
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
        decoder: SlotsDecoder,
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
        self.decoder, self.slots, self.tap = decoder, decoder.slots, decoder.tap
        self.model, self.k, self.penalty_alpha, self.max_length = decoder.model, k, penalty_alpha, max_length
        self.inputs = DirectInputs(self.model)
        self.history = self.slots.history if k > 1 else None
        self.batch, self.width = input_ids.shape
        device = self.device = input_ids.device
        self.starts = starts
        self.logits = logits.to(torch.float32, copy=True)
        self.scores = torch.empty_like(self.logits)
        self.processors = LogitsProcessorList(processors)
        self.outside = any(type(processor) not in GRAPH_SAFE for processor in self.processors)
        self.column = torch.full((1, 1), self.width, dtype=torch.long, device=device)
        self.sequences = torch.nn.functional.pad(input_ids, (0, self.capacity - self.slots.length + 2))
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
        return self.slots.extent.capacity

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
        self.slots.advance_host()

    @torch.no_grad()
    def reproduces(
        self, probs: torch.Tensor, candidates: torch.Tensor, result: StepResult, scores: torch.Tensor | None
    ) -> bool:
        """Run the decoder's last step, whose ``result`` is in the slots, again, keeping its winners. Returns whether
        their logits agree, and what would have been chosen has the best of the decoder's ``scores (B, k)``, up to what
        rounding makes of these (None: there is no choice)."""
        last = self.slots.length - 1
        states = None if self.history is None else self.history.states
        kept = None if states is None else states[:, last].clone()
        self.slots.lengths -= 1
        selected, logits = self._forward(probs, candidates, keep=on(self.device, result.selected))
        self.slots.lengths += 1
        if states is not None and kept is not None:
            states[:, last] = kept
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
            near &= (selected == on(self.device, result.selected)) | (on(self.device, regret) <= allowed)
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
        for layer in self.slots.layers:
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
        self.slots.lengths += 1
        self.column += 1

    def _forward(
        self, probs: torch.Tensor, candidates: torch.Tensor, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Try the candidates, commit the winners, or those at the places ``keep (B,)``. Returns the winners' places
        ``(B,)`` and the logits ``(B, V)`` of those committed."""
        chosen: dict[str, torch.Tensor] = {}

        def choose(states: torch.Tensor) -> torch.Tensor:
            if self.history is None:
                chosen["selected"] = the_first(states)
            else:
                assert self.history.states is not None
                chosen["selected"] = candidate_select(
                    states,
                    on(states.device, probs),
                    self.history.states,
                    on(states.device, self.slots.lengths),
                    self.penalty_alpha,
                    self.history.mask,
                )[0]
            return chosen["selected"] if keep is None else keep

        result = self._try(candidates, choose)
        return on(self.device, chosen["selected"]), on(self.device, result.logits)

    def _try(self, candidates: torch.Tensor, choose: Choose) -> StepResult:
        lengths, commit = self.slots.lengths, prefix_commit if self.plan is None else self.plan.run
        places = lengths if self.starts is None else lengths - self.starts
        positions = places[:, None].expand(-1, self.k).reshape(-1, 1)
        assert self.decoder.forward is not None
        run = partial(
            self.decoder.forward.run,
            self.inputs(candidates.reshape(-1, 1), positions, self.slots.cache),
            candidates,
            choose,
            commit=lambda rows: self.slots.commit(on(self.device, rows), lengths, commit),
            lengths=lengths,
            starts=self.starts,
            windows=self.known.windows,
        )
        self.slots.extent.static = True
        try:
            if self.compiled:
                assert self.tap.decoder is not None
                try:
                    return run(around=partial(compiled_decoder, self.tap.decoder))
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # compilers raise all kinds; what is wrong with the model comes again
                    reason = str(error).strip().partition("\n")[0]
                    self._do_not_compile(f"its decoder cannot be compiled ({type(error).__name__}: {reason})")
            return run()
        finally:
            self.slots.extent.static = False

    # ---- buffers --------------------------------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Room for one more position; where the buffers have to move, the graph is captured again."""
        if self.slots.length < self.capacity:
            return
        self.graph, self.kept, self.rehearsals = None, (), 0
        self.wants_graph &= self._tokens_left() >= MIN_CAPTURED
        self.slots.reserve(self.slots.length + 1)
        self.sequences = torch.nn.functional.pad(self.sequences, (0, self.capacity - self.slots.length + 2))
        if self.compiled:
            self._let_capacity_vary()

    # ---- capture --------------------------------------------------------------------------------------------------

    def _tokens_left(self) -> float:
        return math.inf if self.max_length is None else self.max_length - self.slots.length

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
        self.plan = CommitPlan(2 * len(self.slots.layers), self.device)
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


def open_decode_step(run, probs: torch.Tensor, candidates: torch.Tensor, result: StepResult) -> DecodeStep:
    """Take over a `generate_loop.Run` after one of its steps.

    Raises:
        UnsupportedError: the call or the model does not allow it.
    """
    decoder = run.decoder
    odd = sorted({type(criterion).__name__ for criterion in run.criteria} - _KNOWN_CRITERIA)
    unknown = sorted(
        name for name, value in decoder.expanded.items() if value is not None and name not in _KNOWN_KWARGS
    )
    left = (
        math.inf
        if run.max_length is None or not isinstance(decoder, SlotsDecoder)
        else run.max_length - decoder.slots.length
    )
    for problem in (
        run.strategy.decode_step == "auto" and left < MIN_CAPTURED and f"{left} tokens are left",
        not isinstance(decoder, SlotsDecoder) and f"it is decoded on path {decoder.name!r}",
        run.is_encoder_decoder and "encoder-decoders run step by step",
        not decoder.head and "its output embedding does not get the last hidden state",
        DirectInputs(run.model).position_argument is None and "it takes no position_ids",
        run.strategy.temperature is not None and "the choice is random",
        (run.record.wanted or run.arguments.callers_cache is not None) and "more than the tokens is wanted",
        run.synced_gpus and "synced_gpus is set",
        bool(odd) and f"stopping criteria look at the tokens: {', '.join(odd)}",
        bool(unknown) and f"the model is given {', '.join(unknown)}",
    ):
        if problem:
            raise UnsupportedError(problem)
    slots, device = decoder.slots, run.input_ids.device
    mask, starts = _padding(run, slots), None
    if mask is not None:
        used = mask[:, : slots.length].to(device)
        starts = used.int().argmax(dim=-1)
        if not bool((used.sum(dim=-1) == slots.length - starts).all()):
            raise UnsupportedError("attention_mask has gaps")
    eos = next((criterion.eos_token_id for criterion in run.criteria if isinstance(criterion, EosTokenCriteria)), None)
    slots.reserve(slots.length + 1)
    slots.grow()
    step = DecodeStep(
        decoder,
        input_ids=run.input_ids,
        logits=result.logits.to(device),
        k=run.k,
        penalty_alpha=run.penalty_alpha,
        starts=starts,
        processors=run.processors,
        eos_token_id=None if eos is None else eos.to(device),
        pad_token_id=0 if run.config._pad_token_tensor is None else run.config._pad_token_tensor,
        max_length=run.max_length,
        compile_decoder=run.strategy.decode_step == "compiled",
    )
    scores = None if run.choice is None else run.choice.ranked
    kind, reproduced = run.routes.kind, step.known.reproduced
    try:
        if kind not in reproduced and not step.reproduces(probs, candidates, result, scores):
            raise UnsupportedError("its step over static buffers differs")
        step.compile()
        untried = step.compiled and (kind, "compiled") not in reproduced
        if untried and not step.reproduces(probs, candidates, result, scores) and step.compiled:
            step._do_not_compile("its step differs when it is compiled")
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedError(f"a step over static buffers fails ({type(error).__name__}: {error})") from error
    if kind is not None:  # else the caller named a path, and nothing is remembered of such calls
        reproduced.update([kind, (kind, "compiled")] if step.compiled else [kind])
    return step


def _padding(run, slots: Slots) -> torch.Tensor | None:
    """Which positions of the slots are real; None if all are."""
    if slots.history.states is not None:
        return slots.history.mask
    mask = run.arguments.prompt_mask
    if mask is None or bool(mask.all()):
        return None
    return torch.nn.functional.pad(mask.bool(), (0, slots.length - mask.shape[1]), value=True)
