"""A small model of any class: the sizes of its configuration made small by their names."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from parity_zoo.weights import fill

VOCABULARY, WINDOW, LAYERS, WIDTH, HEADS = 96, 4, 2, 32, 4
IMAGE, PATCH = 8, 4
STD = {torch.float32: 0.35, torch.bfloat16: 0.2, torch.float16: 0.2}  # the larger, the more is made of rounding
MOST_PARAMETERS = 30_000_000
IMAGE_TOKEN, VIDEO_TOKEN, AUDIO_TOKEN = 90, 91, 92


class NotBuiltError(Exception):
    """The generic rules do not make a small model of this class."""


# The first pattern that a field's whole name fits decides. A callable gets the default value.
_RULES: list[tuple[str, Any]] = [
    (r"(t2u_|text_|char_|unpadded_)?vocab_size(_per_layer_input)?|audio_vocab_size|text_vocab_size", VOCABULARY),
    (r"(additional|extra)_vocab_size", lambda v: min(v, 4)),
    (r"pad_token_id|padding_idx|pad_index", 0),
    (r"bos_token_id|bos_index", 1),
    (r"eos_token_id|eos_index", 2),
    (r"decoder_start_token_id", 1),
    (r"forced_(bos|eos)_token_id|suppress_tokens|begin_suppress_tokens", None),
    (r"(image|img)_token_(id|index)|image_patch_id", IMAGE_TOKEN),
    (r"video_token_(id|index)", VIDEO_TOKEN),
    (r"(audio|speech)_token_(id|index)", AUDIO_TOKEN),
    (r"tie_word_embeddings|tie_encoder_decoder", False),
    (r"(kv|q|o)_lora_rank", lambda v: 16 if v else v),
    (r"qk_rope_head_dim|index_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"qk_head_dim", 16),
    (r"index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"index_topk", 4),
    (r"(num_|n_)?(routed_|local_)?experts|moe_num_experts|n_routed_experts|num_local_experts", lambda v: 4 if v else v),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|num_selected_experts", lambda v: 2 if v else v),
    (r"n_group|topk_group|n_groups|mamba_n_groups|ssm_n_groups", 1),
    (r"first_k_dense_replace", lambda v: min(v, 1)),
    (r"attn_layer_period|expert_layer_period", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"sliding_window(_size)?|attention_window(_size)?|keep_window_size|attention_chunk_size|local_attention|"
     r"local_attention_window_len|"
     r"swa_window_size|window_size", lambda v: WINDOW if isinstance(v, int) and v > 0 else v),
    (r"use_sliding_window", True),
    (r"max_window_layers", 1),
    (r"(mamba_)?(d_)?state(_size)?|mamba_d_state|ssm_state_size|mamba_state_dim", lambda v: 8 if v else v),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_(d_head|headdim|head_dim)", lambda v: v if isinstance(v, str) else 8),
    (r"mamba_dt_rank|time_step_rank|dt_rank", lambda v: v if isinstance(v, str) else 4),
    (r"chunk_size|mamba_chunk_size", lambda v: min(v, 8) if v > 0 else v),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim|linear_head_dim", 8),
    (r"(swa_|global_|compress_)?head_(dim|size)|attention_head_dim|d_kv|kv_channels|head_dim_.*",
     lambda v: 8 if v else v),
    (r"(num_|n_|.*_)?(key_value|kv)_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads", lambda v: 2 if v else v),
    (r"(.*_)?(num_|n_)?(attention_|attn_)?heads?|n_head|(.*_)?num_attention_heads|.*attention_heads",
     lambda v: HEADS if isinstance(v, int) and v > 1 else v),
    (r"num_kv_shared_layers|num_mtp_layers|num_nextn_predict_layers", 0),
    (r"(.*_)?(num_)?(hidden_|encoder_|decoder_|conv_pos_)?layers|n_layers?|(.*_)?depth|(.*_)?n_layer|num_blocks",
     lambda v: min(v, LAYERS) if isinstance(v, int) else v),
    (r"hidden_size_per_layer_input", lambda v: 8 if v else v),
    (r"(max_|n_)(position_embeddings|positions?|seq_len|sequence_length|target_positions|source_positions|seq_length|"
     r"text_len|2d_position_embeddings)|context_length|n_ctx|max_position_embeddings|left_max_position_embeddings",
     lambda v: 128 if v and v > 0 else v),
    (r"original_max_position_embeddings", 64),
    (r"image_size|input_resolution|img_size|force_image_size|pretrain_image_size",
     lambda v: [IMAGE] * len(v) if isinstance(v, (list, tuple)) else IMAGE),
    (r"patch_size", lambda v: [PATCH] * len(v) if isinstance(v, (list, tuple)) else PATCH),
    (r"temporal_patch_size", lambda v: min(v, 2)),
    (r"num_mel_bins|feature_size|mel_dim|input_feat_per_channel", 16),
    (r"rotary_dim", 4),
    (r"query_pre_attn_scalar|attention_multiplier", lambda v: 8 if v > 1 else v),
    (r"dropout|(.*_)?dropout(_.*)?|.*drop_?path.*|.*drop_prob|.*pdrop|layerdrop|.*layerdrop|apply_spec_augment",
     lambda v: type(v)(0) if isinstance(v, (int, float)) else v),
    (r"(.*_)?(intermediate|ffn|inner)_?(size|dim|hidden_size)?|.*ffn_dim|d_ff|n_inner|.*intermediate_size|mlp_dim|"
     r"ffn_hidden_size|dense_ffn_hidden_size|feed_forward_proj_dim|d_inner",
     lambda v: 48 if isinstance(v, int) and v > 1 else v),
    (r"(.*_)?(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim|dim|proj_dim|"
     r"projection_dim|hidden|lru_width|word_embed_proj_dim|output_dim)|dim_model",
     lambda v: WIDTH if isinstance(v, int) and v > 8 else v),
    (r"num_attention_global_tokens|num_query_tokens|num_latents|resampler_n_latents|image_seq_length|image_seq_len|"
     r"mm_tokens_per_image|max_num_patches", lambda v: 4),
    (r"num_experts.*|n_shared_experts|shared_experts",
     lambda v: min(v, 2) if isinstance(v, int) and not isinstance(v, bool) else v),
]  # fmt: skip
_RULES_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_KEPT = {
    "model_type", "transformers_version", "architectures", "id2label", "label2id", "dtype", "return_dict",
    "chunk_size_feed_forward", "rms_norm_eps", "output_hidden_states",
}  # fmt: skip

# Where the names say too little. By configuration class; a dictionary goes into a sub-configuration.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "DbrxConfig": {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "DogeConfig": {"sliding_window": None},  # beside one its dynamic mask is idle
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "GPTNeoConfig": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "NemotronConfig": {"head_dim": 8, "num_key_value_heads": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "XLNetConfig": {"d_head": 8, "n_head": 4},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "HunYuanDenseV1Config": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "HunYuanMoEV1Config": {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "MinistralConfig": {"head_dim": 8},
    "HunYuanVLTextConfig": {"head_dim": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 50},
    "MoonshineConfig": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "MoonshineStreamingEncoderConfig": {"num_key_value_heads": HEADS},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "Dots3NoteConfig": {"num_key_value_heads": 4},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "index_kpool": 2},
}


def small(config_class: Any, default: Any = None, lists: bool = True) -> dict[str, Any]:
    """Arguments of ``config_class`` for a small model; ``default`` is an instance with its own values."""
    default = config_class() if default is None else default
    arguments: dict[str, Any] = {}
    sub_configs = getattr(config_class, "sub_configs", {})
    names = [field.name for field in dataclasses.fields(config_class)] if dataclasses.is_dataclass(config_class) else []
    layers = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in names), None)
    depth = getattr(default, layers, None) if layers else None
    for name in names:
        if name in _KEPT:
            continue
        value = _value(default, name)
        if name in sub_configs:
            if value is not None:
                arguments[name] = small(type(value), value, lists) | {"model_type": value.model_type}
            continue
        if isinstance(value, (list, tuple)) and depth and len(value) == depth and lists:
            continue  # one entry a layer: below
        rule = next((rule for pattern, rule in _RULES_COMPILED if pattern.fullmatch(name)), None)
        if rule is None:
            if isinstance(value, int) and not isinstance(value, bool) and name.endswith(("token_id", "token_index")):
                arguments[name] = value if value < VOCABULARY else 77 + zlib.crc32(name.encode()) % 13
            continue
        if name == "sliding_window" and not value and lists:  # there is room for one
            arguments[name] = WINDOW
            continue
        if value is None and not (name.endswith("token_id")):
            continue
        try:
            new = rule(value) if callable(rule) else rule
        except TypeError:
            continue
        if new is not value:
            arguments[name] = new
    if "kv_lora_rank" in names and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS  # one latent for all heads
    if lists and depth:
        kinds: list[int] = []  # the first layer of each kind, and at least two layers
        per_layer = {
            name: list(_value(default, name))
            for name in names
            if isinstance(_value(default, name), (list, tuple)) and len(_value(default, name)) == depth
        }
        if per_layer:
            seen = set()
            for index in range(depth):
                kind = tuple(str(values[index]) for values in per_layer.values())
                if kind not in seen and len(kinds) < 6:
                    seen.add(kind)
                    kinds.append(index)
            while len(kinds) < LAYERS:
                kinds.append(min(depth - 1, kinds[-1] + 1))
            for name, values in per_layer.items():
                arguments[name] = [values[index] for index in kinds]
            arguments[layers] = len(kinds)
            full = set(arguments.get("layer_types", ())) == {"full_attention"}
            if full and "sliding_window" in arguments and "sliding_attention" in _source(config_class):
                arguments["layer_types"][-1] = "sliding_attention"
    rope = _value(default, "rope_parameters")
    if "rope_parameters" in names and isinstance(rope, dict):
        arguments["rope_parameters"] = _small_rope(rope)
        if "mrope_section" in _source(config_class) and rope and not any(isinstance(v, dict) for v in rope.values()):
            arguments["rope_parameters"].setdefault("mrope_section", [2, 1, 1])
    arguments.update(copy.deepcopy(OVERRIDES.get(config_class.__name__, {})))
    return arguments


def _value(config: Any, name: str) -> Any:
    """An attribute, or None; some configurations refuse to say what differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:
        return vars(config).get(name)


@functools.cache
def _source(config_class: Any) -> str:
    folder = Path(sys.modules[config_class.__module__].__file__ or "").parent
    return "".join(path.read_text(encoding="utf-8") for path in folder.glob("modeling_*.py"))


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    rope = copy.deepcopy(rope)
    for name, value in rope.items():
        if isinstance(value, dict):
            rope[name] = _small_rope(value)
        elif name == "mrope_section":
            rope[name] = [2, 1, 1] if len(value) == 3 else [1] * len(value)
        elif name in ("long_factor", "short_factor") and isinstance(value, list):
            rope[name] = value[:4]
        elif name == "original_max_position_embeddings":
            rope[name] = 64
        elif name == "rope_theta" and value is None:
            rope[name] = 10000.0
    return rope


def build(cls: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A new small model of ``cls`` in evaluation mode, its weights drawn in float32, large enough to matter.

    Raises:
        NotBuiltError: how the last attempt failed.
    """
    problems = []
    for lists in (True, False):
        try:
            config = cls.config_class(**small(cls.config_class, lists=lists))
            _settle(config, cls)
            with torch.device("meta"):
                count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if count > MOST_PARAMETERS:
                raise NotBuiltError(f"{count / 1e6:.0f} million parameters after shrinking: {_largest(cls, config)}")
            torch.manual_seed(seed)
            model = cls(config).eval()
            break
        except NotBuiltError as error:
            problems.append(str(error))
        except Exception as error:
            text = " ".join(str(error).split())
            problems.append(f"{type(error).__name__}: {text[:300]}")
    else:
        raise NotBuiltError(problems[0] if len(set(problems)) == 1 else " / ".join(problems))
    fill(model, seed, STD[dtype])
    return model if dtype == torch.float32 else _loaded(model, dtype)


def _loaded(model: Any, dtype: torch.dtype) -> torch.nn.Module:
    """As ``from_pretrained`` loads it: buffers as the class makes them in ``dtype``, and in float32 what it says it
    needs in that."""
    try:
        loaded = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).eval()
    except Exception:  # something in its initialisation knows no 16 bits
        loaded = copy.deepcopy(model).to(dtype)
    names = set(getattr(loaded, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names |= set(getattr(loaded, "_keep_in_fp32_modules", None) or ())
    wide = re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in sorted(names)) or r"(?!)")
    for name, value in loaded.named_parameters():
        if wide.search(name):
            value.data = value.data.float()
    loaded.load_state_dict(model.state_dict())
    return loaded


def _largest(cls: Any, config: Any) -> str:
    with torch.device("meta"):
        sizes = sorted(((p.numel(), n, tuple(p.shape)) for n, p in cls(config).named_parameters()), reverse=True)
    return ", ".join(f"{name} {shape}" for _, name, shape in sizes[:3])


def _settle(config: Any, cls: Any) -> None:
    """What a class wants of its configuration beside sizes."""
    if re.search(r"ForCausalLM$|LMHeadModel$|Decoder$", cls.__name__):
        text = config.get_text_config(decoder=True)
        if hasattr(text, "is_decoder"):
            text.is_decoder = True
        if hasattr(config, "is_encoder_decoder") and cls.__name__.endswith("ForCausalLM"):
            config.is_encoder_decoder = False
    elif config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
