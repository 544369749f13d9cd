"""A key/value cache that holds the prefix once, however many candidates a step tries."""

from __future__ import annotations

import inspect
from functools import partial

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from ..ops.prefix_commit import prefix_commit

# What models call their cache, as an argument and in their output: transformers 5.24 renamed it.
CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
GROWTH = 512  # positions added when a buffer is full: a copy every 512 tokens, and at most 512 positions unused


def next_capacity(needed: int, max_length: int | None) -> int:
    """Positions to reserve when ``needed`` are in use: up to the known end, and never more than a block ahead."""
    ahead = needed + GROWTH
    return max(needed, ahead if max_length is None else min(ahead, max_length))


class PrefixCacheLayer(CacheLayerMixin):
    """One layer: a preallocated ``(B, H_kv, capacity, D)`` buffer of which the first ``length`` positions are in use.

    *Plain* (``candidates`` is None): ``update`` writes the new positions and returns all of them, as any cache does.
    *Candidates*: ``update`` sets the ``B·k`` new keys and values aside and returns a view whose length counts one
    position more (models derive positions from it); the cache's ``commit`` then writes the winners'.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, max_length: int | None = None):
        super().__init__()
        self.max_length = max_length
        self.length = 0
        self.candidates: int | None = None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[-1])
        self.is_initialized = True

    def _reserve(self, needed: int) -> None:
        if self.keys.shape[2] >= needed:
            return
        capacity = next_capacity(needed, self.max_length)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[-1])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self._reserve(end)
        if self.candidates is None:
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            self.length = end
        else:
            self.pending = (key_states, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.18
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))


class PrefixCache(Cache):
    """Self-attention cache of :class:`PrefixCacheLayer`; ``max_length`` bounds what is reserved."""

    def __init__(self, max_length: int | None = None, num_layers: int = 0):
        make = partial(PrefixCacheLayer, max_length)
        if num_layers:
            super().__init__(layers=[make() for _ in range(num_layers)])
        else:
            super().__init__(layer_class_to_replicate=make)

    @property
    def length(self) -> int:
        return self.layers[0].length if self.layers else 0

    def set_candidates(self, candidates: int | None) -> None:
        for layer in self.layers:
            layer.candidates = candidates
            layer.pending = None

    def fill_unused(self, value: float) -> None:
        """Overwrite what lies beyond the text, two positions at least, with ``value`` in alternating signs."""
        for layer in self.layers:
            if layer.is_initialized:
                layer._reserve(layer.length + 2)
                for buffer in (layer.keys, layer.values):
                    fill_alternating(buffer[:, :, layer.length :], value)

    def rewind(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def commit(self, rows: torch.Tensor) -> None:
        """Keep the keys and values of candidate rows ``rows (B,)`` of the last step, one a sequence."""
        position = self.length
        updated = [layer for layer in self.layers if layer.pending is not None]
        prefix_commit(
            [pair for layer in updated for pair in zip((layer.keys, layer.values), layer.pending, strict=True)],
            position,
            rows,
        )
        for layer in updated:
            layer.length, layer.pending = position + 1, None

    def to_dynamic(self, config, length: int) -> DynamicCache:
        """The first ``length`` positions as the cache plain ``generate`` makes; this cache is emptied on the way."""
        dynamic = DynamicCache(config=config)
        if len(dynamic.layers) < len(self.layers):  # some models run a layer of theirs more than once
            dynamic = DynamicCache()
        for index, layer in enumerate(self.layers):
            if layer.is_initialized:
                dynamic.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
            layer.keys = layer.values = None
            layer.is_initialized = False
        return dynamic


def fill_alternating(buffer: torch.Tensor, value: float) -> None:
    """``value`` everywhere, with signs that alternate by channel."""
    buffer.copy_(value * (1 - 2 * (torch.arange(buffer.shape[-1], device=buffer.device) % 2)))


def self_attention_cache(cache: Cache) -> Cache:
    """The decoder's own cache, whether or not a cross-attention cache stands beside it."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


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
