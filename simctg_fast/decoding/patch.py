"""``generate(penalty_alpha=…, top_k=…)`` as it was spelled in transformers 4."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin

from .contrastive_search import ContrastiveSearch, _check_penalty_alpha, contrastive_search

logger = logging.getLogger("simctg_fast")

_original = None  # GenerationMixin.generate while ours stands in its place


class _Patch:
    """What :func:`patch_transformers` returns: leaving the ``with`` block undoes the patch this object made."""

    def __init__(self, made: bool):
        self._made = made

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._made:
            unpatch_transformers()


def patch_transformers() -> _Patch:
    """Make ``model.generate(penalty_alpha=0.6, top_k=4)`` run our contrastive search, without ``trust_remote_code``.

    ``streamer``, ``tokenizer`` and ``stop_strings`` arrive whether contrastive search is asked for by the old spelling
    or by ``custom_generate``. Calling it again changes nothing; :func:`unpatch_transformers`, or using the result as a
    context manager, undoes it. Everything that is not contrastive search passes through untouched.
    """
    global _original
    if _original is not None:
        return _Patch(made=False)
    _original = GenerationMixin.generate
    GenerationMixin.generate = _wrap(_original)
    return _Patch(made=True)


def unpatch_transformers() -> None:
    """Put transformers' own ``generate`` back; nothing happens when it was not replaced."""
    global _original
    if _original is not None:
        GenerationMixin.generate = _original
        _original = None


def _wrap(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self, *args: Any, **kwargs: Any):
        bound = signature.bind_partial(self, *args, **kwargs)
        given = dict(bound.arguments)
        extra = given.pop("kwargs", {})
        given.pop("self")
        strategy = _strategy_asked_for(self, given | extra)
        if strategy is None:
            return original(self, *args, **kwargs)
        # What callables never get is ours to carry; what the strategy was made with beats what generate is given.
        if strategy.streamer is None:
            strategy.streamer = given.get("streamer")
        tokenizer = extra.pop("tokenizer", None) if strategy.tokenizer is None else strategy.tokenizer
        config = given.get("generation_config")
        stop_strings = strategy.stop_strings or extra.pop("stop_strings", None)
        stop_strings = stop_strings or getattr(config, "stop_strings", None) or self.generation_config.stop_strings
        extra.pop("tokenizer", None)
        extra.pop("stop_strings", None)
        strategy = ContrastiveSearch(**vars(strategy) | {"tokenizer": tokenizer, "stop_strings": stop_strings})
        if config is not None:
            given["generation_config"] = _without_stop_strings(config)
        for name in ("penalty_alpha", "top_k", "low_memory", "trust_remote_code"):
            extra.pop(name, None)
            given.pop(name, None)
        given.pop("streamer", None)
        if self.generation_config.stop_strings is not None:
            extra["stop_strings"] = None  # beats the model's own
        return original(self, **given | extra | {"custom_generate": strategy})

    return generate


def _without_stop_strings(config: GenerationConfig) -> GenerationConfig:
    """``generate`` looks for the tokenizer of its own stop strings, which it never hands to a callable."""
    if config.stop_strings is None:
        return config
    config = copy.deepcopy(config)
    config.stop_strings = None
    return config


def _strategy_asked_for(model, arguments: dict[str, Any]) -> ContrastiveSearch | None:
    """A strategy of this call's own if the arguments ask for contrastive search."""
    asked = arguments.get("custom_generate")
    config = arguments.get("generation_config")

    def setting(name: str) -> Any:
        value = arguments.get(name)
        if value is None and config is not None:
            value = getattr(config, name, None)
        return getattr(model.generation_config, name, None) if value is None else value

    typed_top_k = arguments.get("top_k", getattr(config, "top_k", None))
    typed_alpha = arguments.get("penalty_alpha", getattr(config, "penalty_alpha", None))
    if isinstance(asked, ContrastiveSearch):
        settings = dict(vars(asked))
        if asked.penalty_alpha is None:
            settings["penalty_alpha"] = typed_alpha
        if asked.top_k is None:
            settings["top_k"] = typed_top_k
        return ContrastiveSearch(**settings)
    if asked is contrastive_search:
        return ContrastiveSearch(typed_alpha, typed_top_k)
    if asked is not None:
        return None
    penalty_alpha = setting("penalty_alpha")
    if not penalty_alpha:
        return None
    _check_penalty_alpha(penalty_alpha)
    if setting("do_sample"):
        logger.warning(
            "penalty_alpha=%s is ignored: do_sample=True samples. Pass do_sample=False for contrastive search.",
            penalty_alpha,
        )
        return None
    if (setting("num_beams") or 1) != 1 or setting("top_k") in (0, 1):
        return None
    return ContrastiveSearch(penalty_alpha, typed_top_k)
