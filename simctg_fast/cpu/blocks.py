"""Whole decoder blocks in a few native calls, without the dozens of module calls that each of them is made of.

With few rows a block's own Python takes as long as a third of its arithmetic. A *family* gives the blocks of some
models a ``forward`` of a few calls: the same kernels in the same order, on the same weights. Each call decides for
itself (:meth:`Plan.begin`): outside of a step over shared prefixes, in training, with hooks on a part of the block, or
with anything else than plain layers of one type on the CPU, the block's own forward runs. (A model that was once asked
for ``output_attentions`` keeps transformers' hooks on its attentions, and so this forward.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, ReLU, SiLU
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.models.t5.modeling_t5 import T5Block
from transformers.pytorch_utils import Conv1D

from ..ops.block_layers import native_activation
from .forwards import Use, has_own_forward, uses_here
from .modules import NativeLinear, NativeNorm, Snapshot, is_plain, is_plain_eager

CACHE_NAME = next(n for n in ("past_key_values", "cache") if n in inspect.signature(T5Block.forward).parameters)

# The activations there are kernels for.
ACTS: dict[type[Module], str] = {
    ReLU: "relu",
    NewGELUActivation: "gelu_tanh",
    SiLU: "silu",
    type(ACT2FN["silu"]): "silu",
}

_UNSEEN = object()

CurrentStep = Callable[[], Any]


@dataclass(frozen=True)
class Family:
    """Blocks that have a forward of ours.

    ``blocks``: their classes; ``is_eligible``: whether a block is made of what transformers makes it of; ``plan``: what
    its forward works with; ``models``: whose forward hands what a block returns to the next, untouched.
    """

    blocks: tuple[type[Module], ...]
    is_eligible: Callable[[Any], bool]
    plan: Callable[[Any, CurrentStep], Plan]
    forward: Callable[..., Any]
    models: dict[type[Module], Any] = field(default_factory=dict)  # as `forwards_of`


@dataclass(slots=True)
class Call:
    """What one forward of a block works with."""

    layers: list[Any]  # as the plan's linears
    norms: list[Any]  # likewise
    kept: list[Any]  # the tensors whose addresses these carry: another thread may replace them meanwhile


class Plan:
    """A block's parts, found once for a ``with`` block, and how to ask for the step that is under way.

    Args:
        known: arguments under which a block does what it always does, or that its forward looks at.
    """

    known: frozenset[str] = frozenset({CACHE_NAME, "use_cache", "return_dict"})

    def __init__(
        self, block: Module, current_step: CurrentStep, norms: Iterable[Any], linears: Iterable[Any], act: Module
    ):
        self.current_step = current_step
        self.norms = [NativeNorm(norm) for norm in norms]
        self.linears = [NativeLinear(linear) for linear in linears]
        self.act = native_activation(ACTS[type(act)])
        self.width = self.norms[0].width
        self.places = [
            (parent._modules, name, part, part.__dict__)
            for parent in block.modules()
            for name, part in parent._modules.items()
            if part is not None
        ]
        self.found: tuple[int, torch.dtype, Snapshot, Call] | None = None
        self.forwards: list[Any] = [_UNSEEN] * len(self.places)  # of each part, those that were found to be its own

    def begin(self, hidden_states: Any, arguments: dict[str, Any]) -> Call | None:
        """None unless what the call brings, and the block as it is now, are what the kernels are for."""
        if not self.takes(hidden_states, arguments):
            return None
        return self.current(len(hidden_states), hidden_states.dtype, uses_here())

    def takes(self, hidden_states: Any, arguments: dict[str, Any]) -> bool:
        """Whether what the call brings is what the kernels are for."""
        if torch.is_grad_enabled() or not is_plain(hidden_states, Tensor) or hidden_states.dim() != 3:
            return False
        _, positions, width = hidden_states.shape
        if positions != 1 or width != self.width or not is_plain_eager() or _has_any_global_hook():
            return False
        return self.knows(arguments)

    def knows(self, arguments: dict[str, Any]) -> bool:
        known = self.known
        for name, value in arguments.items():
            if value is not None and value is not False and name not in known:
                return False
        return True

    def current(self, rows: int, dtype: torch.dtype, uses: dict[int, Use]) -> Call | None:
        """The block as it is now, for so many rows of this type; None: it is not what the kernels are for."""
        forwards = self.forwards
        for index, (siblings, name, part, own) in enumerate(self.places):
            if siblings.get(name) is not part or part.training or part._forward_hooks or part._forward_pre_hooks:
                return None
            forward = own.get("forward")
            if forward is not forwards[index]:
                if not has_own_forward(part):
                    return None
                forwards[index] = forward
        if self.found is not None and self.found[:2] == (rows, dtype) and self.found[2].holds(uses):
            return self.found[3]
        layers, norms, kept = [], [], []
        for linear in self.linears:
            state = linear.current(rows, dtype, uses)
            if state is None:
                return None
            kept.append(state)
            layers.append(state[-1])
        for norm in self.norms:
            state = norm.current(dtype)
            if state is None:
                return None
            kept.append(state)
            norms.append(state[-1])
        call = Call(layers, norms, kept)
        self.found = rows, dtype, Snapshot(self.linears, self.norms, uses), call
        return call


def forwards_of(*kinds: type[Module]) -> dict[type[Module], Any]:
    """What a block may be made of, each with the forward that it has now."""
    return {kind: kind.forward for kind in kinds}


def is_made_of(block: Module, parts: dict[type[Module], Any]) -> bool:
    """Whether nothing of it was replaced or wrapped."""
    return all(parts.get(type(part)) is type(part).forward and has_own_forward(part) for part in block.modules())


def has_sizes(linear: Any, in_features: int, out_features: int) -> bool:
    """Whether a `Linear` or `Conv1D` has them."""
    shape = (in_features, out_features) if isinstance(linear, Conv1D) else (out_features, in_features)
    return linear.weight.shape == shape
