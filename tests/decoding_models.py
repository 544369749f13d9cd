"""Tiny random models, prompts and a tokenizer for the tests of decoding."""

from __future__ import annotations

import functools

import torch
import transformers

VOCABULARY = 98  # three special tokens and the printable ASCII characters
PAD = 0

_TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # a tied model repeats its last word
}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# name -> (class of transformers, its configuration, what the tests need different from the others)
_MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 6}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _LLAMA
        | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0}
        | {"attn_implementation": "eager"},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("MBartForConditionalGeneration", "MBartConfig", _BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
}


def build(name: str, seed: int = 0, std: float = 0.4, **overrides) -> transformers.PreTrainedModel:
    """A new model in evaluation mode whose weights are large enough for its tokens to vary."""
    model_class, config_class, options = _MODELS[name]
    options = _TOKENS | options | overrides
    attention = options.pop("attn_implementation", None)
    config = getattr(transformers, config_class)(**options)
    if attention is not None:
        config._attn_implementation = attention
    return draw(getattr(transformers, model_class)(config), std, seed)


def draw(model: transformers.PreTrainedModel, std: float = 0.4, seed: int = 0) -> transformers.PreTrainedModel:
    """``model`` in evaluation mode, its weights drawn so that they matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                # Rows that sum to zero: the mean of an activation must not push every position the same way.
                parameter.copy_(std * (noise - noise.mean(dim=-1, keepdim=True)))
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


@functools.cache
def shared(name: str) -> transformers.PreTrainedModel:
    """`build(name)`, made once for all tests. None may change it; that decoding does not is itself tested."""
    return build(name)


def prompt(batch: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids ``(batch, length)`` without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` of rows with these numbers of real tokens, padded on the left."""
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, ids.shape[1] - length :] = 1
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def inputs_for(model: transformers.PreTrainedModel, batch: int = 1, length: int = 9) -> dict[str, torch.Tensor]:
    """Keyword arguments of ``generate``, padded where there is more than one row."""
    if batch == 1:
        ids = prompt(1, length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = left_padded(*range(length, length - batch, -1))
    if model.config.is_encoder_decoder:
        padded = {key: value.flip(1) for key, value in padded.items()}
    return padded


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One printable ASCII character a token, after ``<pad>``, ``<bos>`` and ``<eos>``."""
    from tokenizers import Tokenizer, decoders, models

    characters = {chr(32 + index): index + 3 for index in range(VOCABULARY - 3)}
    core = Tokenizer(models.BPE({"<pad>": 0, "<bos>": 1, "<eos>": 2} | characters, merges=[]))
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def decode(model, inputs: dict, *, path: str = "auto", penalty_alpha=0.6, top_k=4, new_tokens=12, **kwargs):
    """``generate`` by contrastive search on one of its paths, for exactly ``new_tokens`` tokens unless they end."""
    from simctg_fast import ContrastiveSearch

    strategy = ContrastiveSearch(penalty_alpha, top_k, path=path)
    return model.generate(**inputs, custom_generate=strategy, max_new_tokens=new_tokens, do_sample=False, **kwargs)


def greedy(model, inputs: dict, *, new_tokens=12, **kwargs):
    """``generate`` by transformers' own greedy search."""
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **kwargs)
