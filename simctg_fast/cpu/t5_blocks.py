"""The decoder blocks of T5 and mT5 in a step of ours, without the two dozen module calls that each of them is made of.

With few rows a block's own Python takes as long as a third of its arithmetic. :func:`fast_t5_blocks` gives the blocks a
``forward`` of five calls: the same kernels in the same order, on the same weights, and so the same bits. Each call
decides for itself: outside of a step over shared prefixes, in training, with hooks on a part of the block, or with
anything else than plain float32 layers on the CPU, the block's own forward runs. (A model that was once asked for
``output_attentions`` keeps transformers' hooks on its attentions, and so this forward.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Dropout, Embedding, Linear, Module, ModuleList, ReLU
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import NewGELUActivation
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.mt5 import modeling_mt5 as mt5
from transformers.models.t5 import modeling_t5 as t5

from ..ops import _backends
from ..ops.block_layers import Norm, feed_forward, linear_residual, norm_linears
from .forwards import Forwards, has_own_forward, here
from .modules import NativeLinear, is_plain, is_plain_eager

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
        *(Linear, Dropout, Embedding, ModuleList, ReLU, NewGELUActivation),
    )
}
_ACTS = {ReLU: "relu", NewGELUActivation: "gelu_tanh"}
_CACHE_NAME = next(n for n in ("past_key_values", "cache") if n in inspect.signature(t5.T5Block.forward).parameters)
# Arguments under which a block does what it always does.
_HARMLESS = frozenset({_CACHE_NAME, "use_cache", "return_dict"})
_AHEAD = 512  # positions for which a bias is made beyond those that are there


@dataclass(slots=True)
class _Call:
    """What one forward of a block works with."""

    layers: list[Any]  # as `_Plan.linears`
    norms: list[Norm]
    kept: list[Any]  # the tensors whose addresses the layers carry: another thread may replace them meanwhile


class _Plan:
    """A block's parts, found once for a ``with`` block, and how to ask for the step that is under way."""

    def __init__(self, block: Module, current_step: Callable[[], Any]):
        self.current_step = current_step
        attention, cross, dense = _parts(block)
        self.self_attention, self.cross_attention = attention, cross
        layers: Any = block.layer
        self.act = _ACTS[type(dense.act)]
        self.norms = [layer.layer_norm for layer in layers]
        self.width = self.norms[0].weight.numel()
        linears = [attention.q, attention.k, attention.v, attention.o, cross.q, cross.o, dense.wo, *_widening(dense)]
        self.linears = [NativeLinear(linear) for linear in linears]
        self.places = [(parent._modules, name, part) for parent in block.modules() for name, part in _children(parent)]
        self.bias: tuple[Tensor, Tensor] | None = None  # the weight it was made from, and the bias

    def begin(self, hidden_states: Any, arguments: dict[str, Any]) -> _Call | None:
        """None unless what the call brings, and the block as it is now, are what the kernels are for."""
        if torch.is_grad_enabled() or not is_plain(hidden_states, Tensor):
            return None
        rows, positions, width = hidden_states.shape
        if positions != 1 or width != self.width or not is_plain_eager() or _has_any_global_hook():
            return None
        if not all(value is None or value is False or name in _HARMLESS for name, value in arguments.items()):
            return None
        for siblings, name, part in self.places:
            if siblings.get(name) is not part or part.training or part._forward_hooks or part._forward_pre_hooks:
                return None
            if "forward" in part.__dict__ and not has_own_forward(part):
                return None
        norms = [(norm._parameters.get("weight"), norm.variance_epsilon) for norm in self.norms]
        states = [linear.current(rows) for linear in self.linears]
        if not all(is_plain(weight) and weight.shape == (width,) for weight, _ in norms) or None in states:
            return None
        return _Call([state[3] for state in states], norms, states)  # type: ignore[index]

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


def _children(parent: Module) -> list[tuple[str, Module]]:
    return [(name, part) for name, part in parent._modules.items() if part is not None]


def _is_eligible(block: Any) -> bool:
    """Whether the block is made of what transformers makes it of, nothing of it replaced or wrapped."""
    if not block.is_decoder:
        return False
    if any(_PARTS.get(type(part)) is not type(part).forward or not has_own_forward(part) for part in block.modules()):
        return False
    attention, cross, dense = _parts(block)
    if type(dense.act) not in _ACTS:
        return False
    (width, inner), between = attention.o.weight.shape, dense.wo.weight.shape[1]
    shapes = [(linear, (inner, width)) for linear in (attention.q, attention.k, attention.v, cross.q)]
    shapes += [(linear, (width, inner)) for linear in (attention.o, cross.o)]
    shapes += [(dense.wo, (width, between)), *((linear, (between, width)) for linear in _widening(dense))]
    return all(linear.weight.shape == shape for linear, shape in shapes) and all(
        each.n_heads * each.key_value_proj_dim == inner for each in (attention, cross)
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
    use, cache, step, call = here(self), arguments.get(_CACHE_NAME), None, None
    if use is not None:
        plan: _Plan = use.value
        step = plan.current_step()
        # Whether the encoder's keys and values are in the cache.
        filled = isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(plan.cross_attention.layer_idx)
        if step is not None and encoder_hidden_states is not None and filled:
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
    q, k, v, o, cross_q, cross_o, outer, inner, *gate = call.layers
    rows, attention, cross = hidden_states.shape[0], plan.self_attention, plan.cross_attention

    # One position a row: (rows, heads, 1, dim) without a transposition.
    shape = (rows, attention.n_heads, 1, attention.key_value_proj_dim)
    query, new_key, new_value = new = [hidden_states.new_empty(shape) for _ in range(3)]
    norm_linears(hidden_states, call.norms[0], [q, k, v], new)
    seen = cache.self_attention_cache.get_seq_length(attention.layer_idx)
    key, value = cache.self_attention_cache.update(new_key, new_value, attention.layer_idx)
    if position_bias is None and attention.has_relative_attention_bias:
        position_bias = plan.relative_bias(key.shape[-2], seen)
    out, position_bias = _attend(step, attention, query, key, value, attention_mask, position_bias)
    hidden_states = linear_residual(out, o, hidden_states)

    layer = cache.cross_attention_cache.layers[cross.layer_idx]
    query = hidden_states.new_empty((rows, cross.n_heads, 1, cross.key_value_proj_dim))
    norm_linears(hidden_states, call.norms[1], [cross_q], [query])
    out, cross_bias = _attend(
        step, cross, query, layer.keys, layer.values, encoder_attention_mask, encoder_decoder_position_bias
    )
    hidden_states = linear_residual(out, cross_o, hidden_states)

    hidden_states = feed_forward(hidden_states, call.norms[2], inner, gate[0] if gate else None, plan.act, outer)
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


@contextmanager
def fast_t5_blocks(model: Module, current_step: Callable[[], Any]) -> Iterator[int]:
    """Routes the decoder blocks of T5 and mT5 in ``model`` around their modules within the block.

    It holds for the thread that enters the block, and blocks may be nested. On the way out every module is as it was
    found.

    Args:
        current_step: says which forward over shared prefixes is under way in the calling thread, None where there is
            none; its ``attend`` is what the candidates attend with.

    Yields:
        The number of blocks that were routed: 0 without the C++ extension, and for other models.
    """
    blocks = [module for module in model.modules() if isinstance(module, _BLOCKS)]
    with Forwards() as forwards:
        routed = 0
        if _backends.extension() is not None:
            for block in blocks:
                if _is_eligible(block) and forwards.put(block, _block_forward, _Plan(block, current_step)) is not None:
                    routed += 1
        yield routed
