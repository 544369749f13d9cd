"""Continuous batching: a finished row is replaced at once, prompts are run in chunks between decoding steps."""

from __future__ import annotations

import heapq
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..cpu.fast_blocks import fast_blocks
from ..cpu.modules import MOST_EXACT, WeightCopies, fast_linears
from ..decoding.attention import current_step
from ..decoding.compiled_decoder import as_written
from ..decoding.slots import round_up
from ..decoding.strategies import Strategy
from ..decoding.unsupported import UnsupportedError
from ..loading import context_length
from ..memory import SPARE_MEMORY, free_bytes, is_out_of_memory, release
from ..ops.dispatch import ELEMENT_TYPES
from ..ops.linear import most_rows
from .observe import StepRecord
from .prepare import apply_processors
from .sequence import IDLE, Sequence
from .slot_decoder import SlotDecoder
from .slot_trial import SlotTrial, rows_are_independent, slot_trial, verify

logger = logging.getLogger("simctg_fast")

DEFAULT_SLOTS = 16
CUDA_SLOTS = 64  # there, if memory allows
LOOKAHEAD = 4096  # sequences that are known, and put in order, before the first is begun
CHUNK = 512  # prompt tokens a forward
PREFILL_BUDGET = 2048  # prompt tokens between two steps
SHARED = 64  # tokens from which on a prefix in common is copied, and in multiples of which
KERNEL_ROWS = 1024  # rows up to which linear layers go to the kernel whose rows do not depend on each other
MAX_SLOTS = 256  # that are made of memory, or kept for fewer sequences
TRIAL_SLOTS = 64  # at most, however many there will be
TYPICAL_PROMPT = 1024  # tokens reckoned with where the number of slots is made from memory


class SlotScheduler:
    """Runs sequences over the slots of a :class:`SlotDecoder`.

    Sequences that may become longest go first, so that the last ones to run are short and the slots stay full to the
    end. When memory runs out the slots are halved and what was in work begins again.

    Attributes:
        most_slots: rows that there may be; slots: those there are, no more than requests where fewer change nothing.
        steps, row_steps, busy_row_steps: decoding steps, slots in them, and slots that wrote a token.
        generated: tokens written; active: sequences in work; halvings: how often memory ran out.
        shared_tokens: of prompts, that were copied from other slots.
        model_seconds: time inside forwards and the choice of tokens; seconds: of ``run`` as a whole.
    """

    kind = "slots"

    def __init__(self, model: Any, strategy: Strategy, slots: int, budget: int | None = None):
        self.model, self.strategy, self.budget = model, strategy, budget
        self.slots = self.most_slots = slots
        self.steps = self.row_steps = self.busy_row_steps = 0
        self.halvings = self.active = self.generated = self.shared_tokens = 0
        self.model_seconds = self.seconds = 0.0
        self.stopping = False
        self.shares_prefixes = True
        self.weights: WeightCopies | None = None  # what is read in their place, but in trials
        self.no_graph: str | None = None  # what is known to be in the way of one
        self._last_reason: str | None = None
        self.batches_prompts = model.device.type == "cuda" and not model.config.is_encoder_decoder
        self.on_step: Callable[[], None] | None = None
        self.independent_slots = 1  # up to so many, a row's bits do not depend on how many there are
        self.decoder: SlotDecoder | None = None
        self.bytes_per_position = self.bytes_per_slot = 0  # of one slot: what grows with its length, and the rest
        self.reserved: dict[int, Sequence] = {}  # slots that wait for a sibling's prompt

    # ---- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls, model: Any, strategy: Strategy, slots: int | None, memory: float | None, max_new_tokens: int
    ) -> SlotScheduler | str:
        """A scheduler for ``model``, or why it cannot have one. The model is tried: see `slot_trial`."""
        if model.training:
            return "the model is in training mode"
        budget = None
        on_cuda = model.device.type == "cuda"
        try:
            if slots is None and (memory is not None or on_cuda):
                measured = cls(model, strategy, 3)
                measured._try()
                free = free_bytes(model.device) or 0
                allowed = int((SPARE_MEMORY if memory is None else memory) * free)
                budget = None if memory is None else allowed
                positions = TYPICAL_PROMPT + max_new_tokens
                limit = context_length(model)
                positions = positions if limit is None else min(positions, limit)
                most = CUDA_SLOTS if memory is None else MAX_SLOTS
                slots = max(1, min(most, allowed // max(1, measured.bytes_per_position * positions)))
            scheduler = cls(model, strategy, slots or DEFAULT_SLOTS, budget)
            scheduler._try()
        except UnsupportedError as error:
            return str(error)
        return scheduler

    def _try(self) -> None:
        """Raise UnsupportedError where slots do not do what the model does; measure them."""
        self.slots = min(self.most_slots, TRIAL_SLOTS)
        with as_written(self.model):
            trial = slot_trial(self.model, self.slots, self.strategy.candidates, context_length(self.model))
        try:
            self._verify(trial)
        except UnsupportedError as error:
            if self.no_graph is not None:
                raise
            self.no_graph = f"its step over whole buffers does not serve: {error}"
            logger.info("%s is not captured as a CUDA graph: %s", type(self.model).__name__, error)
            self._verify(trial)
        self.slots = self.most_slots

    def _verify(self, trial: SlotTrial) -> None:
        with self._running() as decoder:
            self.no_graph = decoder.graph.reason
            verify(decoder, trial)
            self._measure(decoder)
            on_cpu = self.model.device.type == "cpu" and self.model.dtype in ELEMENT_TYPES
            if on_cpu and not decoder.static and self.slots > 1 and rows_are_independent(decoder):
                # As far as one kernel goes: with more rows another takes over.
                self.independent_slots = max(self.slots, KERNEL_ROWS // self.strategy.candidates)

    @contextmanager
    def _running(self, weights: WeightCopies | None = None) -> Iterator[SlotDecoder]:
        """The model's hooks and fast layers, for the length of a ``with`` block."""
        with (
            as_written(self.model),
            fast_linears(
                self.model,
                max_rows=max(KERNEL_ROWS, most_rows(self.model.dtype)),
                weights=weights,
                exact=max(MOST_EXACT, self.strategy.candidates),
            ),
            fast_blocks(self.model, current_step),
        ):
            try:
                self._reopen()
                yield self._decoder
            except BaseException as error:
                self._close(type(error))
                raise
            self._close()

    @property
    def not_captured(self) -> str | None:
        """Why steps are not replayed as a CUDA graph, or were not in the last run; None: nothing is in the way."""
        return self._last_reason if self.decoder is None else self.decoder.graph.reason

    @property
    def _decoder(self) -> SlotDecoder:
        assert self.decoder is not None
        return self.decoder

    # ---- the loop -------------------------------------------------------------------------------------------------

    def run(self, sequences: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yields every sequence when it is finished or has failed, and `IDLE` where the source did."""
        began = time.perf_counter()
        self.source, self.exhausted = iter(sequences), False
        self.waiting: list[tuple[int, int, list[Sequence]]] = []  # a heap: longest first, siblings together
        self.order = 0
        self.ended: list[Sequence] = []
        self._pull()
        self._fit_slots()
        self._empty_slots()
        with self._running(self.weights):
            while True:
                self._pull()
                out_of_memory = None
                try:
                    self._admit()
                    self._prefill()
                    self._step()
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    out_of_memory = str(error).splitlines()[0] if str(error) else type(error).__name__
                if out_of_memory is not None:  # not in the handler: the error holds on to what has to be freed
                    self._halve(out_of_memory)
                self.seconds += time.perf_counter() - began
                if self.on_step is not None:
                    self.on_step()
                ended, self.ended = self.ended, []
                yield from ended
                if self.idle:
                    yield IDLE
                began = time.perf_counter()
                if not self.active and (self.stopping or (self.exhausted and not self.waiting)):
                    return

    def _empty_slots(self) -> None:
        self.rows: list[Sequence | None] = [None] * self.slots  # sequences that are being decoded
        self.filling: deque[tuple[int, list[Sequence], int]] = deque()  # slot, siblings, positions that are there
        self.taken: set[int] = set()
        self.bound: list[Sequence | None] | None = None
        self.launched: StepRecord | None = None  # the step on its way
        self.active = 0

    def _pull(self) -> None:
        """Look ahead in the source, so that the longest can go first."""
        self.idle = False
        while not self.exhausted and not self.stopping and len(self.waiting) < LOOKAHEAD:
            sequence = next(self.source, None)
            if sequence is None:
                self.exhausted = True
                return
            if sequence is IDLE:
                self.idle = True
                return
            siblings = [sequence]
            while len(siblings) < sequence.parameters.n:
                siblings.append(next(self.source))
            self._wait(siblings)

    def _wait(self, siblings: list[Sequence]) -> None:
        first = siblings[0]
        work = first.parameters.max_new_tokens + (len(first.prompt_ids) + len(first.source_ids or ())) // 16
        heapq.heappush(self.waiting, (-work, self.order, siblings))
        self.order += 1

    def _admit(self) -> None:
        while not self.stopping and self.waiting and len(self.taken) < self.slots:
            siblings = self.waiting[0][2]
            needed = self._positions(siblings[0])
            if (reason := self._lacks_memory(1, needed)) is not None:  # fewer slots would not help it
                heapq.heappop(self.waiting)
                for sequence in siblings:
                    sequence.fail("out_of_memory", reason)
                self.ended += siblings
                continue
            self._make_room(needed)
            heapq.heappop(self.waiting)
            free = [slot for slot in range(self.slots) if slot not in self.taken]
            now, later = siblings[: len(free)], siblings[len(free) :]
            if later:
                self._wait(later)
            self.taken.update(free[: len(now)])
            for sequence in now:
                sequence.started = time.monotonic()
            # The prompt runs once, in the first of their slots.
            self.filling.append((free[0], now, 0))
            for slot, sequence in zip(free[1:], now[1:], strict=False):
                self.reserved[slot] = sequence
            self.active += len(now)

    def _positions(self, sequence: Sequence) -> int:
        """That a slot needs: one more than its text, and with a graph one for the step made before its end is seen."""
        return sequence.total_length + 1 + self._decoder.static

    def _make_room(self, needed: int) -> None:
        """Raise MemoryError where there is none for so many positions. With a graph, which would have to be captured
        again, the longest that waits is reckoned with at once."""
        slots = self._decoder.slots
        if needed <= slots.extent.capacity:
            return
        if self._decoder.static:
            longest = max(needed, *(self._positions(siblings[0]) for _, _, siblings in self.waiting))
            needed = needed if self._lacks_memory(self.slots, longest) else longest
        if (reason := self._lacks_memory(self.slots, needed)) is not None:
            raise MemoryError(reason)
        if self._decoder.static:
            slots.reserve(needed)

    def _prefill(self) -> None:
        decoder, budget = self._decoder, PREFILL_BUDGET
        while self.filling and budget > 0:
            slot, siblings, start = self.filling[0]
            first = siblings[0]
            began = time.perf_counter()
            decoder.slots.reserve(self._positions(first))
            if start == 0 and first.source_ids is not None:
                decoder.encode(first.source_ids)
                budget -= len(first.source_ids)
            elif start == 0 and self.shares_prefixes:
                start = self._copy_prefix(slot, first.prompt_ids)
            batch = self._fresh(budget) if start == 0 else []
            if len(batch) > 1:
                prompts = [siblings[0].prompt_ids for _, siblings in batch]
                decoder.prefill_batch([slot for slot, _ in batch], prompts)
                budget -= len(batch) * max(map(len, prompts))
            else:
                ids = first.prompt_ids[start : start + CHUNK]
                last = start + len(ids) == len(first.prompt_ids)
                decoder.prefill(slot, ids, start, last)
                budget -= len(ids)
                batch = [(slot, siblings)] if last else []
                self.filling[0] = (slot, siblings, start + len(ids))
            self.model_seconds += time.perf_counter() - began
            for slot, siblings in batch:
                self.filling.popleft()
                self._begin(slot, siblings)

    def _fresh(self, budget: int) -> list[tuple[int, list[Sequence]]]:
        """Whole prompts at the head of the queue that one forward may run, with their slots."""
        batch: list[tuple[int, list[Sequence]]] = []
        longest = 0
        for slot, siblings, start in self.filling if self.batches_prompts else ():
            length = len(siblings[0].prompt_ids)
            longest = max(longest, length)
            if start or length > CHUNK or (len(batch) + 1) * longest > budget:
                break
            if batch and self.shares_prefixes and self._donor(siblings[0].prompt_ids)[0]:
                break
            self._decoder.slots.reserve(self._positions(siblings[0]))
            batch.append((slot, siblings))
        return batch

    def _begin(self, slot: int, siblings: list[Sequence]) -> None:
        """The prompt is in ``slot``: its first sequence is decoded there, others in copies."""
        self.rows[slot] = siblings[0]
        for sequence in siblings[1:]:
            target = next(s for s, waiting in self.reserved.items() if waiting is sequence)
            del self.reserved[target]
            self._decoder.copy(slot, target)
            self.rows[target] = sequence

    def _donor(self, prompt: list[int]) -> tuple[int, int]:
        """How many positions of a prompt another slot holds, and which one."""
        shared, source = 0, 0
        for other, sequence in enumerate(self.rows):
            if sequence is not None and sequence.source_ids is None:
                length = common_prefix(prompt[:-1], sequence.prompt_ids)  # the last token's logits are wanted
                shared, source = max((shared, source), (length, other), key=lambda found: found[0])
        return shared, source

    def _copy_prefix(self, slot: int, prompt: list[int]) -> int:
        """Give ``slot`` what another one holds of its prompt, a system prompt say; returns how many positions."""
        shared, source = self._donor(prompt)
        if shared:
            self._decoder.copy(source, slot, shared)
            self.shared_tokens += shared
        return shared

    def _step(self) -> None:
        """One token for every row. Of a graph the next step is launched before the last one is read, unless a row has
        to see its tokens first."""
        decoder, step = self._decoder, self._decoder.step
        patient = any(row is not None and row.needs_each_step for row in self.rows)
        if patient:
            self._read()
        if not any(row is not None for row in self.rows):
            self.launched = None  # a surplus step
            return
        count = self._compact()
        logits = self._processed()
        self._bind()
        began = time.perf_counter()
        if decoder.static:
            logits = logits.clone() if patient else logits
            decoder.launch()
        else:
            proposal = decoder.propose(count)
            if self.strategy.looks_ahead:
                decoder.proceed(proposal)
        self.model_seconds += time.perf_counter() - began
        self.steps += 1
        self.row_steps += self.slots
        outcome = step.outcome
        assert outcome is not None
        overlaps = decoder.graph.recorded is not None and not patient
        record = StepRecord(list(self.rows), outcome.proposal, outcome.choice, outcome.decision, logits)
        before, self.launched = self.launched, record
        if before is not None:
            self._write(before)
        if not overlaps:
            self._read()
        if not decoder.static and not self.strategy.looks_ahead and any(row is not None for row in self.rows):
            began = time.perf_counter()
            self._bind()
            decoder.proceed(proposal)
            self.model_seconds += time.perf_counter() - began

    def _processed(self) -> torch.Tensor:
        """The logits, as the rows' processors leave them."""
        logits = self._decoder.logits
        for slot, sequence in enumerate(self.rows):
            if sequence is not None and sequence.processors:
                with torch.inference_mode():
                    logits[slot] = apply_processors(sequence, logits[slot : slot + 1])[0]
                if sequence.failure is not None:
                    self._release(slot)
        return logits

    def _bind(self) -> None:
        if self.rows != self.bound:
            self._decoder.bind(list(self.rows))
            self.bound = list(self.rows)

    def _read(self) -> None:
        """Wait for the step that was launched last."""
        launched, self.launched = self.launched, None
        if launched is not None:
            self._write(launched)

    def _write(self, record: StepRecord) -> None:
        began = time.perf_counter()
        record.wait()
        self.model_seconds += time.perf_counter() - began
        written = record.write(self.strategy)
        self.generated += written
        self.busy_row_steps += written
        for slot, sequence in enumerate(record.rows):
            if sequence is not None and sequence.finished and self.rows[slot] is sequence:
                self._release(slot)

    def _release(self, slot: int) -> None:
        """The slot's sequence has ended; it is handed out after the step, whatever becomes of the rest of it."""
        sequence = self.rows[slot]
        assert sequence is not None
        self.rows[slot] = None
        self.taken.discard(slot)
        self._decoder.clear(slot)
        self.active -= 1
        self.ended.append(sequence)

    def _compact(self) -> int:
        """Rows the next step computes. Where they do not depend on each other, those at the end are left out once there
        is nothing to fill them with; elsewhere the shape stays what it is."""
        if self.slots > self.independent_slots or not self.exhausted or self.waiting or self.filling:
            return self.slots
        used = [slot for slot, row in enumerate(self.rows) if row is not None]
        for target in range(len(used)):
            if self.rows[target] is None:
                source = used.pop()
                self._decoder.copy(source, target)
                self._decoder.clear(source)
                self.rows[target], self.rows[source] = self.rows[source], None
                self.taken.discard(source)
                self.taken.add(target)
        return max(1, sum(row is not None for row in self.rows))

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _measure(self, decoder: SlotDecoder) -> None:
        """Keys, values and the history's state of a position, the cross-attention's keys and values as well; logits and
        what a step makes of them, and of candidates' states, for a slot."""
        size = sum(
            buffer.shape[1] * buffer.shape[3] * buffer.element_size()
            for layer in decoder.slots.layers
            if layer.is_initialized
            for buffer in (layer.keys, layer.values)
        )
        size *= 2 if decoder.is_encoder_decoder else 1
        history = decoder.slots.history
        width = 0 if history.states is None else history.states.shape[2]
        self.bytes_per_position = size + history.bytes_per_position
        self.bytes_per_slot = 4 * (4 * decoder.logits.shape[1] + 16 * width * self.strategy.candidates)

    def _lacks_memory(self, slots: int, positions: int) -> str | None:
        """Why so many slots, each of so many positions, cannot be had; None if they can. (A CPU's memory is handed out
        on trust, and the system kills whom it then cannot serve.)"""
        positions = round_up(positions)
        wanted = slots * (self.bytes_per_position * positions + self.bytes_per_slot)
        if self.budget is not None and wanted > self.budget and slots > 1:
            return f"{slots} slots of {positions} positions are more than the memory they may take"
        if positions <= self._decoder.slots.extent.capacity and slots <= self.slots:
            return None
        free = free_bytes(self.model.device)
        held = self.bytes_per_position * self.slots * self._decoder.slots.extent.capacity
        if free is not None and wanted > held + SPARE_MEMORY * free:
            return f"{slots} slots of {positions} positions do not fit into the free memory ({free / 2**30:.1f} GiB)"
        return None

    def _fit_slots(self) -> None:
        """No more slots than sequences that are known: of very many always, and of others where these are all there
        will be, and the bits of a row do not depend on how many there are."""
        wanted = sum(len(siblings) for _, _, siblings in self.waiting)
        if not self.exhausted or self.most_slots > self.independent_slots:
            wanted = max(wanted, MAX_SLOTS)
        self.slots = max(1, min(self.most_slots, wanted))

    def _halve(self, reason: str) -> None:
        """Half the slots; everything in work begins again. With one slot left, its sequence fails."""
        failed: list[Sequence] = []
        if self.slots == 1:
            if self.filling:
                victim = self.filling.popleft()[1][0]
            elif self.rows[0] is not None:
                victim = self.rows[0]
            else:
                victim = heapq.heappop(self.waiting)[2].pop(0)
            victim.fail("out_of_memory", f"one slot alone does not fit into memory: {reason}")
            failed = [victim]
        before, self.slots = self.slots, max(1, self.slots // 2)
        self.most_slots = self.slots
        self.halvings += 1
        logger.warning("out of memory with %d slots (%s): going on with %d", before, reason, self.slots)
        groups = [siblings for _, siblings, _ in self.filling]
        placed = {id(sequence) for siblings in groups for sequence in siblings}
        groups += [[s] for s in (*self.rows, *self.reserved.values()) if s is not None and id(s) not in placed]
        for siblings in groups:
            kept = [s for s in siblings if s not in failed]
            for sequence in kept:
                sequence.restart()
            if kept:
                self._wait(kept)
        self._empty_slots()
        self.reserved.clear()
        self._reopen()
        self.ended += failed

    def _close(self, error: type[BaseException] | None = None) -> None:
        if self.decoder is not None:
            self._last_reason = self.decoder.graph.reason
            self.decoder.__exit__(error, None, None)
        self.decoder = None

    def _reopen(self) -> None:
        self._close()
        release()
        self.decoder = SlotDecoder(self.model, self.slots, self.strategy, no_graph=self.no_graph)
        self.decoder.__enter__()


def common_prefix(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with, in multiples of `SHARED`."""
    length = 0
    while length + SHARED <= len(one) and one[length : length + SHARED] == other[length : length + SHARED]:
        length += SHARED
    return length
