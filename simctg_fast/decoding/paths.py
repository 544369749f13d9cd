"""Three ways to run one step of contrastive search, from the fastest to the most general.

=================  ==================================================  ===============================================
path               prefix                                              models
=================  ==================================================  ===============================================
``shared_prefix``  one copy of keys and values a sequence, read by     those that use transformers' attention interface
                   all k candidates (:mod:`.shared_prefix`)
``reorder``        k copies, expanded and selected through             every other cache: bloom, falcon, state-space
                   ``cache.reorder_cache``                             and hybrid models
``uncached``       recomputed for every candidate at every step        models without such a cache
=================  ==================================================  ===============================================

All give the same tokens. A path is opened by ``prefill`` and then driven by ``step``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import utils as generation_utils
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_outputs import ModelOutput

from .hidden_states import HiddenStatesTap, last_position
from .prefix_cache import CACHE_NAME, PrefixCache, self_attention_cache
from .shared_prefix import AttentionSwitch, SharedPrefixStep, SharedPrefixUnsupportedError

Choose = Callable[[torch.Tensor], torch.Tensor]  # candidates' states (B, k, D) -> index of the winner (B,)

_PREFILL_ONLY = frozenset(getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ())) | {
    "inputs_embeds",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
}
# What a model that cannot do something raises; anything else is somebody's own, and goes on.
FAILURES = (
    AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
KEY_VALUE_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"})


class PathUnsupportedError(Exception):
    """This path cannot serve this model; the message says why."""


class HeadUnsupportedError(Exception):
    """What reaches the output embedding is not the last hidden state; the message says why."""


@dataclass
class StepResult:
    """Of the winners, one row a sequence."""

    selected: torch.Tensor  # (B,) index among the candidates
    hidden_states: torch.Tensor  # (B, D) last layer
    logits: torch.Tensor  # (B, V) float32, for the token after
    outputs: Any  # the model's output; per-layer tensors still have a row a candidate
    rows: torch.Tensor  # (B,) rows of the winners in ``outputs``


class Path:
    """One generation call on one model. ``head``: whether winners are chosen before the output embedding."""

    name = ""

    def __init__(
        self,
        model,
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
        self.max_length = max_length
        self.record = {name: True for name, wanted in record.items() if wanted}  # output_hidden_states, …attentions
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)

    # ---- what the paths share -------------------------------------------------------------------------------------

    def prefill(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Run the prompt. Returns the next token's logits ``(B, V)`` float32, the states of all positions
        ``(B, L, D)``, and the model's output."""
        kwargs = with_own_states(self.kwargs) | self.record | self.tap.arguments
        if self.tap.arguments:
            self.generation_config.prefill_chunk_size = None  # the output of a chunk holds that chunk's states only
        self.tap.listen(last_position if self.head else None, all_positions=self.head)
        try:
            outputs = self.model._prefill(input_ids, self.generation_config, kwargs)
        finally:
            heard = self.tap.mute()
        parts = heard.head if self.head else self.tap.last_layer(outputs, heard)
        shapes = [tuple(part.shape) for part in parts if isinstance(part, torch.Tensor)]
        positions = sum(shape[1] for shape in shapes if len(shape) == 3)
        chunked = self.generation_config.prefill_chunk_size is not None
        if positions < max(1, input_ids.shape[1]) or (len(parts) > 1 and not chunked):
            if self.head:
                raise HeadUnsupportedError(f"of the prompt, {shapes or 'nothing'} reaches the output embedding")
            raise PathUnsupportedError(f"{type(self.model).__name__} has no hidden state for every position")
        states = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        self._after_prefill(outputs)
        return logits, states, outputs

    def _after_prefill(self, outputs) -> None:
        raise NotImplementedError

    def _advance(self, outputs, kwargs: dict[str, Any]) -> dict[str, Any]:
        return self.model._update_model_kwargs_for_generation(
            outputs, kwargs, is_encoder_decoder=self.is_encoder_decoder
        )

    def _forward(self, model_inputs: dict[str, Any], candidates: torch.Tensor, choose: Choose) -> StepResult:
        """One forward over ``B·k`` rows in which ``choose`` picks each sequence's winner."""
        batch, k = candidates.shape
        first_rows = torch.arange(batch, device=candidates.device) * k
        chosen: dict[str, torch.Tensor] = {}

        def select(hidden_states: torch.Tensor) -> torch.Tensor:
            last = hidden_states[:, -1]
            chosen["selected"] = choose(last.view(batch, k, -1))
            chosen["rows"] = first_rows.to(last.device) + chosen["selected"].to(last.device)
            chosen["hidden_states"] = last.index_select(0, chosen["rows"])
            return chosen["hidden_states"][:, None]

        model_inputs = model_inputs | self.record
        if self.head:
            self.tap.listen(select)
            try:
                outputs = self.model(**model_inputs, return_dict=True)
            finally:
                heard = self.tap.mute()
            if len(heard.head) != 1:
                raise HeadUnsupportedError(f"the output embedding ran {len(heard.head)} times in one forward")
            logits = outputs.logits[:, -1].float()
        else:
            self.tap.listen()
            try:
                outputs = self.model(**model_inputs | self.tap.arguments, return_dict=True)
            finally:
                heard = self.tap.mute()
            select(self.tap.last_layer(outputs, heard)[-1])
            logits = outputs.logits[:, -1].float().index_select(0, chosen["rows"])
        return StepResult(chosen["selected"], chosen["hidden_states"], logits, outputs, chosen["rows"])

    def step(self, input_ids: torch.Tensor, candidates: torch.Tensor, choose: Choose) -> StepResult:
        """Try ``candidates (B, k)`` after ``input_ids (B, L)``, and keep the winners."""
        raise NotImplementedError

    def result_cache(self, input_ids: torch.Tensor, surplus: int) -> Cache | None:
        """A cache of all but the last token of ``input_ids``, as plain ``generate`` returns one; ``surplus`` steps were
        run beyond them."""
        return None


def expand_kwargs(
    model, kwargs: dict[str, Any], k: int, prompt: torch.Tensor, *, keep_all: bool = False
) -> dict[str, Any]:
    """``kwargs`` of B sequences for ``B·k`` candidate rows. Caches stay at B rows; unless ``keep_all``, encoder outputs
    do too, and what only the prompt needs is dropped. Some models count a row's images in the ids of its ``prompt``."""
    aside = {n: v for n, v in kwargs.items() if isinstance(v, Cache) or (n == "encoder_outputs" and not keep_all)}
    rest = {n: v for n, v in kwargs.items() if n not in aside and (keep_all or n not in _PREFILL_ONLY)}
    return repeat_rows(model, prompt, rest, k)[1] | aside


def repeat_rows(model, input_ids: torch.Tensor, kwargs: dict[str, Any], k: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Each sequence of a call ``k`` times, as the model does it; the caller's own arguments stay as they are."""
    encoded, features = kwargs.get("encoder_outputs"), kwargs.get("mm_encoder_outputs")
    if features is not None:  # both are expanded in place
        kwargs = kwargs | {"mm_encoder_outputs": {name: copy_outputs(value) for name, value in features.items()}}
    if isinstance(encoded, ModelOutput):
        kwargs = kwargs | {"encoder_outputs": copy_outputs(encoded)}
    elif isinstance(encoded, (tuple, list)):  # what a decoder alone may be given
        kwargs = kwargs | {"encoder_outputs": type(encoded)(states.repeat_interleave(k, dim=0) for states in encoded)}
    return model._expand_inputs_for_generation(
        input_ids=input_ids, expand_size=k, is_encoder_decoder=isinstance(encoded, ModelOutput), **kwargs
    )


def copy_outputs(outputs: Any) -> Any:
    """A model's output of its own whose fields can be replaced."""
    return copy.copy(outputs)


def encoder_rows(outputs: Any, k: int, states: torch.Tensor) -> Any:
    """An encoder's output for ``k`` rows a sequence, its last hidden state replaced. What else it holds (masks, router
    logits) some decoders look for."""
    rows = len(outputs.last_hidden_state)
    expanded = copy_outputs(outputs)
    for name, value in list(expanded.items()):
        if name == "last_hidden_state":
            expanded[name] = states
        elif isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == rows:
            expanded[name] = value.repeat_interleave(k, dim=0)
    return expanded


def with_own_states(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` for one forward, with encoder states of its own: some decoders write into them (Moonshine's streaming
    one adds positions)."""
    encoded = kwargs.get("encoder_outputs")
    if isinstance(encoded, ModelOutput):
        encoded = copy_outputs(encoded)
        encoded["last_hidden_state"] = encoded.last_hidden_state.clone()
        return kwargs | {"encoder_outputs": encoded}
    return kwargs


def grow_kwargs(model, kwargs: dict[str, Any], new_ids: torch.Tensor) -> dict[str, Any]:
    """``kwargs`` of a prompt (masks, positions, embeddings) for that prompt followed by ``new_ids (rows, n)``."""
    kwargs = dict(kwargs)
    if not new_ids.shape[1]:
        return kwargs
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    if kwargs.get("inputs_embeds") is not None and not is_encoder_decoder:
        new = model.get_input_embeddings()(new_ids)
        kwargs["inputs_embeds"] = torch.cat([kwargs["inputs_embeds"], new.to(kwargs["inputs_embeds"])], dim=1)
    nothing = _NoOutputs()
    grown = model._update_model_kwargs_for_generation(
        nothing, kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=new_ids.shape[1]
    )
    return {name: value for name, value in grown.items() if value is not nothing}


class _NoOutputs(dict):
    """Stands where a forward's outputs belong when none has run; what a model takes from it is this very object."""

    def __getattr__(self, name: str) -> Any:
        return self


def _last_positions_only(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of position ids the model needs the newest; keeping the rest would be a growing copy a token."""
    for name in ("position_ids", "decoder_position_ids"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name][..., -1:]
    return kwargs


class SharedPrefixPath(Path):
    name = "shared_prefix"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.record.get("output_attentions"):
            raise PathUnsupportedError("output_attentions needs the model's own attention")
        made = self.kwargs.get(CACHE_NAME)
        if not isinstance(made, Cache):
            raise PathUnsupportedError(f"the model does not take a key/value cache as {CACHE_NAME}")
        layers = self_attention_cache(made).layers
        odd = sorted({type(layer).__name__ for layer in layers} - KEY_VALUE_LAYERS)
        if odd:
            raise PathUnsupportedError(f"its cache has layers that are not plain keys and values: {', '.join(odd)}")
        self.text_config = self.model.config.get_text_config(decoder=True)
        self.cache = PrefixCache(self.max_length, num_layers=len(layers))
        self.cross: DynamicCache | None = None
        if isinstance(made, EncoderDecoderCache):
            self.cross = made.cross_attention_cache  # as the model wants it: some cut it to a window, some do not
            self.kwargs[CACHE_NAME] = EncoderDecoderCache(self.cache, self.cross)
        else:
            self.kwargs[CACHE_NAME] = self.cache
        self.switch = AttentionSwitch(self.model)
        self.last_step: SharedPrefixStep | None = None
        self.expanded: dict[str, Any] | None = None

    def prefill(self, input_ids):
        try:
            return super().prefill(input_ids)
        except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
            raise PathUnsupportedError(f"its prompt cannot fill a key/value cache ({error})") from error

    def _after_prefill(self, outputs) -> None:
        lengths = {layer.length for layer in self.cache.layers if layer.is_initialized}
        if len(lengths) != 1:
            raise PathUnsupportedError(f"its layers cached {sorted(lengths) or 'no'} positions of one prompt")
        self.kwargs = _last_positions_only(self._advance(outputs, self.kwargs))

    def step(self, input_ids, candidates, choose):
        k = candidates.shape[1]
        if self.expanded is None:
            self.expanded = expand_kwargs(self.model, self.kwargs, k, input_ids)
            if self.cross is not None:
                # Their keys and values are cached; what is left to read off them is shape, dtype and device.
                outputs = self.expanded["encoder_outputs"]
                shape = (len(outputs.last_hidden_state) * k, *outputs.last_hidden_state.shape[1:])
                states = outputs.last_hidden_state.new_zeros(()).expand(shape)
                self.expanded["encoder_outputs"] = encoder_rows(outputs, k, states)
        inputs = self.model.prepare_inputs_for_generation(
            candidates.reshape(-1, 1), next_sequence_length=1, is_first_iteration=False, **self.expanded
        )
        step = self.last_step = SharedPrefixStep(self.cache, self.cross, k)
        self.cache.set_candidates(k)
        try:
            with self.switch(step):
                result = self._forward(inputs, candidates, choose)
            step.check_all_called()
            self.cache.commit(result.rows)
        except SharedPrefixUnsupportedError as error:
            raise PathUnsupportedError(str(error)) from error
        finally:
            self.cache.set_candidates(None)
        self.expanded = _last_positions_only(self._advance(result.outputs, self.expanded))
        return result

    @contextmanager
    def undone(self, filling: float) -> Iterator[None]:
        """What is stepped within the block has not been afterwards. What lies beyond the text is ``filling`` meanwhile,
        with signs that alternate by channel."""
        kwargs, expanded, length = dict(self.kwargs), self.expanded, self.cache.length
        self.expanded = None if expanded is None else dict(expanded)
        self.cache.fill_unused(filling)
        try:
            yield
        finally:
            self.kwargs, self.expanded = kwargs, expanded
            self.cache.rewind(length)

    def result_cache(self, input_ids, surplus):
        dynamic = self.cache.to_dynamic(self.text_config, self.cache.length - 1 - surplus)
        return dynamic if self.cross is None else EncoderDecoderCache(dynamic, self.cross)


class ReorderPath(Path):
    """``cache.reorder_cache`` expands each sequence to k rows before a step and selects the winners after it."""

    name = "reorder"

    def prefill(self, input_ids):
        if not self.kwargs.get("use_cache"):
            raise PathUnsupportedError("use_cache is False")
        # The prompt's own arguments, with caches that stay empty, for running whole sequences again.
        self.initial, self.prompt_ids = self.kwargs, input_ids.shape[1]
        self.kwargs = {n: copy.deepcopy(v) if isinstance(v, Cache) else v for n, v in self.kwargs.items()}
        return super().prefill(input_ids)

    def _after_prefill(self, outputs) -> None:
        self.kwargs = self._advance(outputs, self.kwargs)
        found = [n for n, v in self.kwargs.items() if isinstance(v, Cache) and hasattr(v, "reorder_cache")]
        if not found:
            raise PathUnsupportedError("the model returns no cache that can be reordered")
        self.cache_name = found[0]
        self.rows: torch.Tensor | None = None
        self.expanded: dict[str, Any] | None = None

    def step(self, input_ids, candidates, choose):
        batch, k = candidates.shape
        rows = torch.arange(batch, device=candidates.device) if self.rows is None else self.rows
        self.kwargs[self.cache_name].reorder_cache(rows.repeat_interleave(k))
        if self.expanded is None:
            self.expanded = expand_kwargs(self.model, self.kwargs, k, input_ids)
            if self.expanded.get("encoder_outputs") is not None:
                outputs = self.expanded["encoder_outputs"]
                states = outputs.last_hidden_state.repeat_interleave(k, dim=0)
                self.expanded["encoder_outputs"] = encoder_rows(outputs, k, states)
        inputs = self.model.prepare_inputs_for_generation(
            candidates.reshape(-1, 1), next_sequence_length=1, is_first_iteration=False, **self.expanded
        )
        result = self._forward(inputs, candidates, choose)
        self.rows = result.rows
        self.expanded = self._advance(result.outputs, self.expanded)
        return result

    def result_cache(self, input_ids, surplus):
        cache = self.kwargs[self.cache_name]
        layers = self_attention_cache(cache).layers
        plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
        if self.rows is not None and plain and getattr(cache, "is_croppable", True):
            cache.reorder_cache(self.rows)
            cache.crop(-1 - surplus)
            return cache
        # States and windows cannot be cut back by a token: run the winners once more, up to the last but one.
        kwargs = grow_kwargs(self.model, self.initial, input_ids[:, self.prompt_ids : -1])
        outputs = self.model._prefill(input_ids[:, :-1], self.generation_config, kwargs)
        return self._advance(outputs, kwargs)[self.cache_name]


class UncachedPath(Path):
    """Every candidate's whole sequence again at every step: slow, exact."""

    name = "uncached"

    def prefill(self, input_ids):
        self.prompt_ids = input_ids.shape[1]
        self.kwargs = without_caches(self.kwargs) | {"use_cache": False}
        return super().prefill(input_ids)

    def _after_prefill(self, outputs) -> None:
        self.expanded: dict[str, Any] | None = None

    def step(self, input_ids, candidates, choose):
        k = candidates.shape[1]
        if self.expanded is None:
            prompt = input_ids[:, : self.prompt_ids]
            self.expanded = expand_kwargs(self.model, self.kwargs, k, prompt, keep_all=True)
        rows = torch.cat([input_ids.repeat_interleave(k, dim=0), candidates.reshape(-1, 1)], dim=1)
        kwargs = with_own_states(grow_kwargs(self.model, self.expanded, rows[:, self.prompt_ids :]))
        inputs = self.model.prepare_inputs_for_generation(rows, is_first_iteration=True, **kwargs)
        return self._forward(inputs, candidates, choose)


def without_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in kwargs.items() if not isinstance(v, Cache)}


PATHS: dict[str, type[Path]] = {path.name: path for path in (SharedPrefixPath, ReorderPath, UncachedPath)}
