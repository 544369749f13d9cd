"""transformers' caches: what models call theirs, which are plain keys and values, how they are made and filled."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.generation.utils import GenerationMixin

# What models call their cache, as an argument and in their output: transformers 5.24 renamed it.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
_KEY_VALUE_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer"})


def other_layers(cache: Any) -> list[str]:
    """Kinds of layers in ``cache``, if it has any, that are not plain keys and values."""
    return sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())} - _KEY_VALUE_LAYERS)


def self_attention_cache(cache: Cache) -> Cache:
    """The decoder's own cache, whether or not a cross-attention cache stands beside it."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def new_cache(model: Any, config: GenerationConfig, batch: int, max_length: int | None) -> Any:
    """The cache that ``generate`` makes for ``model``; None where it leaves that to the model, or has none."""
    kwargs: dict[str, Any] = {}
    config = copy.copy(config)
    config.use_cache, config.cache_implementation = True, None
    model._prepare_cache_for_generation(config, kwargs, GenerationMode.GREEDY_SEARCH, batch, max_length or 1)
    return kwargs.get(CACHE_NAME)


def without_caches(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if not isinstance(value, Cache)}


def fill_cache(cache: Cache, result: Cache) -> Cache:
    """Make ``cache``, which the caller of ``generate`` passed in, hold what ``result`` holds; returns it."""
    if isinstance(cache, EncoderDecoderCache):
        fill_cache(cache.self_attention_cache, result.self_attention_cache)
        fill_cache(cache.cross_attention_cache, result.cross_attention_cache)
        cache.is_updated = dict(result.is_updated)
        for index in range(len(cache.cross_attention_cache)):
            cache.is_updated[index] = True
    elif isinstance(cache, DynamicCache):
        cache.layers = result.layers
        cache.layer_class_to_replicate = result.layer_class_to_replicate
    else:  # buffers of a fixed size, that others may hold on to
        cache.reset()
        for index, layer in enumerate(result.layers):
            cache.update(layer.keys, layer.values, index)
    return cache
