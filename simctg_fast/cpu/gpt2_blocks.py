"""The blocks of GPT-2, see :mod:`.blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Dropout, LayerNorm, Module
from transformers.activations import NewGELUActivation
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from ..ops.block_layers import linear_feed_forward, norm_linears
from .blocks import ACTS, CurrentStep, Family, Plan, forwards_of, has_sizes, is_made_of, is_own_cache
from .forwards import here

_PARTS = forwards_of(
    *(gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP, Conv1D, LayerNorm, Dropout, NewGELUActivation),
    *ACTS,
)


class _Plan(Plan):
    known = Plan.known | {"position_ids"}

    def __init__(self, block: Any, current_step: CurrentStep):
        attention, mlp = block.attn, block.mlp
        super().__init__(
            block,
            current_step,
            (block.ln_1, block.ln_2),
            (attention.c_attn, attention.c_proj, mlp.c_fc, mlp.c_proj),
            mlp.act,
        )
        self.attention = attention


def _is_eligible(block: Any) -> bool:
    if not is_made_of(block, _PARTS) or hasattr(block, "crossattention") or type(block.mlp.act) not in ACTS:
        return False
    attention, mlp, width = block.attn, block.mlp, block.attn.embed_dim
    between = mlp.c_fc.weight.shape[-1]
    return (
        attention.num_heads * attention.head_dim == width
        and block.ln_1.normalized_shape == block.ln_2.normalized_shape == (width,)
        and has_sizes(attention.c_attn, width, 3 * width)
        and has_sizes(attention.c_proj, width, width)
        and has_sizes(mlp.c_fc, width, between)
        and has_sizes(mlp.c_proj, between, width)
    )


def _block_forward(self: Module, hidden_states: Tensor, *args: Any, **arguments: Any) -> Tensor:
    use, step, call = here(self), None, None
    if use is not None and len(args) == 3:  # as the model calls its blocks
        plan: _Plan = use.value
        cache, mask, encoder_hidden_states = args
        step = plan.current_step()
        if step is not None and is_own_cache(cache) and encoder_hidden_states is None:
            call = plan.begin(hidden_states, arguments)
    if step is None or call is None:
        return type(self).forward(self, hidden_states, *args, **arguments)
    (joined, projection, inner, outer), (first_norm, second_norm) = call.layers, call.norms
    attention = plan.attention
    # One position a row: (rows, heads, 1, dim) without a transposition.
    states = hidden_states.new_empty((len(hidden_states), 3, attention.num_heads, 1, attention.head_dim))
    norm_linears(hidden_states, first_norm, [joined], [states])
    query, new_key, new_value = states.unbind(1)
    key, value = cache.update(new_key, new_value, attention.layer_idx)
    out, _ = step.attend(attention, query, key, value, mask, scaling=attention.scaling)
    return linear_feed_forward(out.contiguous(), projection, hidden_states, second_norm, inner, None, plan.act, outer)


FAMILY = Family((gpt2.GPT2Block,), _is_eligible, _Plan, _block_forward)
