"""The decoder layers of Llama, Mistral and Qwen2, see :mod:`.blocks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from ..ops.block_layers import linear_feed_forward, norm_linears
from .blocks import ACTS, CACHE_NAME, CurrentStep, Family, Plan, forwards_of, has_sizes, is_made_of, is_own_cache
from .forwards import here
from .modules import is_plain

_PARTS = forwards_of(
    *(llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm),
    *(mistral.MistralDecoderLayer, mistral.MistralAttention, mistral.MistralMLP, mistral.MistralRMSNorm),
    *(qwen2.Qwen2DecoderLayer, qwen2.Qwen2Attention, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    Linear,
    *ACTS,
)
# What their attentions call by name, and what it is now.
_ROTATIONS = {
    module.__name__: (module, module.apply_rotary_pos_emb, module.rotate_half) for module in (llama, mistral, qwen2)
}


class _Plan(Plan):
    known = Plan.known | {"attention_mask", "position_embeddings", "position_ids"}

    def __init__(self, block: Any, current_step: CurrentStep):
        attention, mlp = block.self_attn, block.mlp
        super().__init__(
            block,
            current_step,
            (block.input_layernorm, block.post_attention_layernorm),
            (*(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj), *_feed_forward(mlp)),
            mlp.act_fn,
        )
        self.attention = attention
        self.heads, self.kv_heads = (len(p.weight) // attention.head_dim for p in (attention.q_proj, attention.k_proj))


def _is_eligible(block: Any) -> bool:
    module, *functions = _ROTATIONS[type(block).__module__]
    if functions != [module.apply_rotary_pos_emb, module.rotate_half]:
        return False
    if not is_made_of(block, _PARTS) or type(block.mlp.act_fn) not in ACTS:
        return False
    attention, (inner, gate, outer) = block.self_attn, _feed_forward(block.mlp)
    width, dim, between = block.input_layernorm.weight.numel(), attention.head_dim, len(inner.weight)
    own, shared = len(attention.q_proj.weight), len(attention.k_proj.weight)
    return (
        own % dim == 0
        and shared % dim == 0
        and dim % 2 == 0
        and block.post_attention_layernorm.weight.shape == (width,)
        and has_sizes(attention.q_proj, width, own)
        and has_sizes(attention.k_proj, width, shared)
        and has_sizes(attention.v_proj, width, shared)
        and has_sizes(attention.o_proj, own, width)
        and has_sizes(inner, width, between)
        and has_sizes(gate, width, between)
        and has_sizes(outer, between, width)
    )


def _feed_forward(mlp: Any) -> tuple[Any, Any, Any]:
    """What the activation is of, its factor, and what comes behind."""
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _are_turns(embeddings: Any, dtype: torch.dtype, rows: int, dim: int) -> bool:
    """Whether they are cosines and sines of one position a row, for whole heads."""
    for each in embeddings:
        if not is_plain(each, Tensor) or each.dtype is not dtype or each.shape not in ((1, 1, dim), (rows, 1, dim)):
            return False
    return len(embeddings) == 2 and embeddings[0].shape == embeddings[1].shape


def _layer_forward(self: Module, hidden_states: Tensor, *args: Any, **arguments: Any) -> Tensor:
    use, step, call = here(self), None, None
    if use is not None and not args:  # as the model calls its layers
        plan: _Plan = use.value
        cache: Any
        cache, turns = arguments.get(CACHE_NAME), arguments.get("position_embeddings")
        step = plan.current_step()
        if step is not None and is_own_cache(cache) and type(turns) is tuple:
            call = plan.begin(hidden_states, arguments)
    if (
        step is None
        or call is None
        or not _are_turns(turns, hidden_states.dtype, len(hidden_states), plan.attention.head_dim)
    ):
        return type(self).forward(self, hidden_states, *args, **arguments)
    (q, k, v, projection, inner, gate, outer), (first_norm, second_norm) = call.layers, call.norms
    rows, attention = len(hidden_states), plan.attention
    # One position a row: (rows, heads, 1, dim) without a transposition.
    query = hidden_states.new_empty((rows, plan.heads, 1, attention.head_dim))
    new_key, new_value = hidden_states.new_empty((2, rows, plan.kv_heads, 1, attention.head_dim)).unbind()
    norm_linears(hidden_states, first_norm, [q, k, v], [query, new_key, new_value], turns)
    key, value = cache.update(new_key, new_value, attention.layer_idx)
    out, _ = step.attend(attention, query, key, value, arguments.get("attention_mask"), scaling=attention.scaling)
    return linear_feed_forward(out.contiguous(), projection, hidden_states, second_norm, inner, gate, plan.act, outer)


FAMILY = Family(
    (llama.LlamaDecoderLayer, mistral.MistralDecoderLayer, qwen2.Qwen2DecoderLayer), _is_eligible, _Plan, _layer_forward
)
