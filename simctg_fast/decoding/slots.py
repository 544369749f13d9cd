"""Decoding with slots: every row has its own length, and can be replaced while the others go on.

One forward serves ``rows × k`` candidates at as many different positions. Attention reads each slot's own prefix
(:mod:`.slot_cache`); masks are made from the model's own mask functions, position by position; position ids go in by
the model's argument for them, or at its position embedding; T5's relative bias, which the model makes for the longest
row, is shifted for the others. None of this is believed: :meth:`SlotDecoder.verify` compares rows of different lengths
with transformers' own steps for each of them alone before anything is decoded.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.masking_utils import causal_mask_function
from transformers.modeling_outputs import BaseModelOutput

from .call import own_cache
from .hidden_states import HiddenStatesTap, last_position
from .linear_swap import give_forward_back, take_forward
from .own_step import (
    MOST_NOISE,
    OwnText,
    allowed_for_noise,
    draw_tokens,
    error_of,
    moved_by_noise,
    own_text,
    wrong_head,
)
from .padding_warning import no_padding_warning
from .paths import FAILURES, KEY_VALUE_LAYERS
from .prefix_cache import CACHE_NAME
from .shared_prefix import AttentionSwitch, SharedPrefixStep, SharedPrefixUnsupportedError
from .slot_cache import CrossSlots, SlotCache, SlotHistory
from .trial import FILLINGS
from .truth import RELATIVE_ERROR, known_tokens

Choose = Callable[[torch.Tensor], torch.Tensor]  # candidates' states (rows, k, D) -> index of the winner (rows,)

_TRIAL_LENGTHS = (3, 17, 60)


class SlotsUnsupportedError(Exception):
    """Rows of different lengths do not work on this model; the message says why."""


class _SlotsDifferError(SlotsUnsupportedError):
    def __init__(self, what: str, error: float, allowed: float):
        super().__init__(
            f"{what} of rows of different lengths differ from those of transformers' own step by {error:.2g} (allowed "
            f"{allowed:.2g})"
        )
        self.error = error


class SlotStep(SharedPrefixStep):
    """What the attention function must know during one forward over slots of different lengths."""

    def __init__(self, cache: SlotCache, cross: DynamicCache | None, cross_lengths: torch.Tensor | None, k: int):
        super().__init__(cache, cross, k)
        self.lengths = cache.lengths[: cache.rows]
        self.width = cache.length
        self.cross_lengths = cross_lengths
        self.masks: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # id(mask) -> itself, first positions
        self.biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id(model's bias) -> itself, each row's own

    def make_mask(self, *args, **kwargs) -> torch.Tensor | None:
        """None where a row sees all of its own positions; else ``(rows, 1, 1, width + 1)``, the last for the new."""
        padding = kwargs.get("attention_mask")  # BART and its kin make one of ones
        if padding is not None and not bool(padding.all()):
            raise SharedPrefixUnsupportedError("it makes an attention mask of its own")
        function = kwargs.get("mask_function", causal_mask_function)
        if function is causal_mask_function or kwargs.get("q_length") != 1:
            return None
        if kwargs.get("allow_is_bidirectional_skip") or self.width == 0:
            return None
        device = self.lengths.device
        own = self.lengths[:, None, None, None]
        positions = torch.arange(self.width + 1, device=device)[None, None, None]
        # The last column is the candidate's own key, which stands at its row's length.
        places = torch.where(positions == self.width, own, positions.clamp(max=max(0, self.width - 1)))
        rows = torch.arange(len(self.lengths), device=device)[:, None, None, None]
        mask = function(rows, torch.zeros_like(rows), own, places)
        mask = mask.expand(len(self.lengths), 1, 1, self.width + 1) & ((positions < own) | (positions == self.width))
        seen = mask[:, 0, 0, :-1]
        starts = torch.where(seen.any(dim=-1), seen.int().argmax(dim=-1), self.lengths)
        # One stretch up to the row's end, and the candidate itself: a first position says it all.
        is_window = bool(((self.lengths - starts) == seen.sum(dim=-1)).all() & mask[..., -1].all())
        self.masks[id(mask)] = (mask, starts if is_window else None)
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
        shared = key.shape[2] - has_own
        starts = None
        if attention_mask is not None and (known := self.masks.get(id(attention_mask))) is not None:
            starts = known[1]
            attention_mask = attention_mask if starts is None else None
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise SharedPrefixUnsupportedError("it adds a mask of its own to the scores")
        bias = self._shifted(position_bias) if position_bias is not None and has_own else position_bias
        lengths = self.lengths if has_own else self.cross_lengths
        prefix = {"key": key[:, :, :shared], "value": value[:, :, :shared], "length": shared}
        rows = {"lengths": self._on(key.device, lengths), "starts": self._on(key.device, starts)}
        return prefix | rows | {"mask": attention_mask, "bias": bias}

    @staticmethod
    def _on(device: torch.device, lengths: torch.Tensor | None) -> torch.Tensor | None:
        return lengths if lengths is None or lengths.device == device else lengths.to(device)

    def _shifted(self, bias: torch.Tensor) -> torch.Tensor:
        """The model's bias ``(1, H, 1, width + 1)`` is that of a query at ``width``. A query at its row's length sees a
        position at the same distance as that one sees the position further back by the difference."""
        known = self.biases.get(id(bias))
        if known is not None:
            return known[1]
        if bias.ndim != 4 or bias.shape[0] != 1 or bias.shape[2] != 1 or bias.shape[3] != self.width + 1:
            raise SharedPrefixUnsupportedError(f"position bias of shape {tuple(bias.shape)}")
        positions = torch.arange(self.width + 1, device=bias.device)
        lengths = self.lengths.to(bias.device)
        index = (positions + (self.width - lengths[:, None])).clamp_(max=self.width)
        shifted = bias[0, :, 0][:, index].transpose(0, 1)[:, :, None].contiguous()  # (rows, H, 1, width + 1)
        self.biases[id(bias)] = (bias, shifted)
        return shifted


class SlotDecoder:
    """Slots over one model. A slot is filled by ``prefill``, and grows by one with each ``step``.

    Args:
        model: in evaluation mode.
        slots: rows; candidates: tokens tried a step.
        history: keep hidden states for the degeneration penalty.

    Attributes:
        logits: ``(slots, V)`` float32, for the next token of each slot.

    Raises:
        SlotsUnsupportedError: this model cannot; also from every method.
    """

    def __init__(self, model: Any, slots: int, candidates: int, history: bool):
        self.model, self.slots, self.candidates = model, slots, candidates
        self.device: torch.device = model.device
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        text_config = model.config.get_text_config(decoder=True)
        layers = DynamicCache(config=text_config).layers
        odd = sorted({type(layer).__name__ for layer in layers} - KEY_VALUE_LAYERS)
        if odd or not layers:
            raise SlotsUnsupportedError(f"its cache has layers that are not plain keys and values: {', '.join(odd)}")
        self.cache = SlotCache(slots, len(layers), self.device)
        self.cross = CrossSlots(slots, len(layers), self.device) if self.is_encoder_decoder else None
        self.history = SlotHistory(self.cache) if history else None
        self.switch = AttentionSwitch(model)
        self.tap = HiddenStatesTap(model)
        if not self.tap.has_head:
            raise SlotsUnsupportedError("it has no output embedding whose input could be read")
        parameters = inspect.signature(model.forward).parameters
        self.position_argument = next((n for n in ("decoder_position_ids", "position_ids") if n in parameters), None)
        self.position_modules = [] if self.position_argument else _position_modules(model)
        self.logits: torch.Tensor | None = None
        self.last_step: SlotStep | None = None

    def __enter__(self) -> SlotDecoder:
        self.tap.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.tap.__exit__(*exc)
        self.cache.layers.clear()  # they know their cache: buffers must not wait for the cycle collector

    # ---- one slot -------------------------------------------------------------------------------------------------

    @no_padding_warning()
    @torch.inference_mode()
    def prefill(self, slot: int, ids: list[int], start: int, last: bool) -> None:
        """Run ``ids``, which follow the ``start`` positions the slot holds already. ``last``: the prompt ends here, and
        the slot's logits are wanted."""
        self.cache.set_length(slot, start)
        self.cache.reserve(start + len(ids) + 1)
        tokens = torch.tensor([ids], device=self.device)
        inputs: dict[str, Any] = {CACHE_NAME: self._slot_cache(), "use_cache": True, "return_dict": True}
        if self.is_encoder_decoder:
            inputs |= {"decoder_input_ids": tokens, "encoder_outputs": self.encoded}
        else:
            inputs["input_ids"] = tokens
        if self.position_argument is not None:
            inputs[self.position_argument] = torch.arange(start, start + len(ids), device=self.device)[None]
        self.cache.slot = slot
        self.tap.listen(last_position, all_positions=True)
        try:
            outputs = self.model(**inputs)
        except SharedPrefixUnsupportedError as error:
            raise SlotsUnsupportedError(str(error)) from error
        finally:
            heard = self.tap.mute().head
            self.cache.slot = None
        if len(heard) != 1 or heard[0].shape[:2] != tokens.shape:
            shapes = [tuple(states.shape) for states in heard]
            raise SlotsUnsupportedError(f"of {len(ids)} tokens, {shapes or 'nothing'} reaches the output embedding")
        if self.cross is not None and start == 0:
            self.cross.fill(slot, inputs[CACHE_NAME].cross_attention_cache)
        if self.history is not None:
            self.history.write(slot, start, heard[0][0])
        self.cache.set_length(slot, start + len(ids))
        if last:
            self._set_logits(slot, outputs.logits[0, -1])

    def _slot_cache(self) -> Any:
        if self.cross is None:
            return self.cache
        made = own_cache(self.model, self.model.generation_config, 1, None)
        if not isinstance(made, EncoderDecoderCache):
            raise SlotsUnsupportedError(f"it does not take a cache for encoder-decoders as {CACHE_NAME}")
        return EncoderDecoderCache(self.cache, made.cross_attention_cache)

    @torch.inference_mode()
    def encode(self, ids: list[int]) -> None:
        """Run the encoder for the slot that is prefilled next."""
        source = torch.tensor([ids], device=self.device)
        encoder = self.model.get_encoder()
        self.encoded = encoder(input_ids=source, attention_mask=torch.ones_like(source), return_dict=True)

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """Make slot ``target`` hold what ``source`` holds: its prefix, its history and its logits."""
        self.cache.copy(source, target)
        if self.cross is not None:
            self.cross.copy(source, target)
        if self.history is not None:
            self.history.copy(source, target)
        assert self.logits is not None
        self.logits[target] = self.logits[source]

    def clear(self, slot: int) -> None:
        """The slot is free: rows of length 0 cost the least."""
        self.cache.set_length(slot, 0)

    def _set_logits(self, slot: int, logits: torch.Tensor) -> None:
        if self.logits is None:
            if known_tokens(self.model, logits) is not None:
                raise SlotsUnsupportedError("its output embedding writes tokens that it cannot read")
            self.logits = torch.zeros(self.slots, logits.shape[-1], dtype=torch.float32, device=self.device)
        self.logits[slot] = logits.to(self.logits)

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
        rows, k = tokens.shape
        cache = self.cache
        cache.rows = rows
        cache.reserve(cache.length + 1)
        lengths = cache.lengths[:rows]
        positions = lengths.clone()
        grows = torch.tensor(advance, device=self.device)
        cross = cross_lengths = None
        past: Any = cache
        inputs: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if self.cross is not None:
            cross, cross_lengths = self.cross.as_cache(rows), self.cross.lengths[:rows]
            past = EncoderDecoderCache(cache, cross)
            past.is_updated = dict.fromkeys(range(len(cache.layers)), True)
            width = cross.layers[0].keys.shape[2]
            states = self.encoded.last_hidden_state
            inputs["encoder_outputs"] = BaseModelOutput(
                last_hidden_state=states.new_zeros(()).expand(rows * k, width, states.shape[-1])
            )
            inputs["decoder_input_ids"] = tokens.reshape(-1, 1)
        else:
            inputs["input_ids"] = tokens.reshape(-1, 1)
        inputs[CACHE_NAME] = past
        each = positions.repeat_interleave(k)
        if self.position_argument is not None:
            inputs[self.position_argument] = each[:, None]
        step = self.last_step = SlotStep(cache, cross, cross_lengths, k)
        first_rows = torch.arange(rows, device=self.device) * k
        chosen: dict[str, torch.Tensor] = {}

        def select(hidden_states: torch.Tensor) -> torch.Tensor:
            if k == 1:
                chosen["rows"], chosen["states"] = first_rows, hidden_states[:, -1]
                choose(hidden_states[:, -1:])
                return hidden_states
            last = hidden_states[:, -1]
            selected = choose(last.view(rows, k, -1))
            chosen["rows"] = first_rows + selected.to(first_rows.device)
            chosen["states"] = last.index_select(0, chosen["rows"].to(last.device))
            return chosen["states"][:, None]

        self.tap.listen(select)
        try:
            with self.switch(step), self._positions(each):
                outputs = self.model(**inputs)
            heard = self.tap.mute()
            if len(heard.head) != 1:
                raise SlotsUnsupportedError(f"the output embedding ran {len(heard.head)} times in one forward")
            step.check_all_called()
            cache.commit(chosen["rows"], grows, advance)
        except SharedPrefixUnsupportedError as error:
            raise SlotsUnsupportedError(str(error)) from error
        finally:
            self.tap.mute()
            cache.drop_pending()
        if self.history is not None:
            self.history.append(chosen["states"], positions)
        logits = outputs.logits[:, -1]
        assert self.logits is not None
        # A new tensor: what was there before is still asked for by those who record the step.
        new = logits.to(self.logits)
        self.logits = new if rows == self.slots else torch.cat([new, self.logits[rows:]])
        cache.rows = self.slots

    @contextmanager
    def _positions(self, positions: torch.Tensor) -> Iterator[None]:
        """Models that make positions of their cache's one length get each row's at their position embedding."""
        if not self.position_modules:
            yield
            return
        outer, _positions.value = getattr(_positions, "value", None), positions
        entries: list[_Positioned] = []
        try:
            with _positions_lock:
                for module in self.position_modules:
                    entry = take_forward(_positioned, module, _positioned_entry)
                    if entry is None:
                        raise SlotsUnsupportedError(f"the forward of its {type(module).__name__} was replaced")
                    entries.append(entry)
            yield
        finally:
            _positions.value = outer
            with _positions_lock:
                for entry in entries:
                    give_forward_back(_positioned, entry)

    # ---- trial ----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def verify(self, trial: SlotTrial) -> None:
        """Fill slots to different lengths, take two steps, and compare candidates' hidden states and the winners'
        logits with transformers' own steps for each text alone. Leaves all slots free.

        Raises:
            SlotsUnsupportedError: they differ, or the model cannot be run so at all.
        """
        try:
            try:
                self._verify(trial, RELATIVE_ERROR.get(self.model.dtype, 1e-1))
            except _SlotsDifferError as error:
                if error.error > MOST_NOISE:
                    raise
                text = trial.texts[-1]
                moved = moved_by_noise(self.model, lambda: text.again(self.model).logits, text.logits)
                if not error.error < (allowed := allowed_for_noise(moved)):
                    raise
                self._verify(trial, allowed)
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if self.last_step is not None and not self.last_step.calls:
                raise SlotsUnsupportedError("it does not use the attention interface") from error
            raise SlotsUnsupportedError(f"a trial step fails ({type(error).__name__}: {error})") from error
        finally:
            for slot in range(self.slots):
                self.clear(slot)

    def _verify(self, trial: SlotTrial, allowed: float) -> None:
        def compare(ours: torch.Tensor, expected: torch.Tensor | None, what: str) -> None:
            assert expected is not None
            if not (error := error_of(ours, expected.view(ours.shape))) <= allowed:
                raise _SlotsDifferError(what, error, allowed)

        for slot, (source, text) in enumerate(zip(trial.sources, trial.texts, strict=True)):
            if source is not None:
                self.encode(source)
            prompt = text.ids[0].tolist()
            half = len(prompt) // 2  # in two chunks, as a long prompt is
            self.prefill(slot, prompt[:half] or prompt[:1], 0, last=False)
            if len(prompt) > 1:
                self.prefill(slot, prompt[half or 1 :], half or 1, last=True)
        for number, filling in enumerate(FILLINGS):  # beyond the rows' ends: who reads it is far off
            self._fill_unused(filling)
            tokens = trial.tokens[number].to(self.device)
            seen: list[torch.Tensor] = []

            def choose(states: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
                seen.append(states.clone())
                return torch.full((len(states),), states.shape[1] - 1, device=states.device)

            self.step(tokens, choose, [slot < len(trial.texts) for slot in range(self.slots)])
            assert self.logits is not None
            for slot, text in enumerate(trial.texts):
                for column, (states, _) in zip(trial.columns, text.rounds[number], strict=True):
                    compare(seen[0][slot, column], states[True], "hidden states")
                compare(self.logits[slot], text.rounds[number][-1][1], "logits")
        self._fill_unused(0.0)

    def _fill_unused(self, value: float) -> None:
        self.cache.fill_unused(value)
        if self.cross is not None:
            self.cross.fill_unused(value)

    @torch.inference_mode()
    def rows_are_independent(self) -> bool:
        """Whether a row's bits stay the same when fewer rows are computed with it, as far as a trial can tell."""
        tokens = draw_tokens(self.model)(self.slots, self.candidates)
        seen: list[torch.Tensor] = []

        def choose(states: torch.Tensor) -> torch.Tensor:
            seen.append(states.clone())
            return torch.zeros(len(states), dtype=torch.long)

        logits = []
        for rows in (self.slots, max(1, self.slots // 2), 1):
            for slot in range(self.slots):  # what earlier trials have left there, or zeros
                self.cache.set_length(slot, 2 + slot % 2)
            self.step(tokens[:rows], choose, [True] * rows)
            assert self.logits is not None
            logits.append(self.logits[0].clone())
        for slot in range(self.slots):
            self.clear(slot)
        return all(torch.equal(states[0], seen[0][0]) for states in seen) and all(
            torch.equal(row, logits[0]) for row in logits
        )


@dataclass(frozen=True)
class SlotTrial:
    """Texts of different lengths, the tokens that are tried after them, and what transformers' own steps make of it.

    Attributes:
        tokens: of two rounds, ``(slots, k)`` each; the last of a row is kept.
        columns: those of them that transformers' own steps tried, too.
    """

    sources: list[list[int] | None]
    texts: list[OwnText]
    tokens: list[torch.Tensor]
    columns: list[int]


@torch.inference_mode()
def slot_trial(model: Any, slots: int, candidates: int, limit: int | None) -> SlotTrial:
    """The truth for :meth:`SlotDecoder.verify`, to be made while nothing of ours is in place.

    Args:
        limit: positions that the model has, None for any number.

    Raises:
        SlotsUnsupportedError: the model cannot be run so, or its hidden states cannot be read.
    """
    longest = max(4, (limit or 1024) - 4)
    lengths = [min(length, longest) for length in _TRIAL_LENGTHS[-slots:]]
    draw = draw_tokens(model)
    tokens = [draw(slots, candidates) for _ in FILLINGS]
    columns = sorted({0, candidates - 1})
    sources: list[list[int] | None] = []
    texts: list[OwnText] = []
    for slot, length in enumerate(lengths):
        rounds = [tried[slot : slot + 1, columns].to(model.device) for tried in tokens]
        prompt = draw(1, length).to(model.device)
        inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        sources.append(None)
        if model.config.is_encoder_decoder:
            source = draw(1, lengths[-1 - slot]).to(model.device)
            inputs = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": prompt}
            sources[-1] = source[0].tolist()
        try:
            texts.append(own_text(model, inputs, rounds))
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise SlotsUnsupportedError(f"its own step fails ({type(error).__name__}: {error})") from error
        for states, _ in itertools.chain(*texts[-1].rounds):
            if (reason := wrong_head(states)) is not None:
                raise SlotsUnsupportedError(reason)
    return SlotTrial(sources, texts, tokens, columns)


def _position_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Position embeddings of the decoder that can be told positions."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    return [
        module
        for name, module in decoder.named_modules()
        if "position" in name.rpartition(".")[2] and "position_ids" in inspect.signature(module.forward).parameters
    ]


class _Positioned:
    """A position embedding that has our forward, and how many steps want it to."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.forward, self.users = module, _positioned_forward, 0


def _positioned_entry(module: torch.nn.Module) -> _Positioned | None:
    return None if "forward" in module.__dict__ else _Positioned(module)


def _positioned_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    positions = getattr(_positions, "value", None)
    if positions is None:  # another thread's forward of the same model
        return type(self).forward(self, *args, **kwargs)
    out = type(self).forward(self, *args, **(kwargs | {"position_ids": positions}))
    return out.reshape(len(positions), 1, out.shape[-1])


_positioned_forward.__name__ = "forward"
_positions = threading.local()  # the positions of the step that is under way in a thread
_positions_lock = threading.RLock()
_positioned: dict[int, _Positioned] = {}  # by id(module)
