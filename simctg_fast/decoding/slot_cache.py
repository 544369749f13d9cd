"""Keys, values and hidden states of slots: one buffer for all rows, and a length of its own for each."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..ops.candidate_select import candidate_scan
from ..ops.prefix_commit import prefix_commit
from .hidden_states import _at_least_float32, _normalize
from .prefix_cache import PrefixCacheLayer, fill_alternating

BLOCK = 256  # buffers grow by whole blocks of positions


class SlotCacheLayer(PrefixCacheLayer):
    """One layer of a :class:`SlotCache`: ``(slots, H_kv, capacity, D)``.

    While a slot's prompt is run (``cache.slot`` is set) it behaves as that one row's cache. In a step it sets the new
    keys and values aside, and returns views as long as the longest row, plus one. What lies beyond a row's length is
    finite, and no row reads it.
    """

    def __init__(self, cache: SlotCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.cache.slots, states.shape[1], self.cache.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            setattr(self, name, _longer(getattr(self, name), capacity, dim=2))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self.cache.slot is None:
            self.pending = (key_states, value_states)
            rows = slice(0, self.cache.rows)
        else:
            rows = slice(self.cache.slot, self.cache.slot + 1)
            self.keys[rows, :, start:end] = key_states
            self.values[rows, :, start:end] = value_states
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length + query_length, 0


class SlotCache(Cache):
    """Self-attention cache of ``slots`` rows; ``lengths[slot]`` positions of each are in use."""

    def __init__(self, slots: int, num_layers: int, device: torch.device):
        self.slots, self.capacity, self.rows = slots, 0, slots
        self.slot: int | None = None  # whose prompt is being run
        self.lengths_host = [0] * slots
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        super().__init__(layers=[SlotCacheLayer(self) for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """What a model takes for the length of the past: that of the slot, or of the longest row."""
        if self.slot is not None:
            return self.lengths_host[self.slot]
        return max(self.lengths_host[: self.rows])

    def reserve(self, positions: int) -> None:
        """Make room for ``positions`` in every slot."""
        if positions <= self.capacity:
            return
        self.capacity = -(-positions // BLOCK) * BLOCK
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow(self.capacity)

    def set_length(self, slot: int, length: int) -> None:
        self.lengths_host[slot] = length
        self.lengths[slot] = length

    def commit(self, rows: torch.Tensor, advance: torch.Tensor, advance_host: list[bool]) -> None:
        """Keep the keys and values of candidate rows ``rows (B,)``, each at its slot's length; slots in ``advance``
        grow by one. (The others' go where their next prompt or chunk is written.)"""
        updated = [layer for layer in self.layers if layer.pending is not None]
        positions = self.lengths[: self.rows]
        prefix_commit(
            [
                (buffer[: self.rows], new)
                for layer in updated
                for buffer, new in zip((layer.keys, layer.values), layer.pending, strict=True)
            ],
            positions,
            rows,
        )
        for layer in updated:
            layer.pending = None
        positions += advance
        for slot, grows in enumerate(advance_host):
            self.lengths_host[slot] += grows

    def fill_unused(self, value: float) -> None:
        """Overwrite what lies beyond the rows' ends with ``value`` in alternating signs."""
        for layer in self.layers:
            if layer.is_initialized:
                for slot, length in enumerate(self.lengths_host):
                    fill_alternating(layer.keys[slot, :, length:], value)
                    fill_alternating(layer.values[slot, :, length:], value)

    def drop_pending(self) -> None:
        for layer in self.layers:
            layer.pending = None

    def copy(self, source: int, target: int) -> None:
        """Make slot ``target`` hold what ``source`` holds."""
        length = self.lengths_host[source]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
        self.set_length(target, length)


class CrossSlots:
    """Cross-attention keys and values of slots, each of its own source length."""

    def __init__(self, slots: int, num_layers: int, device: torch.device):
        self.slots, self.capacity = slots, 0
        self.lengths_host = [0] * slots
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers
        self.hidden_size = 0

    def fill(self, slot: int, cache: DynamicCache) -> None:
        """Take over what running the first decoder position of one row left in ``cache``."""
        length = int(cache.layers[0].keys.shape[2])
        if length > self.capacity:
            self.capacity = -(-length // BLOCK) * BLOCK
        for index, layer in enumerate(cache.layers):
            for buffers, states in ((self.keys, layer.keys), (self.values, layer.values)):
                buffer = buffers[index]
                if buffer is None:
                    buffer = states.new_zeros(self.slots, states.shape[1], self.capacity, states.shape[3])
                buffer = buffers[index] = _longer(buffer, self.capacity, dim=2)
                buffer[slot, :, :length] = states[0]
        self.lengths_host[slot] = length
        self.lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        for buffer in (*self.keys, *self.values):
            if buffer is not None:
                buffer[target] = buffer[source]
        self.lengths_host[target] = self.lengths_host[source]
        self.lengths[target] = self.lengths[source]

    def fill_unused(self, value: float) -> None:
        """Overwrite what lies beyond the sources' ends with ``value`` in alternating signs."""
        for buffer in (*self.keys, *self.values):
            for slot, length in enumerate(self.lengths_host):
                if buffer is not None:
                    fill_alternating(buffer[slot, :, length:], value)

    def as_cache(self, rows: int) -> DynamicCache:
        """A cross-attention cache over the first ``rows`` slots, as wide as the longest source among them."""
        width = max(1, *self.lengths_host[:rows], 1)
        pairs = zip(self.keys, self.values, strict=True)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(pairs):
            assert keys is not None
            assert values is not None
            cache.update(keys[:0, :, :0], values[:0, :, :0], index)
            cache.layers[index].keys = keys[:rows, :, :width]
            cache.layers[index].values = values[:rows, :, :width]
        return cache


class SlotHistory:
    """Unit-length hidden states of every position of every slot, ``(slots, capacity, D)``; lengths are the cache's."""

    def __init__(self, cache: SlotCache):
        self.cache = cache
        self.states: torch.Tensor | None = None

    def _reserve(self, like: torch.Tensor) -> torch.Tensor:
        if self.states is None:
            # Half precision is kept only where it saves bandwidth; a CPU multiplies float32 faster.
            dtype = like.dtype if like.is_cuda else _at_least_float32(like)
            shape = (self.cache.slots, self.cache.capacity, like.shape[-1])
            self.states = torch.zeros(shape, dtype=dtype, device=like.device)
        self.states = _longer(self.states, self.cache.capacity, dim=1)
        return self.states

    def write(self, slot: int, start: int, hidden_states: torch.Tensor) -> None:
        """States ``(T, D)`` of a slot's positions from ``start`` on."""
        self._reserve(hidden_states)[slot, start : start + len(hidden_states)] = _normalize(hidden_states)

    def append(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> None:
        """The winners' states ``(B, D)``, each at its own position."""
        states = self._reserve(hidden_states)
        rows = torch.arange(len(positions), device=positions.device)
        states[rows, positions] = _normalize(hidden_states).to(states.dtype)

    def penalty(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Largest cosine of candidates ``(B, k, D)`` with their own slot's history and its position, ``(B, k)``."""
        states, rows = self._reserve(hidden_states), len(hidden_states)
        lengths = self.cache.lengths[:rows].to(states.device)
        return candidate_scan(hidden_states, states[:rows], self.cache.length, None, lengths=lengths)

    def copy(self, source: int, target: int) -> None:
        if self.states is not None:
            length = self.cache.lengths_host[source]
            self.states[target, :length] = self.states[source, :length]


def _longer(buffer: torch.Tensor, capacity: int, dim: int) -> torch.Tensor:
    used = buffer.shape[dim]
    if used >= capacity:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, used).copy_(buffer)
    return grown
