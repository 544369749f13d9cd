"""The decoder blocks of T5 and mT5, see :mod:`.blocks`: the same bits as their modules over our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Embedding, Linear, Module, ModuleList
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.mt5 import modeling_mt5 as mt5
from transformers.models.t5 import modeling_t5 as t5

from ..ops.block_layers import linear_feed_forward, linear_residual, norm_linears
from .blocks import ACTS, CACHE_NAME, CurrentStep, Family, Plan, forwards_of, has_sizes, is_made_of
from .forwards import here

_BLOCKS = (t5.T5Block, mt5.MT5Block)
_PARTS = forwards_of(
    *_BLOCKS,
    *(t5.T5LayerSelfAttention, t5.T5LayerCrossAttention, t5.T5LayerFF, t5.T5Attention, t5.T5LayerNorm),
    *(t5.T5DenseActDense, t5.T5DenseGatedActDense),
    *(mt5.MT5LayerSelfAttention, mt5.MT5LayerCrossAttention, mt5.MT5LayerFF, mt5.MT5Attention, mt5.MT5LayerNorm),
    *(mt5.MT5DenseActDense, mt5.MT5DenseGatedActDense),
    *(Linear, Dropout, Embedding, ModuleList, *ACTS),
)
_AHEAD = 512  # positions for which a bias is made beyond those that are there


class _Plan(Plan):
    def __init__(self, block: Any, current_step: CurrentStep):
        attention, cross, dense = _parts(block)
        super().__init__(
            block,
            current_step,
            [layer.layer_norm for layer in block.layer],
            [attention.q, attention.k, attention.v, attention.o, cross.q, cross.o, dense.wo, *_widening(dense)],
            dense.act,
        )
        self.self_attention, self.cross_attention = attention, cross
        self.bias: tuple[Tensor, Tensor] | None = None  # the weight it was made from, and the bias

    def relative_bias(self, width: int, seen: int) -> Tensor:
        """``(1, H, 1, width)``, for a query behind ``seen`` keys."""
        attention: Any = self.self_attention
        weight = attention.relative_attention_bias.weight
        if width != seen + 1:
            return attention.compute_bias(1, width, device=weight.device, past_seen_tokens=seen)
        # It depends on the distance alone: the last `width` of a longer one, while the few weights are what they were.
        known = self.bias
        if known is None or known[1].shape[-1] < width or not torch.equal(known[0], weight):
            longest = width + _AHEAD
            bias = attention.compute_bias(1, longest, device=weight.device, past_seen_tokens=longest - 1)
            self.bias = known = (weight.detach().clone(), bias.contiguous())
        return known[1][..., -width:]


def _is_eligible(block: Any) -> bool:
    if not block.is_decoder or not is_made_of(block, _PARTS):
        return False
    attention, cross, dense = _parts(block)
    if type(dense.act) not in ACTS:
        return False
    (width, inner), between = attention.o.weight.shape, dense.wo.weight.shape[1]
    linears = [*(attention.q, attention.k, attention.v, attention.o, cross.q, cross.o), dense.wo, *_widening(dense)]
    sizes = [*[(width, inner)] * 3, (inner, width), (width, inner), (inner, width), (between, width)]
    sizes += [(width, between)] * len(_widening(dense))
    return (
        all(linear.bias is None and has_sizes(linear, *each) for linear, each in zip(linears, sizes, strict=True))
        and all(layer.layer_norm.weight.numel() == width for layer in block.layer)
        and all(each.n_heads * each.key_value_proj_dim == inner for each in (attention, cross))
    )


def _parts(block: Any) -> tuple[Any, Any, Any]:
    """Self-attention, cross-attention and the feed-forward part."""
    first, second, last = block.layer
    return first.SelfAttention, second.EncDecAttention, last.DenseReluDense


def _widening(dense: Any) -> list[Any]:
    return [dense.wi_0, dense.wi_1] if hasattr(dense, "wi_1") else [dense.wi]


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
    use, cache, step, call = here(self), arguments.get(CACHE_NAME), None, None
    if use is not None:
        plan: _Plan = use.value
        step = plan.current_step()
        # Whether the encoder's keys and values are in the cache.
        filled = isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(plan.cross_attention.layer_idx)
        clamped = hidden_states.dtype is torch.float16  # the block keeps infinite numbers out
        if step is not None and encoder_hidden_states is not None and filled and not clamped:
            call = plan.begin(hidden_states, arguments)
    if step is None or cache is None or call is None:
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
    (q, k, v, o, cross_q, cross_o, outer, inner, *gate), norms = call.layers, call.norms
    rows, attention, cross = hidden_states.shape[0], plan.self_attention, plan.cross_attention

    # One position a row: (rows, heads, 1, dim) without a transposition.
    shape = (rows, attention.n_heads, 1, attention.key_value_proj_dim)
    query, new_key, new_value = new = [hidden_states.new_empty(shape) for _ in range(3)]
    norm_linears(hidden_states, norms[0], [q, k, v], new)
    seen = cache.self_attention_cache.get_seq_length(attention.layer_idx)
    key, value = cache.self_attention_cache.update(new_key, new_value, attention.layer_idx)
    if position_bias is None and attention.has_relative_attention_bias:
        position_bias = plan.relative_bias(key.shape[-2], seen)
    out, position_bias = _attend(step, attention, query, key, value, attention_mask, position_bias)
    hidden_states = linear_residual(out, o, hidden_states)

    layer = cache.cross_attention_cache.layers[cross.layer_idx]
    query = hidden_states.new_empty((rows, cross.n_heads, 1, cross.key_value_proj_dim))
    norm_linears(hidden_states, norms[1], [cross_q], [query])
    out, cross_bias = _attend(
        step, cross, query, layer.keys, layer.values, encoder_attention_mask, encoder_decoder_position_bias
    )
    factor = gate[0] if gate else None
    hidden_states = linear_feed_forward(out, cross_o, hidden_states, norms[2], inner, factor, plan.act, outer)
    return hidden_states, position_bias, cross_bias


def _attend(
    step: Any,
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the candidates read, and the bias for the next block."""
    if bias is None:
        bias = query.new_zeros((1, attention.n_heads, 1, key.shape[-2]))
    out, _ = step.attend(attention, query, key, value, mask, scaling=attention.scaling, position_bias=bias)
    return out.contiguous(), bias


FAMILY = Family(_BLOCKS, _is_eligible, _Plan, _block_forward)
