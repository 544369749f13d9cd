"""Slots of the engine: every row has its own length, and can be replaced while the others go on.

One forward (:mod:`..decoding.slot_step`) serves ``rows × k`` candidates at as many different positions. Attention reads
each slot's own prefix; masks are made from the model's own mask functions; position ids go in by the model's argument
for them, or at its position embedding; T5's relative bias, which the model makes for the longest row, is shifted for
the others. None of this is believed: :mod:`.slot_trial` compares it with transformers' own steps before anything is
decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..cpu.forwards import suspended
from ..cpu.modules import at_most
from ..decoding.caches import CACHE_NAME, new_cache, other_layers
from ..decoding.graph import Graph, known_of, obstacle, take
from ..decoding.hidden_states import HiddenStatesTap, last_position
from ..decoding.padding_warning import no_padding_warning
from ..decoding.slot_step import SlotStep
from ..decoding.slots import CrossSlots, Slots
from ..decoding.step import Step
from ..decoding.strategies import Proposal, Row, Strategy
from ..decoding.truth import known_tokens
from ..decoding.unsupported import UnsupportedError
from ..ops.linear import most_rows


class SlotDecoder:
    """Slots over one model. A slot is filled by ``prefill``, and grows by one with each step while it is active.

    Args:
        model: in evaluation mode.
        count: slots.
        strategy: how tokens are chosen.
        no_graph: why steps are not to be replayed as a CUDA graph; None: they are, where that can be.

    Attributes:
        slots: the buffers, the logits ``(count, V)`` for the next token of each slot among them.
        graph: of the step.

    Raises:
        UnsupportedError: this model cannot; also from every method.
    """

    def __init__(self, model: Any, count: int, strategy: Strategy, *, no_graph: str | None = None):
        self.model, self.count, self.strategy = model, count, strategy
        self.device: torch.device = model.device
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if (odd := other_layers(cache)) or not cache.layers:
            raise UnsupportedError(f"its cache has layers that are not plain keys and values: {', '.join(odd)}")
        self.tap = HiddenStatesTap(model)
        if not self.tap.has_head:
            raise UnsupportedError("it has no output embedding whose input could be read")
        reason = no_graph or obstacle(model, self.device)
        if reason is None and strategy.asks_host:
            reason = f"{type(strategy).__name__} asks the host"
        self.static = reason is None  # steps see whole buffers
        self.key = ("engine", count, type(strategy), strategy.key())
        recorded = take(model, self.key) if reason is None else None
        if recorded is None:
            self.slots = Slots(count, len(cache.layers), self.device, blocks=True)
            self.slots.cross = CrossSlots(self.slots.extent, self.device) if self.is_encoder_decoder else None
            self.slots.end_prompt(0)
        else:
            self.slots = recorded.slots
            for slot in range(count):
                self.slots.set_length(slot, 0)
        self.slots.history = self.slots.history.of_kind(strategy.centers)
        self.slots.history.keeps_norms = strategy.needs_norms
        strategy.static, strategy.settings = self.static, {} if recorded is None else recorded.settings
        strategy.bind([None] * count, self.device)
        self.forward = Step(model, self.tap, self.slots)
        self.step = SlotStep(self.forward, strategy, known_of(model).windows)
        self.graph = Graph(self.step, reason)
        if recorded is not None:
            self.graph.adopt(recorded)

    def __enter__(self) -> SlotDecoder:
        self.tap.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.tap.__exit__(*exc)
        if exc[0] in (None, GeneratorExit):
            self.graph.keep(self.key)

    @property
    def logits(self) -> torch.Tensor:
        assert self.slots.logits is not None
        return self.slots.logits

    # ---- slots ----------------------------------------------------------------------------------------------------

    @no_padding_warning()
    @torch.inference_mode()
    def prefill(self, slot: int, ids: list[int], start: int, last: bool) -> None:
        """Run ``ids``, which follow the ``start`` positions the slot holds already. ``last``: the prompt ends here, and
        the slot's logits are wanted."""
        slots, end = self.slots, start + len(ids)
        slots.reserve(end + 1)
        cache, encoder_outputs = self._cache_of_prompt(), self.encoded if self.is_encoder_decoder else None
        tokens = torch.tensor([ids], device=self.device)
        states, logits = self._run([slot], tokens, start, cache, encoder_outputs, last_position)
        slots.end_prompt(end)
        if slots.cross is not None and start == 0:
            slots.cross.like = self.encoded.last_hidden_state[:1, :1]
            slots.cross.fill(slot, cache.cross_attention_cache)
        self._after_prompt([slot], tokens, [len(ids)], start, states, logits if last else None)

    @no_padding_warning()
    @torch.inference_mode()
    def prefill_batch(self, places: list[int], prompts: list[list[int]]) -> None:
        """Run whole prompts of slots that hold nothing, in one forward; padding on the right is not read."""
        lengths = [len(ids) for ids in prompts]
        width = max(lengths)
        self.slots.reserve(width + 1)
        tokens = torch.tensor([ids + ids[:1] * (width - len(ids)) for ids in prompts], device=self.device)
        index = torch.tensor(lengths, device=self.device)[:, None, None] - 1

        def ends(states: torch.Tensor) -> torch.Tensor:
            return states.gather(1, index.to(states.device).expand(-1, -1, states.shape[2]))

        states, logits = self._run(places, tokens, 0, self.slots.cache, None, ends)
        self.slots.end_prompt(lengths)
        self._after_prompt(places, tokens, lengths, 0, states, logits)

    def _run(
        self, places: list[int], tokens: torch.Tensor, start: int, cache: Any, encoder_outputs: Any, select: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States ``(n, T, D)`` and logits ``(n, V)`` of ``tokens (n, T)`` in these slots from ``start`` on."""
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).expand(len(tokens), -1)
        inputs = self.step.inputs(tokens, positions, cache, encoder_outputs)
        rows = slice(places[0], places[0] + 1) if len(places) == 1 else places
        self.slots.begin_prompt(rows, start)
        self.tap.listen(select, all_positions=True)
        try:
            # A prompt's forward has no other row in it: what `generate` computes it by serves, and is faster.
            with at_most(most_rows(self.model.dtype)):
                outputs = self.model(**inputs, return_dict=True)
        except BaseException:
            self.slots.end_prompt(start)
            raise
        finally:
            heard = self.tap.mute().head
        if len(heard) != 1 or heard[0].shape[:2] != tokens.shape:
            shapes = [tuple(states.shape) for states in heard]
            self.slots.end_prompt(start)
            raise UnsupportedError(f"of {tokens.shape[1]} tokens, {shapes or 'nothing'} reaches the output embedding")
        return heard[0], outputs.logits[:, -1]

    def _after_prompt(
        self,
        places: list[int],
        tokens: torch.Tensor,
        lengths: list[int],
        start: int,
        states: torch.Tensor,
        logits: torch.Tensor | None,
    ) -> None:
        """Keep what the strategy asks for; ``logits (n, V)``: of prompts that are whole, None: they are not."""
        slots, strategy = self.slots, self.strategy
        if strategy.needs_history:
            slots.history.write(places, start, states, lengths=lengths, whole=logits is not None)
        if strategy.needs_tokens:
            slots.keep_tokens(places, start, tokens)
        if logits is None:
            return
        if slots.logits is None and known_tokens(self.model, logits) is not None:
            raise UnsupportedError("its output embedding writes tokens that it cannot read")
        slots.keep_logits(places, logits)
        for slot in places:
            strategy.clear(slot)

    def _cache_of_prompt(self) -> Any:
        if not self.is_encoder_decoder:
            return self.slots.cache
        cache = new_cache(self.model, self.model.generation_config, 1, None)
        if not isinstance(cache, EncoderDecoderCache):
            raise UnsupportedError(f"it does not take a cache for encoder-decoders as {CACHE_NAME}")
        return EncoderDecoderCache(self.slots.cache, cache.cross_attention_cache)

    @torch.inference_mode()
    def encode(self, ids: list[int]) -> None:
        """Run the encoder for the slot that is prefilled next."""
        source = torch.tensor([ids], device=self.device)
        encoder = self.model.get_encoder()
        with suspended():  # so does `generate` run it
            self.encoded = encoder(input_ids=source, attention_mask=torch.ones_like(source), return_dict=True)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make slot ``target`` hold what ``source`` holds: its prefix, its history and its logits. With ``length``, no
        more than so many positions of the prefix, which a strategy that centers has no use for."""
        assert length is None or not self.strategy.centers
        self.slots.copy(source, target, length)
        if length is None:
            self.strategy.copy(source, target)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """The slot is free: rows of length 0 cost the least."""
        self.slots.set_length(slot, 0)

    # ---- steps ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def bind(self, rows: list[Row | None]) -> None:
        """Who is in the slots; None: nobody who writes tokens."""
        self.strategy.bind(rows, self.device)
        self.slots.set_active([row is not None for row in rows])

    @torch.inference_mode()
    def propose(self, count: int) -> Proposal:
        """Begin a step of the first ``count`` slots."""
        self.slots.set_rows(count)
        self.step.strategy.reserve(self.slots.extent.capacity)
        self.step.strategy.draw(count)
        return self.step.propose()

    @no_padding_warning()
    @torch.inference_mode()
    def proceed(self, proposal: Proposal) -> None:
        """Make the rest of it: the winners are put behind the texts of slots that are active."""
        slots = self.slots
        slots.reserve(slots.length + 1)
        with slots.extent.seen_whole(self.static):
            self.step.proceed(proposal)
        slots.advance_host(slots.host_active[: len(proposal.tokens)])
        slots.set_rows(self.count)

    @no_padding_warning()
    @torch.inference_mode()
    def launch(self) -> None:
        """A whole step of all slots, replayed if it can be."""
        self.slots.set_rows(self.count)
        self.graph(self.slots.host_active)
