"""The blocks of GPT-2, see :mod:`.blocks`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Dropout, LayerNorm, Module
from transformers.activations import NewGELUActivation
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from .blocks import ACTS, CurrentStep, Family, forwards_of, has_sizes, is_made_of
from .decoder_blocks import BlockPlan
from .forwards import here

_PARTS = forwards_of(
    *(gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP, Conv1D, LayerNorm, Dropout, NewGELUActivation),
    *ACTS,
)


class _Plan(BlockPlan):
    known = BlockPlan.known | {"position_ids"}

    def __init__(self, block: Any, current_step: CurrentStep):
        attention, mlp = block.attn, block.mlp
        super().__init__(
            block,
            current_step,
            norms=(block.ln_1, block.ln_2),
            attention=attention,
            projections=(attention.c_attn,),
            output=attention.c_proj,
            feed_forward=(mlp.c_fc, None, mlp.c_proj),
            act=mlp.act,
            heads=attention.num_heads,
            kv_heads=attention.num_heads,
            turned=False,
        )


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
    use, out = here(self), None
    if use is not None and len(args) == 3 and args[2] is None:  # as the model calls its blocks, and with no encoder
        cache, mask, _ = args
        out = use.value.run(hidden_states, cache, mask, None, arguments)
    return type(self).forward(self, hidden_states, *args, **arguments) if out is None else out


FAMILY = Family((gpt2.GPT2Block,), _is_eligible, _Plan, _block_forward, forwards_of(gpt2.GPT2Model))
