"""The models of the zoo: two or three layers, a vocabulary of 128, every feature of their architecture switched on.

Configurations are spelled so that transformers 4 and 5 read them alike. What an architecture is here to show is made to
matter: windows are shorter than the prompts, soft caps sit where they bite, biases and sinks are drawn like weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from . import weights

VOCABULARY = 128
PAD, BOS = 0, 1
WINDOW = 8  # sliding windows: shorter than every prompt but the padded ones

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None}
# Grouped-query attention: four query heads on two key/value heads.
_GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_HEADS = {key: value for key, value in _GROUPED.items() if key != "num_key_value_heads"}


@dataclass(frozen=True)
class Architecture:
    """One entry of the zoo.

    Attributes:
        config: configuration class of transformers and its arguments.
        model: model class of transformers.
        oracle: whether transformers 4.55.4 can run contrastive search on it.
        kind: what it reads: `text`, `text-to-text`, `speech` or `image-text`.
        std: standard deviation of the weights, and by part of a parameter's name where another serves better.
        cache_implementation: passed to `generate`, for the caches that are not the default one.
        own_head: gives the model an output matrix of its own, where transformers 5 ties it whatever the configuration
            says (a checkpoint that holds both, as mT5's do, is loaded untied).
    """

    name: str
    config: tuple[str, dict[str, Any]]
    model: str
    oracle: bool = True
    kind: str = "text"
    std: float = 0.35
    stds: dict[str, float] = field(default_factory=dict)
    cache_implementation: str | None = None
    own_head: bool = False

    @property
    def is_encoder_decoder(self) -> bool:
        return self.kind in ("text-to-text", "speech")


def _causal(name: str, prefix: str, *, oracle: bool = True, **config: Any) -> Architecture:
    options = {key: config.pop(key) for key in ("std", "stds", "cache_implementation") if key in config}
    config_class = config.pop("config_class", f"{prefix}Config")
    model_class = config.pop("model_class", f"{prefix}ForCausalLM")
    return Architecture(name, (config_class, _TOKENS | config), model_class, oracle, **options)


def _seq2seq(name: str, prefix: str, sizes: dict[str, Any], config: dict[str, Any]) -> Architecture:
    options = {key: config.pop(key) for key in ("stds", "own_head") if key in config}
    arguments = _TOKENS | sizes | config
    model_class = f"{prefix}ForConditionalGeneration"
    return Architecture(name, (f"{prefix}Config", arguments), model_class, kind="text-to-text", **options)


def _bart_like(name: str, prefix: str, **config: Any) -> Architecture:
    sizes = {
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 512,
        "decoder_start_token_id": BOS,
        "forced_eos_token_id": None,
    }
    return _seq2seq(name, prefix, sizes, config)


def _t5_like(name: str, prefix: str, **config: Any) -> Architecture:
    sizes = {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 24,
        "decoder_start_token_id": BOS,
    }
    return _seq2seq(name, prefix, sizes, config)


_SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 32,
}

_ENTRIES = (
    # What transformers 4.55.4 can do as well.
    _causal("gpt2", "GPT2", model_class="GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=512),
    _causal(
        "opt",
        "OPT",
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=64,
    ),
    _causal(
        "opt_project_out",
        "OPT",
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
    _causal("llama", "Llama", **_GROUPED, attention_bias=True, mlp_bias=True),
    _causal("qwen2", "Qwen2", **_GROUPED),
    _causal("qwen2_window", "Qwen2", **_GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    _causal("qwen3", "Qwen3", **_GROUPED, head_dim=16, attention_bias=True),
    _causal("mistral", "Mistral", **_GROUPED, sliding_window=None),
    _causal("mistral_window", "Mistral", **_GROUPED, sliding_window=WINDOW),
    _causal("mixtral", "Mixtral", **_GROUPED, sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    _causal("gpt_neox", "GPTNeoX", **_HEADS, rotary_pct=0.5, attention_bias=True),
    _causal("phi", "Phi", **_GROUPED, partial_rotary_factor=0.5),
    _causal("phi3", "Phi3", **_GROUPED, sliding_window=None),
    _causal("gemma", "Gemma", **_GROUPED | {"tie_word_embeddings": True}, head_dim=16, attention_bias=True),
    _causal("olmo2", "Olmo2", **_GROUPED, attention_bias=True, stds={"embed_tokens": 1.0}),
    _causal("bloom", "Bloom", hidden_size=64, n_layer=2, n_head=4, tie_word_embeddings=False),
    _causal(
        "falcon",
        "Falcon",
        **_HEADS | {"tie_word_embeddings": True},
        alibi=False,
        bias=True,
        multi_query=False,
        new_decoder_architecture=True,
        num_kv_heads=2,
        parallel_attn=True,
    ),
    _causal("falcon_alibi", "Falcon", **_HEADS, alibi=True, bias=True, multi_query=True, parallel_attn=False),
    _causal("gptj", "GPTJ", n_embd=64, n_layer=2, n_head=4, n_positions=512, rotary_dim=8),
    _causal(
        "gpt_neo",
        "GPTNeo",
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=512,
        intermediate_size=96,
    ),
    _t5_like("t5", "T5", feed_forward_proj="relu", stds={"shared": 1.2}),
    _t5_like("mt5", "MT5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, own_head=True),
    _bart_like("bart", "Bart", d_model=128, encoder_layers=1),
    _bart_like("mbart", "MBart"),
    _bart_like("pegasus", "Pegasus"),
    # What only the float64 reference can judge.
    _causal(
        "gemma2",
        "Gemma2",
        oracle=False,
        **_GROUPED,
        head_dim=16,
        attention_bias=True,
        sliding_window=WINDOW,
        query_pre_attn_scalar=40,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=8.0,
    ),
    _causal(
        "gemma3",
        "Gemma3",
        config_class="Gemma3TextConfig",
        oracle=False,
        **_GROUPED | {"num_hidden_layers": 3},
        head_dim=16,
        attention_bias=True,
        sliding_window=WINDOW,
        query_pre_attn_scalar=40,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    _causal(
        "gpt_oss",
        "GptOss",
        oracle=False,
        **_GROUPED,
        head_dim=16,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    _causal("mpt", "Mpt", oracle=False, d_model=64, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=512),
    _causal(
        "xglm",
        "XGLM",
        oracle=False,
        d_model=64,
        num_layers=2,
        attention_heads=4,
        ffn_dim=96,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        stds={"embed_tokens": 2.0},
    ),
    _causal("mamba", "Mamba", oracle=False, hidden_size=64, state_size=8, num_hidden_layers=2, use_bias=True),
    _causal(
        "mamba2",
        "Mamba2",
        oracle=False,
        hidden_size=64,
        state_size=8,
        num_hidden_layers=2,
        expand=2,
        num_heads=8,
        head_dim=16,
        n_groups=2,
        chunk_size=16,
        use_bias=True,
    ),
    _causal(
        "bamba",
        "Bamba",
        oracle=False,
        **_GROUPED,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_expand=2,
        mamba_chunk_size=16,
        mamba_proj_bias=True,
    ),
    _causal(
        "lfm2",
        "Lfm2",
        oracle=False,
        **_GROUPED,
        conv_bias=True,
        conv_L_cache=3,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    _causal("llama_static", "Llama", oracle=False, **_GROUPED, attention_bias=True, cache_implementation="static"),
    Architecture(
        "whisper",
        (
            "WhisperConfig",
            _TOKENS
            | {
                "num_mel_bins": 8,
                "d_model": 128,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "max_source_positions": 20,
                "max_target_positions": 128,
                "decoder_start_token_id": BOS,
                "suppress_tokens": None,
                "begin_suppress_tokens": None,
            },
        ),
        "WhisperForConditionalGeneration",
        oracle=False,
        kind="speech",
    ),
    Architecture(
        "llava",
        (
            "LlavaConfig",
            {
                "vision_config": {"model_type": "clip_vision_model"} | _SMALL_VISION,
                "text_config": {"model_type": "llama", "attention_bias": True} | _TOKENS | _GROUPED,
                "image_token_id": VOCABULARY - 1,
                "vision_feature_layer": -1,
                "tie_word_embeddings": False,
            },
        ),
        "LlavaForConditionalGeneration",
        oracle=False,
        kind="image-text",
    ),
    Architecture(
        "qwen2_vl",
        (
            "Qwen2VLConfig",
            {
                "vision_config": {
                    "depth": 1,
                    "embed_dim": 32,
                    "num_heads": 2,
                    "hidden_size": 64,
                    "mlp_ratio": 2,
                    "patch_size": 4,
                    "spatial_merge_size": 2,
                    "temporal_patch_size": 2,
                },
                "text_config": _TOKENS
                | _GROUPED
                | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
                "image_token_id": VOCABULARY - 1,
                "video_token_id": VOCABULARY - 2,
                "vision_start_token_id": VOCABULARY - 3,
                "vision_end_token_id": VOCABULARY - 4,
                "tie_word_embeddings": False,
            },
        ),
        "Qwen2VLForConditionalGeneration",
        oracle=False,
        kind="image-text",
    ),
)

ARCHITECTURES: dict[str, Architecture] = {entry.name: entry for entry in _ENTRIES}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    """The model of that name with the weights of that seed, in evaluation mode and with eager attention.

    Args:
        name: a key of `ARCHITECTURES`.
        seed: any integer; weights of different seeds have nothing in common.
        dtype: weights are drawn in float32 and then converted, so that float64 holds the very same numbers.
        overrides: arguments of the configuration to use instead of the zoo's; weights stay as they are.
    """
    import transformers

    entry = ARCHITECTURES[name]
    config_class, arguments = entry.config
    config = getattr(transformers, config_class)(**arguments | overrides)
    # Mixture-of-experts layers otherwise pick a fused kernel, which has no float64.
    options = {"experts_implementation": "eager"} if hasattr(config, "num_local_experts") else {}
    model_class = getattr(transformers, entry.model)
    model = model_class._from_config(config, attn_implementation="eager", **options)
    if entry.own_head:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    weights.fill(model, seed, entry.std, entry.stds)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD, bos_token_id=BOS, decoder_start_token_id=BOS if entry.is_encoder_decoder else None
    )
    return model.to(dtype).eval()
