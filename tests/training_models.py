"""Tiny models and uneven data for the tests of training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY, PAD, EOS = 32, 0, 1
ARCHITECTURES = ("gpt2", "t5", "bart")
# One sequence without a pair of tokens, long and short ones together: no two cuts of it have equal counts.
LENGTHS = (10, 40, 3, 2, 22, 7, 16, 5)


def tiny_model(name: str, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The same weights on every call; biased, so that hinges are active."""
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS}
    if name == "gpt2":
        config = GPT2Config(
            **common, bos_token_id=EOS, n_positions=64, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        model = GPT2LMHeadModel(config)
    elif name == "t5":
        config = T5Config(
            **common, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=dropout,
            decoder_start_token_id=PAD,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    else:
        config = BartConfig(
            **common, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            dropout=dropout, bos_token_id=2, decoder_start_token_id=EOS, forced_eos_token_id=EOS,
        )  # fmt: skip
        model = BartForConditionalGeneration(config)
    return model.to(dtype)


def dataset(name: str, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        source = torch.randint(3, VOCABULARY, (4 + number,), generator=generator).tolist()
        rows.append({"input_ids": tokens if name == "gpt2" else source, "labels": tokens})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right, labels with -100."""

    def pad(sequences: list[list[int]], value: int) -> Tensor:
        longest = max(map(len, sequences))
        return torch.tensor([row + [value] * (longest - len(row)) for row in sequences])

    inputs = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(inputs, PAD),
        "attention_mask": pad([[1] * len(row) for row in inputs], 0),
        "labels": pad([row["labels"] for row in rows], -100),
    }


def collate_for_compute_loss(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """With the decoder's inputs, shifted to the right, as `DataCollatorForSeq2Seq(model=...)` makes them."""
    batch = collate(rows)
    shifted = batch["labels"].roll(1, dims=1).masked_fill(batch["labels"].roll(1, dims=1).eq(-100), PAD)
    shifted[:, 0] = PAD
    return batch | {"decoder_input_ids": shifted}
