"""Plain PyTorch models as people write them: a GPT with a cache of its own, and a recurrent network."""

from __future__ import annotations

import math

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.keys = self.values = None

    def forward(self, x, input_pos, mask):
        batch, length, width = x.shape
        q, k, v = self.attn(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.keys is not None:
            self.keys[:batch, :, input_pos], self.values[:batch, :, input_pos] = k, v
            k, v = self.keys[:batch], self.values[:batch]
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf")).softmax(dim=-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class NanoGPT(nn.Module):
    """Decoder with learned positions and a static cache: ``logits = model(ids, input_pos)``."""

    def __init__(self, vocab_size: int, width: int, heads: int, layers: int, positions: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)
        self.positions, self.cached = positions, 0

    def setup_cache(self, batch: int, length: int) -> None:
        self.cached = length
        for block in self.blocks:
            shape = (batch, block.heads, length, self.wte.embedding_dim // block.heads)
            block.keys, block.values = torch.zeros(shape), torch.zeros(shape)

    def states(self, ids, input_pos, attention_mask=None):
        width = self.cached or len(input_pos)
        mask = torch.arange(width)[None] <= input_pos[:, None]  # (T, width)
        mask, positions = mask[None, None], input_pos[None]
        if attention_mask is not None:  # padding on the left: positions count real tokens
            real = torch.zeros(len(ids), width, dtype=torch.bool)
            real[:, : attention_mask.shape[1]] = attention_mask.bool()
            mask = mask & real[:, None, None]
            mask |= torch.eye(width, dtype=torch.bool)[input_pos]  # padding sees itself, not nothing
            positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, input_pos]
        x = self.wte(ids) + self.wpe(positions)
        for block in self.blocks:
            x = block(x, input_pos, mask)
        return self.ln_f(x)

    def forward(self, ids, input_pos, attention_mask=None):
        return self.head(self.states(ids, input_pos, attention_mask))


def nano_gpt_from(model) -> NanoGPT:
    """A `NanoGPT` with the weights of a ``GPT2LMHeadModel``."""
    config, source = model.config, model.state_dict()
    nano = NanoGPT(config.vocab_size, config.n_embd, config.n_head, config.n_layer, config.n_positions).eval()
    names = {"attn": "attn.c_attn", "proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    names |= {"ln_1": "ln_1", "ln_2": "ln_2"}
    weights = {"wte.weight": source["transformer.wte.weight"], "wpe.weight": source["transformer.wpe.weight"]}
    weights["head.weight"] = source["lm_head.weight"]
    for part in ("weight", "bias"):
        weights[f"ln_f.{part}"] = source[f"transformer.ln_f.{part}"]
        for layer in range(config.n_layer):
            for ours, theirs in names.items():
                value = source[f"transformer.h.{layer}.{theirs}.{part}"]
                weights[f"blocks.{layer}.{ours}.{part}"] = value.T if value.ndim == 2 else value  # Conv1D
    nano.load_state_dict(weights)
    return nano


class RecurrentNet(nn.Module):
    """A GRU language model: ``logits, state, hidden = model(ids, state)``."""

    def __init__(self, vocab_size: int, width: int, layers: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)
        self.gru = nn.GRU(width, width, layers, batch_first=True)

    def forward(self, ids, state):
        hidden, state = self.gru(self.embed(ids), state)
        return self.head(hidden), state, hidden

    @staticmethod
    def select(state, index):
        return state[:, index]  # (layers, B, width)
