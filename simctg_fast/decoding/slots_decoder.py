"""``generate`` over slots: one copy of the prefix a sequence, read by all candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .caches import CACHE_NAME, other_layers, self_attention_cache
from .decoder import Decoder
from .graph import Recorded, obstacle, take
from .inputs import encoder_rows, expand_kwargs
from .packing import Packing
from .slots import History, Slots
from .step import Choose, Step, StepResult
from .unsupported import UnsupportedError


class SlotsDecoder(Decoder):
    """For models that use transformers' attention interface over plain keys and values."""

    name = "shared_prefix"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.record.get("output_attentions"):
            raise UnsupportedError("output_attentions needs the model's own attention")
        cache = self.kwargs.get(CACHE_NAME)
        if not isinstance(cache, Cache):
            raise UnsupportedError(f"the model does not take a key/value cache as {CACHE_NAME}")
        self.num_layers = len(self_attention_cache(cache).layers)
        if odd := other_layers(self_attention_cache(cache)):
            raise UnsupportedError(f"its cache has layers that are not plain keys and values: {', '.join(odd)}")
        # As the model wants it: some cut it to a window, some do not.
        self.cross: DynamicCache | None = getattr(cache, "cross_attention_cache", None)
        self.text_config = self.model.config.get_text_config(decoder=True)
        self.forward: Step | None = None
        self.obstacle: str | None = f"it is on {self.model.device}"
        self.graph_key: Any = None
        self.recorded: Recorded | None = None

    def look_for_graph(self, key: Any) -> None:
        """Steps may be captured, for calls of this ``key``: run in the slots of one that was, if there is one."""
        self.obstacle = obstacle(self.model, self.model.device)
        if self.obstacle is None:
            self.graph_key, self.recorded = key, take(self.model, key)

    @property
    def slots(self) -> Slots:
        assert self.forward is not None
        return self.forward.slots

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Any]:
        if self.recorded is None:
            slots = Slots(len(input_ids), self.num_layers, input_ids.device, self.max_length)
        else:
            slots = self.recorded.slots
            slots.begin_again(self.max_length)
        self.forward = Step(self.model, self.tap, slots, self.head)
        self.kwargs[CACHE_NAME] = slots.cache if self.cross is None else EncoderDecoderCache(slots.cache, self.cross)
        try:
            return super().prefill(input_ids)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            raise UnsupportedError(f"its prompt cannot fill a key/value cache ({error})") from error

    def _new_history(self, rows: int) -> History:
        return self.slots.history

    def _use(self, history: History) -> None:
        self.history = self.slots.history = history

    def _after_prefill(self, outputs: Any) -> None:
        lengths = {layer.filled for layer in self.slots.layers if layer.is_initialized}
        if len(lengths) != 1:
            raise UnsupportedError(f"its layers cached {sorted(lengths) or 'no'} positions of one prompt")
        self.slots.end_prompt()
        self.kwargs = _last_positions_only(self._advance(outputs, self.kwargs))

    def step(self, input_ids: Tensor, candidates: Tensor, choose: Choose, packing: Packing | None = None) -> StepResult:
        assert self.forward is not None
        k = candidates.shape[1]
        if not self.expanded:
            self.counts = [k] * len(candidates)
            self.expanded = expand_kwargs(self.model, self.kwargs, k, input_ids)
            if self.cross is not None:
                # Their keys and values are cached; what is left to read off them is shape, dtype and device.
                outputs = self.expanded["encoder_outputs"]
                states = outputs.last_hidden_state
                states = states.new_zeros(()).expand(len(states) * k, *states.shape[1:])
                self.expanded["encoder_outputs"] = encoder_rows(outputs, k, states)
        self.slots.reserve(self.slots.length + 1)
        inputs = self._next_inputs(candidates, packing)
        result = self.forward.run(inputs, candidates, choose, cross=self.cross, packing=packing)
        self.slots.advance()
        self.expanded = _last_positions_only(self._advance(result.outputs, self.expanded))
        return result

    def _copy(self, source: int, target: int) -> None:
        self.slots.copy(source, target)

    def _keep(self, places: list[int]) -> None:
        self.slots.set_rows(len(places))
        for layer in () if self.cross is None else self.cross.layers:
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys[places], layer.values[places]

    @contextmanager
    def undone(self, filling: float) -> Iterator[None]:
        """What is stepped within the block has not been afterwards. What lies beyond the text is ``filling`` meanwhile,
        with signs that alternate by channel."""
        kwargs, expanded, length = dict(self.kwargs), self.expanded, self.slots.length
        self.expanded = dict(expanded)
        self.slots.fill_unused(filling)
        try:
            yield
        finally:
            self.kwargs, self.expanded = kwargs, expanded
            for slot in range(self.slots.extent.rows):
                self.slots.set_length(slot, length)

    def result_cache(self, input_ids: Tensor, surplus: int) -> Cache:
        dynamic = self.slots.to_dynamic(self.text_config, self.slots.length - 1 - surplus)
        return dynamic if self.cross is None else EncoderDecoderCache(dynamic, self.cross)


def _last_positions_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of position ids the model needs the newest; keeping the rest would be a growing copy a token."""
    for name in ("position_ids", "decoder_position_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name][..., -1:]
    return kwargs
