"""Texts in, texts out: a model by name that continues prompts by contrastive search."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .loading import context_length, fitting_threads, load_model, tokenize

if TYPE_CHECKING:
    import torch

__all__ = ["TextGenerator", "Written"]


@dataclass(frozen=True)
class Written:
    """A prompt and what was written: its continuation, or an encoder-decoder's answer to it."""

    prompt: str
    text: str
    tokens: int
    continues_prompt: bool


class TextGenerator:
    """Loads a model once; a call continues a batch of prompts.

    Args:
        model: ``"bundled"``, a local folder or a hub name.
        penalty_alpha, top_k, temperature, stop_strings: as in `ContrastiveSearch`.
        max_new_tokens: the longest continuation; less where the model's context ends before, which `notes` then says.
        seed: of the draws that a `temperature` makes; drawn anew by each call in turn.
        device, dtype: see `load_model`.
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
        stop_strings: Sequence[str] | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
    ) -> None:
        import torch

        self.model, self.tokenizer = load_model(model, device, dtype)
        self.max_new_tokens = max_new_tokens
        self.notes: list[str] = []
        self._search: dict[str, Any] = {"penalty_alpha": penalty_alpha, "top_k": top_k}
        if temperature is not None:
            generator = torch.Generator(self.model.device)
            if seed is not None:
                generator.manual_seed(seed)
            self._search |= {"temperature": temperature, "generator": generator}
        if stop_strings:
            self._search |= {"stop_strings": list(stop_strings), "tokenizer": self.tokenizer}

    def __call__(self, prompts: Sequence[str]) -> list[Written]:
        """Continues the prompts together; the result is in their order, without the prompts."""
        prompts = list(prompts)
        continues = not self.model.config.is_encoder_decoder
        rows = self._generate(prompts, None)
        padding, ends = self.tokenizer.pad_token_id, _as_set(self.model.generation_config.eos_token_id)
        results = []
        for prompt, row in zip(prompts, rows.tolist(), strict=True):
            length = next((i for i, token in enumerate(row) if token in ends or token == padding), len(row))
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            results.append(Written(prompt, text, length, continues))
        return results

    def stream(self, prompt: str) -> None:
        """Continues one prompt, prompt included, to standard output as it is written."""
        from transformers import TextStreamer

        self._generate([prompt], TextStreamer(self.tokenizer, skip_special_tokens=True))

    def _generate(self, prompts: list[str], streamer: Any) -> torch.Tensor:
        """The new tokens, ``(len(prompts), T)``."""
        import torch

        from . import ContrastiveSearch

        inputs = tokenize(self.model, self.tokenizer, prompts)
        # A decoder continues the prompt; an encoder-decoder's output begins with its own start token.
        start = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        search = ContrastiveSearch(**self._search, streamer=streamer)
        with torch.inference_mode(), fitting_threads(self.model):
            output = self.model.generate(
                **inputs,
                custom_generate=search,
                max_new_tokens=self._room(start),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return output[:, start:]

    def _room(self, start: int) -> int:
        limit = context_length(self.model)
        if limit is None or start + self.max_new_tokens <= limit:
            return self.max_new_tokens
        note = f"the model's context ends at {limit} tokens; at most {limit - start} are written behind {start}"
        if note not in self.notes:
            self.notes.append(note)
        return limit - start


def _as_set(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
