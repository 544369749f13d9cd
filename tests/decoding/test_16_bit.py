"""Models of 16 bits on the CPU: our step is as close to float64, from the same weights, as the model's own modules."""

from __future__ import annotations

import pytest
import torch
import transformers

from simctg_fast.decoding.report import recall

from ..decoding_models import build, decode, draw, prompt

TYPES = [torch.bfloat16, torch.float16]
NEW, BATCH, SEEDS = 8, 4, 9  # 288 positions, of as many texts as tell the error of an encoder


def forward(model, ids, sequences, new):
    """Logits ``(B, new, V)`` of the model's own modules, without a cache, for the last ``new`` tokens."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            logits = model(input_ids=ids, decoder_input_ids=sequences[:, :-1], use_cache=False).logits
        else:
            logits = model(sequences[:, :-1], use_cache=False).logits
    return logits[:, -new:].double()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "bloom", "mamba", "bart", "mbart", "t5"])
def test_as_close_as_the_models_own_modules(name, dtype):
    ours, theirs, behind = [], [], []
    for seed in range(SEEDS):
        model = build(name, seed=seed, std=0.2).to(dtype)
        ids = prompt(BATCH, seed=seed)
        out = decode(
            model, {"input_ids": ids}, new_tokens=NEW, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert recall(model).path == ("reorder" if name in ("bloom", "mamba") else "shared_prefix")
        logits = torch.stack(out.logits, dim=1).double()
        plain = forward(model, ids, out.sequences, logits.shape[1])
        exact = forward(model.double(), ids, out.sequences, logits.shape[1])
        ours.append((logits - exact).flatten())
        theirs.append((plain - exact).flatten())
        # A candidate is one of the four most probable, but for what tokens within the rounding make of that.
        chosen = exact.gather(-1, out.sequences[:, -logits.shape[1] :, None]).squeeze(-1)
        behind.append((exact.topk(4).values[..., -1] - chosen).max().item())
    own, modules = (torch.cat(errors).square().mean().sqrt().item() for errors in (ours, theirs))
    largest = max(error.abs().max().item() for error in ours)
    assert own <= 1.05 * modules, (own, modules)
    assert max(behind) <= 2 * largest


def cpmant():
    config = transformers.CpmAntConfig(
        vocab_size=98, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2,
        prompt_length=16, position_bias_num_buckets=16, position_bias_max_distance=64,
    )  # fmt: skip
    return draw(transformers.CpmAntForCausalLM(config), 0.05)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_that_sees_ahead_is_not_recomputed(dtype, rows):
    """CPM-Ant's attention has no direction: the whole text again is something else than the step with its cache, by
    less than what rounding is allowed."""
    model, ids = cpmant().to(dtype), prompt(rows)
    with pytest.raises(ValueError, match="uncached: in a whole text its positions see later ones"):
        decode(model, {"input_ids": ids}, new_tokens=NEW)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bart", "t5"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_text_that_does_not_is_recomputed(name, dtype):
    model = build(name, std=0.2).to(dtype)
    decode(model, {"input_ids": prompt(2)}, new_tokens=2, path="uncached")
