"""The decoder layers of Llama, Mistral and Qwen2, see :mod:`.blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Linear, Module
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from .blocks import ACTS, CACHE_NAME, CurrentStep, Family, forwards_of, has_sizes, is_made_of
from .decoder_blocks import BlockPlan
from .forwards import here

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


class _Plan(BlockPlan):
    known = BlockPlan.known | {"attention_mask", "position_embeddings", "position_ids"}

    def __init__(self, block: Any, current_step: CurrentStep):
        attention, mlp = block.self_attn, block.mlp
        super().__init__(
            block,
            current_step,
            norms=(block.input_layernorm, block.post_attention_layernorm),
            attention=attention,
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            output=attention.o_proj,
            feed_forward=(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
            act=mlp.act_fn,
            heads=len(attention.q_proj.weight) // attention.head_dim,
            kv_heads=len(attention.k_proj.weight) // attention.head_dim,
            turned=True,
        )


def _is_eligible(block: Any) -> bool:
    module, *functions = _ROTATIONS[type(block).__module__]
    if functions != [module.apply_rotary_pos_emb, module.rotate_half]:
        return False
    if not is_made_of(block, _PARTS) or type(block.mlp.act_fn) not in ACTS:
        return False
    attention, mlp = block.self_attn, block.mlp
    width, dim, between = block.input_layernorm.weight.numel(), attention.head_dim, len(mlp.gate_proj.weight)
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
        and has_sizes(mlp.gate_proj, width, between)
        and has_sizes(mlp.up_proj, width, between)
        and has_sizes(mlp.down_proj, between, width)
    )


def _layer_forward(self: Module, hidden_states: Tensor, *args: Any, **arguments: Any) -> Tensor:
    use, out = here(self), None
    if use is not None and not args:  # as the model calls its layers
        cache, mask, turns = (arguments.get(name) for name in (CACHE_NAME, "attention_mask", "position_embeddings"))
        out = use.value.run(hidden_states, cache, mask, turns, arguments)
    return type(self).forward(self, hidden_states, *args, **arguments) if out is None else out


FAMILY = Family(
    (llama.LlamaDecoderLayer, mistral.MistralDecoderLayer, qwen2.Qwen2DecoderLayer),
    _is_eligible,
    _Plan,
    _layer_forward,
    forwards_of(llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model),
)
