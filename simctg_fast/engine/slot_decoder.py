"""Slots of the engine: every row has its own length, and can be replaced while the others go on.

One forward serves ``rows × k`` candidates at as many different positions. Attention reads each slot's own prefix; masks
are made from the model's own mask functions; position ids go in by the model's argument for them, or at its position
embedding; T5's relative bias, which the model makes for the longest row, is shifted for the others. None of this is
believed: :mod:`.slot_trial` compares it with transformers' own steps before anything is decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from ..cpu.forwards import suspended
from ..cpu.modules import at_most
from ..decoding.caches import CACHE_NAME, new_cache, other_layers
from ..decoding.hidden_states import HiddenStatesTap, last_position
from ..decoding.inputs import DirectInputs, stand_in_states
from ..decoding.padding_warning import no_padding_warning
from ..decoding.slots import CrossSlots, Slots, round_up
from ..decoding.step import Choose, Step
from ..decoding.truth import known_tokens
from ..decoding.unsupported import UnsupportedError
from ..ops.linear import MAX_ROWS


class SlotDecoder:
    """Slots over one model. A slot is filled by ``prefill``, and grows by one with each ``step``.

    Args:
        model: in evaluation mode.
        count: slots; candidates: tokens tried a step.
        history: keep hidden states for the degeneration penalty.

    Attributes:
        slots: the buffers, the logits ``(count, V)`` for the next token of each slot among them.

    Raises:
        UnsupportedError: this model cannot; also from every method.
    """

    def __init__(self, model: Any, count: int, candidates: int, history: bool):
        self.model, self.count, self.candidates, self.keeps_history = model, count, candidates, history
        self.device: torch.device = model.device
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if (odd := other_layers(cache)) or not cache.layers:
            raise UnsupportedError(f"its cache has layers that are not plain keys and values: {', '.join(odd)}")
        self.slots = Slots(count, len(cache.layers), self.device)
        self.slots.end_prompt(0)
        self.slots.cross = CrossSlots(count, self.device) if self.is_encoder_decoder else None
        self.tap = HiddenStatesTap(model)
        if not self.tap.has_head:
            raise UnsupportedError("it has no output embedding whose input could be read")
        self.forward = Step(model, self.tap, self.slots)
        self.inputs = DirectInputs(model)
        self.windows: dict[int, bool] = {}

    def __enter__(self) -> SlotDecoder:
        self.tap.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.tap.__exit__(*exc)

    @property
    def logits(self) -> torch.Tensor:
        assert self.slots.logits is not None
        return self.slots.logits

    # ---- one slot -------------------------------------------------------------------------------------------------

    @no_padding_warning()
    @torch.inference_mode()
    def prefill(self, slot: int, ids: list[int], start: int, last: bool) -> None:
        """Run ``ids``, which follow the ``start`` positions the slot holds already. ``last``: the prompt ends here, and
        the slot's logits are wanted."""
        slots, end, rows = self.slots, start + len(ids), slice(slot, slot + 1)
        slots.reserve(round_up(end + 1), exactly=True)
        tokens = torch.tensor([ids], device=self.device)
        cache, encoder_outputs = self._cache_of_prompt(), self.encoded if self.is_encoder_decoder else None
        inputs = self.inputs(tokens, torch.arange(start, end, device=self.device)[None], cache, encoder_outputs)
        slots.begin_prompt(rows, start)
        self.tap.listen(last_position, all_positions=True)
        try:
            # A prompt's forward has no other row in it: what `generate` computes it by serves, and is faster.
            with at_most(MAX_ROWS):
                outputs = self.model(**inputs, return_dict=True)
        finally:
            heard = self.tap.mute().head
            slots.end_prompt(end)
        if len(heard) != 1 or heard[0].shape[:2] != tokens.shape:
            shapes = [tuple(states.shape) for states in heard]
            raise UnsupportedError(f"of {len(ids)} tokens, {shapes or 'nothing'} reaches the output embedding")
        if slots.cross is not None and start == 0:
            slots.cross.fill(slot, cache.cross_attention_cache)
        if self.keeps_history:
            slots.history.write(rows, start, heard[0])
        if last:
            self._set_logits(slot, outputs.logits[0, -1])

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
        more than so many positions of the prefix."""
        self.slots.copy(source, target, length)

    @torch.inference_mode()
    def clear(self, slot: int) -> None:
        """The slot is free: rows of length 0 cost the least."""
        self.slots.set_length(slot, 0)

    def _set_logits(self, slot: int, logits: torch.Tensor) -> None:
        if self.slots.logits is None:
            if known_tokens(self.model, logits) is not None:
                raise UnsupportedError("its output embedding writes tokens that it cannot read")
            shape = (self.count, logits.shape[-1])
            self.slots.logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.slots.logits[slot] = logits.to(self.slots.logits)

    # ---- all slots ------------------------------------------------------------------------------------------------

    @no_padding_warning()
    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, choose: Choose, advance: list[bool]) -> None:
        """Try candidates ``tokens (rows, k)`` and keep each row's winner, as ``choose`` picks them.

        Args:
            tokens: for the first ``rows`` slots; those behind must be free.
            choose: called once, before the output embedding runs on the winners alone.
            advance: which of the rows grow; the others' tokens are there for the shape only.
        """
        (rows, k), slots = tokens.shape, self.slots
        slots.set_rows(rows)
        slots.reserve(round_up(slots.length + 1), exactly=True)
        lengths = slots.lengths[:rows]
        positions = lengths.clone()
        each = positions.repeat_interleave(k)
        cache: Any = slots.cache
        known: dict[str, Any] = {}
        encoder_outputs = None
        if slots.cross is not None:
            cross = slots.cross.as_cache(rows)
            known = {"cross": cross, "cross_lengths": slots.cross.lengths[:rows]}
            cache = EncoderDecoderCache(cache, cross)
            cache.is_updated = dict.fromkeys(range(len(slots.layers)), True)
            width = cross.layers[0].keys.shape[2]
            encoder_outputs = stand_in_states(self.encoded.last_hidden_state, rows * k, width)
        result = self.forward.run(
            self.inputs(tokens.reshape(-1, 1), each[:, None], cache, encoder_outputs),
            tokens,
            choose,
            commit=lambda winners: slots.commit(winners, lengths),
            around=lambda _: self.inputs.placed(each),
            lengths=lengths,
            windows=self.windows,
            **known,
        )
        slots.advance(advance)
        if self.keeps_history:
            slots.history.append(result.hidden_states, positions)
        # A new tensor: what was there before is still asked for by those who record the step.
        logits = result.logits.to(self.logits)
        slots.logits = logits if rows == self.count else torch.cat([logits, self.logits[rows:]])
        slots.set_rows(self.count)
