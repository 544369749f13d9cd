"""Generation settings of a call, and the processors and criteria that transformers' ``generate`` would make of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedConfig, StoppingCriteriaList

from ..checks import is_number
from ..decoding.settings import check_penalty_alpha, check_settings

# Fields that change what ``generate`` writes by means that a plain step does not have, with the values that do not.
_REFUSED: dict[str, tuple[str, tuple]] = {
    "num_beams": ("beam search", (None, 1)),
    "guidance_scale": ("classifier-free guidance", (None, 1)),
    "prompt_lookup_num_tokens": ("assisted generation", (None,)),
    "assistant_early_exit": ("assisted generation", (None,)),
    "use_mtp": ("multi-token prediction", (None, False)),
    "dola_layers": ("DoLa", (None,)),
    "constraints": ("constrained beam search", (None,)),
    "force_words_ids": ("constrained beam search", (None,)),
    "token_healing": ("token healing", (None, False)),
    "encoder_repetition_penalty": ("an encoder", (None, 1)),
    "encoder_no_repeat_ngram_size": ("an encoder", (None, 0)),
    "return_dict_in_generate": ("more than token ids", (None, False)),
}


class _Transformers(GenerationMixin):
    """transformers' own builders of processors and criteria, which ask the model for no more than its config."""

    def __init__(self, vocabulary: int):
        self.config = PreTrainedConfig(vocab_size=vocabulary, is_encoder_decoder=False)


def make_config(generation_config: GenerationConfig | None, prompt: Tensor, values: dict[str, Any]) -> GenerationConfig:
    """``generation_config`` with ``values`` in place of its own, and everything unset at transformers' defaults.

    Args:
        prompt: ``(B, L)``, for the lengths and the device.

    Raises:
        TypeError: a name that is no field of ``GenerationConfig``.
        ValueError: a value that ``GenerationConfig`` refuses, or a setting that a plain step cannot have.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}")
    typed = {name: value for name, value in values.items() if name != "temperature" or not is_number(value, 0, 0)}
    check_settings(typed, sampled=True)  # temperature=0 beside do_sample=False is a way of saying greedy
    if values.get("penalty_alpha") is not None:
        check_penalty_alpha(values["penalty_alpha"])
    config = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
    given = {name: value for name, value in values.items() if value is not None}
    # Of this transformers would say that it may be ignored.
    top_k = given.pop("top_k", None) if given.get("penalty_alpha") else None
    unknown = config.update(**given)  # this also has transformers check the values
    if unknown:
        raise TypeError(f"generate() got {', '.join(sorted(unknown))}, which GenerationConfig does not have")
    bounded = config.max_length is not None
    config.update(**config._get_default_generation_params(), defaults_only=True)
    if top_k is not None:
        config.top_k = top_k
    check_settings(vars(config), sampled=bool(config.do_sample))
    for name, (what, harmless) in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise ValueError(f"{name}={value!r} asks for {what}, which generation from a plain step does not have")
    _set_lengths(config, prompt.shape[1], bounded)
    _set_special_tokens(config, prompt.device)
    return config


def _set_lengths(config: GenerationConfig, length: int, bounded: bool) -> None:
    """``max_length`` and ``min_length`` in tokens of the whole sequence, as ``generate`` counts them."""
    if config.max_new_tokens is not None:
        config.max_length = length + config.max_new_tokens
    elif not bounded:
        config.max_length += length  # the default counts new tokens
    if config.max_length <= length:
        raise ValueError(f"max_length must be above the prompt's {length} tokens, got {config.max_length}")
    if config.min_new_tokens is not None:
        config.min_length = length + config.min_new_tokens


def _set_special_tokens(config: GenerationConfig, device: torch.device) -> None:
    eos, pad = config.eos_token_id, config.pad_token_id
    ends = None if eos is None else torch.as_tensor(eos, dtype=torch.long, device=device).reshape(-1)
    if ends is not None and (not len(ends) or bool((ends < 0).any())):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
    if pad is None and ends is not None:
        pad = int(ends[0])
    config._eos_token_tensor = ends
    config._pad_token_tensor = None if pad is None else torch.as_tensor(pad, dtype=torch.long, device=device)
    # Read by no builder that a plain step can reach, but part of what ``generate`` leaves behind.
    config._bos_token_tensor = config._decoder_start_token_tensor = None


def make_processors(
    config: GenerationConfig,
    prompt: Tensor,
    mask: Tensor | None,
    vocabulary: int,
    logits_processor: Any,
    prefix_allowed_tokens_fn: Any,
) -> LogitsProcessorList:
    """What ``generate`` would apply, in its order, with the caller's ``logits_processor`` where it would put them."""
    return _Transformers(vocabulary)._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=prompt,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        logits_processor=_as_list(LogitsProcessorList, "logits_processor", logits_processor),
        device=prompt.device,
        model_kwargs={"attention_mask": mask},
    )


def make_criteria(
    config: GenerationConfig, vocabulary: int, stopping_criteria: Any, tokenizer: Any
) -> StoppingCriteriaList:
    if config.stop_strings is not None and tokenizer is None:
        raise ValueError(f"stop_strings={config.stop_strings!r} needs the tokenizer: pass tokenizer=...")
    criteria = _as_list(StoppingCriteriaList, "stopping_criteria", stopping_criteria)
    return _Transformers(vocabulary)._get_stopping_criteria(config, criteria, tokenizer=tokenizer)


def _as_list(kind: type, name: str, value: Any) -> Any:
    """None, one callable, or an iterable of them, as transformers' list."""
    items = [] if value is None else [value] if callable(value) and not isinstance(value, list) else list(value)
    wrong = next((item for item in items if not callable(item)), None)
    if wrong is not None:
        raise ValueError(f"{name} must be callables, got {wrong!r}")
    return kind(items)
