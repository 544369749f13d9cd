"""``generate(penalty_alpha=…, top_k=…)`` as it was spelled in transformers 4."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

from transformers.generation.utils import GenerationMixin

from .contrastive_search import ContrastiveSearch, contrastive_search
from .settings import check_penalty_alpha, check_top_k

logger = logging.getLogger("simctg_fast")

_original = None  # GenerationMixin.generate while ours stands in its place

# What makes ``generate`` run another mode than contrastive search, and the value that does not.
_OTHER_MODES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "constraints": None,
    "force_words_ids": None,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "dola_layers": None,
}


class _Patch:
    """What :func:`patch_transformers` returns: leaving the ``with`` block undoes the patch this object made."""

    def __init__(self, installed: bool):
        self._installed = installed

    def __enter__(self) -> _Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._installed:
            unpatch_transformers()


def patch_transformers() -> _Patch:
    """Make ``model.generate(penalty_alpha=0.6, top_k=4)`` run our contrastive search, without ``trust_remote_code``.

    Calling it again changes nothing; :func:`unpatch_transformers`, or using the result as a context manager, undoes it.
    Everything that is not contrastive search passes through untouched.

    Beams, assistants, constraints and DoLa beside ``penalty_alpha`` raise a ValueError. Only where the call asks for
    one of them (or for ``do_sample``) and ``penalty_alpha`` is the checkpoint's does the call win: it runs as
    transformers runs it. ``do_sample=True`` beside a ``penalty_alpha`` samples, as in transformers 4, with a warning.
    """
    global _original
    if _original is not None:
        return _Patch(installed=False)
    _original = GenerationMixin.generate
    GenerationMixin.generate = _wrap(_original)
    return _Patch(installed=True)


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
        arguments = dict(bound.arguments)
        extra = arguments.pop("kwargs", {})
        arguments.pop("self")
        strategy = _strategy_asked_for(self, arguments | extra)
        if strategy is None:
            value, typed = _setting("penalty_alpha", self, arguments | extra)
            if not value or typed or arguments.get("custom_generate") is not None:
                return original(self, *args, **kwargs)
            # The checkpoint's: left there, it would have ``generate`` look for contrastive search beside an assistant.
            return original(self, **_with_penalty_alpha(0.0, arguments, extra))
        for name in ("penalty_alpha", "top_k", "low_memory", "trust_remote_code"):
            extra.pop(name, None)
            arguments.pop(name, None)
        return original(self, **arguments | extra | {"custom_generate": strategy})

    return generate


def _with_penalty_alpha(value: float, arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """The arguments with this ``penalty_alpha``, in the configuration where one is passed: both would be deprecated."""
    config = arguments.get("generation_config")
    if config is None:
        return arguments | extra | {"penalty_alpha": value}
    config = copy.deepcopy(config)
    config.penalty_alpha = value
    return arguments | extra | {"generation_config": config}


def _strategy_asked_for(model, arguments: dict[str, Any]) -> ContrastiveSearch | None:
    """A strategy of this call's own if the arguments ask for contrastive search."""
    asked = arguments.get("custom_generate")
    typed_top_k, top_k_typed = _setting("top_k", model, arguments)
    typed_alpha, alpha_typed = _setting("penalty_alpha", model, arguments)
    if isinstance(asked, ContrastiveSearch) or asked is contrastive_search:
        for name in _OTHER_MODES:
            if name != "num_beams" and _setting(name, model, arguments)[1]:  # of beams the strategy takes care
                _check_mode(name, *_setting(name, model, arguments))
        settings = dict(vars(asked)) if isinstance(asked, ContrastiveSearch) else {}
        if settings.get("penalty_alpha") is None and alpha_typed:
            settings["penalty_alpha"] = typed_alpha
        if settings.get("top_k") is None and top_k_typed:
            settings["top_k"] = typed_top_k
        return ContrastiveSearch(**settings)
    if asked is not None or not typed_alpha:
        return None
    check_penalty_alpha(typed_alpha)
    found = {name: _setting(name, model, arguments) for name in (*_OTHER_MODES, "do_sample")}
    if not alpha_typed and any(typed and _is_other_mode(name, value) for name, (value, typed) in found.items()):
        return None  # the call asks for another mode, and the checkpoint alone for contrastive search
    for name in _OTHER_MODES:
        _check_mode(name, *found[name])
    if found["do_sample"][0]:
        logger.warning(
            "penalty_alpha=%s is ignored: do_sample=True samples. Pass do_sample=False for contrastive search.",
            typed_alpha,
        )
        return None
    if top_k_typed and typed_top_k is not None:
        check_top_k(typed_top_k)
    if typed_top_k == 1:
        return None  # greedy search
    return ContrastiveSearch(typed_alpha, typed_top_k if top_k_typed else None)


def _setting(name: str, model, arguments: dict[str, Any]) -> tuple[Any, bool]:
    """The value ``generate`` will use, and whether it comes from the call: an argument, or the configuration passed."""
    if name in arguments:  # a None as well: it undoes what the checkpoint says
        return arguments[name], True
    value = getattr(arguments.get("generation_config"), name, None)
    if value is not None:
        return value, True
    return getattr(model.generation_config, name, None), False


def _is_other_mode(name: str, value: Any) -> bool:
    return value is not None and value is not False and value != _OTHER_MODES.get(name)


def _check_mode(name: str, value: Any, typed: bool) -> None:
    if not _is_other_mode(name, value):
        return
    shown = type(value).__name__ if name == "assistant_model" else repr(value)
    allowed = _OTHER_MODES[name]
    source = "" if typed else f" (from the model's generation_config: pass {name}={allowed})"
    raise ValueError(f"{name} must be {allowed} for contrastive search, got {shown}{source}")
