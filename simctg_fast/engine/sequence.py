"""One continuation while it is being written."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from .requests import Request
from .results import Choice


class Sequence:
    """A prompt, the tokens written so far, and what decides that they are enough.

    Args:
        request: what it belongs to; ``index``: which of its ``n`` continuations this is.
        prompt_ids: tokens the decoder is given (an encoder-decoder's start tokens).
        source_ids: tokens of an encoder-decoder's input, else None.
        seed: of the run.
        processors, criteria: called with this sequence alone, ``(1, length)``.
        ends: token ids that end a text; tokenizer: for stop strings and texts.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        prompt_ids: list[int],
        source_ids: list[int] | None,
        *,
        seed: int,
        processors: list[Any],
        criteria: list[Any],
        ends: frozenset[int],
        tokenizer: Any,
        record_logprobs: bool = False,
        record_trace: bool = False,
    ):
        self.request, self.parameters, self.index = request, request.parameters, index
        self.prompt_ids, self.source_ids = prompt_ids, source_ids
        self.processors, self.criteria = processors, criteria
        self.ends, self.tokenizer = ends, tokenizer
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.failure: tuple[str, str] | None = None  # kind, message
        self.logprobs: list[dict[str, Any]] | None = [] if record_logprobs else None
        self.trace: list[dict[str, Any]] | None = [] if record_trace else None
        self.started = 0.0
        self._seed = seed
        self._generator: torch.Generator | None = None
        self._text: str | None = None
        # A token may stand for a single byte, a character takes four at most.
        self._tail = max((4 * len(s) + 8 for s in self.parameters.stop), default=0)

    @property
    def total_length(self) -> int:
        """Positions it can reach."""
        return len(self.prompt_ids) + self.parameters.max_new_tokens

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.failure is not None

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of its own, on the CPU: neither batch mates nor the device change them."""
        if self._generator is None:
            given = self.parameters.seed
            key = (
                f"request {given} {self.index}"
                if given is not None
                else f"run {self._seed} {self.request.id!r} {self.index}"
            )
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") & (2**63 - 1)
            self._generator = torch.Generator().manual_seed(seed)
        return self._generator

    def restart(self) -> None:
        """Forget what was written, to write it again from the prompt."""
        self.tokens, self._generator, self.finish_reason, self._text = [], None, None, None
        self.logprobs = None if self.logprobs is None else []
        self.trace = None if self.trace is None else []

    def input_ids(self, device: torch.device) -> torch.Tensor:
        return torch.tensor([self.prompt_ids + self.tokens], dtype=torch.long, device=device)

    def token_at(self, position: int) -> int:
        prompt = len(self.prompt_ids)
        return self.prompt_ids[position] if position < prompt else self.tokens[position - prompt]

    def accept(self, token: int, scores: torch.Tensor | None = None) -> None:
        """Write one more token, and decide whether it was the last. ``scores (1, V)`` are for the criteria."""
        self.tokens.append(token)
        ended = token in self.ends or (self._tail > 0 and self._stop_at() is not None)
        if ended or (self.criteria and self._criteria_stop(scores)):
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.parameters.max_new_tokens:
            self.finish_reason = "length"

    def fail(self, kind: str, message: str) -> None:
        self.failure = (kind, message)

    def _criteria_stop(self, scores: torch.Tensor | None) -> bool:
        device = scores.device if scores is not None else torch.device("cpu")
        ids = self.input_ids(device)
        try:
            return any(bool(torch.as_tensor(criterion(ids, scores)).any()) for criterion in self.criteria)
        except Exception as error:  # the user's code: one request pays for it
            self.fail("criterion_error", f"a stopping criterion raised {type(error).__name__}: {error}")
            return False

    def _stop_at(self) -> str | None:
        """The text up to the first stop string, if the newest tokens complete one."""
        tail = self.tokenizer.decode(self.tokens[-self._tail :], skip_special_tokens=True)
        if not any(s in tail for s in self.parameters.stop):
            return None
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [at for at in (text.find(s) for s in self.parameters.stop) if at >= 0]
        if found:
            self._text = text[: min(found)]
        return self._text

    def choice(self) -> Choice:
        text = self._text
        if text is None:
            text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        assert self.finish_reason is not None
        return Choice(text, list(self.tokens), self.finish_reason, self.logprobs, self.trace)
