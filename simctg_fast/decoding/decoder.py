"""What decodes one call of ``generate``: opened by ``prefill``, then driven by ``step``."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig

from .caches import without_caches
from .hidden_states import HiddenStatesTap, last_position
from .inputs import has_rows, take_rows, with_own_states
from .packing import Packing, run_of
from .slots import Extent, History
from .step import Choose, StepResult, the_first, try_candidates
from .strategies import Choice, Proposal, Strategy, View
from .unsupported import UnsupportedError


class Decoder:
    """One call on one model.

    Args:
        head: whether winners are chosen before the output embedding.
        max_length: positions the sequences can reach, if that is known.
        record: ``output_hidden_states`` and ``output_attentions``, as wanted.

    Attributes:
        history: of hidden states, empty unless the strategy needs them.
        strategy: bound to the rows; starts: ``(B,)`` positions of padding in front of them, None: none.
        positions: of the text so far; no_text: ``(B, positions of the prompt)`` those that are padding, None: none.
    """

    name = ""
    strategy: Strategy
    starts: Tensor | None = None
    no_text: Tensor | None = None

    def __init__(
        self,
        model: Any,
        tap: HiddenStatesTap,
        *,
        head: bool,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        max_length: int | None,
        record: dict[str, bool],
    ):
        self.model, self.tap, self.head = model, tap, head
        self.generation_config = generation_config
        self.kwargs = dict(model_kwargs)
        self.expanded: dict[str, Any] = {}  # the same for candidates' rows, once there are any
        self.counts: list[int] = []  # rows of each sequence in what is expanded
        self.max_length = max_length
        self.record = {name: True for name, wanted in record.items() if wanted}
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Run the prompt. Returns the next token's logits ``(B, V)`` float32, the states of all positions
        ``(B, L, D)``, and the model's output.

        Raises:
            UnsupportedError: it cannot be run so.
        """
        self.history = self._new_history(len(input_ids))
        kwargs = with_own_states(self.kwargs) | self.record | self.tap.arguments
        if self.tap.arguments:
            self.generation_config.prefill_chunk_size = None  # the output of a chunk holds that chunk's states only
        self.tap.listen(last_position if self.head else None, all_positions=self.head)
        try:
            outputs = self.model._prefill(input_ids, self.generation_config, kwargs)
        finally:
            heard = self.tap.mute()
        parts = heard.head if self.head else self.tap.last_layer(outputs, heard)
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        positions = sum(shape[1] for shape in shapes if len(shape) == 3)
        chunked = self.generation_config.prefill_chunk_size is not None
        if positions < max(1, input_ids.shape[1]) or (len(parts) > 1 and not chunked):
            if self.head:
                raise UnsupportedError(f"of the prompt, {shapes or 'nothing'} reaches the output embedding", head=True)
            raise UnsupportedError(f"{type(self.model).__name__} has no hidden state for every position")
        states = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        self._after_prefill(outputs)
        return logits, states, outputs

    def _new_history(self, rows: int) -> History:
        return History(Extent(rows, rows, max_length=self.max_length))

    def _use(self, history: History) -> None:
        self.history = history

    def _after_prefill(self, outputs: Any) -> None:
        raise NotImplementedError

    def step(self, input_ids: Tensor, candidates: Tensor, choose: Choose, packing: Packing | None = None) -> StepResult:
        """Try ``candidates (B, k)`` after ``input_ids (B, L)``, or those of ``packing``, and keep the winners."""
        raise NotImplementedError

    def begin(self, strategy: Strategy, states: Tensor, mask: Tensor | None) -> None:
        """From here on ``strategy``, which is bound, chooses. ``states (B, L, D)`` are the prompt's; of these ``mask
        (B, L)`` says which are of real tokens, None: all."""
        self.strategy = strategy
        self.starts, self.positions = padding_in_front(mask), states.shape[1]
        self.no_text = None if mask is None or self.starts is None else mask == 0
        if strategy.needs_history:
            self._use(self.history.of_kind(strategy.centers))
            self.history.keeps_norms = strategy.needs_norms
            self.history.write(slice(0, len(states)), 0, states, mask)
        for row in range(len(states)):
            strategy.clear(row)

    def propose(self, input_ids: Tensor, logits: Tensor) -> Proposal:
        """Candidates of all rows, by the ``logits (B, V)`` after ``input_ids (B, L)``."""
        self.strategy.reserve(self.positions + 1)
        self.strategy.draw(len(logits))
        self.view = self._view(input_ids)
        return self.strategy.propose(logits, self.view)

    def decide(self, input_ids: Tensor, proposal: Proposal) -> tuple[StepResult, Choice | None]:
        """Step with what was just proposed. Returns also why the strategy chose, if it did so."""
        choice: Choice | None = None
        strategy, view = self.strategy, self.view
        proposal, packing = self._narrowed(proposal)

        def choose(states: Tensor) -> Tensor:
            nonlocal choice
            choice = strategy.choose(states, proposal, view)
            return choice.selected

        result = self.step(input_ids, proposal.tokens, choose if strategy.looks_ahead else the_first, packing)
        if strategy.needs_history:
            self.history.append(result.hidden_states)
        if view.tokens is not None:
            view.tokens[:, view.positions] = result.tokens
        strategy.advance(result.tokens, view)
        self.positions += 1
        return result, choice

    def _view(self, input_ids: Tensor) -> View:
        (rows, length), used, tokens = input_ids.shape, self.positions, None
        if self.strategy.needs_tokens:
            tokens = torch.nn.functional.pad(input_ids, (used - length, 1), value=-1)
            if self.no_text is not None:
                tokens[:, : self.no_text.shape[1]].masked_fill_(self.no_text, -1)
        return View(self.history, input_ids.new_full((rows,), used), tokens, self.starts, used)

    def _narrowed(self, proposal: Proposal) -> tuple[Proposal, Packing | None]:
        """What of it is to be run, if the model's arguments can be made to fit."""
        if not self.expanded or not self._can_take_rows():  # before the first step all of them are to be expanded
            return proposal, None
        narrow = proposal.narrowed()
        packing, (rows, k) = narrow.packing, narrow.tokens.shape
        counts = [k] * rows if packing is None else packing.counts
        if counts != self.counts:
            first = self._first_rows()
            self._take_rows([first[row] for row, count in enumerate(counts) for _ in range(count)])
            self.counts = counts
        return narrow, packing

    def _first_rows(self) -> list[int]:
        return [0, *itertools.accumulate(self.counts)][:-1]

    def _can_take_rows(self) -> bool:
        """Whether the model's arguments can be taken apart by candidates' rows."""
        rows = sum(self.counts)
        return all(has_rows(name, value, rows) for name, value in without_caches(self.expanded).items())

    def _take_rows(self, rows: list[int]) -> None:
        self.expanded |= {n: take_rows(value, rows, n) for n, value in without_caches(self.expanded).items()}

    def keep(self, kept: list[bool]) -> list[int]:
        """Go on without the rows that are not ``kept``, which cost nothing from here on, if the model's arguments can
        be taken apart. Returns, of the rows that there are then, the places they had."""
        places, every = places_kept(kept), list(range(len(kept)))
        if places == every or not self.expanded or not self._can_take_rows():
            return every
        first = self._first_rows()
        self._take_rows([first[row] + candidate for row in places for candidate in range(self.counts[row])])
        self.counts = [self.counts[row] for row in places]
        for target, source in enumerate(places):
            if source != target:
                self._copy(source, target)
                self.strategy.copy(source, target)
        self.starts = None if self.starts is None else self.starts[places]
        self.no_text = None if self.no_text is None else self.no_text[places]
        self._keep(places)
        return places

    def _copy(self, source: int, target: int) -> None:
        """Row ``target`` becomes what ``source`` is."""
        self.history.copy(source, target, self.history.length)

    def _keep(self, places: list[int]) -> None:
        """What rows at ``places`` were is in the first ones now; what else is to follow."""

    def result_cache(self, input_ids: Tensor, surplus: int) -> Cache | None:
        """A cache of all but the last token of ``input_ids``, as plain ``generate`` returns one; ``surplus`` steps were
        run beyond them."""
        return None

    def _advance(self, outputs: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return self.model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=self.is_encoder_decoder
        )

    def _next_inputs(self, candidates: Tensor, packing: Packing | None) -> dict[str, Any]:
        """Of a forward over ``candidates (B, k)`` behind what the cache holds, as the model makes them."""
        inputs = self.model.prepare_inputs_for_generation(
            run_of(candidates, packing)[:, None], next_sequence_length=1, is_first_iteration=False, **self.expanded
        )
        return inputs | self.record

    def _try(self, inputs: dict[str, Any], candidates: Tensor, choose: Choose, packing: Packing | None) -> StepResult:
        return try_candidates(self.model, self.tap, inputs, candidates, choose, self.head, packing)


def padding_in_front(mask: Tensor | None) -> Tensor | None:
    """Positions ``(B,)`` before each row's first token, by ``mask (B, L)``, zero at padding; None: there are none."""
    return None if mask is None or bool(mask.all()) else mask.int().argmax(dim=-1)


def places_kept(kept: list[bool]) -> list[int]:
    """For each of the first places, the one whose row it gets when those that are not ``kept`` leave: its own, or for a
    place that is free one from the end."""
    count = sum(kept)
    moved = [place for place in range(count, len(kept)) if kept[place]]
    return [place if kept[place] else moved.pop() for place in range(count)]
