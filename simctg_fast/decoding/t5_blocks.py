"""The decoder blocks of T5 and mT5 in a step of ours, without the two dozen module calls that each of them is made of.

With few rows a block's own Python takes as long as a third of its arithmetic. :func:`fast_t5_blocks` gives the blocks a
``forward`` of five calls: the same kernels in the same order, on the same weights, and so the same bits. Each call
decides for itself: outside of a step over shared prefixes, in training, with hooks on a part of the block, or with
anything else than plain float32 layers on the CPU, the block's own forward runs.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Embedding, Linear, Module, ModuleList, ReLU
from transformers.activations import NewGELUActivation
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.mt5 import modeling_mt5 as mt5
from transformers.models.t5 import modeling_t5 as t5

from ..ops import _backends
from ..ops.block_layers import Norm, feed_forward, linear_residual, norm_linears
from .linear_swap import NativeLinear, has_own_forward, is_plain_eager
from .prefix_cache import CACHE_NAME, next_capacity
from .shared_prefix import SharedPrefixStep, current_step

_BLOCKS = (t5.T5Block, mt5.MT5Block)
# What a block may be made of, each with the forward that it has now.
_PARTS = {
    kind: kind.forward
    for kind in (
        *_BLOCKS,
        *(t5.T5LayerSelfAttention, t5.T5LayerCrossAttention, t5.T5LayerFF, t5.T5Attention, t5.T5LayerNorm),
        *(t5.T5DenseActDense, t5.T5DenseGatedActDense),
        *(mt5.MT5LayerSelfAttention, mt5.MT5LayerCrossAttention, mt5.MT5LayerFF, mt5.MT5Attention, mt5.MT5LayerNorm),
        *(mt5.MT5DenseActDense, mt5.MT5DenseGatedActDense),
        *(Linear, Dropout, Embedding, ModuleList),
    )
}
_ACTS = {ReLU: "relu", NewGELUActivation: "gelu_tanh"}
# Arguments under which a block does what it always does.
_HARMLESS = frozenset({CACHE_NAME, "use_cache", "return_dict"})

_lock = threading.RLock()
_plans: dict[int, _Plan] = {}  # by id(block)


class _Plan:
    """A block's parts, found once for a ``with`` block."""

    def __init__(self, block: Module):
        self.block, self.users = block, 0
        layers: Any = block.layer
        own, cross, last = layers
        self.own, self.cross, dense = own.SelfAttention, cross.EncDecAttention, last.DenseReluDense
        self.norms = [own.layer_norm, cross.layer_norm, last.layer_norm]
        self.inner = [dense.wi_0, dense.wi_1] if hasattr(dense, "wi_1") else [dense.wi]
        self.outer, self.act = dense.wo, _ACTS[type(dense.act)]
        self.parts = [module for module in block.modules() if module is not block]
        self.bias: Tensor | None = None
        self.bias_of = (0, 0)  # the version and the address of the weight it was made from
        self.natives = {id(module): NativeLinear(module) for module in self.parts if type(module) is Linear}

    def takes(self, hidden_states: Any, arguments: dict[str, Any]) -> bool:
        """Whether what a call brings, and the block as it is now, are what the kernels are for."""
        if type(hidden_states) is not Tensor or hidden_states.dtype is not torch.float32 or not hidden_states.is_cpu:
            return False
        if torch.is_grad_enabled() or not hidden_states.is_contiguous() or hidden_states.shape[1] != 1:
            return False
        for name, value in arguments.items():
            if not (value is None or value is False or name in _HARMLESS):
                return False
        for part in self.parts:
            if part.training or part._forward_hooks or part._forward_pre_hooks:
                return False
        rows = hidden_states.shape[0]
        return is_plain_eager() and all(native.refresh(rows) for native in self.natives.values())

    def native(self, module: Linear) -> Any:
        return self.natives[id(module)].layer

    def relative_bias(self, width: int, seen: int) -> Tensor:
        """``(1, H, 1, width)``, for a query behind ``seen`` keys."""
        attention, weight = self.own, self.own.relative_attention_bias.weight
        if width != seen + 1:
            bias: Tensor = attention.compute_bias(1, width, device=weight.device, past_seen_tokens=seen)
            return bias
        # It depends on the distance alone: the last `width` of a longer one.
        state = (weight._version, weight.data_ptr())
        if self.bias is None or self.bias.shape[-1] < width or self.bias_of != state:
            longest = next_capacity(width, None)
            made = attention.compute_bias(1, longest, device=weight.device, past_seen_tokens=longest - 1)
            self.bias, self.bias_of = made.contiguous(), state
        return self.bias[..., -width:]

    def norm(self, index: int) -> Norm:
        return self.norms[index].weight, self.norms[index].variance_epsilon


def _is_eligible(block: Any) -> bool:
    """Whether the block is made of what transformers makes it of, nothing of it replaced or wrapped."""
    if not block.is_decoder or "forward" in block.__dict__:
        return False
    act = getattr(getattr(block.layer[-1], "DenseReluDense", None), "act", None)
    if type(act) not in _ACTS:
        return False
    return all(
        module is act or (_PARTS.get(type(module)) is type(module).forward and has_own_forward(module))
        for module in block.modules()
    )


def _block_forward(
    self: Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    encoder_decoder_position_bias: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    plan, step, cache = _plans.get(id(self)), current_step(), arguments.get(CACHE_NAME)
    if (
        plan is None
        or step is None
        or encoder_hidden_states is None
        or not isinstance(cache, EncoderDecoderCache)
        or not cache.is_updated.get(plan.cross.layer_idx)
        or not plan.takes(hidden_states, arguments)
    ):
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            position_bias,
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_decoder_position_bias,
            **arguments,
        )
    hidden_states, position_bias = _self_attention(plan, step, hidden_states, attention_mask, position_bias, cache)
    hidden_states, cross_bias = _cross_attention(
        plan, step, hidden_states, encoder_attention_mask, encoder_decoder_position_bias, cache
    )
    inner = [plan.native(module) for module in plan.inner]
    hidden_states = feed_forward(
        hidden_states, plan.norm(2), inner[0], inner[1] if len(inner) > 1 else None, plan.act, plan.native(plan.outer)
    )
    return hidden_states, position_bias, cross_bias


_block_forward.__name__ = "forward"  # so that a pickled block names its class's own


def _self_attention(
    plan: _Plan,
    step: SharedPrefixStep,
    hidden_states: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    cache: EncoderDecoderCache,
) -> tuple[Tensor, Tensor]:
    attention, layers = plan.own, cache.self_attention_cache
    # One position a row: (rows, heads, 1, dim) without a transposition.
    shape = (hidden_states.shape[0], attention.n_heads, 1, attention.key_value_proj_dim)
    query, new_key, new_value = new = [hidden_states.new_empty(shape) for _ in range(3)]
    projections = [plan.native(module) for module in (attention.q, attention.k, attention.v)]
    norm_linears(hidden_states, plan.norm(0), projections, new)
    seen = layers.get_seq_length(attention.layer_idx)
    key, value = layers.update(new_key, new_value, attention.layer_idx)
    if bias is None and attention.has_relative_attention_bias:
        bias = plan.relative_bias(key.shape[-2], seen)
    return _attended(plan, step, attention, query, key, value, mask, bias, hidden_states)


def _cross_attention(
    plan: _Plan,
    step: SharedPrefixStep,
    hidden_states: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    cache: EncoderDecoderCache,
) -> tuple[Tensor, Tensor]:
    attention = plan.cross
    layer = cache.cross_attention_cache.layers[attention.layer_idx]
    query = hidden_states.new_empty((hidden_states.shape[0], attention.n_heads, 1, attention.key_value_proj_dim))
    norm_linears(hidden_states, plan.norm(1), [plan.native(attention.q)], [query])
    return _attended(plan, step, attention, query, layer.keys, layer.values, mask, bias, hidden_states)


def _attended(
    plan: _Plan,
    step: SharedPrefixStep,
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    """The new hidden states, and the bias for the next block."""
    if bias is None:
        bias = query.new_zeros((1, attention.n_heads, 1, key.shape[-2]))
    out, _ = step.attend(attention, query, key, value, mask, scaling=attention.scaling, position_bias=bias)
    return linear_residual(out, plan.native(attention.o), residual), bias


@contextmanager
def fast_t5_blocks(model: Module) -> Iterator[int]:
    """Routes the decoder blocks of T5 and mT5 in ``model`` around their modules within the block.

    Blocks may be nested, and other threads may use the model meanwhile. On the way out every module is as it was found.

    Yields:
        The number of blocks that were routed: 0 without the C++ extension, and for other models.
    """
    plans: list[_Plan] = []
    try:
        if _backends.extension() is not None:
            with _lock:
                found = (_add(block) for block in model.modules() if isinstance(block, _BLOCKS))
                plans.extend(plan for plan in found if plan is not None)
        yield len(plans)
    finally:
        with _lock:
            for plan in plans:
                _remove(plan)


def _add(block: Module) -> _Plan | None:
    plan = _plans.get(id(block))
    if plan is None:
        if not _is_eligible(block):
            return None
        plan = _plans[id(block)] = _Plan(block)
        block.__dict__["forward"] = types.MethodType(_block_forward, block)
    plan.users += 1
    return plan


def _remove(plan: _Plan) -> None:
    plan.users -= 1
    if plan.users:
        return
    del _plans[id(plan.block)]
    ours = plan.block.__dict__.get("forward")
    if isinstance(ours, types.MethodType) and ours.__func__ is _block_forward:
        del plan.block.__dict__["forward"]
