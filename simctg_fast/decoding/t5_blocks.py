"""The decoder blocks of T5 and mT5 in a step of ours, without the two dozen module calls that each of them is made of.

With few rows a block's own Python takes as long as a third of its arithmetic. :func:`fast_t5_blocks` gives the blocks a
``forward`` that calls the same kernels in the same order, on the same weights, and so writes the same bits. Each call
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
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.mt5 import modeling_mt5 as mt5
from transformers.models.t5 import modeling_t5 as t5

from ..ops import _backends
from ..ops.rms_norm import run_kernel as run_rms_norm
from .linear_swap import has_own_forward, is_plain_eager, linear_forward
from .prefix_cache import CACHE_NAME
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
# Arguments under which a block does what it always does.
_HARMLESS = frozenset({CACHE_NAME, "use_cache", "return_dict"})

_lock = threading.RLock()
_plans: dict[int, _Plan] = {}  # by id(block)


class _Plan:
    """A block's parts, found once for a ``with`` block."""

    def __init__(self, block: Module):
        self.block, self.users = block, 0
        own, cross, last = block.layer
        self.attention, self.cross, self.dense = own.SelfAttention, cross.EncDecAttention, last.DenseReluDense
        self.norms = (own.layer_norm, cross.layer_norm, last.layer_norm)
        self.gated = hasattr(self.dense, "wi_1")
        self.act = self.dense.act
        self.parts = list(block.modules())

    def takes(self, hidden_states: Any, arguments: dict[str, Any]) -> bool:
        """Whether what a call brings, and the block as it is now, are what the kernels are for."""
        if type(hidden_states) is not Tensor or hidden_states.dtype is not torch.float32 or not hidden_states.is_cpu:
            return False
        if torch.is_grad_enabled() or not hidden_states.is_contiguous() or hidden_states.shape[1] != 1:
            return False
        if any(not (value is None or value is False or name in _HARMLESS) for name, value in arguments.items()):
            return False
        for part in self.parts:
            if part.training or (part is not self.block and (part._forward_hooks or part._forward_pre_hooks)):
                return False
        return is_plain_eager() and all(
            norm.weight.dtype is torch.float32 and norm.weight.is_cpu for norm in self.norms
        )


def _is_eligible(block: Module) -> bool:
    """Whether the block is made of what transformers makes it of, nothing of it replaced or wrapped."""
    if not block.is_decoder or "forward" in block.__dict__:
        return False
    act = getattr(getattr(block.layer[-1], "DenseReluDense", None), "act", None)
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
        return type(self).forward(  # type: ignore[no-any-return]
            self,
            hidden_states,
            attention_mask,
            position_bias,
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_decoder_position_bias,
            **arguments,
        )
    hidden_states, position_bias = _attend(plan, step, hidden_states, attention_mask, position_bias, cache, own=True)
    hidden_states, cross_bias = _attend(
        plan, step, hidden_states, encoder_attention_mask, encoder_decoder_position_bias, cache, own=False
    )
    normed, dense = _norm(plan.norms[2], hidden_states), plan.dense
    if plan.gated:
        inner = plan.act(linear_forward(dense.wi_0, normed)).mul_(linear_forward(dense.wi_1, normed))
    elif type(plan.act) is ReLU:
        inner = linear_forward(dense.wi, normed).relu_()
    else:
        inner = plan.act(linear_forward(dense.wi, normed))
    return linear_forward(dense.wo, inner).add_(hidden_states), position_bias, cross_bias


_block_forward.__name__ = "forward"  # so that a pickled block names its class's own


def _norm(norm: Module, x: Tensor) -> Tensor:
    return run_rms_norm(x, norm.weight, norm.variance_epsilon)


def _attend(
    plan: _Plan,
    step: SharedPrefixStep,
    hidden_states: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    cache: EncoderDecoderCache,
    *,
    own: bool,
) -> tuple[Tensor, Tensor]:
    """Self-attention or cross-attention with what comes before and behind it: the new hidden states and the bias."""
    attention, index = (plan.attention, 0) if own else (plan.cross, 1)
    rows, heads, dim = hidden_states.shape[0], attention.n_heads, attention.key_value_proj_dim
    normed = _norm(plan.norms[index], hidden_states)
    # One position a row: (rows, heads, 1, dim) without a transposition.
    query = linear_forward(attention.q, normed).view(rows, heads, 1, dim)
    if own:
        seen = cache.self_attention_cache.get_seq_length(attention.layer_idx)
        new = (linear_forward(attention.k, normed), linear_forward(attention.v, normed))
        key, value = cache.self_attention_cache.update(
            new[0].view(rows, heads, 1, dim), new[1].view(rows, heads, 1, dim), attention.layer_idx
        )
    else:
        seen, layer = 0, cache.cross_attention_cache.layers[attention.layer_idx]
        key, value = layer.keys, layer.values
    if bias is None and attention.has_relative_attention_bias:
        bias = attention.compute_bias(1, key.shape[-2], device=query.device, past_seen_tokens=seen)
    elif bias is None:
        bias = query.new_zeros((1, heads, 1, key.shape[-2]))
    out, _ = step.attend(attention, query, key, value, mask, scaling=attention.scaling, position_bias=bias)
    return linear_forward(attention.o, out.view(rows, 1, heads * dim)).add_(hidden_states), bias


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
                for block in model.modules():
                    if isinstance(block, _BLOCKS) and (plan := _add(block)) is not None:
                        plans.append(plan)
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
