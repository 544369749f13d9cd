"""``generate`` keeps its streamer and its tokenizer from every callable: the one then hears only the prompt, and the
other is missed for the ``stop_strings`` of the call (a pipeline's ``stop_sequence``). Contrastive search gets both.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers.generation.utils import GenerationMixin


def keep_arguments(wanted: Callable[[Any, dict[str, Any], dict[str, Any]], dict[str, Any]]) -> None:
    """From now on ``generate`` hands on what ``wanted(custom_generate, bound, kwargs)`` returns of its arguments
    ``bound``; ``kwargs`` are its others, settings among them."""
    original = getattr(GenerationMixin, "_extract_generation_mode_kwargs", None)
    if original is None or hasattr(original, "__wrapped__"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def extract(self, *args: Any, **more: Any) -> dict[str, Any]:
        bound = signature.bind(self, *args, **more).arguments
        tokenizer = bound["kwargs"].get("tokenizer")
        kept = wanted(
            bound["custom_generate"], {"tokenizer": tokenizer, "streamer": bound["streamer"]}, bound["kwargs"]
        )
        return original(self, *args, **more) | {name: value for name, value in kept.items() if value is not None}

    GenerationMixin._extract_generation_mode_kwargs = extract
