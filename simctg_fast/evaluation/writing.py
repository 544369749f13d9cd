"""Every prompt continued by one setting, through the engine; beam search by transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine import Engine
from ..engine.requests import RequestError
from ..loading import fitting_threads
from ..text.batches import by_length, pad_token, padded_rows
from ..text.files import is_utf8
from ..text.texts import short
from .prompts import Prompt
from .settings import Setting

SLOTS = 16


@dataclass(frozen=True)
class Tokenized:
    """A prompt in tokens: of the decoder's text, and of an encoder-decoder's source."""

    prompt: Prompt
    ids: list[int]
    source: list[int] | None

    @property
    def given(self) -> list[int]:
        """What the model reads before it writes: the source, or the text that is continued."""
        return self.ids if self.source is None else self.source


@dataclass
class Written:
    """What one setting wrote, a list of token ids a prompt (without the end of text; None: it failed), the errors by
    the prompt's number, and the seconds that it took together."""

    token_ids: list[list[int] | None]
    errors: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.token_ids if ids is not None)


def tokenize(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int
) -> tuple[list[Tokenized], dict[str | int, str]]:
    """The prompts that the model can continue, and why it cannot the others, by their ids."""
    engine = Engine(model, tokenizer, strategy="greedy", batching="static", max_new_tokens=max_new_tokens)
    ready, refused = [], {}
    for prompt in prompts:
        try:
            request = engine.parse({"id": prompt.id, **prompt.content})
            _check_text(prompt.content)
            sequence = engine.prepare(request)[0]
        except RequestError as error:  # noqa: PERF203
            # What follows is advice of the engine's, on options that an evaluation has not.
            refused[prompt.id] = str(error).partition("; ")[0] if error.kind == "too_long" else str(error)
        else:
            ready.append(Tokenized(prompt, sequence.prompt_ids, sequence.source_ids))
    return ready, refused


def _check_text(content: Mapping[str, Any]) -> None:
    """Not every tokenizer says what is wrong with half of a surrogate pair, and some take it."""
    if not is_utf8(json.dumps(content, ensure_ascii=False, default=repr)):
        raise RequestError("invalid_utf8", f"it holds half of a surrogate pair, got {short(content)}")


class Writer:
    """Continues prompts by one setting, ``slots`` at a time.

    Raises:
        ValueError: the model cannot be decoded by it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, setting: Setting, *, max_new_tokens: int, seed: int = 0, slots: int = SLOTS
    ) -> None:
        self.model, self.setting, self.new, self.slots = model, setting, max_new_tokens, slots
        self.is_warm = False
        if setting.is_beam:
            self.pad, self.ends = pad_token(tokenizer, model.config), _ends(model)
        else:
            self.engine = Engine(
                model,
                tokenizer,
                strategy=setting.strategy,
                slots=slots,
                seed=setting.seed(seed),
                max_new_tokens=max_new_tokens,
                **setting.given,
            )
            self.ends = self.engine.prepare.ends

    def __call__(self, prompts: Sequence[Tokenized], on_text: Callable[[], None] = lambda: None) -> Written:
        """What is written behind ``prompts``; ``on_text`` is called after each. What a first call builds and later ones
        reuse is no part of the time."""
        run = self._by_beams if self.setting.is_beam else self._by_the_engine
        if not self.is_warm:
            run(prompts[:1], 2, lambda: None)
            self.is_warm = True
        began = time.perf_counter()
        written = run(prompts, self.new, on_text)
        written.seconds = time.perf_counter() - began
        return written

    def _by_the_engine(self, prompts: Sequence[Tokenized], new: int, on_text: Callable[[], None]) -> Written:
        written = Written([None] * len(prompts))
        # An encoder-decoder takes the tokens of its source by this key as well. What is drawn depends on the id.
        requests = [{"id": each.prompt.id, "prompt": each.given, "max_new_tokens": new} for each in prompts]
        for result in self.engine.generate(requests):
            if result.error is None:
                written.token_ids[result.index] = _without_end(result.token_ids, self.ends)
            else:
                written.errors[result.index] = result.error["message"]
            on_text()
        return written

    def _by_beams(self, prompts: Sequence[Tokenized], new: int, on_text: Callable[[], None]) -> Written:
        """By transformers, in batches of similar length."""
        written, rows = Written([None] * len(prompts)), [prompt.given for prompt in prompts]
        beams = self.setting.given["num_beams"]
        most = max(1, self.slots // beams)
        for batch in by_length(rows, lambda batch, _: len(batch) == most):
            inputs = padded_rows(self.model, [rows[i] for i in batch], self.pad)
            with torch.inference_mode(), fitting_threads(self.model):
                out = self.model.generate(
                    **inputs, num_beams=beams, do_sample=False, max_new_tokens=new, pad_token_id=self.pad
                )
            begin = 1 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            for index, tokens in zip(batch, out[:, begin:].tolist(), strict=True):
                written.token_ids[index] = _without_end(tokens, self.ends)
                on_text()
        return written


def _ends(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))


def _without_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Up to the end of text."""
    return list(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
