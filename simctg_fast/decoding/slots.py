"""Keys, values and hidden states of sequences that stand at lengths of their own: the buffers of a decoding step.

A slot holds one sequence, once, however many candidates a step tries. ``generate`` fills all slots with one prompt
batch; the engine fills, copies and frees them one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..ops.candidate_select import candidate_scan
from ..ops.centered_scan import centered_scan
from ..ops.prefix_commit import prefix_commit

Rows = slice | list[int]
GROWTH = 512  # positions added when a buffer is full: a copy every 512 tokens, and at most 512 positions unused


def next_capacity(needed: int, max_length: int | None) -> int:
    """Positions to reserve when ``needed`` are in use: up to the known end, and never more than a block ahead."""
    ahead = needed + GROWTH
    return max(needed, ahead if max_length is None else min(ahead, max_length))


@dataclass
class Extent:
    """What of the buffers counts at the moment, known to all of them.

    ``slots``: rows there are; ``rows``: those, from the first on, that a step runs; ``length``: positions of the
    longest of them; ``capacity``: positions there is room for; ``max_length``: that they can reach, if it is known;
    ``blocks``: room is made in whole blocks, and no further than asked; ``filling``: rows whose prompt is being run,
    None in a step; ``static``: a step sees whole buffers, whatever their rows' lengths.
    """

    slots: int
    rows: int
    length: int = 0
    capacity: int = 0
    max_length: int | None = None
    blocks: bool = False
    filling: Rows | None = None
    static: bool = False

    @property
    def width(self) -> int:
        """Positions that a step looks at."""
        return self.capacity if self.static else self.length

    @contextmanager
    def seen_whole(self, static: bool) -> Iterator[None]:
        """Whether steps within the block see whole buffers."""
        before, self.static = self.static, static
        try:
            yield
        finally:
            self.static = before

    def reserve(self, positions: int) -> None:
        if positions > self.capacity:
            self.capacity = round_up(positions) if self.blocks else next_capacity(positions, self.max_length)


class SlotLayer(CacheLayerMixin):
    """One layer: ``(slots, H_kv, capacity, D)`` buffers of keys and values, finite beyond the rows' ends.

    While prompts are run, ``update`` writes the new positions and returns all of those rows', as any cache does. In a
    step it sets the ``rows · k`` new keys and values aside, and returns a view as long as the longest row, and one
    position more: models derive positions from it.
    """

    keys: Tensor
    values: Tensor
    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, extent: Extent):
        super().__init__()
        self.extent = extent
        self.filled = 0  # positions of the rows whose prompt is being run
        self.pending: tuple[Tensor, Tensor] | None = None
        self.was_read = False  # in this step, by our attention

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.extent.slots, states.shape[1], self.extent.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def grow(self) -> None:
        self.keys = longer(self.keys, self.extent.capacity, dim=2)
        self.values = longer(self.values, self.extent.capacity, dim=2)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        extent = self.extent
        if extent.filling is not None:
            extent.reserve(self.filled + key_states.shape[2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if extent.filling is None:
            self.pending = (key_states, value_states)
            return self.seen
        filling, start, end = extent.filling, self.filled, self.filled + key_states.shape[2]
        self.grow()
        self.keys[filling, :, start:end] = key_states
        self.values[filling, :, start:end] = value_states
        self.filled = end
        if start == 0:
            return key_states, value_states
        return self.keys[filling, :, :end], self.values[filling, :, :end]

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """The view that a step is given."""
        extent = self.extent
        if extent.static:
            return self.keys, self.values
        rows = slice(0, extent.rows)
        return self.keys[rows, :, : extent.length + 1], self.values[rows, :, : extent.length + 1]

    @property
    def layout(self) -> tuple[Any, ...] | None:
        """Layers of one layout are read alike, but for their addresses. None: there is nothing to read."""
        if not self.is_initialized or self.extent.filling is not None:
            return None
        return tuple((x.dtype, x.device, x.shape, x.stride()) for x in (self.keys, self.values))

    def get_seq_length(self) -> int:
        if self.extent.filling is not None:
            return self.filled
        return self.keys.shape[2] - 1 if self.extent.static else self.extent.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # the name before transformers 5.18
        return -1


class History:
    """Hidden states of every position of every slot, ``(slots, capacity, D)``: of unit length, normalised once, when
    they come in. ``mask (slots, capacity)``: which of them are real, None if all are; ``length``: positions written to
    all rows alike; ``norms (slots, capacity)`` float32: the lengths that the states had, where ``keeps_norms``."""

    keeps_norms = False

    def __init__(self, extent: Extent):
        self.extent = extent
        self.states: Tensor | None = None
        self.last: Tensor | None = None  # (slots, D), of the newest position, as the model made it
        self.mask: Tensor | None = None
        self.norms: Tensor | None = None
        self.length = 0

    def of_kind(self, centered: bool) -> History:
        """This, if it is of the kind that is wanted, or a new one."""
        kind = CenteredHistory if centered else History
        return self if type(self) is kind else kind(self.extent)

    @property
    def bytes_per_position(self) -> int:
        norms = 0 if self.norms is None else self.norms.element_size()
        return 0 if self.states is None else self.states.shape[2] * self.states.element_size() + norms

    def grow(self) -> None:
        if self.states is not None:
            self.states = longer(self.states, self.extent.capacity, dim=1)
        if self.norms is not None:
            self.norms = longer(self.norms, self.extent.capacity, dim=1)
        if self.mask is not None:  # everything after the prompt is real
            missing = self.extent.capacity - self.mask.shape[1]
            self.mask = torch.nn.functional.pad(self.mask, (0, missing), value=True) if missing > 0 else self.mask

    def write(
        self,
        rows: Rows,
        start: int,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        lengths: list[int] | None = None,
        whole: bool = True,
    ) -> None:
        """States ``(n, T, D)`` of positions from ``start`` on; ``mask (n, T)``: zero at padding; ``lengths``: of each
        row's text within T, None: all; ``whole``: the prompt ends with them, else more of it follows."""
        count, width, _ = hidden_states.shape
        self.extent.reserve(start + width)
        if self.states is None:
            self._allocate(hidden_states)
        assert self.states is not None
        assert self.last is not None
        if self.keeps_norms and self.norms is None:
            self.norms = torch.zeros(self.states.shape[:2], dtype=torch.float32, device=self.states.device)
        if mask is not None and not bool(mask.all()):
            if self.mask is None:
                self.mask = torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device)
            self.mask[rows] = True
            self.mask[rows, start : start + width] = mask.bool()
        self.grow()
        places = torch.arange(self.extent.slots)[rows].tolist()
        for row, states, length in zip(places, hidden_states, lengths or [width] * count, strict=True):
            self.last[row] = states[length - 1]
            self._write_row(row, start, states[:length], whole)  # a whole batch in float32 may be large
        self.length = start + width

    def _allocate(self, hidden_states: Tensor) -> None:
        # Half precision is kept only where it saves bandwidth; a CPU multiplies float32 faster.
        dtype = hidden_states.dtype if hidden_states.is_cuda else _at_least_float32(hidden_states)
        shape = (self.extent.slots, self.extent.capacity, hidden_states.shape[2])
        self.states = torch.zeros(shape, dtype=dtype, device=hidden_states.device)
        self.last = hidden_states.new_zeros(self.extent.slots, hidden_states.shape[2])

    def _write_row(self, row: int, start: int, hidden_states: Tensor, whole: bool) -> None:
        assert self.states is not None
        self.states[row, start : start + len(hidden_states)] = unit(hidden_states)
        if self.norms is not None:
            self.norms[row, start : start + len(hidden_states)] = hidden_states.float().norm(dim=-1)

    def append(self, hidden_states: Tensor, positions: Tensor | None = None) -> None:
        """States ``(n, D)`` of the first rows, each at its own position ``(n,)``; None: behind those of all rows."""
        assert self.states is not None
        assert self.last is not None
        rows = len(hidden_states)
        self.last[:rows] = hidden_states
        if positions is None:
            self.extent.reserve(self.length + 1)
            self.grow()
            self._append_at((slice(0, rows), self.length), hidden_states)
            self.length += 1
        else:
            index = torch.arange(rows, device=self.states.device)
            self._append_at((index, on(self.states.device, positions)), hidden_states)

    def _append_at(self, place: tuple[Any, Any], hidden_states: Tensor) -> None:
        assert self.states is not None
        self.states[place] = unit(hidden_states).to(self.states.dtype)
        if self.norms is not None:
            self.norms[place] = hidden_states.float().norm(dim=-1)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make row ``target`` hold what ``source`` holds in its first ``length`` positions."""
        if self.states is not None and self.last is not None:
            self.states[target, :length] = self.states[source, :length]
            self.last[target] = self.last[source]
        if self.norms is not None:
            self.norms[target, :length] = self.norms[source, :length]
        if self.mask is not None:
            self.mask[target] = self.mask[source]

    def penalty(self, hidden_states: Tensor, lengths: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Largest cosine of candidates ``(n, k, D)`` of the first rows with their history, and its position, both
        ``(n, k)``; ``lengths (n,)``: positions in use, or of all rows alike, None: all that were written."""
        assert self.states is not None
        mask = None if self.mask is None else self.mask[: len(hidden_states)]
        if not isinstance(lengths, Tensor):
            length = self.length if lengths is None else lengths
            return self._scan(hidden_states, length, mask, None)
        return self._scan(hidden_states, self.extent.width, mask, on(self.states.device, lengths))

    def _scan(
        self, hidden_states: Tensor, length: int, mask: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.states is not None
        return candidate_scan(hidden_states, self.states[: len(hidden_states)], length, mask, lengths=lengths)

    def amplification(self) -> float:
        """How much more than states, of their lengths, cosines may move: 1 where they are those of the states."""
        return 1.0


class CenteredHistory(History):
    """States less the mean of their row's real positions, for cosines between such.

    ``states`` are kept less ``shift (slots, D)``, the mean of the row's whole prompt; what is left to take out is their
    own mean, from ``sums (slots, D)``. ``squares (slots, capacity)`` are of their lengths. Until a prompt is whole its
    states lie there as they came. All of it is of a row alone, by its positions from the first on: neither batch mates
    nor the pieces a prompt is run in change a bit.
    """

    shift: Tensor
    squares: Tensor
    sums: Tensor

    @property
    def bytes_per_position(self) -> int:
        return super().bytes_per_position + (0 if self.states is None else self.squares.element_size())

    def grow(self) -> None:
        super().grow()
        if self.states is not None:
            self.squares = longer(self.squares, self.extent.capacity, dim=1)

    def _allocate(self, hidden_states: Tensor) -> None:
        super()._allocate(hidden_states)
        assert self.states is not None
        slots, capacity, width = self.states.shape
        self.shift = self.states.new_zeros(slots, width)
        self.squares = self.states.new_zeros(slots, capacity, dtype=_at_least_float32(self.states))
        self.sums = self.squares.new_zeros(slots, width)

    def _write_row(self, row: int, start: int, hidden_states: Tensor, whole: bool) -> None:
        assert self.states is not None
        end = start + len(hidden_states)
        self.states[row, start:end] = hidden_states
        if whole:
            kept = self.states[row, :end]
            real = slice(None) if self.mask is None else self.mask[row, :end]
            self.shift[row] = mean_of(kept[real])
            kept[:] = self._centered(kept, self.shift[row])
            self.squares[row, :end] = squares_of(kept)
            self.sums[row] = sum_of(kept[real])

    def _append_at(self, place: tuple[Any, Any], hidden_states: Tensor) -> None:
        assert self.states is not None
        rows = len(hidden_states)
        kept = self._centered(hidden_states, self.shift[:rows])
        self.states[place] = kept
        self.squares[place] = squares_of(kept)
        self.sums[:rows] += kept

    def _centered(self, hidden_states: Tensor, shift: Tensor) -> Tensor:
        """Rounded once, when the shift is out of them."""
        assert self.states is not None
        precise = self.squares.dtype
        return (on(shift.device, hidden_states).to(precise) - shift.to(precise)).to(self.states.dtype)

    def copy(self, source: int, target: int, length: int) -> None:
        """Make row ``target`` hold what ``source`` holds, all of its ``length`` positions: the sums are of all."""
        super().copy(source, target, length)
        if self.states is not None:
            self.squares[target, :length] = self.squares[source, :length]
            for of_row in (self.shift, self.sums):
                of_row[target] = of_row[source]

    def _scan(
        self, hidden_states: Tensor, length: int, mask: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert self.states is not None
        shift, states, squares, sums = (
            x[: len(hidden_states)] for x in (self.shift, self.states, self.squares, self.sums)
        )
        return centered_scan(hidden_states, shift, states, squares, sums, length, mask, lengths=lengths)

    def amplification(self) -> float:
        """By the newest states: as long as they are, beside what they are from the mean."""
        assert self.last is not None
        newest, precise = self.last, self.squares.dtype
        real = self.length if self.mask is None else self.mask[:, : self.length].sum(dim=-1, keepdim=True)
        rest = on(self.shift.device, newest).to(precise) - self.shift.to(precise) - self.sums / real
        ratio = newest.to(precise).norm(dim=-1).to(rest.device) / rest.norm(dim=-1)
        return max(1.0, float(ratio.nan_to_num(nan=1.0, posinf=1.0).max()))


class CrossSlots:
    """Cross-attention keys and values of slots, each of its own source length.

    Attributes:
        like: ``(1, 1, D)``, of the encoder's states, whose width, dtype and device decoders look at.
    """

    like: Tensor

    def __init__(self, extent: Extent, device: torch.device):
        self.extent, self.capacity = extent, 0
        self.host_lengths = [0] * extent.slots
        self.lengths = torch.zeros(extent.slots, dtype=torch.long, device=device)
        self.buffers: list[list[Tensor]] = []  # keys and values of every layer
        self.cache = DynamicCache()  # of views of them; one for all steps, as making its layers asks the host

    def fill(self, first: int, cache: DynamicCache, lengths: Sequence[int] | None = None) -> None:
        """Take over what running the first decoder position of some rows left in ``cache``, from slot ``first`` on;
        ``lengths`` of their sources, None: all of what is there."""
        states = [[layer.keys, layer.values] for layer in cache.layers]
        rows, _, width, _ = states[0][0].shape
        lengths = [width] * rows if lengths is None else lengths
        self.capacity = max(self.capacity, round_up(width))
        if not self.buffers:
            self.buffers = [
                [x.new_zeros(self.extent.slots, x.shape[1], self.capacity, x.shape[3]) for x in layer]
                for layer in states
            ]
        for buffers, new in zip(self.buffers, states, strict=True):
            buffers[:] = [longer(buffer, self.capacity, dim=2) for buffer in buffers]
            for buffer, x in zip(buffers, new, strict=True):
                buffer[first : first + rows, :, :width] = x
        self.host_lengths[first : first + rows] = lengths
        self.lengths[first : first + rows] = torch.tensor(lengths, device=self.lengths.device)

    def copy(self, source: int, target: int) -> None:
        for buffer in itertools.chain(*self.buffers):
            buffer[target] = buffer[source]
        self.host_lengths[target] = self.host_lengths[source]
        self.lengths[target] = self.lengths[source]

    def fill_unused(self, value: float) -> None:
        """Overwrite what lies beyond the sources' ends with ``value`` in alternating signs."""
        for buffer in itertools.chain(*self.buffers):
            for slot, length in enumerate(self.host_lengths):
                fill_alternating(buffer[slot, :, length:], value)

    def as_cache(self, rows: int) -> DynamicCache:
        """A cross-attention cache over the first ``rows`` slots, as wide as the longest source among them, or whole."""
        width = self.capacity if self.extent.static else max(1, *self.host_lengths[:rows])
        for index, (keys, values) in enumerate(self.buffers):
            if index == len(self.cache.layers):
                self.cache.update(keys[:0, :, :0], values[:0, :, :0], index)
            layer = self.cache.layers[index]
            layer.keys, layer.values = keys[:rows, :, :width], values[:rows, :, :width]
        return self.cache


class Slots:
    """Every buffer of the decoding of ``count`` sequences.

    Args:
        num_layers: of the model's cache; 0 if it adds them as it goes.
        device: of the lengths; buffers are where the model makes their contents.
        max_length: positions the sequences can reach, if that is known; buffers grow in blocks.

        blocks: they grow by whole blocks instead, and no further than asked.

    Attributes:
        cache: what the model gets; its layers are `SlotLayer`.
        lengths: ``(count,)`` int64, positions in use; ``host_lengths`` what the host knows of them, never less.
        starts: ``(count,)`` positions of padding in front, None: none.
        history: hidden states. logits: ``(count, V)`` float32 for the next token of each, once there are any.
        tokens: ``(count, capacity + 1)`` int64, the texts, where they are kept; −1 where a text holds no token.
        active: ``(count,)`` rows that write tokens; ``host_active`` what the host has said of them.
    """

    def __init__(
        self,
        count: int,
        num_layers: int,
        device: torch.device,
        max_length: int | None = None,
        *,
        blocks: bool = False,
    ):
        self.extent = Extent(count, count, max_length=max_length, blocks=blocks, filling=slice(0, count))
        layer = partial(SlotLayer, self.extent)
        self.cache = Cache(layers=[layer() for _ in range(num_layers)]) if num_layers else Cache(None, layer)
        self.host_lengths = [0] * count
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.active, self.host_active = torch.zeros(count, dtype=torch.bool, device=device), [False] * count
        self.history = History(self.extent)
        self.cross: CrossSlots | None = None
        self.starts: Tensor | None = None
        self.logits: Tensor | None = None
        self.tokens: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @property
    def layers(self) -> list[SlotLayer]:
        return self.cache.layers

    @property
    def length(self) -> int:
        """Positions of the longest row that a step runs."""
        return self.extent.length

    def reserve(self, positions: int) -> None:
        """Make room for ``positions`` in every slot."""
        if positions > self.extent.capacity:
            self.extent.reserve(positions)
            self.grow()

    def grow(self) -> None:
        """All buffers have the same room."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.grow()
        self.history.grow()
        if self.tokens is not None:
            self.tokens = longer(self.tokens, self.extent.capacity + 1, dim=1)

    def begin_again(self, max_length: int | None) -> None:
        """All rows are to be filled with another prompt batch."""
        self.extent.max_length, self.history.length = max_length, 0
        self.lengths.zero_()
        self.host_lengths = [0] * self.extent.slots
        self.set_rows(self.extent.slots)
        self.begin_prompt(slice(0, self.extent.slots))

    # ---- prompts --------------------------------------------------------------------------------------------------

    def begin_prompt(self, rows: Rows, start: int = 0) -> None:
        """Forwards run the prompts of ``rows`` from now on, behind the ``start`` positions that these hold already."""
        self.extent.filling = rows
        for layer in self.layers:
            layer.filled = start

    def end_prompt(self, lengths: Sequence[int] | int | None = None) -> None:
        """The rows hold so many positions, each or all; None: what was run."""
        rows, self.extent.filling = self.extent.filling, None
        assert rows is not None
        places = torch.arange(self.extent.slots)[rows].tolist()
        if lengths is None:
            lengths = max((layer.filled for layer in self.layers), default=0)
        each = [lengths] * len(places) if isinstance(lengths, int) else lengths
        for slot, length in zip(places, each, strict=True):
            self.host_lengths[slot] = length
        self.lengths[rows] = lengths if isinstance(lengths, int) else torch.tensor(lengths, device=self.device)
        self.set_rows(self.extent.rows)

    def set_length(self, slot: int, length: int) -> None:
        self.host_lengths[slot] = length
        self.lengths[slot] = length
        self.set_rows(self.extent.rows)

    def set_rows(self, rows: int) -> None:
        """A step runs the first ``rows`` slots."""
        self.extent.rows = rows
        self.extent.length = max(self.host_lengths[:rows])

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Make slot ``target`` hold what ``source`` holds, or its first ``length`` positions."""
        length = self.host_lengths[source] if length is None else length
        buffers = [buffer for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]
        for buffer in buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        self.history.copy(source, target, length)
        if self.logits is not None:
            self.logits[target] = self.logits[source]
        if self.tokens is not None:
            self.tokens[target] = self.tokens[source]
        if self.cross is not None:
            self.cross.copy(source, target)
        self.set_length(target, length)

    def keep_logits(self, rows: Rows, logits: Tensor) -> None:
        """``(n, V)`` for the next token of these rows."""
        if self.logits is None:
            shape = (self.extent.slots, logits.shape[-1])
            self.logits = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.logits[rows] = logits.to(self.logits)

    def keep_tokens(self, rows: Rows, start: int, tokens: Tensor) -> None:
        """``(n, T)`` of these rows, from position ``start`` on."""
        if self.tokens is None:
            shape = (self.extent.slots, self.extent.capacity + 1)
            self.tokens = torch.full(shape, -1, dtype=torch.long, device=self.device)
        self.tokens[rows, start : start + tokens.shape[1]] = tokens

    # ---- a step ---------------------------------------------------------------------------------------------------

    def commit(
        self,
        winners: Tensor,
        positions: int | Tensor | None = None,
        run: Callable[[Sequence[tuple[Tensor, Tensor]], int | Tensor, Tensor], None] = prefix_commit,
    ) -> None:
        """Keep the keys and values of candidate rows ``winners (rows,)`` at ``positions (rows,)``; None: the length of
        all rows. The lengths stay."""
        layers = [layer for layer in self.layers if layer.pending is not None]
        rows = None if self.extent.rows == self.extent.slots else slice(0, self.extent.rows)
        run(
            [
                (buffer if rows is None else buffer[rows], new)
                for layer in layers
                for buffer, new in zip((layer.keys, layer.values), layer.pending or (), strict=True)
            ],
            self.length if positions is None else positions,
            winners,
        )

    def drop_pending(self) -> None:
        for layer in self.layers:
            layer.pending, layer.was_read = None, False

    def set_active(self, active: list[bool]) -> None:
        """Which of the first rows write tokens."""
        if active != self.host_active[: len(active)]:
            self.host_active[: len(active)] = active
            upload(torch.tensor(self.host_active), self.active)

    def advance(self) -> None:
        """The rows of a step are longer by the position that was committed."""
        self.lengths[: self.extent.rows] += 1
        self.advance_host([True] * self.extent.rows)

    def advance_host(self, grows: Sequence[bool]) -> None:
        """What the host knows of that, of the rows that grow."""
        self.host_lengths[: len(grows)] = [n + g for n, g in zip(self.host_lengths, grows, strict=False)]
        self.set_rows(self.extent.rows)

    # ---- for trials and results -----------------------------------------------------------------------------------

    def fill_unused(self, value: float) -> None:
        """Overwrite what lies beyond the rows' ends, two positions at least, with ``value`` in alternating signs."""
        self.reserve(self.length + 2)
        for layer in self.layers:
            if layer.is_initialized:
                for slot, length in enumerate(self.host_lengths):
                    fill_alternating(layer.keys[slot, :, length:], value)
                    fill_alternating(layer.values[slot, :, length:], value)
        if self.cross is not None:
            self.cross.fill_unused(value)

    def to_dynamic(self, config: Any, length: int) -> DynamicCache:
        """The first ``length`` positions as the cache plain ``generate`` makes; these slots are emptied on the way."""
        dynamic = DynamicCache(config=config)
        if len(dynamic.layers) < len(self.layers):  # some models run a layer of theirs more than once
            dynamic = DynamicCache()
        for index, layer in enumerate(self.layers):
            if layer.is_initialized:
                dynamic.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
            del layer.keys, layer.values
            layer.is_initialized = False
        return dynamic


def longer(buffer: Tensor, capacity: int, dim: int) -> Tensor:
    """``buffer`` with room for ``capacity`` in dimension ``dim``, zero in what is new."""
    used = buffer.shape[dim]
    if used >= capacity:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = capacity
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, used).copy_(buffer)
    return grown


BLOCK = 256  # positions that the engine's slots grow by


def round_up(positions: int) -> int:
    """To whole blocks."""
    return -(-positions // BLOCK) * BLOCK


def fill_alternating(buffer: Tensor, value: float) -> None:
    """``value`` everywhere, with signs that alternate by channel."""
    buffer.copy_(value * (1 - 2 * (torch.arange(buffer.shape[-1], device=buffer.device) % 2)))


def on(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == device else tensor.to(device)


def upload(values: Tensor, to: Tensor) -> None:
    """Put what the host has made into a tensor of a device; the host does not wait."""
    is_cuda = to.device.type == "cuda" and values.device.type == "cpu"
    to.copy_(values.pin_memory() if is_cuda else values, non_blocking=is_cuda)


def unit(hidden_states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(hidden_states.to(_at_least_float32(hidden_states)), dim=-1)


def _at_least_float32(hidden_states: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_states.dtype, torch.float32)


def squares_of(states: Tensor) -> Tensor:
    """Of the lengths of ``states (…, D)``, ``(…)``."""
    return states.to(_at_least_float32(states)).square().sum(dim=-1)


_TOGETHER = 1024  # positions that are summed in float64 at a time


def sum_of(states: Tensor) -> Tensor:
    """Of ``states (n, D)``, ``(D,)`` float64: the same whatever they were run in."""
    total = torch.zeros(states.shape[-1], dtype=torch.float64, device=states.device)
    for some in states.split(_TOGETHER):
        total += some.double().sum(dim=0)
    return total


def mean_of(states: Tensor) -> Tensor:
    return sum_of(states) / max(1, len(states))
