"""Blocks of an attention and a feed-forward network, each behind a norm, one after the other in one native call.

The first one runs those behind it as well, and each hands out what was made for it when it is given what the one before
it has returned, in the same step. Where it is given anything else, or a block on the way is not what the kernels are
for, the next one begins anew. So a step's blocks cost one call, and the model's own loop, its hooks and whoever records
what blocks return go on as always.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..ops.block_layers import decoder_blocks, native_block
from .blocks import CurrentStep, Plan
from .forwards import Use, uses_here
from .modules import is_plain


class BlockPlan(Plan):
    """A block ``z = x + attention(norm(x)) · output``, ``z + feed_forward(norm(z))``.

    Args:
        attention: has ``layer_idx``, ``head_dim`` and ``scaling``.
        projections: to queries, keys and values, or one to all three, side by side.
        feed_forward: what the activation is of, its factor or None, and what comes behind.
        turned: whether queries and keys are, by the rows' positions.
    """

    def __init__(
        self,
        block: Module,
        current_step: CurrentStep,
        norms: tuple[Module, Module],
        attention: Any,
        projections: tuple[Module, ...],
        output: Module,
        feed_forward: tuple[Module, Module | None, Module],
        act: Module,
        heads: int,
        kv_heads: int,
        turned: bool,
    ):
        inner, gate, outer = feed_forward
        gates = () if gate is None else (gate,)
        super().__init__(block, current_step, norms, (*projections, output, inner, *gates, outer), act)
        self.block, self.attention, self.joined, self.turned = block, attention, len(projections) == 1, turned
        self.shape = heads, kv_heads, attention.head_dim
        self.made: tuple[Any, float, Any] | None = None  # of what, with which scaling
        self.stack, self.index = Stack([self]), 0

    def run(
        self, hidden_states: Tensor, cache: Any, mask: Tensor | None, turns: Any, arguments: dict[str, Any]
    ) -> Tensor | None:
        """What the block's forward returns; None: its own has to run."""
        step = self.current_step()
        if step is None or cache is not step.slots.cache:
            return None
        return self.stack.run(self, hidden_states, (step, mask, turns), arguments)

    def native(self, rows: int, dtype: torch.dtype, uses: dict[int, Use]) -> tuple[Any, Any] | None:
        """The block as it is now, and what has to be kept alive meanwhile; None: it is not what the kernels are for."""
        if (call := self.current(rows, dtype, uses)) is None:
            return None
        scaling = self.attention.scaling
        if self.made is None or self.made[0] is not call or self.made[1] != scaling:
            count = 1 if self.joined else 3
            projections, (output, inner, *gates, outer) = call.layers[:count], call.layers[count:]
            gate = gates[0] if gates else None
            first, second = call.norms
            made = native_block(first, projections, scaling, output, second, inner, gate, self.act, outer)
            self.made = call, scaling, made
        return self.made[2], call.kept

    def is_turned_by(self, turns: Any, dtype: torch.dtype, rows: int) -> bool:
        """Whether they are of one position a row, for whole heads."""
        if not self.turned:
            return turns is None
        if type(turns) is not tuple or len(turns) != 2:
            return False
        dim = self.attention.head_dim
        for each in turns:
            if not is_plain(each, Tensor) or each.dtype is not dtype or each.shape not in ((1, 1, dim), (rows, 1, dim)):
                return False
        return bool(turns[0].shape == turns[1].shape)


class Stack:
    """Blocks that follow one another, and what was made for those of them that have not been called yet."""

    def __init__(self, plans: list[BlockPlan]):
        self.plans = plans
        self.begins = [False] * len(plans)  # a call of ours once began there: none runs on past it
        self.ahead: _Ahead | None = None
        for index, plan in enumerate(plans):
            plan.stack, plan.index = self, index

    def run(
        self, plan: BlockPlan, hidden_states: Tensor, given: tuple[Any, ...], arguments: dict[str, Any]
    ) -> Tensor | None:
        """See `BlockPlan.run`; ``given``: what all blocks of a call are given alike."""
        ahead = self.ahead
        if ahead is not None and ahead.is_for(plan.index, hidden_states, given):
            if not plan.knows(arguments):
                return None
        else:
            self.ahead = ahead = self._begin(plan, hidden_states, given, arguments)
            if ahead is None:
                return None
        result = ahead.take()
        if not ahead.results:
            self.ahead = None
        return result

    def _begin(self, plan: BlockPlan, x: Tensor, given: tuple[Any, ...], arguments: dict[str, Any]) -> _Ahead | None:
        step, mask, turns = given
        rows, attention = len(x), plan.attention
        if not plan.takes(x, arguments) or not plan.is_turned_by(turns, x.dtype, rows):
            return None
        self.begins[plan.index] = True
        natives: list[Any] = []
        layers: list[Any] = []
        uses, kept, hooked, like = uses_here(), [], False, None
        for other in self.plans[plan.index :]:
            if other is not plan and (hooked or self.begins[other.index] or other.block._forward_pre_hooks):
                break
            hooked = bool(other.block._forward_hooks)  # they may change what it returns in place
            place = other.attention.layer_idx
            layer = step.slots.layers[place] if place < len(step.slots.layers) else None
            if layer is None or layer.pending is not None or other.shape != plan.shape:
                break
            layout = layer.layout
            if layout is None or layout != (like or layout):
                break
            like = layout
            if (found := other.native(rows, x.dtype, uses)) is None:
                break
            natives.append(found[0])
            kept.append(found[1])
            layers.append(layer)
        if not natives:
            return None
        # One position a row: (rows, heads, 1, dim) without a transposition.
        (heads, kv_heads, dim), count = plan.shape, len(natives)
        if plan.joined:
            joined = x.new_empty((count, rows, 3, heads, 1, dim))
            queries, keys, values = (each.unbind() for each in joined.unbind(2))
        else:
            queries = (x.new_empty((rows, heads, 1, dim)),) * count
            keys, values = (each.unbind() for each in x.new_empty((2, count, rows, kv_heads, 1, dim)).unbind())
        called = step.attend_natively(attention, layers[0], queries[0], keys[0], values[0], mask)
        if called is None:
            return None
        results = x.new_empty((count, *x.shape)).unbind()
        cached = [(layer.keys, layer.values) for layer in layers]
        tensors = [(*new, *old, y) for *new, old, y in zip(queries, keys, values, cached, results, strict=True)]
        arrays = [tuple(tensor.data_ptr() for tensor in each) for each in tensors]
        decoder_blocks(x, natives, arrays, called[0], turns)
        return _Ahead(plan.index, x, given, results, list(zip(layers, keys, values, strict=True)))


class _Ahead:
    """What was made of ``x`` and has not been asked for, from the block at ``index`` on."""

    def __init__(self, index: int, x: Tensor, given: tuple[Any, ...], results: Any, pending: list[tuple[Any, ...]]):
        self.index, self.x, self.given = index, x, given
        self.results, self.pending = list(reversed(results)), list(reversed(pending))

    def is_for(self, index: int, x: Tensor, given: tuple[Any, ...]) -> bool:
        return index == self.index and x is self.x and all(map(operator.is_, given, self.given))

    def take(self) -> Tensor:
        """The next one's, whose keys and values the cache is given."""
        layer, key, value = self.pending.pop()
        layer.pending, layer.was_read = (key, value), True
        self.index += 1
        self.x = self.results.pop()
        return self.x
