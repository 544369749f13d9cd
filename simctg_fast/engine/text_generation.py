"""Texts in, texts out: a model by name that continues prompts by contrastive search."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .engine import Engine
from .requests import Request
from .results import Result

__all__ = ["TextGenerator", "Written"]


@dataclass(frozen=True)
class Written:
    """A prompt and what was written: its continuation, or an encoder-decoder's answer to it; or why there is none."""

    prompt: str
    text: str
    tokens: int
    continues_prompt: bool
    error: str | None = None


class TextGenerator:
    """Loads a model once; a call continues prompts, each as if it were alone.

    Args:
        model: ``"bundled"``, a local folder or a hub name.
        penalty_alpha, top_k, temperature: as in `ContrastiveSearch`.
        max_new_tokens: the longest continuation; less where the model's context ends before, which `notes` then says.
        stop: texts that end a continuation and are no part of it, as in the engine.
        seed: of the draws that a `temperature` makes; drawn anew where there is none.
        batch_size: prompts that are written at a time.
        loading: ``device``, ``dtype`` and ``trust_remote_code`` of `load_model`; ``weights`` and ``dry_…`` of `Engine`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        penalty_alpha: float = 0.6,
        top_k: int = 4,
        max_new_tokens: int = 128,
        temperature: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        batch_size: int = 8,
        **loading: Any,
    ) -> None:
        drawn: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self.engine = Engine.from_pretrained(
            model,
            strategy="stochastic-contrastive" if drawn else "contrastive",
            slots=batch_size,
            seed=secrets.randbits(62) if seed is None else seed,
            penalty_alpha=penalty_alpha,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            stop=list(stop or ()),
            clamp_max_new_tokens=True,
            **drawn,
            **loading,
        )
        self.notes: list[str] = []

    def __call__(
        self, prompts: Sequence[str], on_text: Callable[[Request, int, str], None] | None = None
    ) -> Iterator[Written]:
        """Continues the prompts, in their order. ``on_text``: see `Engine.generate`."""
        key = "source" if self.engine.prepare.is_encoder_decoder else "prompt"
        requests = [{"id": number, key: prompt} for number, prompt in enumerate(prompts)]
        for result in self.engine.generate(requests, ordered=True, on_text=on_text):
            yield self._written(prompts[result.index], result)

    def _written(self, prompt: str, result: Result) -> Written:
        error = None if result.error is None else result.error["message"]
        limit, tokens = self.engine.prepare.limit, result.usage["completion_tokens"]
        request = result.request
        if request is not None and request.parameters.max_new_tokens < self.engine.parameters.max_new_tokens:
            room = request.parameters.max_new_tokens
            note = (
                f"the model's context ends at {limit} tokens; at most {room} are written behind {(limit or 0) - room}"
            )
            if note not in self.notes:
                self.notes.append(note)
        return Written(prompt, result.text, tokens, not self.engine.prepare.is_encoder_decoder, error)
