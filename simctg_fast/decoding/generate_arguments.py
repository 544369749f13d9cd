"""What a call of ``generate`` brings: checked, and made ready for decoders."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.configuration_utils import GenerationConfig

from .caches import CACHE_NAME, new_cache, self_attention_cache
from .call import learned_prompt
from .settings import check_penalty_alpha, check_top_k

logger = logging.getLogger("simctg_fast")

DEFAULT_PENALTY_ALPHA = 0.6
DEFAULT_TOP_K = 4
_TRANSFORMERS_TOP_K = 50  # what generation configurations say when nobody chose
_SUPPORTED_CACHES = (None, "dynamic", "static")
_RECORDED = ("output_hidden_states", "output_attentions")  # these are in the configuration as well


def call_settings(alpha: float | None, top_k: int | None, config: GenerationConfig, model: Any) -> tuple[float, int]:
    """``penalty_alpha`` and ``top_k`` of a call of contrastive search: its own, else the configuration's, else the
    defaults."""
    if alpha is None:
        alpha = DEFAULT_PENALTY_ALPHA if config.penalty_alpha is None else config.penalty_alpha
    check_penalty_alpha(alpha)
    if top_k is None:
        # Neither transformers' own default nor a checkpoint's setting for sampling was typed for this.
        untyped = {None, _TRANSFORMERS_TOP_K}
        if model.generation_config.do_sample:
            untyped.add(model.generation_config.top_k)
        top_k = DEFAULT_TOP_K if config.top_k in untyped else config.top_k
    check_top_k(top_k)
    check_vocabulary("top_k", top_k, model)
    return float(alpha), int(top_k)


def check_vocabulary(name: str, count: int, model: Any) -> None:
    """Raise ValueError where there are fewer tokens than ``count``, which ``name`` asks for."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if count > vocabulary:
        raise ValueError(f"{name} must be at most the vocabulary size {vocabulary}, got {count}")


def check_known(name: str, tokens: Iterable[int], model: Any) -> None:
    """Raise ValueError where ``name`` has a token that the model does not know."""
    known = model.get_input_embeddings().num_embeddings
    for token in tokens:
        if token >= known:
            raise ValueError(f"{name} must be token ids below {known}, of the model's vocabulary, got {token}")


def check_call(config: GenerationConfig, name: str) -> None:
    """Raise ValueError for what a call of the search ``name`` cannot have."""
    if (config.num_beams or 1) != 1:
        raise ValueError(f"num_beams must be 1 for {name}, got {config.num_beams}")
    if config.cache_implementation not in _SUPPORTED_CACHES:
        raise ValueError(
            f"cache_implementation must be one of {_SUPPORTED_CACHES} for {name}, got {config.cache_implementation!r}"
        )


class Arguments:
    """The keyword arguments of a call, and what follows from them.

    Attributes:
        kwargs: for the model, with a cache that is still empty.
        callers_cache: one that the caller passed in, to be filled at the end.
        positions: size of the model's table of them, or None; virtual: how many a prompt that PEFT has learned takes.
    """

    def __init__(
        self, model: Any, input_ids: torch.Tensor, config: GenerationConfig, bound: int | None, kwargs: dict[str, Any]
    ):
        self.model, self.input_ids, self.config, self.bound = model, input_ids, config, bound
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.callers_cache: Cache | None = None
        self.positions, wrapper = position_table(model), learned_prompt(model)
        self.virtual = 0 if wrapper is None else wrapper.active_peft_config.num_virtual_tokens
        self.kwargs = self._checked({n: v for n, v in kwargs.items() if n not in _RECORDED})
        self.prompt_mask = self._prompt_mask()

    @property
    def embeds(self) -> torch.Tensor | None:
        return None if self.is_encoder_decoder else self.kwargs.get("inputs_embeds")

    @property
    def max_length(self) -> int | None:
        """Positions the sequences can reach, where a criterion bounds them (inputs_embeds are not counted in ids)."""
        if self.bound is None:
            return None
        more = 0 if self.embeds is None else self.embeds.shape[1] - self.input_ids.shape[1]
        return self.bound + more + self.virtual

    @property
    def longest_prompt(self) -> int:
        if self.prompt_mask is not None:
            return self.virtual + int(self.prompt_mask.sum(dim=-1).max())
        return self.virtual + (self.input_ids if self.embeds is None else self.embeds).shape[1]

    def renew_cache(self) -> None:
        """For a decoder that begins again."""
        if self.kwargs.get(CACHE_NAME) is not None:
            self.kwargs[CACHE_NAME] = self._new_cache()

    def _new_cache(self) -> Any:
        return new_cache(self.model, self.config, len(self.input_ids), self.bound)

    def _checked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        for name in (CACHE_NAME, "cache_params"):  # the other: state-space models before transformers 5.24
            cache = kwargs.get(name)
            if getattr(cache, "_is_user_defined", False):
                self._check_callers_cache(name, cache, kwargs)
                self.callers_cache = cache
                kwargs[name] = self._new_cache()
            elif isinstance(cache, Cache) and isinstance(self_attention_cache(cache), StaticCache):
                kwargs[name] = self._new_cache()  # a static one has no room for the last step's candidates
        if kwargs.get("use_cache") is False and self.model.generation_config.use_cache is False:
            kwargs["use_cache"] = True  # the model's default (often left over from training), not the caller's wish
            if self.model._supports_default_dynamic_cache():
                kwargs[CACHE_NAME] = self._new_cache()
        elif kwargs.get("use_cache") is False:
            logger.warning("use_cache=False: every step runs whole texts again, candidate by candidate (slow).")
        return kwargs

    @property
    def _mask_name(self) -> str:
        return "decoder_attention_mask" if self.is_encoder_decoder else "attention_mask"

    def _check_callers_cache(self, name: str, cache: Any, kwargs: dict[str, Any]) -> None:
        """A cache that the caller passed in is filled at the end. One that holds tokens lacks their hidden states, so
        the prompt is run again, provided it is all there."""
        part = self_attention_cache(cache) if isinstance(cache, Cache) else cache
        if type(part) not in (DynamicCache, StaticCache):
            raise ValueError(
                f"{name} must be a DynamicCache, StaticCache or EncoderDecoderCache of these, got {type(part).__name__}"
            )
        if type(part) is StaticCache and any(part.is_sliding):
            raise ValueError(f"{name} must not be a StaticCache for a model with sliding windows; pass a DynamicCache")
        held = int(cache.get_seq_length())
        if not held:
            return
        mask, width = kwargs.get(self._mask_name), self.input_ids.shape[1]
        expected = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", width)
        if width <= held or expected != width:
            raise ValueError(
                f"{name} holds {held} tokens whose hidden states contrastive search does not have: pass the whole "
                f"prompt as input_ids (got {width} tokens) so that it can be run again"
            )
        logger.warning("%s holds %d tokens; their hidden states are needed, so the prompt is run again.", name, held)

    def _prompt_mask(self) -> torch.Tensor | None:
        """``(B, L)``, zero at padding; None where there is no such mask."""
        mask = self.kwargs.get(self._mask_name)
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return None
        empty = (mask.sum(dim=-1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask has no real token in row {empty[0]} of the batch; allowed: at least 1")
        padded = [] if self.is_encoder_decoder else (mask[:, -1] == 0).nonzero().flatten().tolist()
        if padded:
            raise ValueError(
                f"attention_mask is 0 at the end of row {padded[0]}: a prompt that is padded on the right is "
                "continued after its padding; allowed: padding on the left (tokenizer.padding_side='left')"
            )
        return mask

    def mask_of(self, positions: int) -> torch.Tensor | None:
        """Which positions ``(B, positions)`` are real of those that the model made of the prompt; None: all."""
        mask = self.prompt_mask
        more = 0 if mask is None else positions - mask.shape[1]
        if mask is None or more == 0:
            return mask
        if more == self.virtual:  # it stands in front
            return torch.cat([mask.new_ones(len(mask), more), mask], dim=1)
        if more > 0 and bool(mask.all()):  # an image's positions, say: all are real, wherever they stand
            return None
        if more > 0 and self._appends(more):
            return torch.cat([mask, mask.new_ones(len(mask), more)], dim=1)
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} positions, but {type(self.model).__name__} made hidden states for "
            f"{positions}: which of them are padding cannot be told; allowed: prompts of one length, unpadded"
        )

    def check_states_of_tokens(self, positions: int) -> None:
        """Raise ValueError if, of so many states of the prompt, it cannot be told which is whose token's."""
        more = positions - self.virtual - (self.input_ids if self.embeds is None else self.embeds).shape[1]
        if more > 0 and self._appends(more):
            raise ValueError(
                f"{type(self.model).__name__} puts {more} tokens of its own behind a text: which state stood before "
                "which token cannot be told; allowed: strategies that do not compare these, such as FSD('ngram')"
            )

    def _appends(self, count: int) -> bool:
        """Whether the model puts so many tokens of its own behind a text (XLM: one that stands for the next)."""
        kwargs = {name: value for name, value in self.kwargs.items() if not isinstance(value, Cache)}
        inputs = self.model.prepare_inputs_for_generation(self.input_ids, is_first_iteration=True, **kwargs)
        ids, width = inputs.get("input_ids"), self.input_ids.shape[1]
        return ids is not None and ids.shape[1] == width + count and torch.equal(ids[:, :width], self.input_ids)


def position_table(model: Any) -> int | None:
    """Size of the decoder's table of positions; None for models that compute theirs."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return None if limit is None or position_embedding(model, limit) is None else limit


def position_embedding(model: Any, limit: int) -> torch.nn.Embedding | None:
    """The module that is a table of at least ``limit`` positions; None where there is none."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_table = isinstance(module, torch.nn.Embedding) and (last == "wpe" or "position" in last)
        if is_table and limit <= module.num_embeddings <= limit + 2:  # OPT and BART keep two rows for other uses
            return module
    return None
